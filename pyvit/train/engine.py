"""The training loop, on one process or many. A run can be resumed at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pyvit.data import Data, load_data, loading
from pyvit.data.loading import default_workers
from pyvit.heap import Trimmer
from pyvit.train import schedules
from pyvit.train.best import Best
from pyvit.train.config import Config
from pyvit.train.ema import WeightAverage, decay_at
from pyvit.train.evaluated import Evaluated
from pyvit.train.grad_cache import MicroBatch, cache, rng_state, set_rng_state
from pyvit.train.initialisation import adopt, check_model, inherit
from pyvit.train.log import Log, Progress, active_kernels, say
from pyvit.train.optim import make_optimizer, parameter_groups
from pyvit.train.options import SettingError, parse
from pyvit.train.presets import MODELS, PRESETS, RECIPE_MODELS
from pyvit.train.recipe import Contrastive, Recipe, load_recipe
from pyvit.train.run_folder import Lock
from pyvit.train.sampler import BatchSampler, step_seed
from pyvit.train.sharding import leave, shard, whole
from pyvit.train.signals import Stopped, StopSignals

#: More float16 overflows in a row than this are an error: the loss scale is then below 1e-3, from 65536.
MAX_OVERFLOWS = 27

#: A note says so if more than MUCH_WAITING of the time of the first NOTE_AFTER steps is spent waiting for data.
MUCH_WAITING, NOTE_AFTER = 0.2, 50


class NumberedBatches:
    """Yields (step, indices, repetitions) for each micro-batch of a sampler. Crops are drawn from the step's and the
    repetition's number."""

    def __init__(self, plan: BatchSampler) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[tuple[int, list[int], list[int]]]:
        for n, (indices, repetitions) in enumerate(self.plan.picks()):
            yield self.plan.start + n // self.plan.accumulate, indices, repetitions


def resolve_config(config: Config) -> Config:
    """Fill in the settings that were not given: presets for built-in data, then the recipe's defaults, then the run
    folder."""
    config.check()
    if config.epochs is not None and config.steps is not None:
        raise SettingError(f"epochs and steps: give one of them, got {config.epochs} and {config.steps}")
    recipe = load_recipe(config.recipe)
    config = inherit(config, recipe)
    preset = dict(PRESETS.get((config.recipe, config.data), {}))
    given = parse(config.option, "option")
    options = {**preset.pop("option", {}), **given}
    config = dataclasses.replace(config, option=[f"{k}={v!r}" for k, v in options.items()])
    recipe.options_of(config)
    parse(config.set, "set")
    default = RECIPE_MODELS.get((config.recipe, config.data)) or MODELS.get(config.data)
    config = config.resolved({"model": default or RECIPE_MODELS.get((config.recipe, ""), "vit_small_patch16_224")})
    check_model(recipe, config)
    config = adopt(config, recipe)
    config = config.resolved({k: v for k, v in preset.items() if k not in ("epochs",) or config.steps is None})
    of_model = recipe.model_defaults(config)
    options = {**of_model.pop("option", {}), **options}
    config = dataclasses.replace(config, option=[f"{k}={v!r}" for k, v in options.items()]).resolved(of_model)
    settings = recipe.base_settings(config.optimizer)
    if config.lr is None and config.optimizer not in (None, settings["optimizer"]):
        raise SettingError(
            f"lr must be given with optimizer {config.optimizer}: the default of {config.recipe} is for "
            f"{settings['optimizer']}"
        )
    config = config.resolved(settings)
    for name in ("beta1", "beta2", "eps", "momentum"):
        if name not in settings and getattr(config, name) is not None:
            raise SettingError(f"{name} must not be given with optimizer {config.optimizer}, which has none")
    if config.fsdp and config.optimizer == "muon":
        raise SettingError("fsdp must not be given with optimizer muon, whose steps need whole matrices")
    if config.ema and recipe.averages:
        raise SettingError(
            f"ema must be 0 with {config.recipe}, whose exported teacher is a moving average already, got {config.ema}"
        )
    for name, value in (("select", config.select == "best"), ("patience", config.patience)):
        if value and not config.eval_every:
            raise SettingError(f"{name} {getattr(config, name)} needs eval_every, which is 0")
    if config.lr is None:
        config = dataclasses.replace(config, lr=recipe.peak_lr(config.batch_size or 1))
    if (config.min_lr or 0.0) > (config.lr or 0.0):
        raise SettingError(f"min_lr must be at most lr, {config.lr}, got {config.min_lr}")
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise SettingError("precision must be no or bf16 without a GPU, got 'fp16'")
    if config.out is None:
        name = Path(config.data).name.replace(":", "-") or "data"
        config = dataclasses.replace(config, out=f"runs/{config.recipe}-{name}-{config.model}")
    return config


def fit_batch(config: Config, free: Collection[str], images: int, multiple: int) -> Config:
    """``config`` with a batch size that suits ``images`` training images, if the default one is larger than that.

    It is the largest power of two times ``multiple`` (processes x micro-batches) that makes at least four steps an
    epoch, or less if there are too few images. ``free`` names the settings that were not given: without "batch_size"
    nothing changes; the learning rate follows the batch if it has "lr".
    """
    batch = config.batch_size or 1
    if "batch_size" not in free or batch <= images or images < multiple:
        return config
    batch = multiple * 2 ** int(math.log2(max(images // 4 // multiple, 1)))
    recipe = load_recipe(config.recipe)
    lr = config.lr or 0.0
    if "lr" in free:
        lr *= recipe.peak_lr(batch) / recipe.peak_lr(config.batch_size or 1)
    return dataclasses.replace(config, batch_size=batch, lr=lr, min_lr=min(config.min_lr or 0.0, lr))


def _accelerator(config: Config) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'pyvit-kernels[train]'") from error
    # Some models and recipes leave parameters without a gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])


def _optimizer(recipe: Recipe, config: Config) -> torch.optim.Optimizer:
    try:
        groups = parameter_groups(
            recipe,
            recipe.backbone,
            config.layer_decay or 1.0,
            recipe.rate_scales(),
            recipe.no_decay(),
            recipe.own_rates(),
        )
    except TypeError as error:
        raise SettingError(
            f"layer_decay must be 1 with {config.model}, whose layers cannot be counted ({error})"
        ) from error
    return make_optimizer(groups, config)


def _set_rates(optimizer: Any, recipe: Recipe, config: Config, step: int, steps: int) -> float:
    """Set the learning rate and weight decay of all parameter groups for ``step``. Returns the head's learning rate."""
    warmup = int(steps * (config.warmup or 0.0))
    lr = schedules.cosine(step, steps, config.lr or 0.0, config.min_lr or 0.0, warmup)
    weight_decay = config.weight_decay or 0.0
    overrides = recipe.schedule(step, steps)
    lr = overrides.get("lr", lr)
    weight_decay = overrides.get("weight_decay", weight_decay)
    rates = {**overrides, "lr": lr}
    for group in optimizer.param_groups:
        group["lr"] = rates[group.get("schedule", "lr")] * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return lr


class Run(Evaluated):
    """One training run; see :func:`train`."""

    def __init__(self, config: Config) -> None:
        #: What fit_batch may change: settings that are the recipe's defaults.
        self.free = {name for name in ("batch_size", "lr") if getattr(config, name) is None}
        self.config = config = resolve_config(config)
        self.folder = Path(config.out or "")
        self.owns_group = not dist.is_initialized()  # this run creates the process group, and destroys it
        self.accelerator = _accelerator(config)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.signals, self.stop = StopSignals(), 0
        self.overflows = 0  # consecutive steps skipped because float16 overflowed
        self.best = Best(self.folder)
        self.trim = Trimmer()
        self.waited = 0.0  # seconds that the current step has waited for data
        self.lock = Lock(self.folder)
        try:
            self._on_main(self.lock.acquire)
            self._prepare()
        except BaseException:
            self.lock.release()
            raise

    def _prepare(self) -> None:
        config = self.config
        self.data: Data = load_data(config.data, config.image_size, config.validation, config.train_images)
        if not config.flip:
            self.data = dataclasses.replace(self.data, flip=False)
        if self.main:
            say(self.data.summary())
        if config.image_size is None:
            self.config = config = dataclasses.replace(config, image_size=self.data.size[1])
        stream = self.data.train.streamed
        # A stream may not know its length.
        n = config.steps * (config.batch_size or 1) if stream and config.steps else len(self.data.train)
        if (found := fit_batch(config, self.free, n, self.world * config.accumulate)) is not config:
            self.tell(
                f"note: batches of {found.batch_size} instead of the default {config.batch_size}, because there are "
                f"{n} images; learning rate {found.lr:.3g}"
            )
            self.config = config = found
        batch = config.batch_size or 1
        if batch > n or batch % (self.world * config.accumulate):
            multiple = f"{self.world} x {config.accumulate}"
            raise ValueError(
                f"batch_size must be at most the {n} images and a multiple of processes x accumulate, {multiple}, "
                f"got {batch}"
            )
        self.per_epoch = n // batch
        self.steps = self.total_steps(config.epochs, config.steps)
        torch.manual_seed(config.seed)
        self.recipe = load_recipe(config.recipe)(config, self.data)
        self.recipe.per_epoch = self.per_epoch
        if config.fsdp and self.world > 1:
            self.model = shard(self.recipe, self.accelerator.device, config.precision)
            self.optimizer = self.accelerator.prepare(_optimizer(self.recipe, config))
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.recipe, _optimizer(self.recipe, config))
        if config.compile:
            self.model.compile()
        self.average = WeightAverage(self.recipe) if config.ema else None
        self.start = self._resume()
        self.best_record = self._from_main(self.best.record)
        left = (self.steps - self.start) * batch // self.world
        self.workers = default_workers(self.data.train, left) if config.workers is None else config.workers
        if config.eval_every and (config.select == "best" or config.patience) and not config.validation:
            self.tell(
                "note: the held-out images choose the weights, so that their results are too good; --validation 0.1 "
                "chooses by a part of the training images instead"
            )
        if config.accumulate > 1 and (parts := self.recipe.depends_on_micro_batch()):
            self.tell(
                f"note: {' and '.join(parts)} see each of the {config.accumulate} micro-batches separately, not the "
                "whole batch"
            )

    def total_steps(self, epochs: float | None, steps: int | None) -> int:
        return steps or max(round((epochs or 1) * self.per_epoch), 1)

    def batches(self) -> Iterator[dict[str, Any]]:
        c, train, crops = self.config, self.data.train, self.recipe.crops
        schedule = (c.batch_size or 1, self.start, self.steps, c.seed, self.rank, self.world, c.accumulate)
        if train.streamed:
            yield from loading.stream_batches(train, train.batches(*schedule, crops), self.workers)
        else:
            batches = NumberedBatches(BatchSampler(len(train), *schedule, self.recipe.repeats))
            yield from loading.training_batches(train, crops, batches, c.seed, self.workers)

    def step(self, step: int, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step. Returns the values to log. Steps skipped by the float16 scaler do not advance the
        schedules."""
        c = self.config
        schedule_step = step - self.skipped
        lr = _set_rates(self.optimizer, self.recipe, c, schedule_step, self.steps)
        if isinstance(self.recipe, Contrastive) and c.accumulate > 1:
            totals = self._cached_gradients(step, schedule_step, batches)
        else:
            totals = self._gradients(step, schedule_step, batches)
        self.recipe.gradients(schedule_step, self.steps)
        if c.clip:
            totals["grad_norm"] = self._clip(c.clip)
        scaler = self.accelerator.scaler
        totals = self._mean_over_ranks(totals)
        bad, self.stop = self._max_over_ranks(
            int(scaler is None and not all(map(_finite, totals.values()))), self.signals.last
        )
        if bad:
            raise FloatingPointError(
                f"step {step}: the loss or its gradient is not finite ({totals}); {self._checkpoint_note()}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if scaler is None:
            self._update(schedule_step)
            return {**totals, "lr": lr}
        self._count_overflow(step, getattr(self.optimizer, "step_was_skipped", False))
        if self.overflows:
            self.recipe.step_skipped()
        else:
            self._update(schedule_step)
        return {**totals, "lr": lr, "loss_scale": scaler.get_scale(), "skipped_steps": self.skipped}

    def _clip(self, most: float) -> float:
        """Limit the gradient norm of each of the recipe's groups. Returns the norm of all gradients before."""
        self.accelerator.unscale_gradients()
        groups = [[p for p in group if p.grad is not None] for group in self.recipe.clip_groups()]
        norms = [torch.nn.utils.clip_grad_norm_(group, most) for group in groups if group]
        norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
        return float(torch.stack(norms).norm())

    def _update(self, schedule_step: int) -> None:
        """Moving averages, after an optimizer step."""
        self.recipe.update(schedule_step, self.steps)
        if self.average is not None:
            c = self.config
            self.average.update(decay_at(c.ema or 0.0, schedule_step + 1, c.ema_warmup))

    def _count_overflow(self, step: int, skipped: bool) -> None:
        """Count the steps that the gradient scaler skipped because float16 gradients overflowed."""
        self.overflows = self.overflows + 1 if skipped else 0
        self.skipped += int(skipped)
        if self.overflows > MAX_OVERFLOWS:
            raise FloatingPointError(
                f"step {step}: the gradients are not finite for {self.overflows} steps in a row, at a loss scale of "
                f"{self.accelerator.scaler.get_scale():g}; {self._checkpoint_note()}"
            )

    def _views(self, step: int, schedule_step: int, micro: int, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        read = next(batches)
        self.waited += time.perf_counter() - began
        device = self.accelerator.device
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in read.items()}
        torch.manual_seed(step_seed(self.config.seed + 1, step, self.rank, micro))
        return self.recipe.views(batch, schedule_step, self.steps)

    def _gradients(self, step: int, schedule_step: int, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """Gradients of the mean loss over the micro-batches."""
        count, totals = self.config.accumulate, dict[str, float]()
        for micro in range(count):
            views = self._views(step, schedule_step, micro, batches)
            with self.accelerator.autocast(), self._without_sync(micro + 1 < count):
                found = self.model(views)
                self.accelerator.backward(found["loss"] / count)
            for key, value in found.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach()) / count
        return totals

    def _cached_gradients(self, step: int, schedule_step: int, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """Gradients of the loss over all micro-batches together: see :mod:`pyvit.train.grad_cache`."""
        device = self.accelerator.device
        scaler = self.accelerator.scaler
        micros = []
        for i in range(self.config.accumulate):
            micros.append(MicroBatch(self._views(step, schedule_step, i, batches), rng_state(device)))
        with whole(self.recipe), self.accelerator.autocast():
            caches = cache(self.recipe, micros, device, 1.0 if scaler is None else scaler.get_scale())  # type: ignore[arg-type]
        found: dict[str, torch.Tensor] = {}
        for micro, cached in zip(micros, caches, strict=True):
            set_rng_state(micro.state, device)
            with self.accelerator.autocast(), self._without_sync(not cached.last):
                found = self.model(micro.views, cached)
                self.accelerator.backward(found["loss"])
        return {key: float(value.detach()) for key, value in found.items()}

    def _without_sync(self, defer: bool) -> Any:
        """Defers averaging of gradients over ranks to a later micro-batch if ``defer``."""
        return self.accelerator.no_sync(self.model) if defer else contextlib.nullcontext()

    def run(self) -> dict[str, float]:
        log = Log(self.folder, self.start, self.config.tensorboard, self.main)
        if self.start:
            self.tell(f"resuming {self.folder} at step {self.start} of {self.steps}")
        self.model.train()
        try:
            with self.signals.caught():
                saved, results = self._loop(log)
        finally:
            for problem in self.data.train.problems[:20] if self.main else ():
                say(f"skipped {problem}".encode("ascii", "backslashreplace").decode())
        for line in self.data.damage() if self.main else ():
            say(f"note: {line}")
        log.close()
        if self.config.select == "best" and self.best_record:
            results = self.best_record["results"]
        lost = [] if saved else ["last.pt"]
        lost += self.export(results)
        self.tell(f"{self.folder}: {self.recipe.expectation(results)}")
        if best := self.best_record:
            self.tell(f"best {best['metric']} {best['value']:.4g} after step {best['step']}: {self.best.path}")
        if lost:
            raise OSError(
                f"{self.folder}: training has finished, but {', '.join(lost)} could not be written; "
                f"{self._checkpoint_note()}"
            )
        return results

    def _loop(self, log: Log) -> tuple[bool, dict[str, float]]:
        """Run all steps. Returns whether the last checkpoint was written, and the last evaluation."""
        c, saved, done = self.config, True, self.start
        progress, batches = Progress(self.steps, self.start, c.batch_size or 1, self.main), self.batches()
        # A run that was stopped between a checkpoint and its evaluation makes up for it.
        missed = self._from_main(log.evaluated) < done - 1
        ends = done == self.steps or self._is_exhausted(done)
        results = self._assess(done, log) if self._is_due(done) and (missed or ends) else {}
        try:
            while done < self.steps and not self._is_exhausted(done):
                step, began, self.waited = done, time.perf_counter(), 0.0
                values = self.step(step, batches)
                self.trim()
                if warning := self.recipe.warning(step, self.steps, values):
                    self.tell(f"step {step}: warning: {warning}")
                done = step + 1
                shown = {key: values[key] for key in self.recipe.shown if key in values}
                progress.update(step, time.perf_counter() - began, self.waited, shown)
                if step == self.start:
                    self.tell(f"kernels: {active_kernels() or 'none of pyvit'}")
                last = done == self.steps
                if step % c.log_every == 0 or last or self.overflows:
                    log.write(step, **values, **progress.rates(), time=round(time.time(), 3))
                if done - self.start == NOTE_AFTER or (last and done - self.start < NOTE_AFTER):
                    self._note_waiting(progress)
                if done % c.save_every == 0 or self._is_due(done) or self.stop:
                    saved = self.save(done)
                if self.stop and not last:
                    left = "the same command resumes it" if self.saved else "nothing was saved"
                    self.tell(f"stopped after step {done} of {self.steps}; {self._checkpoint_note()}; {left}")
                    raise Stopped(self.stop)
                if self._is_due(done):  # after saving: a failing evaluation loses no step
                    results = self._assess(done, log)
        finally:
            progress.close()
        if done < self.steps:
            self.tell(
                f"ended after step {done} of {self.steps}: {c.patience} evaluations without a better "
                f"{self.best_record.get('metric')}"
            )
        return saved, results

    def _note_waiting(self, progress: Progress) -> None:
        """Say so if the model waits for data."""
        rates = progress.rates()
        if rates["data_wait"] > MUCH_WAITING and progress.count > 1:
            self.tell(
                f"note: {100 * rates['data_wait']:.0f} % of the time is spent waiting for data, which comes at "
                f"{rates['images_per_s']:.0f} images/s; the model alone would take {rates['model_images_per_s']:.0f} "
                f"(--workers is {self.workers})"
            )

    def close(self) -> None:
        """Release the networks, then leave the process group if this run created it. The run cannot be used
        afterwards."""
        self.lock.release()
        self.accelerator.free_memory()
        del self.model, self.optimizer, self.recipe
        if self.owns_group and dist.is_initialized():
            from accelerate.state import AcceleratorState

            leave()
            AcceleratorState._reset_state(reset_partial_state=True)  # the next run of this process needs a new group


def _finite(value: float) -> bool:
    return value - value == 0


def train(config: Config) -> dict[str, float]:
    """Train as ``config`` says, from the last checkpoint in its folder if there is one. Returns the final evaluation.

    The folder gets config.json, data.json, log.jsonl and last.pt (atomic), best.safetensors and curves.png at
    evaluations, and at the end model.safetensors and results.json.

    Raises ValueError for settings that do not fit, before training; FloatingPointError if the loss is not finite;
    OSError if results could not be written. On SIGINT or SIGTERM the run saves a checkpoint after the current step and
    raises :class:`pyvit.train.signals.Stopped`, a SystemExit.
    """
    warnings.filterwarnings("ignore", message=".*No device id is provided.*")
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP constructor.*")
    run = Run(config)
    try:
        results = run.run()
    except Stopped:
        run.close()
        raise
    finally:
        run.lock.release()
    run.close()
    return results
