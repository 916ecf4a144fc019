"""What ``benchmarks.gpu`` measures on: a GPU, or, for a rehearsal, the PTX interpreter of tests/ptx."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pyvit
from benchmarks import measure
from benchmarks.gpu_micro import Kernel

_REPOSITORY = Path(__file__).parent.parent
#: Exit status of a process that can no longer use the GPU.
LOST = 75
#: Versions that do not make a measurement another one.
ABOUT_ONLY = ("pyvit", "commit", "python")


def _said(*command: str) -> str:
    """The first line that ``command`` prints; empty where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=_REPOSITORY)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else ""


def _common() -> dict[str, str]:
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "pyvit": pyvit.__version__,
        "commit": _said("git", "rev-parse", "--short=12", "HEAD"),
    }


class Gpu:
    """The GPU that torch sees. Times are the GPU's own."""

    name, tensors, unit = "cuda", "cuda", "us"
    #: Processes that compile and run tests at a time.
    workers = max(1, min(8, (os.cpu_count() or 2) - 1))

    def versions(self) -> dict[str, str]:
        return {
            "gpu": torch.cuda.get_device_name(),
            **_common(),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(torch.backends.cudnn.version()),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }

    def properties(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        names = (
            "name",
            "major",
            "minor",
            "total_memory",
            "multi_processor_count",
            "L2_cache_size",
            "shared_memory_per_block_optin",
            "clock_rate",
            "memory_clock_rate",
        )
        return {name: getattr(found, name, None) for name in names}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        torch.backends.cuda.matmul.allow_tf32 = False
        yield

    def lost(self) -> str | None:
        """Why this process can no longer use the GPU (after an illegal access every call fails), or None."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None

    def milliseconds(self, run: Callable[[], object]) -> float:
        times = measure.interleave({"": run}, seconds=0.3, device="cuda", rounds=(5, 21), sample_ms=10.0)
        return times[""].median

    def rate(self, kernel: Kernel, steps: int = 512) -> float:
        """What ``kernel`` does per second, in its unit. Raises RuntimeError where it cannot run."""
        from torch.cuda import _utils

        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        if kernel.capability is not None and kernel.capability != found.major:
            raise RuntimeError(f"needs compute capability {kernel.capability}, this GPU has {found.major}")
        loaded = _utils._cuda_load_module(kernel.text, [kernel.name])[kernel.name]  # type: ignore[index]
        grid = kernel.blocks * found.multi_processor_count
        out = torch.empty(grid * kernel.threads, device="cuda")

        def run() -> None:
            loaded((grid, 1, 1), (kernel.threads, 1, 1), [out, steps], kernel.shared)

        return kernel.work * grid * steps / self.milliseconds(run) * 1e3

    def kernel_times(self, run: Callable[[], object], repeats: int = 10) -> dict[str, float]:
        """Microseconds of every kernel in one call of ``run``, by name."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(repeats):
                run()
            torch.cuda.synchronize()
        found = {}
        for event in recorded.key_averages():
            if event.device_type == DeviceType.CUDA and event.self_device_time_total:
                found[event.key] = event.self_device_time_total / repeats
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))


class Rehearsal:
    """Triton's kernels, compiled for a GPU and run by the PTX interpreter. It counts instructions; its times are of no
    use."""

    name, tensors, unit = "fake", "cpu", "instructions"
    workers = 1

    def __init__(self, arch: str = "sm_90") -> None:
        self.arch = arch
        self._launches: Any = None

    def versions(self) -> dict[str, str]:
        return {"gpu": f"none: PTX interpreter, {self.arch}", **_common()}

    def properties(self) -> dict[str, Any]:
        return {"name": self.versions()["gpu"]}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        from tests.ptx.launch import running

        with running(self.arch) as self._launches:
            yield

    def lost(self) -> str | None:
        return None

    def milliseconds(self, run: Callable[[], object]) -> float:
        return measure.interleave({"": run}, seconds=0.0, rounds=(1, 1), sample_ms=0.0)[""].median

    def rate(self, kernel: Kernel, steps: int = 1) -> float:
        """Results of one instruction issue: the work of a block per instruction that its warps issue."""
        from tests.ptx import machine
        from tests.ptx.program import parse

        out = torch.empty(kernel.threads)
        issued = machine.run(parse(kernel.text), [out, steps], [out], kernel.shared, 1)
        return kernel.work * steps / sum(issued.values())

    def kernel_times(self, run: Callable[[], object], repeats: int = 1) -> dict[str, float]:
        self._launches.issued.clear()
        run()
        return {name: float(sum(counts.values())) for name, counts in self._launches.issued.items()}


Device = Gpu | Rehearsal


def open_device(name: str) -> Device:
    return Gpu() if name == "cuda" else Rehearsal()


def tool(name: str, device: Device, out: Path) -> str | None:
    """The path of one of the CUDA toolkit's programs, on PATH or in its usual place; in a rehearsal, of its stand-in in
    ``out``."""
    if device.name == "fake":
        return str(out / name) if (out / name).exists() else None
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)
