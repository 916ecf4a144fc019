"""``python -m benchmarks.profile [MODEL ...]``: time of a model by kind of work, beside the least time of each kind.

Profiles one forward (inference) and one training step (forward, backward, AdamW; bfloat16 by autocast) of pyvit's model
and of plain PyTorch with SDPA. The least time of matrix products and attention is their multiply-adds at the machine's
rate; of everything else, reading and writing its tensors once at the copy bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pyvit
from benchmarks import ceiling, models
from benchmarks.workload import OURS
from pyvit.nn import attention, window_attention

#: Kind of work -> prefixes of operator names. The first match is used.
KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "mkldnn::_linear_pointwise",
        "mkldnn::_linear",
        "pyvit::prepacked_mlp",
        "pyvit::prepacked_gated_mlp",
        "pyvit::product",
    ),
    "attention": (
        "pyvit::flash_attention",
        "pyvit::window_attention",
        "aten::_scaled_dot_product",
        "aten::bmm",
        "aten::_softmax",
    ),
    "patches": (
        "pyvit::patch_embed",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
        "aten::_convolution",
        "aten::slow_conv",
    ),
    "layer norm": ("aten::native_layer_norm", "pyvit::_norm"),
    "activation": ("aten::gelu", "pyvit::activation", "pyvit::gate"),
    "optimizer": ("aten::_fused_adamw_", "Optimizer."),
    "copies and casts": (
        "aten::copy_",
        "pyvit::transposed",
        "aten::cat",
        "aten::roll",
        "aten::index",
        "aten::_index_put",
        "aten::constant_pad",
    ),
    "sums and additions": ("aten::add", "aten::sum", "aten::mul", "aten::div"),
}
REST = "everything else"


def kind_of(name: str) -> str:
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), REST)


def product_flops(name: str, shapes: Sequence[Sequence[int]]) -> float:
    """Flops (two per multiply-add) of a matrix product from its arguments' shapes (empty for arguments that are not
    tensors).
    """
    if name == "pyvit::prepacked_mlp":  # x, norm, its weight, bias and eps, the first weight, ..., and at 9 the second
        return 2.0 * math.prod(shapes[0][:-1]) * sum(math.prod(shapes[at]) for at in (5, 9) if shapes[at])
    if name == "pyvit::prepacked_gated_mlp":  # as above, at 8 the gate's, and at 17 the last
        return 2.0 * math.prod(shapes[0][:-1]) * sum(math.prod(shapes[at]) for at in (5, 8, 17) if shapes[at])
    shapes = [s for s in shapes if s]
    if name == "aten::addmm":
        shapes = shapes[1:]
    a, b = shapes[0], shapes[1]
    rows = math.prod(a[:-1])
    return 2.0 * rows * a[-1] * (b[0] if name.startswith("mkldnn") else b[-1])


@contextlib.contextmanager
def _recorded() -> Iterator[Any]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        yield recorded


def by_kind(run: Callable[[], object], itemsize: int, rounds: int = 3) -> dict[str, tuple[float, float, float]]:
    """Kind -> (milliseconds, flops of its products, bytes of its tensors) of one call: the round with the median total
    time."""
    for _ in range(2):
        run()
    found = []
    for _ in range(rounds):
        with _recorded() as recorded:
            run()
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for event in recorded.events():
            kind = kind_of(event.name)
            entry = totals[kind]
            entry[0] += event.self_cpu_time_total / 1e3
            shapes = [s for s in event.input_shapes if s]
            if kind == "matrix products" and len(shapes) > 1 and event.self_cpu_time_total > 0:
                entry[1] += product_flops(event.name, [list(s) for s in event.input_shapes])
            elif event.self_cpu_time_total > 0 and shapes:
                entry[2] += itemsize * (sum(math.prod(s) for s in shapes) + math.prod(shapes[0]))
        found.append({kind: (v[0], v[1], v[2]) for kind, v in totals.items()})
    found.sort(key=lambda totals: sum(v[0] for v in totals.values()))
    return found[len(found) // 2]


def _size(name: str) -> tuple[int, int]:
    found = re.search(r"_(\d{3})$", name)
    if not found:
        raise SystemExit(f"MODEL must end in its image size, got {name!r}")
    return int(found[1]), int(found[1])


def _steps(name: str, provider: str, dtype: str, batch: int) -> dict[str, Callable[[], object]]:
    size = _size(name)
    images = torch.randn(batch, 3, *size)
    labels = torch.arange(batch)
    low = torch.bfloat16 if dtype == "bf16" else torch.float32
    fixed = models.MODULES[provider](name).eval().to(low)
    if provider == OURS:
        pyvit.pack_weights(fixed)
        for module in (attention, window_attention):  # in parts, so that each kind of work is an operator of its own
            name_of_branch = f"{module.__name__.rpartition('.')[2]}_branch"
            setattr(module, name_of_branch, lambda *_: None)
    trained: nn.Module = models.MODULES[provider](name).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, fused=True)

    def infer() -> None:
        with torch.no_grad():
            fixed(images.to(low))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = F.cross_entropy(trained(images), labels)
        loss.backward()
        optimizer.step()

    return {"inference": infer, "training step": step}


def table(name: str, dtype: str, batch: int, top: ceiling.Ceiling) -> str:
    """One model's table in markdown."""
    itemsize = 2 if dtype == "bf16" else 4
    runs = {provider: _steps(name, provider, dtype, batch) for provider in (OURS, "eager SDPA")}
    lines = [
        f"### {name}, {dtype}, batch {batch}",
        "",
        "| kind of work | ours | least | SDPA | ours, training | least | SDPA, training |",
        "|---|" + "---|" * 6,
    ]
    cells = {
        (mode, provider): by_kind(runs[provider][mode], itemsize)
        for mode in ("inference", "training step")
        for provider in runs
    }
    totals = {key: sum(v[0] for v in found.values()) for key, found in cells.items()}
    for kind in (*KINDS, REST):
        row = [kind]
        for mode in ("inference", "training step"):
            ours, sdpa = (cells[mode, provider].get(kind, (0.0, 0.0, 0.0)) for provider in runs)
            flops, moved = ours[1], ours[2]
            if kind == "attention":
                flops = attention_flops(name, batch) * (3.5 if mode == "training step" else 1)
            least = 0.0 if kind == REST else top.floor_ms(flops, 0 if flops else moved, dtype)
            row += [f"{ours[0]:.1f}", f"{least:.1f}" if least else "-", f"{sdpa[0]:.1f}"]
        if row[1] != "0.0" or row[3] != "0.0" or row[4] != "0.0":
            lines.append(f"| {' | '.join(row)} |")
    whole = [f"{totals[mode, provider]:.0f}" for mode in ("inference", "training step") for provider in runs]
    lines.append(f"| **total** | {whole[0]} | | {whole[1]} | {whole[2]} | | {whole[3]} |")
    return "\n".join(lines)


def attention_flops(name: str, batch: int) -> float:
    """Flops of the two products of every attention layer in a forward, counted from the shapes that the layers see."""
    model = pyvit.create_model(name).eval()
    total = 0.0

    def count(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        nonlocal total
        x = args[0]
        tokens = x.numel() // x.shape[-1]
        keys = math.prod(module.window_size) if hasattr(module, "window_size") else x.shape[1]
        total += 4.0 * tokens * keys * x.shape[-1]

    for module in model.modules():
        if type(module).__name__ in ("Attention", "WindowAttention"):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, *_size(name)))
    return total * batch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=["vit_base_patch16_224", "swin_tiny_patch4_window7_224"], metavar="MODEL"
    )
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    top = ceiling.measure(torch.get_num_threads(), 0.5)
    print(f"{top}\n")
    for name in args.models:
        for dtype in args.dtype:
            print(table(name, dtype, args.batch, top), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
