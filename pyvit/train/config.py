"""All settings of a run, in one record that is saved with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from pyvit.train.options import SettingError, check, parse

__all__ = ["FREE", "Config", "parse"]


def option(default: Any, help: str, within: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its help text for the command line and its allowed values (see
    :class:`pyvit.train.options.Option`)."""
    metadata = {"help": help, "within": within, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Settings of a run. None means the recipe's default: see ``pyvit train RECIPE --help``."""

    data: str = option(
        "digits",
        (
            "folder, table of captions or labels, hf:NAME, hf-stream:NAME, or digits | emoji | fashion-mnist | icons | "
            "scenes | words | synthetic"
        ),
    )
    model: str | None = option(
        None, "a name of pyvit.list_models(); default: a small one that suits the data, or that of --init"
    )
    out: str | None = option(
        None, "folder of the run; default runs/RECIPE-DATA-MODEL. The same command resumes the run in it"
    )
    init: str | None = option(None, "start from the weights of a finished run's folder, or of a checkpoint file")
    epochs: float | None = option(None, "passes over the training set", "(0, inf)")
    steps: int | None = option(None, "optimizer steps, instead of epochs", "(0, inf)")
    batch_size: int | None = option(None, "images per optimizer step, over all processes", "(0, inf)")
    accumulate: int = option(
        1,
        (
            "micro-batches per optimizer step. Contrastive recipes keep all negatives of the batch, at the cost of a "
            "second forward pass"
        ),
        "(0, inf)",
    )
    lr: float | None = option(None, "peak learning rate", "(0, inf)")
    min_lr: float | None = option(None, "learning rate of the last step", "[0, inf)")
    weight_decay: float | None = option(None, "weight decay, of matrices only", "[0, inf)")
    optimizer: str | None = option(
        None,
        "adamw | muon | sgd | lars | lamb; other than the recipe's needs --lr",
        choices=("adamw", "muon", "sgd", "lars", "lamb"),
    )
    beta1: float | None = option(None, "decay of the mean gradient, of adamw, lamb and muon", "[0, 1)")
    beta2: float | None = option(None, "decay of the mean squared gradient, of adamw, lamb and muon", "[0, 1)")
    eps: float | None = option(
        None, "added to the root of the mean squared gradient, of adamw, lamb and muon", "(0, inf)"
    )
    momentum: float | None = option(None, "momentum of sgd, lars and muon", "[0, 1)")
    warmup: float | None = option(None, "share of the steps with a linearly rising learning rate", "[0, 1)")
    clip: float | None = option(None, "largest gradient norm; 0 for none", "[0, inf)")
    layer_decay: float | None = option(None, "factor on the learning rate per block below the head", "(0, 1]")
    ema: float | None = option(
        None,
        "decay per step of a moving average of the weights, which is then evaluated and exported; 0 for none",
        "[0, 1)",
    )
    ema_warmup: bool = option(False, "let the decay of --ema rise with the step n: min(ema, 1 - n^(-2/3))")
    precision: str = option("no", "mixed precision: no | bf16 | fp16 (needs a GPU)", choices=("no", "bf16", "fp16"))
    checkpointing: bool = option(False, "recompute blocks in the backward pass instead of storing activations")
    compile: bool = option(False, "torch.compile the model")
    fsdp: bool = option(
        False, "shard parameters, gradients and optimizer over processes (FSDP2) instead of replicating them (DDP)"
    )
    image_size: int | None = option(None, "side of the images; default the data set's own, or 224", "(0, inf)")
    validation: float = option(
        0.0,
        "share of the training images to evaluate on instead of the held-out ones, for choosing settings",
        "[0, 1)",
    )
    train_images: int | None = option(
        None, "use only this many training images, equally many of each class", "(0, inf)"
    )
    flip: bool = option(True, "random horizontal flips; never of spectrograms, built-in digits or images with captions")
    workers: int | None = option(
        None,
        "processes that load images, per training process; default by the cores, 0 for images in memory",
        "[0, inf)",
    )
    seed: int = option(0, "seed of weights, image order and augmentation", "[0, inf)")
    save_every: int = option(200, "steps between checkpoints; one is also written before each evaluation", "(0, inf)")
    log_every: int = option(10, "steps between lines of log.jsonl", "(0, inf)")
    eval_every: int = option(0, "epochs between evaluations; 0 for a single one at the end", "[0, inf)")
    select: str = option(
        "last", "last | best: export the weights of the last step or of the best evaluation", choices=("last", "best")
    )
    patience: int = option(0, "evaluations without a better result that end the run; 0 for no limit", "[0, inf)")
    tensorboard: bool = option(False, "also write TensorBoard events")
    overwrite: bool = option(False, "discard the run in the folder")
    allow_changed_data: bool = option(False, "resume although the training set has changed since the run began")
    set: list[str] = option([], "KEY=VALUE, a setting of the model, such as depth=4; repeatable")  # noqa: RUF009
    option: list[str] = option([], "KEY=VALUE, a setting of the recipe, listed below; repeatable")  # noqa: RUF009
    recipe: str = "supervised"

    def resolved(self, defaults: Mapping[str, Any]) -> Config:
        """A copy with ``defaults`` for the fields that are None."""
        return dataclasses.replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def check(self) -> None:
        """Raise SettingError for a value of the wrong type or out of range. None is allowed where the recipe has a
        default."""
        hints = get_type_hints(Config)
        for each in dataclasses.fields(self):
            value, kinds = getattr(self, each.name), get_args(hints[each.name]) or (hints[each.name],)
            if kinds == (str,) and each.name in ("set", "option"):
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise SettingError(f"{each.name} must be a list of KEY=VALUE, got {value!r}")
            elif value is not None or type(None) not in kinds:
                check(each.name, value, kinds[0], each.metadata.get("within", ""), each.metadata.get("choices", ()))


#: Settings that may change between a run and its resumption.
FREE = {
    "out", "overwrite", "workers", "save_every", "log_every", "tensorboard", "allow_changed_data",
    "eval_every", "select", "patience",
}  # fmt: skip
