"""Costs of a model: parameters, multiply-accumulates, tokens, and attention memory with and without fusion.

Everything is counted from the model: it runs on meta tensors, all matrix products and convolutions are recorded, and
every attention layer reports its scores. "FLOPs" in the ViT and Swin papers are multiply-accumulates (MACs), as here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pyvit.dispatch import use_backend
from pyvit.models.registry import create_model
from pyvit.nn.packed_weights import pack_weights
from pyvit.ops.flops import FORMULAS
from pyvit.torch_private import fake_mode


@dataclass(frozen=True)
class Cost:
    """Cost of one input.

    params: parameters, including positions and mask tokens. macs: multiply-accumulates of matrix products and
    convolutions. tokens: the longest sequence of an attention layer, or the tokens of a window.

    scores: attention probabilities of all layers, which naive attention stores for the backward pass. statistics: what
    fused attention stores instead, one log-sum-exp per query and head.
    """

    name: str
    input_shape: tuple[int, ...]
    params: int
    macs: int
    tokens: int
    scores: int
    statistics: int

    def memory(self, itemsize: int = 4) -> tuple[int, int]:
        """Attention memory in bytes per input in training: naive, with ``itemsize`` bytes per number, and fused
        (float32)."""
        return self.scores * itemsize, self.statistics * 4


def count(model: str, **overrides: Any) -> Cost:
    """Cost of a registered model for one input, with changed settings (``img_size=384``). Nothing is allocated or
    computed.

    For DINO and SimCLR models the encoder is counted.
    """
    with torch.device("meta"):
        made = create_model(model, **overrides).eval()
        made = getattr(made, "encoder_of", lambda: made)()
    with fake_mode():
        for module in made.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(
                    module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), requires_grad=False)
                )
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device="cpu"))
        return count_module(made, name=model)


def count_module(model: nn.Module, inputs: Sequence[Any] | None = None, name: str | None = None) -> Cost:
    """Cost of one forward pass of a module. ``inputs`` default to the model's ``example_inputs`` with batch size 1."""
    inputs = tuple(model.example_inputs(1)) if inputs is None else tuple(inputs)  # type: ignore[operator]
    seen: list[tuple[int, int, int]] = []  # (sequences x heads, queries, keys) of each attention call

    def record(module: nn.Module, args: tuple[Any, ...], _out: Any) -> None:
        seen.append(module.score_shape(args[0]))  # type: ignore[operator]

    handles = [m.register_forward_hook(record) for m in model.modules() if hasattr(m, "score_shape")]
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    first = tree_leaves(inputs)[0]
    device = first.device.type
    try:
        # The counter sees the dispatcher's operators, which are those of the CPU; the reference is made of products it
        # knows.
        with torch.no_grad(), counter, use_backend(None if device == "cpu" else "reference"):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Cost(
        name or type(model).__name__,
        tuple(first.shape),
        sum(p.numel() for p in model.parameters()),
        counter.get_total_flops() // 2,
        max((k for _, _, k in seen), default=0),
        sum(bh * q * k for bh, q, k in seen),
        sum(bh * q for bh, q, _ in seen),
    )


def attention_memory(tokens: int, heads: int, layers: int, itemsize: int = 4) -> int:
    """Bytes of all attention matrices of a transformer for one input: layers x heads x tokens^2 x itemsize."""
    return layers * heads * tokens**2 * itemsize


#: Why images are cut into patches: attention memory of 16 heads and 48 layers in float32.
PIXELS_OR_PATCHES = (
    ("512 x 512 image, pixels as tokens, one matrix", attention_memory(512 * 512, 1, 1)),
    ("512 x 512 image, pixels as tokens", attention_memory(512 * 512, 16, 48)),
    ("512 x 512 image, 16 x 16 patches as tokens", attention_memory(32 * 32, 16, 48)),
    ("32 x 32 image, pixels as tokens", attention_memory(32 * 32, 16, 48)),
)


@dataclass(frozen=True)
class Published:
    """A row of the Swin paper's comparison of ImageNet-22k models (Liu et al., 2021, table 1b): million parameters,
    GMACs, top-1 accuracy in per cent, images per second on a V100 (None: not published)."""

    label: str
    img_size: int
    params: float
    gmacs: float
    top1: float
    name: str | None = None
    images_per_s: float | None = None


PAPER_TABLE = (
    Published("R-101x3", 384, 388.0, 204.6, 84.4),
    Published("R-152x4", 480, 937.0, 840.5, 85.4),
    Published("ViT-B/16", 384, 86.0, 55.4, 84.0, "vit_base_patch16_384", 85.9),
    Published("ViT-L/16", 384, 307.0, 190.7, 85.2, "vit_large_patch16_384", 27.3),
    Published("Swin-B", 224, 88.0, 15.4, 85.2, "swin_base_patch4_window7_224", 278.1),
    Published("Swin-B", 384, 88.0, 47.0, 86.4, "swin_base_patch4_window12_384", 84.7),
    Published("Swin-L", 384, 197.0, 103.9, 87.3, "swin_large_patch4_window12_384", 42.1),
)


def paper_table() -> list[tuple[Published, Cost | None]]:
    """Every row of :data:`PAPER_TABLE` with the cost counted here; None for the ResNets, which are only cited."""
    return [(row, count(row.name) if row.name else None) for row in PAPER_TABLE]


def paper_throughput(batch: int = 8, seconds: float = 3.0) -> dict[Published, float]:
    """Images per second on this machine, in float32, of every row of :data:`PAPER_TABLE` that has a model here."""
    found = {}
    for row in PAPER_TABLE:
        if row.name is not None:
            model = create_model(row.name)
            pack_weights(model)
            found[row] = throughput(model, batch, seconds)
    return found


def plot_paper_table(measured: Mapping[Published, float], path: str | Path) -> None:
    """A picture: published accuracy over images per second, on a V100 as published, and here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    sides = (
        ("published, V100", {row: row.images_per_s for row in PAPER_TABLE if row.images_per_s}),
        ("this machine", dict(measured)),
    )
    for ax, (title, speeds) in zip(axes, sides, strict=True):
        for row, speed in speeds.items():
            color = "tab:orange" if row.label.startswith("Swin") else "tab:blue"
            ax.plot(speed, row.top1, "o", color=color)
            ax.annotate(f"{row.label}, {row.img_size}", (speed, row.top1), textcoords="offset points", xytext=(4, 4))
        ax.set_title(title)
        ax.set_xlabel("images per second")
        ax.set_xlim(0, 1.4 * max(speeds.values()))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ImageNet top-1, published, %")
    figure.savefig(path, dpi=120)


def throughput(model: nn.Module, batch: int = 8, seconds: float = 3.0, warmup: int = 2) -> float:
    """Inputs per second of the forward pass on the model's device, in inference mode, measured for about
    ``seconds``."""
    inputs = model.example_inputs(batch)  # type: ignore[operator]
    synchronize = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for _ in range(warmup):
            model(*inputs)
        synchronize()
        start, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - start < seconds:
            model(*inputs)
            synchronize()
            done += batch
        elapsed = time.perf_counter() - start
    model.train(was_training)
    return done / elapsed


def human(size: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1000
    raise AssertionError


HEADER = ("model", "input", "params", "GMACs", "N", "attention naive", "attention fused")


def rows(costs: Iterable[Cost]) -> list[tuple[str, ...]]:
    """Table cells for costs, under :data:`HEADER`. Memory is per input, in training, float32."""
    return [
        (
            c.name,
            "x".join(map(str, c.input_shape[1:])),
            f"{c.params:,}",
            f"{c.macs / 1e9:.2f}",
            str(c.tokens),
            *map(human, c.memory()),
        )
        for c in costs
    ]
