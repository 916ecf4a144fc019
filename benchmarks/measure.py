"""Interleaved timing: all contenders run in every round, in alternating order, and ratios are computed within rounds.

A machine's clock and load drift over seconds; contenders of the same round see the same machine.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one sample per round."""

    samples: tuple[float, ...]

    def quantile(self, p: float) -> float:
        ordered = sorted(self.samples)
        at = p * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)


def ratio(baseline: Timing, other: Timing) -> float:
    """Speedup of ``other`` over ``baseline``: the median over rounds of baseline / other."""
    return statistics.median(b / o for b, o in zip(baseline.samples, other.samples, strict=True))


def _sample(run: Run, repeats: int, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) * 1e3 / repeats


def interleave(
    contenders: dict[str, Run],
    *,
    seconds: float,
    device: str = "cpu",
    rounds: tuple[int, int] = (5, 101),
    sample_ms: float = 2.0,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Time the contenders round by round for about ``seconds`` in total.

    Args:
        contenders: name to a call without arguments.
        rounds: minimum and maximum number of rounds, regardless of ``seconds``.
        sample_ms: short calls are repeated within a sample until it lasts about this long.
        rest: seconds of sleep before each sample, so that the previous contender's threads have stopped spinning.
    """
    if not contenders:
        return {}
    repeats, spent = {}, 0.0
    for name, run in contenders.items():
        run()
        once = _sample(run, 1, device)
        repeats[name] = max(1, min(10_000, round(sample_ms / max(once, 1e-4))))
        spent += once * repeats[name]
    count = int(min(max(seconds * 1e3 / spent, rounds[0]), rounds[1]))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for i in range(count):
            for name in order if i % 2 == 0 else reversed(order):
                if rest:
                    time.sleep(rest)
                samples[name].append(_sample(contenders[name], repeats[name], device))
            order = [*order[1:], order[0]]  # so that no contender always follows the same one
    finally:
        gc.enable()
    return {name: Timing(tuple(s)) for name, s in samples.items()}


def _status_kib(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


def peak_memory(run: Run, device: str = "cpu") -> float:
    """Largest increase of memory in MiB during one call, results included; NaN if it cannot be measured.

    On a CPU this is the resident set (Linux), so that memory a kernel allocates itself is included.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # resets the peak
        before = _status_kib("VmRSS")
        run()
        return max(_status_kib("VmHWM") - before, 0) / 1024
    except (OSError, AttributeError):
        return math.nan
