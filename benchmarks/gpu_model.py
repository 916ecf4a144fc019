"""``python -m benchmarks.gpu_model``: the cost model against the kernels that an H100 timed on 2026-11-26, as a table.
No GPU is needed.

Those kernels have been replaced; what they moved, multiplied and issued per score is recorded here, as counted then
(docs/gpu-status.md, benchmarks/results/nvidia-h100-80gb-hbm3). The sum is that of
:meth:`pyvit.dispatch.cost_model.Plan.seconds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks import gpu_cases, inputs
from benchmarks.cases import Case
from pyvit.dispatch import choice, cost_model
from pyvit.dispatch.cost_model import Cost, Plan


def shape(case: Case) -> tuple[int, ...]:
    """The case's sizes as :func:`pyvit.dispatch.choice.shape_of` gives them."""
    s = case.shape
    if case.op == "flash_attention":
        return s["length"], s["length"], s["dim"]
    if case.op == "window_attention":
        return s["window"], s["window"], s["width"] // s["heads"]
    return s["patch"], s["patch"], s["width"]


def sizes(case: Case) -> tuple[int, ...]:
    """The case's sizes as dispatch passes them."""
    s = case.shape
    if case.op == "flash_attention":
        return s["batch"], s["heads"], s["heads"], s["length"], s["length"], s["dim"]
    if case.op == "window_attention":
        return s["batch"], s["side"], s["side"], s["window"], s["window"], s["heads"], s["width"] // s["heads"]
    return s["batch"], 3, s["patch"], s["patch"], (s["size"] // s["patch"]) ** 2, s["width"]


def measured(
    case: Case,
    gpu: str,
    milliseconds: tuple[float, float, float],
    date: str,
    digests: tuple[str, str],
    triton_version: str,
) -> choice.Measured:
    """The row of a case that took ``milliseconds`` by CUDA, by Triton and by the fastest of PyTorch's kernels (NaN:
    none), where pyvit's had these digests."""
    grad = case.mode.endswith("backward")
    cuda, triton, theirs = (float(f"{ms:.4g}") for ms in milliseconds)
    dtype = inputs.DTYPES[case.dtype]
    return choice.Measured(gpu, case.op, dtype, grad, shape(case), cuda, triton, theirs, date, digests, triton_version)


H100, BF16 = cost_model.GPUS["H100"], torch.bfloat16


@dataclass(frozen=True)
class Former:
    """One pass of a replaced kernel: reads and writes of (tokens, channels) tensors, products over all pairs of tokens,
    padding of the pairs, launches, passes that recompute the exponentials, and instructions per score without
    padding."""

    tensors: int
    products: int
    padding: float
    launches: int = 1
    passes: int = 1
    instructions: float = 0.0
    warpgroup: bool = True

    def plan(self, backward: bool, window: bool) -> Plan:
        tensors, products = ((7 if window else 8), 5) if backward else (4, 2)
        return Plan(
            self.tensors / tensors,
            self.products / products * self.padding,
            self.launches,
            self.warpgroup,
            self.passes * self.padding,
            self.instructions,
        )


def _forward(padding: float, instructions: float, warpgroup: bool = True) -> Former:
    return Former(4, 2, padding, 1, 1, instructions, warpgroup)


#: (backend, operator, first of the shape, backward). Triton's attention forward issued 9.8 instructions per score of a
#: tile; its two backward passes 12.1 and 16.4; windows as their loops were counted then, of 7 and 8 forward by the 2114
#: instructions of a warp for a tile of 64 x 64.
FORMER = {
    **{("triton", "flash_attention", n, False): _forward(pad, 9.8 * pad) for n, pad in (
        (197, 1.37), (257, 1.32), (577, 1.14), (1025, 1.14))},
    **{("triton", "flash_attention", n, True): Former(12, 7, pad, 2, 2, 28.5 * pad) for n, pad in (
        (197, 1.48), (257, 1.67), (577, 1.17), (1025, 1.13))},
    ("triton", "window_attention", 7, False): _forward(1.71, 113),
    ("triton", "window_attention", 8, False): _forward(1.0, 66),
    ("triton", "window_attention", 12, False): _forward(1.33, 70),
    ("triton", "window_attention", 16, False): _forward(1.0, 62),
    ("triton", "window_attention", 24, False): _forward(1.0, 74),
    ("triton", "window_attention", 7, True): Former(8, 5, 1.71, 3, 1, 183),
    ("triton", "window_attention", 12, True): Former(12, 7, 1.33, 4, 2, 144),
    ("triton", "window_attention", 16, True): Former(12, 7, 1.0, 4, 2, 120),
    ("triton", "window_attention", 24, True): Former(12, 7, 1.0, 4, 2, 140),
    **{("cuda", "flash_attention", n, False): _forward(pad, 38 * pad, False) for n, pad in (
        (197, 1.11), (257, 1.12), (577, 1.05), (1025, 1.03))},
    ("cuda", "window_attention", 7, False): _forward(1.71, 76, False),
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A measured pass, in milliseconds, beside the terms of its prediction."""

    backend: str
    name: str
    measured: float
    terms: dict[str, float]
    predicted: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def verdict(self) -> str:
        """Whether the sum is within 25 %, else what it fails by: time beyond all terms is latency, which no term
        counts; a sum that is too long counts terms that overlapped."""
        if abs(self.ratio - 1) <= 0.25:
            return "within 25 %"
        if self.ratio < 1:
            return f"latency: {self.measured - self.predicted:.2f} ms that no term counts"
        longest = sorted(self.terms, key=lambda name: -self.terms[name])[:2]
        return f"overlap: {' and '.join(longest)} ran at the same time"


def compared() -> Iterator[Compared]:
    """Every measured pass whose kernel's instructions were counted. A backward is its row less the forward's."""
    calls = {(c.op, shape(c)): sizes(c) for c in gpu_cases.ops() if c.op in ("flash_attention", "window_attention")}
    rows = {(r.op, r.shape, r.grad): r for r in choice.MEASURED if r.source == "2026-11-26"}
    for (backend, op, first, backward), former in FORMER.items():
        at = next(key for key in rows if key[0] == op and key[1][0] == first)[1]
        forward = getattr(rows[op, at, False], backend)
        measured = getattr(rows[op, at, True], backend) - forward if backward else forward
        floor = _floor(op, calls[op, at], backward)
        plan = former.plan(backward, op == "window_attention")
        terms = {name: 1e3 * seconds for name, seconds in plan.terms(floor, H100).items()}
        name = f"{op} {'x'.join(map(str, at))}, {'backward' if backward else 'forward'}"
        yield Compared(backend, name, measured, terms, 1e3 * plan.seconds(floor, H100))


def _floor(op: str, call: tuple[int, ...], backward: bool) -> Cost:
    if op == "flash_attention":
        b, h, kv, n_q, n_k, d = call
        return cost_model.attention(b, h, n_q, n_k, d, BF16, kv_heads=kv, backward=backward)
    b, height, width, wh, ww, heads, d = call
    return cost_model.window_attention(b, height, width, (wh, ww), heads, d, BF16, backward=backward)


def table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| call | backend | measured | memory | compute | exponentials | issue | sum | sum / measured | |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for c in compared():
        terms = " | ".join(f"{c.terms[name]:.3f}" for name in ("memory", "compute", "exponentials", "issue"))
        yield (
            f"| {c.name} | {c.backend} | {c.measured:.3f} | {terms} | {c.predicted:.3f} | {c.ratio:.2f} | {c.verdict} |"
        )


def floors(gpu: str) -> Iterator[str]:
    """Lines of Markdown: what bounds each call on ``gpu``, in microseconds, and what the present kernels are predicted
    to take."""
    where = cost_model.GPUS[gpu]
    yield "| call | memory | compute | exponentials | issue | cuda | triton |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    calls = {(c.op, shape(c)): sizes(c) for c in gpu_cases.ops() if c.op in ("flash_attention", "window_attention")}
    for (op, at), call in calls.items():
        features = ("bias_table",) if op == "window_attention" else ()
        before = dict.fromkeys(("cuda", "triton"), 0.0)
        for backward in (False, True):
            cells = [f"{1e6 * t:.0f}" for t in _floor(op, call, backward).times(where).values()]
            for backend in before:
                both = choice.predict(backend, op, BF16, features, call, gpu, backward)
                cells.append(f"{1e3 * (both - before[backend]):.0f}")
                before[backend] = both
            name = f"{op} {'x'.join(map(str, at))}, {'backward' if backward else 'forward'}"
            yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
    for name in ("H100", "H200"):
        print(f"\nMicroseconds on {name}: the four floors, and the present kernels by the model.\n")
        print("\n".join(floors(name)))
