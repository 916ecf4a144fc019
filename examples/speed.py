"""Time the same step with and without pyvit. Every example ends with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def compare(what: str, without: Callable[[], object], with_pyvit: Callable[[], object], rounds: int = 7) -> float:
    """Print the median milliseconds of both steps and the median ratio, which is returned.

    The steps run in turns, so that other load on the machine slows both.
    """
    steps = {"without": without, "with": with_pyvit}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # the first call allocates, and compiles on a GPU
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            _wait()
            began = time.perf_counter()
            step()
            _wait()
            times[name].append(1e3 * (time.perf_counter() - began))
    ratio = statistics.median(a / b for a, b in zip(times["without"], times["with"], strict=True))
    ms = {name: statistics.median(values) for name, values in times.items()}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"speed of {what}, {where}: {ms['without']:.1f} ms without pyvit, {ms['with']:.1f} ms with ({ratio:.2f}x)")
    return ratio


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
