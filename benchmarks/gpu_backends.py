"""``python -m benchmarks.gpu_backends``: CUDA kernels against Triton kernels on this GPU, as rows for
``pyvit.dispatch.choice.MEASURED``.

Both are checked against float64 first. A case in which one is wrong or cannot serve gives no row, and is reported.
``--predicted``, which needs no GPU, prints the recorded measurements beside the predictions of
:func:`pyvit.dispatch.choice.predict`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date

from benchmarks import gpu, gpu_cases, inputs, measure, providers
from benchmarks.cases import Case
from benchmarks.specs import Provider, Spec
from benchmarks.workload import OURS
from pyvit.dispatch import choice


def shape(case: Case) -> tuple[int, ...]:
    """The case's sizes as :func:`pyvit.dispatch.choice.shape_of` gives them."""
    s = case.shape
    if case.op == "flash_attention":
        return s["length"], s["length"], s["dim"]
    if case.op == "window_attention":
        return s["window"], s["window"], s["width"] // s["heads"]
    return s["patch"], s["patch"], s["width"]


def rows(
    cases: Sequence[Case],
    gpu_name: str,
    device: str,
    say: Callable[[str], None],
    backends: tuple[str, str] = ("cuda", "triton"),
) -> Iterator[choice.Measured]:
    """A row for each case that both of ``backends`` compute correctly."""

    def both(case: Case, spec: Spec) -> list[Provider]:
        ours = next(p for p in spec.providers if p.name == OURS)
        return [replace(gpu_cases.on_backend(backend, ours), name=backend) for backend in backends]

    for case in cases:
        work = providers.build(case, case.sources[0], (), device, both)
        wrong = {b: work.unavailable.get(b) for b in backends if b not in work.contenders}
        wrong |= {
            b: str(verdict)
            for b in backends
            if b in work.contenders and not (verdict := work.contenders[b].verdict()).passed
        }
        if wrong:
            say(f"{case.id}: {wrong}")
            continue
        times = measure.interleave(
            {b: work.contenders[b].run for b in backends}, seconds=0.3, device=device, rounds=(5, 31)
        )
        grad = case.mode.endswith("backward")
        figures = [float(f"{times[b].median:.4g}") for b in backends]
        yield choice.Measured(
            gpu_name, case.op, inputs.DTYPES[case.dtype], grad, shape(case), *figures, choice.NAN, f"{date.today()}"
        )


def sizes(case: Case) -> tuple[int, ...]:
    """The case's sizes as dispatch passes them."""
    s = case.shape
    if case.op == "flash_attention":
        return s["batch"], s["heads"], s["heads"], s["length"], s["length"], s["dim"]
    if case.op == "window_attention":
        return s["batch"], s["side"], s["side"], s["window"], s["window"], s["heads"], s["width"] // s["heads"]
    return s["batch"], 3, s["patch"], s["patch"], (s["size"] // s["patch"]) ** 2, s["width"]


def predicted() -> Iterator[str]:
    """Lines of a table: measured and predicted milliseconds of each backend."""
    yield "| call | cuda | predicted | triton | predicted | faster | predicted |"
    yield "|---|---:|---:|---:|---:|---|---|"
    calls = {
        (c.op, shape(c)): sizes(c)
        for c in gpu_cases.ops()
        if c.op in ("flash_attention", "window_attention", "patch_embed")
    }
    for row in choice.MEASURED:
        features = {"window_attention": ("bias_table",)}.get(row.op, ()) + ("grad",) * row.grad
        args = (row.op, row.dtype, features, calls[row.op, row.shape], row.gpu, row.grad)
        told = [choice.predict(backend, *args) for backend in ("cuda", "triton")]
        faster = ["cuda" if a < b else "triton" for a, b in ((row.cuda, row.triton), told)]
        name = f"{row.op} {'x'.join(map(str, row.shape))}, {'forward and backward' if row.grad else 'forward'}"
        yield (
            f"| {name} | {row.cuda:.3g} | {told[0]:.2g} | {row.triton:.3g} | {told[1]:.2g} | {faster[0]} | "
            f"{faster[1]} |"
        )


def main() -> int:
    if sys.argv[1:] == ["--predicted"]:
        print("\n".join(predicted()))
        return 0
    if (why := gpu.lacking()) is not None:
        print(f"benchmarks.gpu_backends {why}", file=sys.stderr)
        return 2
    distinct = {(c.op, shape(c)): c for c in gpu_cases.ops() if not {"uint8", "keep"} & c.shape.keys()}
    cases = [
        replace(c, dtype=dtype, mode=m)
        for c in distinct.values()
        for dtype in ("bf16", "fp32")
        for m in ("forward", "forward+backward")
    ]
    for row in rows(cases, choice.current_gpu() or "", "cuda", lambda line: print(f"# {line}", flush=True)):
        print(f"    {row},", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
