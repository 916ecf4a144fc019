"""Scaling curves: time by number of tokens, batch size, threads and, for Swin, image area."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import pyvit
from benchmarks import inputs, providers, runner
from benchmarks.cases import Case
from benchmarks.ceiling import Ceiling
from benchmarks.ceiling import measure as measure_ceiling
from benchmarks.runner import Row, Settings
from benchmarks.workload import OURS, Contender, Workload

_SIZES = {"quick": (224,), "default": (224, 448), "full": (224, 320, 448, 576, 672, 800, 896, 1024)}
_LENGTHS = {"quick": (49, 197), "default": (49, 197, 577, 1025), "full": (16, 49, 197, 257, 577, 1025, 2048, 4096)}
_BATCHES = {"quick": (1, 2), "default": (1, 2, 8), "full": (1, 2, 4, 8, 16, 32)}


def _attention_rows(
    batch: int, length: int, dtype: str, settings: Settings, ceiling: Ceiling, note: str = ""
) -> list[Row]:
    shape = {"batch": batch, "heads": 12, "length": length, "dim": 64}
    case = Case("flash_attention", f"{batch}x12x{length}x64{note}", dtype, "scaling", shape)
    return runner.run_workload(providers.build(case, "photos", ()), settings, ceiling)


def _swin_rows(size: int, dtype: str, settings: Settings, ceiling: Ceiling) -> list[Row]:
    """Swin-T on one image of ``size`` pixels, checked at that size against pyvit's float64 reference backend."""
    from benchmarks import models
    from benchmarks.gate import Gate, worst

    name = "swin_tiny_patch4_window7_224"
    images = inputs.normalised(inputs.pixels("photos", 1, size)).to(inputs.DTYPES[dtype])

    @functools.cache
    def model(kind: torch.dtype) -> torch.nn.Module:
        made = pyvit.create_model(name)
        made.load_state_dict(models.weights(name))
        return made.eval().to(kind)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(images.dtype)(images)

    def reference(images: torch.Tensor) -> torch.Tensor:
        with pyvit.use_backend("reference"):
            return forward(images)

    gate = Gate({"images": images}, reference)
    case = Case(name, f"1x{size}x{size}", dtype, "scaling", {"size": size})
    work = Workload(case, "photos", models.flops(name, 1, False) * (size / 224) ** 2)
    work.contenders[OURS] = Contender(lambda: forward(images), lambda: worst(gate(OURS, forward)))
    return runner.run_workload(work, settings, ceiling)


def _curves(rows: Sequence[Row], x: Callable[[Row], float]) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row.timed:
            at, value = found.setdefault(f"{row.provider} {row.dtype}", ([], []))
            at.append(x(row))
            value.append(row.median_ms)
    return found


def _sweep(name: str, level: str, settings: Settings, ceiling: Ceiling) -> list[Row]:
    """The rows of one of :data:`SWEEPS`. In the default run only the sweep over tokens includes bfloat16."""
    dtypes = ("fp32", "bf16") if level == "full" or (level == "default" and name == "tokens") else ("fp32",)
    if name == "tokens":
        return [r for n in _LENGTHS[level] for dtype in dtypes for r in _attention_rows(1, n, dtype, settings, ceiling)]
    if name == "batch":
        return [
            r for b in _BATCHES[level] for dtype in dtypes for r in _attention_rows(b, 197, dtype, settings, ceiling)
        ]
    if name == "area":
        return [r for size in _SIZES[level] for dtype in dtypes for r in _swin_rows(size, dtype, settings, ceiling)]
    rows, most = [], torch.get_num_threads()
    try:
        for threads in sorted({1, *(2**i for i in range(1, 8) if 2**i <= most), most}):
            torch.set_num_threads(threads)
            top = ceiling if threads == most else measure_ceiling(threads, 0.1)
            note = f", {threads} thread" + "s" * (threads > 1)
            for dtype in dtypes:
                rows += _attention_rows(8, 197, dtype, settings, top, note)
    finally:
        torch.set_num_threads(most)
    return rows


class Sweep(NamedTuple):
    """A curve: its title, the label of the axis, a row's position on it, and whether a row belongs to it."""

    title: str
    label: str
    x: Callable[[Row], float]
    has: Callable[[Row], bool]


def _size(row: Row, i: int) -> int:
    """A part of "1x12x197x64, 2 threads"."""
    return int(row.case.partition(",")[0].split("x")[i])


def _attends(row: Row) -> bool:
    return row.op == "flash_attention"


SWEEPS = {
    "tokens": Sweep(
        "attention of one image, 12 heads of 64",
        "tokens N",
        lambda row: _size(row, 2),
        lambda row: _attends(row) and _size(row, 0) == 1,
    ),
    "batch": Sweep(
        "attention, N = 197, 12 heads of 64",
        "batch",
        lambda row: _size(row, 0),
        lambda row: _attends(row) and _size(row, 2) == 197 and "thread" not in row.case,
    ),
    "threads": Sweep(
        "attention, batch 8, N = 197",
        "threads",
        lambda row: row.threads,
        lambda row: _attends(row) and "thread" in row.case,
    ),
    "area": Sweep("Swin-T, one image", "pixels", lambda row: _size(row, 1) ** 2, lambda row: row.op.startswith("swin")),
}


def linearity(rows: Sequence[Row], dtype: str) -> float:
    """Largest time per pixel over the smallest, for ``ours``: 1.0 if the cost is exactly linear in the area."""
    per_pixel = [r.median_ms / int(r.case.split("x")[1]) ** 2 for r in rows if r.dtype == dtype and r.timed]
    return max(per_pixel) / min(per_pixel)


def run(
    level: str, settings: Settings, ceiling: Ceiling, out: Path, draw: bool, left: Callable[[], float]
) -> tuple[list[Row], list[Path], list[str]]:
    """Rows of mode "scaling", the plots, and the sweeps that did not fit into ``left()`` seconds."""
    settings = replace(settings, seconds=min(settings.seconds, 0.5), rounds=(3, 41), both_sources=False)
    everything: list[Row] = []
    written: list[Path] = []
    late: list[str] = []
    for name, (title, label, x, _) in SWEEPS.items():
        if left() < 0:
            late.append(f"scaling with {name}")
            continue
        rows = _sweep(name, level, settings, ceiling)
        print(f"scaling with {name}: {len(rows)} points", flush=True)
        everything += rows
        curves = _curves(rows, x)
        if name == "area":
            for dtype in sorted({row.dtype for row in rows if row.timed}):
                at, value = curves[f"{OURS} {dtype}"]
                curves[f"linear {dtype}"] = (at, [value[-1] * pixels / at[-1] for pixels in at])
                print(f"  Swin-T {dtype}: time per pixel varies by {linearity(rows, dtype):.2f}x over {len(at)} sizes")
        if draw and curves:
            from benchmarks import plots

            out.mkdir(parents=True, exist_ok=True)
            written.append(plots.lines(curves, out / f"scaling_{name}.png", title, label, "milliseconds"))
    return everything, written, late
