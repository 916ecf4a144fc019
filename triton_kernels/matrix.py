"""The compilation matrix: every kernel, for every architecture, compiled without a GPU and inspected.

``python -m pyvit.triton_kernels.matrix [--arch sm_90 ...] [--dtype bf16 ...]`` compiles all of it, or those parts and types, and writes
their rows of docs/gpu-kernels-triton.md; ``--check`` only reports what breaks a rule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from pyvit.triton_kernels.common import Launch, recording
from pyvit.triton_kernels.compiled import SHARED_LIMIT, Report, inspect
from pyvit.triton_kernels.workloads import CASES, prepare

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Bytes per thread a kernel may spill: {kernel: (16-bit types, float32)}; kernels not listed may spill ``DEFAULT_SPILL``.
DEFAULT_SPILL = (512, 1024)
SPILL_BUDGET: dict[str, tuple[int, int]] = {}
#: Kernels without a matrix product.
NO_DOT = frozenset({"table_gradient"})


def launches(case: str, dtype: str, arch: str) -> list[Launch]:
    """What the launchers would run for ``case`` on ``arch``."""
    with recording(arch) as found:
        prepare(case, DTYPES[dtype], "meta")()
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


def _made_by(row: str) -> tuple[str, str] | None:
    """Part and type of a row of the table."""
    cells = [c.strip() for c in row.split("|")]
    return (cells[1], cells[2]) if len(cells) > 2 and cells[1] in ARCHS else None


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
        done = {(arch, dtype) for arch in options.arch for dtype in options.dtype}
        if options.case == list(CASES) and options.output.exists():
            lines += [row for row in options.output.read_text().splitlines() if _made_by(row) not in {None, *done}]
        lines.sort(key=lambda row: (ARCHS.index(_made_by(row)[0]), list(DTYPES).index(_made_by(row)[1])))
        options.output.write_text(_PAGE.format(rows="\n".join(lines), spill=DEFAULT_SPILL, extra=SPILL_BUDGET or "none"))
    print(f"{len(lines)} kernels compiled, {broken} break a rule", file=sys.stderr)
    return 1 if broken else 0


_PAGE = """# Triton kernels as compiled

Written by `python -m pyvit.triton_kernels.matrix`. Every row is one kernel as its launcher would run it, compiled ahead of time:
programs, warps, pipeline stages, registers per thread, bytes spilled per thread, bytes of shared memory, static counts of tensor-core
instructions (all, and the warpgroup kind: `wgmma`, `tcgen05`), and the rules it breaks. Rules: tensor-core instructions on operands of
the input's type; no atomics; shared memory within the part's limit; at most {spill} bytes spilled (16-bit types, float32).
Other budgets: {extra}.
Nothing here was run or timed on a GPU.

| part | type | case | kernel | programs | warps | stages | registers | spilled | shared | tensor core | warpgroup | verdict |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    sys.exit(main())
