"""Checkpoints of a run, and resuming from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from pyvit.data import Data
from pyvit.data.description import describe
from pyvit.info import setting
from pyvit.train import checkpoint
from pyvit.train.best import Best
from pyvit.train.config import FREE, Config
from pyvit.train.ema import WeightAverage
from pyvit.train.log import say
from pyvit.train.recipe import Recipe
from pyvit.train.run_folder import changes, fingerprint


class Resumable:
    """The part of a run that saves and loads checkpoints, with one process or many."""

    config: Config
    folder: Path
    accelerator: Any
    data: Data
    recipe: Recipe
    model: nn.Module
    optimizer: Any
    average: WeightAverage | None
    best: Best
    main: bool
    world: int
    steps: int
    #: Step of the checkpoint on disk, and number of steps skipped because float16 overflowed.
    saved: int = 0
    skipped: int = 0

    def tell(self, message: str) -> None:
        """Print a message on the main process."""
        if self.main:
            say(message)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Call ``action()`` on the main process. A ValueError or OSError is raised on every rank, so that none waits
        for the others."""
        problem: list[str | None] = [None]
        if self.main:
            try:
                action()
            except (ValueError, OSError) as error:
                if self.world == 1:
                    raise
                problem = [str(error)]
        if self.world > 1:
            dist.broadcast_object_list(problem, src=0)
            if problem[0] is not None:
                raise ValueError(problem[0])

    def _from_main(self, value: Any) -> Any:
        """The main process's ``value``, on every rank."""
        shared = [value]
        if self.world > 1:
            dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each value over all ranks, which have the same keys."""
        if self.world == 1:
            return values
        mean = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(mean)
        return dict(zip(values, (mean / self.world).tolist(), strict=True))

    def _max_over_ranks(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        if self.world == 1:
            return list(values)
        both = torch.tensor(values, device=self.accelerator.device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return both.tolist()

    def _resume(self) -> int:
        """Load the last checkpoint of the same run, if there is one. Returns its step."""
        path, config = self.folder / "last.pt", dataclasses.asdict(self.config)
        if self.main:
            checkpoint.sweep(
                self.folder, "last.pt", "best.safetensors", "model.safetensors", "config.json", "data.json",
                "results.json", "log.jsonl", "curves.png",
            )  # fmt: skip
        if self.config.overwrite:
            if self.main:
                path.unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        self.fingerprint = fingerprint(self.data) if self.main else {}
        saved = checkpoint.load(path)
        if saved is None:
            if self.main:
                checkpoint.save_json(self.folder / "config.json", config)
                self._keep_data()
                self.best.forget()
            return 0
        self._on_main(self.best.recall)
        if missing := {"config", "step", "model", "optimizer"} - saved.keys():
            raise ValueError(f"{path} is not a checkpoint of pyvit: it lacks {', '.join(sorted(missing))}")
        before = json.loads(saved["config"])
        moved = self._on_main_same_data(saved.get("data"))
        differ = [
            k
            for k in config
            if k not in FREE and k in before and config[k] != before[k] and not (k == "data" and moved)
        ]
        if self.average is not None and "ema" not in saved and "ema" not in differ:  # a checkpoint from before --ema
            differ.append("ema")
        if differ and not {*differ} - {"epochs", "steps"} and self._extends(before, int(saved["step"])):
            differ = []
        if differ:
            said = ", ".join(f"{k} was {before.get(k)!r}, is {config[k]!r}" for k in differ)
            raise ValueError(f"{self.folder} holds another run ({said}); choose another --out, or --overwrite it")
        # Not strict: parameters without updates so far, such as DINO's frozen prototypes, have no optimizer state.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
        model, optimizer = self._parts()
        try:
            if differ := self.recipe.state_dict().keys() ^ saved["model"].keys():
                raise ValueError(f"{min(differ)} is missing on one side")
            if self.average is not None:
                set_model_state_dict(model, saved["ema"], options=options)
                self.average = WeightAverage(self.recipe)
            set_state_dict(
                model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
            )
        except (RuntimeError, KeyError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(
                f"{path} does not fit this version's {self.config.recipe} ({said}); choose another --out, or "
                "--overwrite it"
            ) from error
        for name, p in self.recipe.named_parameters():
            if name not in saved["optimizer"]["state"]:
                optimizer.state.pop(p, None)  # created by set_state_dict
        self.skipped, self.saved = saved.get("skipped", 0), int(saved["step"])
        if self.accelerator.scaler is not None and saved.get("scaler"):
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        then, now = saved.get("setting", {}), self._setting()
        if then != now and self.main:
            said = ", ".join(
                f"{k} was {then.get(k, 'not known')}, is {now.get(k, 'not set')}"
                for k in {**then, **now}
                if then.get(k) != now.get(k)
            )
            say(f"note: {said}; from here on, results may differ in the last bits from an uninterrupted run")
        return self.saved

    def total_steps(self, epochs: float | None, steps: int | None) -> int:
        """The steps of a run of ``epochs`` or ``steps``."""
        raise NotImplementedError

    def _extends(self, before: dict[str, Any], step: int) -> bool:
        """Whether this run continues a finished one of fewer steps, whose checkpoint is of ``step``. Raises ValueError
        if that run is not finished."""
        wanted = self.total_steps(before["epochs"], before["steps"])
        if self.steps <= wanted:
            return self.steps == wanted
        if step < wanted:
            raise ValueError(
                f"{self.folder} holds a run that has taken {step} of its {wanted} steps; only a finished run can be "
                f"extended to {self.steps}: finish it, or choose another --out"
            )
        if self.main:
            say(
                f"extending {self.folder} from {wanted} to {self.steps} steps: from here on, the learning rate and all "
                f"other schedules are those of a run of {self.steps} steps"
            )
            checkpoint.save_json(self.folder / "config.json", dataclasses.asdict(self.config))
        return True

    def _on_main_same_data(self, before: dict[str, Any] | None) -> bool:
        """Whether the training set is known to be unchanged since the run began. Raises ValueError if it has
        changed."""
        same = [False]

        def compare() -> None:
            if before is None:
                return
            found = changes(before, self.fingerprint)
            same[0] = not found and before["hash"] is not None
            if found and self.config.allow_changed_data:
                say(f"warning: the training set has changed since the run began: {found}")
            elif found:
                raise ValueError(
                    f"{self.folder}: the training set has changed since the run began: {found}; choose another "
                    "--out, or give --allow-changed-data to continue"
                )

        self._on_main(compare)
        return self._from_main(same[0])

    def _keep_data(self) -> None:
        """Save classes, preprocessing and tokenizer, so that evaluation needs only the run's folder."""
        checkpoint.save_json(self.folder / "data.json", describe(self.data, self.config.data))
        if (content := getattr(getattr(self.recipe, "tokenizer", None), "content", None)) is not None:
            checkpoint.write_atomic(self.folder / "tokenizer.json", lambda file: file.write(content()))

    def _setting(self) -> dict[str, str]:
        """Everything besides the settings that affects a run's exact results."""
        device = self.accelerator.device
        gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        return {**setting(), **gpu, "processes": str(self.world)}

    def _parts(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.model, getattr(self.optimizer, "optimizer", self.optimizer)

    def save(self, step: int) -> bool:
        """Write the checkpoint after ``step`` steps. On a full disk, print a warning and keep the previous checkpoint.

        Returns whether it was written. Raises FloatingPointError if parameters are not finite.
        """
        unsound = not all(bool(torch.isfinite(getattr(p, "_local_tensor", p)).all()) for p in self.model.parameters())
        if self._max_over_ranks(int(unsound))[0]:
            raise FloatingPointError(f"step {step - 1}: parameters are no longer finite; {self._checkpoint_note()}")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        untouched = not self._parts()[1].state  # get_state_dict creates optimizer state if there is none yet
        model, optimizer = get_state_dict(
            *self._parts(), options=options
        )  # a collective operation: called on every rank
        if untouched:
            self._parts()[1].state.clear()
            optimizer["state"] = {}
        averaged = {}
        if self.average is not None:
            with self.average.applied():
                averaged = get_model_state_dict(self.model, options=options)  # may share the parameters' memory
                averaged = {key: value.clone() for key, value in averaged.items()} if self.main else {}
        written = True
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "step": step,
                "model": model,
                "optimizer": optimizer,
                "config": json.dumps(dataclasses.asdict(self.config)),
            }
            state |= {
                "skipped": self.skipped,
                "scaler": scaler.state_dict() if scaler is not None else {},
                "data": self.fingerprint,
            }
            state |= {"ema": averaged} if averaged else {}
            try:
                checkpoint.save(self.folder / "last.pt", {**state, "setting": self._setting()})
            except OSError as error:
                say(f"warning: no checkpoint at step {step}: {error}; {self._checkpoint_note()}")
                written = False
        written = not self._max_over_ranks(int(not written))[0]
        self.saved = step if written else self.saved
        return written

    def _checkpoint_note(self) -> str:
        """Which checkpoint is on disk, as text."""
        return f"the checkpoint of step {self.saved} is intact" if self.saved else "there is no checkpoint yet"
