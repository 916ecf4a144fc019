"""The loop: one optimizer step after another, on one process or many, resumable at any of them."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from pyvit.data import Data, load_data, loading
from pyvit.data.saved import describe
from pyvit.data.stream import Stream
from pyvit.info import setting
from pyvit.ops import products
from pyvit.train import checkpoint, schedules
from pyvit.train.config import FREE, Config, parse
from pyvit.train.log import Log, Progress, active_kernels, say
from pyvit.train.optim import LARS, parameter_groups
from pyvit.train.recipe import Recipe, load_recipe
from pyvit.train.sharding import leave, shard, whole
from pyvit.train.small import MODELS, PRESETS, TOWERS


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """One seed for each step, process and micro-batch, so that a resumed run draws what the unbroken one drew."""
    return ((seed * 1_000_003 + step) * 4099 + rank) * 64 + part


class Plan(torch.utils.data.Sampler[list[int]]):
    """Which images this process sees in each micro-batch from step ``start`` on: a fresh order every epoch, a function of the seed alone.

    A step's batch is cut first by micro-batch, then by process.
    """

    def __init__(self, n: int, batch: int, start: int, steps: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> None:
        self.n, self.batch, self.start, self.steps, self.seed = n, batch, start, steps, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        per_epoch = max(self.n // self.batch, 1)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(self.n, generator=torch.Generator().manual_seed(step_seed(self.seed, epoch, 0)))
            at = step % per_epoch * self.batch
            for micro in order[at : at + self.batch].chunk(self.accumulate):
                yield micro.chunk(self.world)[self.rank].tolist()


class Numbered:
    """The micro-batches of a plan with the number of their step, from which their crops are drawn."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for n, indices in enumerate(self.plan):
            yield self.plan.start + n // self.plan.accumulate, indices


def _settle(config: Config) -> Config:
    """Fill what the user left open: the small presets, then the recipe's defaults, and the name of the run's folder."""
    recipe = load_recipe(config.recipe)
    inherited: dict[str, Any] = {}
    if config.init is not None and (Path(config.init) / "config.json").exists():
        before = json.loads((Path(config.init) / "config.json").read_text())
        inherited = {"model": before["model"], "image_size": before["image_size"]}
        if config.model in (None, before["model"]):
            config = dataclasses.replace(config, set=[*before["set"], *config.set])
    config = config.resolved(inherited)
    preset = dict(PRESETS.get((config.recipe, config.data), {}))
    given = parse(config.option, "option")
    options = {**preset.pop("option", {}), **given}
    config = dataclasses.replace(config, option=[f"{k}={v!r}" for k, v in options.items()])
    config = config.resolved({"model": TOWERS.get((config.recipe, config.data)) or MODELS.get(config.data, "vit_small_patch16_224")})
    config = config.resolved({k: v for k, v in preset.items() if k not in ("epochs",) or config.steps is None})
    config = config.resolved(recipe.defaults)
    for name in ("epochs", "steps", "batch_size", "accumulate", "save_every", "log_every"):
        if (value := getattr(config, name)) is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if config.lr is None:
        config = dataclasses.replace(config, lr=recipe.base_lr * config.batch_size / recipe.base_batch)  # type: ignore[operator]
    if config.out is None:
        name = Path(config.data).name.replace(":", "-") or "data"
        config = dataclasses.replace(config, out=f"runs/{config.recipe}-{name}-{config.model}")
    return config


def _accelerator(config: Config) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'pyvit-kernels[train]'") from error
    return Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())


def _optimizer(recipe: Recipe, config: Config) -> torch.optim.Optimizer:
    groups = parameter_groups(recipe, recipe.backbone, config.layer_decay or 1.0)
    if recipe.optimizer == "lars":
        return LARS(groups, lr=config.lr or 0.0)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr or 0.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.lr or 0.0, betas=recipe.betas)


def _rates(optimizer: Any, recipe: Recipe, config: Config, step: int, steps: int) -> float:
    """Set every group's rate and decay for ``step``; returns the rate of the head."""
    peak, decay = config.lr or 0.0, config.weight_decay or 0.0
    values = {"lr": schedules.cosine(step, steps, peak, 0.0, int(steps * (config.warmup or 0))), "weight_decay": decay}
    values.update(recipe.schedule(step, steps))
    for group in optimizer.param_groups:
        group["lr"] = values["lr"] * group["lr_scale"]
        group["weight_decay"] = values["weight_decay"] if group["decays"] else 0.0
    return values["lr"]


class Run:
    """One training run; see :func:`train`."""

    def __init__(self, config: Config) -> None:
        self.config = config = _settle(config)
        self.folder = Path(config.out or "")
        self.joined = not dist.is_initialized()  # the group is this run's to leave if it is this run that joins it
        self.accelerator = _accelerator(config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.data: Data = load_data(config.data, config.image_size, config.validation)
        if not config.flip:
            self.data = dataclasses.replace(self.data, flip=False)
        if self.main:
            say(self.data.summary())
        if config.image_size is None:
            self.config = config = dataclasses.replace(config, image_size=self.data.size[1])
        batch, stream = config.batch_size or 1, isinstance(self.data.train, Stream)
        n = config.steps * batch if stream and config.steps else len(self.data.train)  # a stream need not know its length
        if batch > n or batch % (self.world * config.accumulate):
            wanted = f"at most the {n} images and a multiple of processes times accumulate, {self.world} x {config.accumulate}"
            raise ValueError(f"batch_size must be {wanted}, got {batch}")
        self.per_epoch = n // batch
        self.steps = config.steps or max(round((config.epochs or 1) * self.per_epoch), 1)
        torch.manual_seed(config.seed)
        self.recipe = load_recipe(config.recipe)(config, self.data)
        if config.fsdp and self.world > 1:
            self.model = shard(self.recipe, self.accelerator.device)
            self.optimizer = self.accelerator.prepare(_optimizer(self.recipe, config))
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.recipe, _optimizer(self.recipe, config))
        if config.compile:
            self.model.compile()
        self.start = self._resume()

    # -- resuming ----------------------------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """Load the last checkpoint of the same run, if there is one; the number of steps it had made."""
        path, config = self.folder / "last.pt", dataclasses.asdict(self.config)
        if self.config.overwrite:
            if self.main:
                path.unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        saved = checkpoint.load(path)
        if saved is None:
            if self.main:
                checkpoint.save_json(self.folder / "config.json", config)
                self._keep_data()
            return 0
        before = json.loads(saved["config"])
        differ = [k for k in config if k not in FREE and config[k] != before.get(k, getattr(Config, k, None))]
        if differ:
            changes = ", ".join(f"{k} was {before.get(k)!r}, is {config[k]!r}" for k in differ)
            raise ValueError(f"{self.folder} holds another run ({changes}); choose another --out, or --overwrite it")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = self._parts()
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)
        then, now = saved.get("setting", {}), self._setting()
        if then == now:
            products.adopt(saved["products"])
        elif self.main:
            changes = ", ".join(
                f"{k} was {then.get(k, 'not known')}, is {now.get(k, 'not set')}" for k in {**then, **now} if then.get(k) != now.get(k)
            )
            say(f"note: {changes}; from here on the bits are not those of an unbroken run")
        return int(saved["step"])

    def _keep_data(self) -> None:
        """Classes, preprocessing and vocabulary, so that evaluation needs the run's folder alone."""
        checkpoint.save_json(self.folder / "data.json", describe(self.data, self.config.data))
        if (tokenizer := Path(str(getattr(self.recipe, "opt", {}).get("tokenizer", "bytes")))).is_file():
            checkpoint.write_atomic(self.folder / "tokenizer.json", lambda file: file.write(tokenizer.read_bytes()))

    def _setting(self) -> dict[str, str]:
        """What, with the same settings, a run's bits depend on."""
        device = self.accelerator.device
        gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        return {**setting(), **gpu, "processes": str(self.world)}

    def _parts(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.model, getattr(self.optimizer, "optimizer", self.optimizer)

    def save(self, step: int) -> None:
        """Write the checkpoint of a run that has made ``step`` steps; a disk that is full costs this checkpoint, not the run."""
        from accelerate.utils import gather_object

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(*self._parts(), options=options)  # collective: on every rank
        chosen = dict(gather_object(list(products.choices().items())))  # likewise; a class may have come up on one rank alone
        if self.main:
            state = {"step": step, "model": model, "optimizer": optimizer, "config": json.dumps(dataclasses.asdict(self.config))}
            try:
                checkpoint.save(self.folder / "last.pt", {**state, "products": chosen, "setting": self._setting()})
            except OSError as error:
                say(f"warning: no checkpoint at step {step}: {error}; the previous one is intact and the run goes on")
        self.accelerator.wait_for_everyone()

    # -- the loop ----------------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[dict[str, Any]]:
        c = self.config
        train, spread = self.data.train, (c.batch_size or 1, self.start, self.steps, c.seed, self.rank, self.world, c.accumulate)
        crops = self.recipe.crops
        if isinstance(train, Stream):
            yield from loading.streamed(train, train.batches(*spread, crops), c.workers)
            return
        yield from loading.drawn(train, crops, Numbered(Plan(len(train), *spread)), c.seed, c.workers)

    def step(self, step: int, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step; returns the figures to log."""
        c, totals = self.config, dict[str, Any]()
        lr = _rates(self.optimizer, self.recipe, c, step, self.steps)
        for part in range(c.accumulate):
            batch = {k: v.to(self.accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in next(batches).items()}
            torch.manual_seed(step_seed(c.seed + 1, step, self.rank, part))
            views = self.recipe.views(batch, step, self.steps)
            sync = part + 1 == c.accumulate
            with self.accelerator.autocast(), _maybe(not sync, self.accelerator, self.model):
                found = self.model(views)
                self.accelerator.backward(found["loss"] / c.accumulate)
            for key, value in found.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach()) / c.accumulate
        self.recipe.gradients(step, self.steps)
        if c.clip:
            totals["grad_norm"] = float(self.accelerator.clip_grad_norm_(self.model.parameters(), c.clip))
        if not all(map(_finite, totals.values())):
            raise FloatingPointError(f"step {step}: the loss or its gradient is not finite ({totals}); the last checkpoint is intact")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.recipe.update(step, self.steps)
        return {**totals, "lr": lr}

    def evaluate(self) -> dict[str, float]:
        was = self.recipe.training
        self.recipe.eval()
        torch.manual_seed(step_seed(self.config.seed + 2, 0, 0))
        with torch.no_grad(), whole(self.recipe):
            results = self.recipe.evaluate(self.data)
        self.recipe.train(was)
        return results

    def run(self) -> dict[str, float]:
        c = self.config
        log = Log(self.folder, self.start, c.tensorboard, self.main)
        if self.main and self.start:
            say(f"resuming {self.folder} at step {self.start} of {self.steps}")
        progress = Progress(self.steps, self.start, c.batch_size or 1, self.main)
        self.model.train()
        batches, results = self.batches(), {}
        try:
            for step in range(self.start, self.steps):
                values = self.step(step, batches)
                if self.main and step == self.start:
                    say(f"kernels: {active_kernels() or 'none of pyvit'}")
                last = step + 1 == self.steps
                if step % c.log_every == 0 or last:
                    log.write(step, **values, images_per_s=progress.rate(step), time=round(time.time(), 3))
                progress.update(step, f"loss {values['loss']:.4f}")
                if (step + 1) % c.save_every == 0 or last:
                    self.save(step + 1)
                if c.eval_every and not last and (step + 1) % (c.eval_every * self.per_epoch) == 0:
                    log.write(step, **self.evaluate())
        finally:
            progress.close()
            for problem in self.data.train.problems if self.main else ():
                say(f"skipped {problem}".encode("ascii", "backslashreplace").decode())
        results = self.evaluate()
        for line in self.data.damage() if self.main else ():
            say(f"note: {line}")
        log.write(self.steps, **results)
        log.close()
        self.export(results)
        if self.main:
            say(f"{self.folder}: {self.recipe.expectation(results)}")
        return results

    def close(self) -> None:
        """Drop the networks and leave the process group that this run joined, in that order; the run is of no use afterwards."""
        self.accelerator.free_memory()
        del self.model, self.optimizer, self.recipe
        if self.joined and dist.is_initialized():
            from accelerate.state import AcceleratorState

            leave()
            AcceleratorState._reset_state(reset_partial_state=True)  # the next run of this process joins a new group

    def export(self, results: dict[str, float]) -> None:
        """``model.safetensors`` and ``results.json``."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state = get_model_state_dict(self.recipe.exported(), options=options)
        if self.main:
            try:
                checkpoint.save_weights(self.folder / "model.safetensors", state)
                checkpoint.save_json(self.folder / "config.json", dataclasses.asdict(self.config))
                self._keep_data()
                checkpoint.save_json(self.folder / "results.json", results)
            except OSError as error:
                say(f"warning: cannot write the weights: {error}; {self.folder / 'last.pt'} holds them")


def _finite(value: float) -> bool:
    return value - value == 0


def _maybe(defer: bool, accelerator: Any, model: nn.Module) -> Any:
    import contextlib

    return accelerator.no_sync(model) if defer else contextlib.nullcontext()


def train(config: Config) -> dict[str, float]:
    """Train as ``config`` says, from the last checkpoint in its folder if there is one; returns the final evaluation.

    The folder gets config.json, log.jsonl, last.pt (whole or absent), and at the end model.safetensors and results.json.
    Raises ValueError for settings that do not fit, before anything is trained.
    """
    warnings.filterwarnings("ignore", message=".*No device id is provided.*")
    run = Run(config)
    results = run.run()
    run.close()
    return results
