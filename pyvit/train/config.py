"""Everything a run depends on, in one record that is saved with it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A field with the help text that the command line shows."""
    if isinstance(default, list):
        return field(default_factory=list, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Settings of a run. None means the recipe's own default, see ``pyvit train RECIPE --help`` and the recipe's file."""

    data: str = option("digits", "folder, CSV of captions, hf:NAME, hf-stream:NAME, or digits | scenes | words | synthetic")
    model: str | None = option(None, "a name of pyvit.list_models(); default: a small one that suits the data, or that of --init")
    out: str | None = option(None, "folder of the run; default runs/RECIPE-DATA-MODEL. The same command resumes what it finds there")
    init: str | None = option(None, "start from the weights of a finished run's folder, or of a checkpoint file")
    epochs: float | None = option(None, "passes over the training set")
    steps: int | None = option(None, "optimizer steps, instead of epochs")
    batch_size: int | None = option(None, "images per optimizer step, over all processes")
    accumulate: int = option(1, "micro-batches per optimizer step")
    lr: float | None = option(None, "peak learning rate; default: the recipe's base rate scaled by the batch size")
    weight_decay: float | None = option(None, "weight decay, of matrices only")
    warmup: float | None = option(None, "share of the steps in which the rate rises linearly")
    clip: float | None = option(None, "largest gradient norm; 0 for none")
    layer_decay: float | None = option(None, "factor on the rate per block below the head")
    precision: str = option("no", "mixed precision: no | bf16 | fp16")
    checkpointing: bool = option(False, "recompute blocks in the backward pass instead of storing activations")
    compile: bool = option(False, "torch.compile the model")
    fsdp: bool = option(False, "shard parameters, gradients and optimizer over processes (FSDP2) instead of replicating them (DDP)")
    image_size: int | None = option(None, "side of the images; default the data set's own, or 224")
    validation: float = option(0.0, "share of the training images to evaluate on in the place of the held-out ones, to choose settings by")
    flip: bool = option(True, "mirror images at random; never spectrograms, built-in digits or images with captions")
    workers: int = option(0, "processes that read images")
    seed: int = option(0, "of weights, order and augmentation")
    save_every: int = option(200, "steps between checkpoints; one is always written at the end")
    log_every: int = option(10, "steps between lines of log.jsonl")
    eval_every: int = option(0, "epochs between evaluations; 0 for the end alone")
    tensorboard: bool = option(False, "also write TensorBoard events")
    overwrite: bool = option(False, "discard what is in the folder of the run")
    set: list[str] = option([], "KEY=VALUE, a setting of the model, such as depth=4; repeatable")  # noqa: RUF009
    option: list[str] = option([], "KEY=VALUE, a setting of the recipe, such as mask_ratio=0.75; repeatable")  # noqa: RUF009
    recipe: str = "supervised"

    def resolved(self, defaults: Mapping[str, Any]) -> Config:
        """This record with ``defaults`` in the place of None."""
        return dataclasses.replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})


#: Settings that may change between a run and its resumption.
FREE = {"out", "overwrite", "workers", "save_every", "log_every", "tensorboard"}


def parse(pairs: Iterable[str], what: str) -> dict[str, Any]:
    """["depth=4", "name=x"] to {"depth": 4, "name": "x"}: Python literals where they are, else strings."""
    found = {}
    for item in pairs:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"{what} must be KEY=VALUE, got {item!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
