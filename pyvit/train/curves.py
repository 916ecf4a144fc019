"""Curves of runs, from their log.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvit.train.checkpoint import write_atomic

Records = Sequence[Mapping[str, Any]]

#: Logged values that are not drawn.
_HIDDEN = {"step", "time", "loss_scale", "skipped_steps", "model_images_per_s"}
#: The first and the last panels; the others are between them in the order of the log.
_FIRST, _LAST = ("loss", "lr"), ("images_per_s", "data_wait")
_LABELS = {"lr": "learning rate", "images_per_s": "images per second", "data_wait": "share of time waiting for data"}


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. Raises FileNotFoundError if there is none."""
    path = folder / "log.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"run: {folder} must hold log.jsonl, as 'pyvit train' writes it")
    found = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the incomplete last line of a killed or running run
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def series(records: Records) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each logged quantity."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if key not in _HIDDEN and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = found.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(value)
    return found


def _panels(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    found = list(dict.fromkeys(key for each in runs for key in each))
    order = [*_FIRST, *(key for key in found if key not in _FIRST + _LAST), *_LAST]
    return [key for key in order if key in found]


def draw(path: Path, runs: Mapping[str, Records], fewest: int = 1) -> Path | None:
    """A PNG with a panel for each logged quantity and a line for each of ``runs``, name to :func:`read` lines.

    Returns ``path``, or None if no run has ``fewest`` lines of training. Raises ImportError without matplotlib.
    """
    if max((sum("lr" in record for record in records) for records in runs.values()), default=0) < fewest:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install matplotlib") from error
    found = {name: series(records) for name, records in runs.items()}
    panels = _panels(found.values())
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, key in zip(axes, panels, strict=False):
        for i, each in enumerate(found.values()):
            if key in each:
                steps, values = each[key]
                marker = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
                axis.plot(steps, values, color=f"C{i}", linewidth=1.2, **marker)
        axis.set_title(_LABELS.get(key, key), fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if len(found) > 1:
        lines = [axes[0].plot([], [], color=f"C{i}")[0] for i in range(len(found))]
        figure.legend(lines, list(found), loc="outside upper center", fontsize=8, ncols=2)
    else:
        figure.suptitle(next(iter(found)), fontsize=10)
    figure.supxlabel("step", fontsize=9)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path
