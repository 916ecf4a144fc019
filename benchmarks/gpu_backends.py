"""``python -m benchmarks.gpu_backends``: the recorded measurements of CUDA and Triton kernels
(``pyvit.dispatch.gpu_choice.MEASURED``) beside the predictions of :func:`pyvit.dispatch.gpu_choice.predict`.

The step "dispatch" of ``python -m benchmarks.gpu`` measures; its results.md has the rows for the table.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import gpu_cases, inputs
from benchmarks.cases import Case
from pyvit.dispatch import gpu_choice


def shape(case: Case) -> tuple[int, ...]:
    """The case's sizes as :func:`pyvit.dispatch.gpu_choice.shape_of` gives them."""
    s = case.shape
    if case.op == "flash_attention":
        return s["length"], s["length"], s["dim"]
    if case.op == "window_attention":
        return s["window"], s["window"], s["width"] // s["heads"]
    return s["patch"], s["patch"], s["width"]


def measured(
    case: Case, gpu: str, milliseconds: tuple[float, float], date: str, digests: tuple[str, str], triton_version: str
) -> gpu_choice.Measured:
    """The row of a case that took ``milliseconds`` by CUDA and by Triton, whose kernels had these digests."""
    grad = case.mode.endswith("backward")
    cuda, triton = (float(f"{ms:.4g}") for ms in milliseconds)
    dtype = inputs.DTYPES[case.dtype]
    return gpu_choice.Measured(gpu, case.op, dtype, grad, shape(case), cuda, triton, date, digests, triton_version)


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
    for row in gpu_choice.MEASURED:
        features = {"window_attention": ("bias_table",)}.get(row.op, ()) + ("grad",) * row.grad
        args = (row.op, row.dtype, features, calls[row.op, row.shape], row.gpu, row.grad)
        told = [gpu_choice.predict(backend, *args) for backend in ("cuda", "triton")]
        faster = ["cuda" if a < b else "triton" for a, b in ((row.cuda, row.triton), told)]
        name = f"{row.op} {'x'.join(map(str, row.shape))}, {'forward and backward' if row.grad else 'forward'}"
        yield (
            f"| {name} | {row.cuda:.3g} | {told[0]:.2g} | {row.triton:.3g} | {told[1]:.2g} | {faster[0]} | "
            f"{faster[1]} |"
        )


def main() -> None:
    for line in predicted():
        print(line)
    told = {(row.source, why) for row in gpu_choice.MEASURED if (why := gpu_choice.stale(row)) is not None}
    for source, why in sorted(told):
        print(f"\nRows of {source} decide nothing: {why}")


if __name__ == "__main__":
    main()
