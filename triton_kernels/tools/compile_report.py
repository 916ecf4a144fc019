"""The compile report: every kernel, for every architecture, compiled without a GPU and inspected.

``python -m pyvit.triton_kernels.tools.compile_report`` compiles :func:`plan` on all cores and writes
docs/gpu-kernels-triton.md. With ``--arch``, ``--dtype`` or ``--case`` it compiles only those combinations and replaces
their rows; ``--check`` only reports kernels that break a rule. Unchanged kernels come from Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from pyvit.triton_kernels.common import Launch, recording
from pyvit.triton_kernels.tiles import SHARED_LIMIT, family
from pyvit.triton_kernels.tools.compile import TENSOR_MEMORY_LIMIT, Report, inspect
from pyvit.triton_kernels.tools.workloads import CASES, prepare

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Bytes per thread a kernel may spill: {kernel: (16-bit types, float32)}; kernels not listed may spill
#: ``DEFAULT_SPILL``.
DEFAULT_SPILL = (512, 1024)
SPILL_BUDGET: dict[str, tuple[int, int]] = {}
#: Kernels without a matrix product.
NO_DOT = frozenset({"table_gradient"})

#: Compiled in float16 too; bfloat16 and float32 get every case.
SELECTED = (
    "attention N=197 d=64",
    "attention N=257 d=80",
    "attention N=577 d=64",
    "attention map N=197 d=64",
    "window 7",
    "window 12",
    "patches 16",
    "info_nce 4096 d=512",
)


def plan() -> list[tuple[str, str, str]]:
    """Architecture, dtype and case of every row: every case in bfloat16 and float32 on every architecture, and a
    selection in float16."""
    return [
        (arch, dtype, case)
        for arch in ARCHS
        for dtype in ("bf16", "fp16", "fp32")
        for case in (SELECTED if dtype == "fp16" else CASES)
    ]


def launches(case: str, dtype: str, arch: str) -> list[Launch]:
    """The launches of ``case`` on ``arch``."""
    with recording(arch) as found:
        prepare(case, DTYPES[dtype], "meta")()
    return found


def faults(report: Report, dtype: str) -> list[str]:
    """The rules that a compiled kernel breaks."""
    found = []
    if report.kernel not in NO_DOT:
        # WMMA has no float32 operands.
        if not report.tensor_core and (family(report.arch), dtype) != ("wmma", "fp32"):
            found.append("no tensor-core instruction")
        operand = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[dtype]
        if report.dot_types != {operand}:
            found.append(f"products of {', '.join(sorted(report.dot_types))} operands")
    if not report.stores:
        found.append("no store to memory: the compiler gave it up")
    if report.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"{report.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY_LIMIT}")
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


def _compile(work: tuple[str, str, str]) -> tuple[tuple[str, str, str], list[str], int]:
    """One architecture, dtype and case: its key, its rows, and how many of them break a rule."""
    arch, dtype, case = work
    made = list(reports(case, dtype, arch))
    return (
        work,
        [_row(*work, launch, report) for launch, report in made],
        sum(bool(faults(report, dtype)) for _, report in made),
    )


def _made_by(row: str) -> tuple[str, str, str] | None:
    """Architecture, dtype and case of a row."""
    cells = [c.strip() for c in row.split("|")]
    return (cells[1], cells[2], cells[3]) if len(cells) > 3 and cells[1] in ARCHS else None


def _row(arch: str, dtype: str, case: str, launch: Launch, r: Report) -> str:
    o = launch.options
    cells = (
        arch,
        dtype,
        case,
        r.kernel,
        launch.grid,
        o["num_warps"],
        o["num_stages"],
        r.registers,
        r.spilled,
        r.shared,
        r.tensor_memory,
    )
    return "| " + " | ".join(map(str, (*cells, r.tensor_core, r.warpgroup, "; ".join(faults(r, dtype)) or "ok"))) + " |"


def write(path: Path, rows: dict[tuple[str, str, str], list[str]]) -> None:
    """Write the page, with ``rows`` sorted by architecture, dtype and case."""

    def order(key: tuple[str, str, str]) -> tuple[int, int, int]:
        return ARCHS.index(key[0]), list(DTYPES).index(key[1]), list(CASES).index(key[2])

    text = "\n".join(row for key in sorted(rows, key=order) for row in rows[key])
    path.write_text(_PAGE.format(rows=text, spill=DEFAULT_SPILL, extra=SPILL_BUDGET or "none"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvit.triton_kernels.tools.compile_report", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--case", nargs="+", choices=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("docs/gpu-kernels-triton.md"))
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(argv)
    work = plan()
    rows = {}
    compiled = 0
    broken = 0
    if options.arch or options.dtype or options.case:
        asked = itertools.product(options.arch or ARCHS, options.dtype or ("bf16", "fp32"), options.case or CASES)
        work = list(asked)
        for row in options.output.read_text().splitlines() if options.output.exists() else ():
            key = _made_by(row)
            if key is not None and key[2] in CASES:
                rows.setdefault(key, []).append(row)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for key, made, faulty in pool.imap_unordered(_compile, work):
            print("\n".join(made), flush=True)
            rows[key] = made
            compiled = compiled + len(made)
            broken = broken + faulty
            if not options.check:  # after every case, so that an interrupted run keeps its results
                write(options.output, rows)
    print(f"{compiled} kernels compiled, {broken} break a rule", file=sys.stderr)
    return 1 if broken else 0


_PAGE = """# Compile report of the Triton kernels

Written by `python -m pyvit.triton_kernels.tools.compile_report`. Every row is a kernel as its launcher would run it,
compiled ahead of time. Nothing was run or timed on a GPU.

| column | meaning |
|---|---|
| programs, warps, stages | launch: number of programs, warps per program, pipeline stages |
| registers, spilled | per thread: registers, and bytes spilled to local memory |
| shared, tensor memory | per program: bytes of shared memory, and columns of tensor memory |
| dots, warpgroup | static counts of tensor-core instructions: all, and `wgmma` or `tcgen05` |
| verdict | `ok`, or the rules that the kernel breaks |

Rules:

- matrix products use tensor-core instructions for the inputs' dtype;
- the kernel stores something, and uses no atomics;
- shared and tensor memory are within the GPU's limits;
- at most {spill} bytes are spilled (16-bit dtypes, float32). Other budgets: {extra}.

| architecture | dtype | case | kernel | programs | warps | stages | registers | spilled | shared | tensor memory | dots | warpgroup | verdict |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    sys.exit(main())
