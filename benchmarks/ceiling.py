"""The machine's peak rates of multiply-adds and of memory, measured in the same run as the operators."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceiling:
    """GF/s (two per multiply-add) by dtype, copy bandwidth in GB/s (bytes read plus bytes written), and how they were
    measured."""

    gflops: dict[str, float]
    copy_gbs: float
    threads: int
    source: str

    def percent(self, gflops: float, dtype: str) -> float:
        """``gflops`` in per cent of the ceiling for ``dtype``; NaN if that was not measured."""
        return 100.0 * gflops / self.gflops.get(dtype, float("nan"))

    def floor_ms(self, flops: float, moved: float, dtype: str) -> float:
        """The shortest possible time for these flops and bytes (the roofline)."""
        return max(flops / self.gflops.get(dtype, float("nan")) / 1e6, moved / self.copy_gbs / 1e6)

    def bound(self, flops: float, moved: float, dtype: str) -> str:
        """Which of the two sets :meth:`floor_ms`, "compute" or "memory"; empty if either is not known."""
        compute, memory = flops / self.gflops.get(dtype, float("nan")), moved / self.copy_gbs
        return "compute" if compute >= memory else "memory" if memory > compute else ""

    def __str__(self) -> str:
        rates = ", ".join(f"{rate:.0f} GF/s {dtype}" for dtype, rate in self.gflops.items())
        return f"{rates}, copy {self.copy_gbs:.1f} GB/s ({self.threads} threads; {self.source})"


def _best(run: Callable[[], object], seconds: float) -> float:
    """Shortest time of a call in seconds, measured for about ``seconds``: the ceiling is the undisturbed rate."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def _matmul_peak(dtype: torch.dtype, seconds: float) -> float:
    m, k, n = 1536, 1536, 1536
    x, w, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.zeros(n, dtype=dtype)
    product = lambda: torch.nn.functional.linear(x, w, b)  # noqa: E731
    rates = [2 * m * k * n / _best(product, seconds / 2) / 1e9]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        rates.append(
            2
            * m
            * k
            * n
            / _best(lambda: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""), seconds / 2)
            / 1e9
        )
    return max(rates)


def _torch_copy(seconds: float) -> float:
    source = torch.ones(64 * 2**20, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), seconds) / 1e9


def _gpu(seconds: float) -> Ceiling:
    """A GPU's rates, as matrix products and a copy of PyTorch reach them."""
    import torch.cuda as cuda

    def rate(run: Callable[[], object]) -> float:
        """Shortest time of ten calls in a row, in seconds."""

        def ten() -> None:
            for _ in range(10):
                run()
            cuda.synchronize()

        return _best(ten, seconds)

    gflops, n = {}, 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, w = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        gflops[name] = 10 * 2 * n**3 / rate(lambda x=x, w=w: x @ w) / 1e9
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = 10 * 2 * source.nbytes / rate(lambda: target.copy_(source)) / 1e9
    return Ceiling(gflops, copy, torch.get_num_threads(), "PyTorch's matrix products of 8192, on the GPU")


def measure(threads: int, seconds: float = 0.5, device: str = "cpu") -> Ceiling:
    """The ceilings on ``threads`` threads, or of the GPU, measured for about ``seconds`` each.

    Without the compiled module the rate of multiply-adds is that of oneDNN's best matrix product, which is lower;
    ``source`` says which.
    """
    if device == "cuda":
        return _gpu(seconds)
    try:
        from pyvit import _C

        names = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
        gflops = {dtype: _C.fma_peak(name, threads, seconds) for dtype, name in names.items()}
        return Ceiling(gflops, _C.copy_bandwidth(threads, seconds), threads, "register-only multiply-adds")
    except (ImportError, AttributeError) as error:
        gflops = {"fp32": _matmul_peak(torch.float32, seconds), "bf16": _matmul_peak(torch.bfloat16, seconds)}
        return Ceiling(
            gflops, _torch_copy(seconds), threads, f"oneDNN's matrix product, below the true ceiling; pyvit._C: {error}"
        )
