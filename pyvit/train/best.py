"""The best weights of a run, by its evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyvit.train import checkpoint


class Best:
    """``best.safetensors`` in a run's folder: weights, and in the header the evaluation that chose them.

    Weights and evaluation are one file, so that a run killed between two writes resumes with a pair that belongs
    together. ``record`` has "step" (steps taken), "metric", "value" and all "results"; it is {} before the first
    evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "best.safetensors"
        self.record: dict[str, Any] = {}
        self._score = float("-inf")

    def forget(self) -> None:
        """Remove the file, of a run that begins anew."""
        self.path.unlink(missing_ok=True)

    def recall(self) -> None:
        """Read the record of an earlier part of the run. Raises ValueError for a damaged file."""
        if not self.path.exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), "pt") as file:
                found = json.loads((file.metadata() or {})["best"])
            self._score, self.record = found.pop("score"), found
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: {error}; remove it to continue without it") from error

    def is_better(self, score: tuple[str, float] | None) -> bool:
        """Whether an evaluation with this :meth:`pyvit.train.recipe.Recipe.score` beats all before it."""
        return score is not None and score[1] > self._score

    def keep(
        self, step: int, score: tuple[str, float], results: dict[str, float], state: Mapping[str, Tensor],
        header: dict[str, str],
    ) -> None:  # fmt: skip
        """Write the weights ``state`` after ``step`` steps. Raises OSError, and then keeps the record."""
        record = {"step": step, "metric": score[0], "value": results[score[0]], "results": results}
        checkpoint.save_weights(self.path, state, {**header, "best": json.dumps({**record, "score": score[1]})})
        self.record, self._score = record, score[1]

    def copy_to(self, path: Path) -> None:
        """Copy the file to ``path``, atomically."""
        with self.path.open("rb") as source:
            checkpoint.write_atomic(path, lambda file: shutil.copyfileobj(source, file))
