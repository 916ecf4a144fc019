"""Energy counters: RAPL of the processor packages (Linux), NVML of an NVIDIA GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


def _rapl(powercap: Path) -> Callable[[], float]:
    """Joules of all packages. Raises OSError if there are none or they may not be read (often only root may)."""
    packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    if not packages:
        raise OSError("this machine shows no RAPL counters")
    limits = [int((path / "max_energy_range_uj").read_text()) for path in packages]
    last = [int((path / "energy_uj").read_text()) for path in packages]
    total = 0.0

    def joules() -> float:
        nonlocal total
        for i, path in enumerate(packages):
            now = int((path / "energy_uj").read_text())
            total += ((now - last[i]) % (limits[i] + 1)) * 1e-6  # the counter wraps
            last[i] = now
        return total

    return joules


def _nvml() -> Callable[[], float]:
    import pynvml
    import torch

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
    pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) * 1e-3


def counter(device: str, powercap: Path = _POWERCAP) -> tuple[Callable[[], float] | None, str]:
    """A function that returns joules since some moment, or None; and where they come from, or why there are none."""
    try:
        if device == "cuda":
            return _nvml(), "NVML"
        return _rapl(powercap), "RAPL, processor packages"
    except Exception as error:  # NVML's errors are of its own type
        return None, f"not measured: {error}"


def per_call(run: Callable[[], object], joules: Callable[[], float], device: str, seconds: float = 0.2) -> float:
    """Joules of one call, over calls of about ``seconds`` in total. The machine's idle power is included."""
    import torch

    count, begin, before = 0, time.perf_counter(), joules()
    while count == 0 or time.perf_counter() - begin < seconds:
        run()
        count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return (joules() - before) / count
