"""Variants of kernels that are measured beside the present ones, and the calls that tools look at one kernel in.

``python -m benchmarks.gpu_variants CASE DTYPE [VARIANT]`` runs a case of ``triton_kernels/tools/workloads.py`` once,
for Nsight Compute and compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from benchmarks.inputs import DTYPES


@dataclass(frozen=True)
class Variant:
    """``change`` is in force while the case (of workloads.CASES) runs."""

    name: str
    case: str
    change: Callable[[], AbstractContextManager[None]]
    dtype: str = "bf16"


@contextlib.contextmanager
def _tiles(kernel: str, **fields: int) -> Iterator[None]:
    """Other tile sizes for ``kernel``."""
    from pyvit.triton_kernels import tiles

    tiles.force(kernel, tiles.Config(**fields))
    try:
        yield
    finally:
        tiles.force(kernel, None)


@contextlib.contextmanager
def _fits(kernel: str, fits: bool) -> Iterator[None]:
    """Attention by ``kernel`` wherever it is a choice, or never by it."""
    from pyvit.triton_kernels import flash_attention

    before = getattr(flash_attention, f"{kernel}_fits")
    setattr(flash_attention, f"{kernel}_fits", lambda *_: fits)
    try:
        yield
    finally:
        setattr(flash_attention, f"{kernel}_fits", before)


@contextlib.contextmanager
def _bias_read_per_window() -> Iterator[None]:
    """Windows of 65 to 160 tokens by the kernels of larger ones."""
    from pyvit.triton_kernels import window_attention

    before = window_attention.window_bias_fits
    window_attention.window_bias_fits = lambda *_: False
    try:
        yield
    finally:
        window_attention.window_bias_fits = before


FLOAT32_SHORT = Variant(
    "backward_short in float32", "attention N=50 d=64", lambda: _fits("backward_short", True), "fp32"
)

VARIANTS = (
    *(
        Variant(
            f"two passes instead of backward_short, N={n}",
            f"attention N={n} d=64",
            lambda: _fits("backward_short", False),
        )
        for n in (50, 197, 257)
    ),
    Variant(
        "backward_short without pipelining",
        "attention N=197 d=64",
        lambda: _tiles("backward_short", block_m=128, block_n=64, edge_n=16, warps=8, stages=1),
    ),
    Variant(
        "forward_short instead of forward_persistent",
        "attention N=197 d=64",
        lambda: _fits("forward_persistent", False),
    ),
    Variant(
        "forward_long 128 x 64, 4 warps, as before",
        "attention N=1025 d=64",
        lambda: _tiles("forward_long", block_m=128, block_n=64, edge_n=16, warps=4, stages=3),
    ),
    Variant(
        "forward_long 64 x 64",
        "attention N=577 d=64",
        lambda: _tiles("forward_long", block_m=64, block_n=64, edge_n=16, warps=4, stages=3),
    ),
    Variant(
        "backward_dkdv with 8 warps, as before",
        "attention N=257 d=80",
        lambda: _tiles("backward_dkdv", block_m=64, block_n=32, edge_n=32, warps=8, stages=2),
    ),
    Variant(
        "window_backward with 8 warps",
        "window 7",
        lambda: _tiles("window_backward", block_m=64, block_n=64, edge_n=32, group=4, warps=8, stages=1),
    ),
    Variant(
        "window_forward with one window's tile per program",
        "window 7",
        lambda: _tiles("window_forward", block_m=64, group=1, warps=4, stages=2),
    ),
    Variant("window 12 with the bias read in every window", "window 12", _bias_read_per_window),
    Variant(
        "window_forward with 64 queries per program",
        "window 12",
        lambda: _tiles("window_forward", block_m=64, block_n=64, group=8, warps=4, stages=2),
    ),
)

#: kernel -> case, for Nsight Compute.
PROFILED = {
    "forward_short": "attention N=197 d=64",
    "forward_long": "attention N=1025 d=64",
    "backward_dkdv": "attention N=577 d=64",
    "backward_short": "attention N=197 d=64",
    "window_forward": "window 7",
    "window_backward": "window 7",
    "window_backward_queries": "window 12",
}


def main() -> None:
    from pyvit.triton_kernels.tools.workloads import prepare

    case, dtype, *rest = sys.argv[1:]
    change = next((v.change for v in (FLOAT32_SHORT, *VARIANTS) if v.name in rest), contextlib.nullcontext)
    with change():
        prepare(case, DTYPES[dtype], "cuda")()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
