"""Evaluations of a run, its best weights, its curves and its results."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pyvit.models.metadata import header_of
from pyvit.train import checkpoint, curves
from pyvit.train.log import Log, say
from pyvit.train.resume import Resumable
from pyvit.train.sampler import step_seed
from pyvit.train.sharding import whole

#: Curves are drawn of at least this many logged steps.
FEWEST_POINTS = 10


class Evaluated(Resumable):
    """The part of a run that evaluates and exports, with one process or many.

    ``best_record`` is the main process's :attr:`pyvit.train.best.Best.record`, on every rank.
    """

    per_epoch: int
    best_record: dict[str, Any]
    told_of_curves = False

    def evaluate(self) -> dict[str, float]:
        was = self.recipe.training
        self.recipe.eval()
        torch.manual_seed(step_seed(self.config.seed + 2, 0, 0))
        # With FSDP, blocks may be gathered in bfloat16.
        cast = self.accelerator.autocast() if self.config.fsdp and self.world > 1 else contextlib.nullcontext()
        with torch.no_grad(), self._averaged(), whole(self.recipe), cast:
            results = self.recipe.evaluate(self.data)
        self.recipe.train(was)
        return results

    def _averaged(self) -> Any:
        """The networks have their averaged weights inside, with ``--ema``."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def _interval(self) -> int:
        """Steps between evaluations; 0 for a single one at the end."""
        return self.config.eval_every * self.per_epoch

    def _is_due(self, done: int) -> bool:
        """Whether there is an evaluation after ``done`` steps."""
        interval = self._interval()
        return done == self.steps or (done > 0 and interval > 0 and done % interval == 0)

    def _is_exhausted(self, done: int) -> bool:
        """Whether the run ends after ``done`` steps because its evaluations have not improved."""
        c, interval = self.config, self._interval()
        if not c.patience or not self._is_due(done) or "step" not in self.best_record:
            return False
        return (done - self.best_record["step"]) // interval >= c.patience

    def _assess(self, done: int, log: Log) -> dict[str, float]:
        """Evaluate after ``done`` steps, log the results once, keep the best weights and draw the curves."""
        results = self.evaluate()
        if log.evaluated < done - 1:
            log.write(done - 1, **results)
            log.evaluated = done - 1
        if self.config.eval_every:
            self._keep_best(done, results)
        if self.main:
            self._draw_curves()
        return results

    def _keep_best(self, done: int, results: dict[str, float]) -> None:
        score = self.recipe.score(results)
        better = self._from_main(self.best.is_better(score))
        if better and score is not None:
            state = self._exported()
            if self.main:
                try:
                    self.best.keep(done, score, results, state, header_of(self.recipe.exported()))
                except OSError as error:
                    say(f"warning: cannot write {self.best.path}: {error}")
        self.best_record = self._from_main(self.best.record)

    def _draw_curves(self) -> None:
        try:
            curves.draw(self.folder / "curves.png", {self.folder.name: curves.read(self.folder)}, fewest=FEWEST_POINTS)
        except ImportError as error:
            if not self.told_of_curves:
                say(f"note: no curves.png: {error}")
            self.told_of_curves = True
        except OSError as error:
            say(f"warning: cannot write {self.folder / 'curves.png'}: {error}")

    def _exported(self) -> dict[str, torch.Tensor]:
        """A copy of the weights to export: averaged ones with ``--ema``."""
        with self._averaged():
            state = get_model_state_dict(
                self.recipe.exported(), options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            return {key: value.clone() for key, value in state.items()}

    def export(self, results: dict[str, float]) -> list[str]:
        """Write the weights, settings, data description and results. Returns the names of files that could not be
        written."""
        best = self.best_record
        chosen, facts = self._exported(), {"best": best and {k: best[k] for k in ("step", "metric", "value")}}

        def weights(path: Path) -> None:
            if self.config.select == "best" and best:
                self.best.copy_to(path)
            else:
                checkpoint.save_weights(path, chosen, header_of(self.recipe.exported()))

        writes = {
            "model.safetensors": weights,
            "config.json": lambda path: checkpoint.save_json(path, dataclasses.asdict(self.config)),
            "data.json": lambda path: self._keep_data(),
            "results.json": lambda path: checkpoint.save_json(path, {**results, **(facts if best else {})}),
        }
        lost = []
        for name, write in writes.items() if self.main else ():
            try:
                write(self.folder / name)
            except OSError as error:
                say(f"warning: cannot write {self.folder / name}: {error}")
                lost.append(name)
        return lost
