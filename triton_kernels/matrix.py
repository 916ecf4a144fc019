"""The compilation matrix: every kernel, for every architecture, compiled without a GPU and inspected.

``python -m pyvit.triton_kernels.matrix [--arch sm_90 ...] [--output docs/gpu-kernels-triton.md]`` compiles all of it and writes the table;
``--check`` only reports what breaks a rule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pyvit.triton_kernels import attention_map, flash_attention, patch_embed, window_attention
from pyvit.triton_kernels.common import Launch, recording
from pyvit.triton_kernels.compiled import SHARED_LIMIT, Report, inspect

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Bytes per thread a kernel may spill: {kernel: (16-bit types, float32)}; kernels not listed may spill ``DEFAULT_SPILL``.
DEFAULT_SPILL = (512, 1024)
SPILL_BUDGET: dict[str, tuple[int, int]] = {}
#: Kernels without a matrix product.
NO_DOT = frozenset({"table_gradient"})


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(dtype: torch.dtype, n: int, d: int, bias: bool = False, causal: bool = False, dropout: float = 0.0) -> None:
    """Forward and backward of a batch of 64 images, 12 heads."""
    q, k, v = _empty(dtype, 64, n, 3, 12, d).permute(2, 0, 3, 1, 4)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout else None
    rest = (_empty(torch.float32, 1, 12, n, n) if bias else None, causal, d**-0.5, dropout, seed)
    out, lse = flash_attention.flash_attention(q, k, v, *rest)
    flash_attention.flash_attention_backward(out, None, out, lse, bias, q, k, v, *rest)


def varlen(dtype: torch.dtype, longest: int, d: int) -> None:
    """Forward and backward of 64 packed sequences."""
    q, k, v = _empty(dtype, 40 * longest, 3, 12, d).permute(1, 0, 2, 3)
    cu = torch.empty(65, dtype=torch.int32, device="meta")
    rest = (cu, cu, longest, longest, None, False, d**-0.5)
    out, lse = flash_attention.flash_attention_varlen(q, k, v, *rest)
    flash_attention.flash_attention_varlen_backward(out, None, out, lse, False, q, k, v, *rest)


def window(dtype: torch.dtype, size: int, side: int, heads: int, cosine: bool = False, pad: bool = False) -> None:
    """Forward and backward of a Swin block's attention, batch 64, 32 channels per head."""
    qkv, table = _empty(dtype, 64, size, size, 96 * heads), _empty(torch.float32, (2 * side - 1) ** 2, heads)
    logit = _empty(torch.float32, heads) if cosine else None
    rest = ((side, side), (side // 2, side // 2), heads, table, logit, _empty(dtype, 96 * heads) if pad else None, 32**-0.5, 0.0, None)
    out, lse = window_attention.window_attention(qkv, *rest)
    window_attention.window_attention_backward(out, out, lse, qkv, *rest)


def patches(dtype: torch.dtype, kept: int = 0, pixels: str = "float") -> None:
    """Forward and backward of ViT-B/16 on 64 images of 224 x 224."""
    images = _empty(torch.uint8 if pixels == "bytes" else dtype, 64, 3, 224, 224)
    mean = _empty(torch.float32, 3) if pixels == "bytes" else None
    keep = torch.empty(64, kept, dtype=torch.int64, device="meta") if kept else None
    rest = (_empty(dtype, 768, 3, 16, 16), _empty(dtype, 768), (16, 16), _empty(dtype, 196, 768), _empty(dtype, 1, 768), keep, mean, mean)
    out = patch_embed.patch_embed(images, *rest)
    patch_embed.patch_embed_backward(out, pixels != "bytes", True, images, *rest)


def maps(dtype: torch.dtype, n: int) -> None:
    """The class token's attention, ViT-B."""
    q, k = _empty(dtype, 64, n, 2, 12, 64).permute(2, 0, 3, 1, 4)
    attention_map.attention_map(q, k, torch.empty(64, 1, dtype=torch.int64, device="meta"), None, 0.125)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "attention N=197 d=64": lambda t: attention(t, 197, 64),
    "attention N=197 d=64 bias": lambda t: attention(t, 197, 64, bias=True),
    "attention N=257 d=72": lambda t: attention(t, 257, 72),
    "attention N=257 d=80": lambda t: attention(t, 257, 80),
    "attention N=257 d=88": lambda t: attention(t, 257, 88),
    "attention N=577 d=64": lambda t: attention(t, 577, 64),
    "attention N=577 d=96 dropout": lambda t: attention(t, 577, 96, dropout=0.1),
    "attention N=1025 d=64 causal": lambda t: attention(t, 1025, 64, causal=True),
    "attention N=1025 d=128": lambda t: attention(t, 1025, 128),
    "varlen N<=197 d=64": lambda t: varlen(t, 197, 64),
    "varlen N<=1025 d=64": lambda t: varlen(t, 1025, 64),
    "attention map N=197 d=64": lambda t: maps(t, 197),
    "window 4": lambda t: window(t, 56, 4, 3),
    "window 7": lambda t: window(t, 56, 7, 3),
    "window 7 padded": lambda t: window(t, 50, 7, 3, pad=True),
    "window 8 cosine": lambda t: window(t, 64, 8, 3, cosine=True),
    "window 12": lambda t: window(t, 96, 12, 4),
    "window 16 cosine": lambda t: window(t, 64, 16, 3, cosine=True),
    "window 24 cosine": lambda t: window(t, 96, 24, 4, cosine=True),
    "patches 16": patches,
    "patches 16 uint8": lambda t: patches(t, pixels="bytes"),
    "patches 16 keep 49": lambda t: patches(t, kept=49),
}


def launches(case: str, dtype: str, arch: str) -> list[Launch]:
    """What the launchers would run for ``case`` on ``arch``."""
    with recording(arch) as found:
        CASES[case](DTYPES[dtype])
    return found


def faults(report: Report, dtype: str) -> list[str]:
    """The rules a compiled kernel breaks."""
    found = []
    if report.kernel not in NO_DOT:
        if not report.tensor_core:
            found.append("no tensor-core instruction")
        operand = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[dtype]
        if report.dot_types != {operand}:
            found.append(f"products of {', '.join(sorted(report.dot_types))} operands")
    if report.atomics:
        found.append(f"{report.atomics} atomics")
    budget = SPILL_BUDGET.get(report.kernel, DEFAULT_SPILL)[dtype == "fp32"]
    if report.spilled > budget:
        found.append(f"{report.spilled} bytes spilled, budget {budget}")
    if report.shared > SHARED_LIMIT[report.arch]:
        found.append(f"{report.shared} bytes of shared memory, limit {SHARED_LIMIT[report.arch]}")
    return found


def reports(case: str, dtype: str, arch: str) -> Iterator[tuple[Launch, Report]]:
    """Each kernel of ``case`` compiled for ``arch``."""
    for launch in launches(case, dtype, arch):
        yield launch, inspect(launch, arch)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvit.triton_kernels.matrix", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("docs/gpu-kernels-triton.md"))
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    lines, broken = [], 0
    for arch in options.arch:
        for dtype in options.dtype:
            for case in options.case:
                for launch, r in reports(case, dtype, arch):
                    wrong = faults(r, dtype)
                    broken += bool(wrong)
                    o = launch.options
                    cells = (arch, dtype, case, r.kernel, launch.grid, o["num_warps"], o["num_stages"], r.registers, r.spilled, r.shared)
                    row = "| " + " | ".join(map(str, (*cells, r.tensor_core, r.warpgroup, "; ".join(wrong) or "ok"))) + " |"
                    print(row, flush=True)
                    lines.append(row)
    if not options.check:
        options.output.write_text(_PAGE.format(rows="\n".join(lines), spill=DEFAULT_SPILL, extra=SPILL_BUDGET or "none"))
    print(f"{len(lines)} kernels compiled, {broken} break a rule", file=sys.stderr)
    return 1 if broken else 0


_PAGE = """# Triton kernels as compiled

Written by `python -m pyvit.triton_kernels.matrix`. Every row is one kernel as its launcher would run it, compiled ahead of time with no GPU:
programs, warps, pipeline stages, registers per thread, bytes spilled per thread, bytes of shared memory, static counts of tensor-core
instructions (all, and the warpgroup kind: `wgmma`, `tcgen05`), and the rules it breaks. Rules: tensor-core instructions on operands of the input's type;
no atomics; shared memory within the part's limit; at most {spill} bytes spilled (16-bit types, float32), other budgets: {extra}.
Nothing here was run or timed on a GPU.

| part | type | case | kernel | programs | warps | stages | registers | spilled | shared | tensor core | warpgroup | verdict |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    sys.exit(main())
