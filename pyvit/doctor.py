"""Checks of an installation: ``pyvit doctor``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyvit import library, ops, torch_private
from pyvit.dispatch import devices
from pyvit.dispatch.capabilities import BACKENDS, CAPABILITIES, absent
from pyvit.info import Info, info
from pyvit.testing import check_op

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"


@dataclass(frozen=True)
class Check:
    """``status`` is "pass", "fail" or "skipped"; ``advice`` says what to do, where there is something to do."""

    name: str
    status: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """The report of :func:`doctor`; ``print`` it. All of it belongs in a bug report."""

    checks: list[Check]
    info: Info

    @property
    def passed(self) -> bool:
        return all(check.status != FAIL for check in self.checks)

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=1)

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            lines.append(f"{check.status:<8} {check.name:<18} {check.found}")
            if check.advice:
                lines.append(f"{'':<27} -> {check.advice}")
        failed = sum(check.status == FAIL for check in self.checks)
        lines.append(f"{failed} of {len(self.checks)} checks failed" if failed else "no check failed")
        return "\n".join([*lines, "", str(self.info)])


def doctor() -> Report:
    """Check that the compiled library loads, that a kernel of each kind runs on each backend and agrees with float64,
    and that instruction set, threads and GPU are what they can be."""
    checks = [_library(), _private_names(), *_kernels(), _instruction_set(), _threads(), _gpu()]
    return Report(checks, info())


def _library() -> Check:
    name = "compiled library"
    if (problem := library.problem()) is not None:
        advice = (
            "unset it" if os.environ.get("PYVIT_NO_LIBRARY") == "1" else "pip install --force-reinstall, or make build"
        )
        return Check(name, FAIL, problem, advice)
    if (module := _extension_module()) is None:  # wheels have it for some versions of Python
        return Check(name, PASS, "loads, without pyvit._C", "only benchmarks need pyvit._C, to measure peak rates")
    return Check(name, PASS, f"loads; built by {module.compiler}")


def _extension_module() -> Any:
    """``pyvit._C``, or None: no operator needs it."""
    try:
        return importlib.import_module("pyvit._C")
    except ImportError:
        return None


def _private_names() -> Check:
    missing = torch_private.missing()
    advice = "slower stand-ins serve; please report it with this version of torch" if missing else ""
    return Check("torch", PASS, f"{torch.__version__}" + (f" lacks {', '.join(missing)}" if missing else ""), advice)


def _examples(dtype: torch.dtype, device: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]:
    """Operator -> function, tensors, options: a small call of each kind of kernel."""

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    heads = {name: r(2, 3, 37, 32) for name in "qkv"}
    window = {"qkv": r(2, 8, 8, 96), "bias_table": r(49, 1)}
    rows = {"x": r(5, 64), "weight": r(32, 64), "bias": r(32)}
    return {
        "flash_attention": (ops.flash_attention, heads, {"is_causal": True}),
        "window_attention": (ops.window_attention, window, {"window_size": 4, "shift_size": 2, "num_heads": 1}),
        "patch_embed": (ops.patch_embed, {"images": r(2, 3, 16, 16), "weight": r(16, 3, 8, 8), "bias": r(16)}, {}),
        "linear": (ops.linear, rows, {"activation": "gelu"}),
    }


def _kernels() -> Iterator[Check]:
    for backend in BACKENDS:
        if backend == "reference":
            continue
        name, device = f"backend {backend}", "cuda" if backend in ("cuda", "triton") else "cpu"
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            device = "cpu"
        why = absent("flash_attention", backend, device)
        if why is None and device == "cuda":
            why = devices.refused(backend, torch.float32) if devices.present() else "there is no GPU"
        if why is not None:
            yield Check(name, SKIPPED, why)
            continue
        wrong, right = [], []
        for dtype in (torch.float32, torch.bfloat16):
            for op, (function, tensors, options) in _examples(dtype, device).items():
                if backend not in CAPABILITIES[op]:
                    continue
                try:
                    _check(function, tensors, backend, options)
                    right.append(op)
                except Exception as error:  # whatever a broken installation raises
                    wrong.append(f"{op}, {dtype}: {type(error).__name__}: {error}")
        if wrong:
            yield Check(name, FAIL, "; ".join(wrong), "please report it with all of this output")
        else:
            yield Check(name, PASS, f"{', '.join(dict.fromkeys(right))} agree with float64, gradients too")


def _check(function: Callable[..., Any], tensors: dict[str, Any], backend: str, options: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        check_op(function, tensors, backend=backend, **options)


def _instruction_set() -> Check:
    name = "instruction set"
    if library.problem() is not None:
        return Check(name, SKIPPED, "no compiled library")
    chosen = str(torch.ops.pyvit.cpu_isa())
    found = chosen
    if (module := _extension_module()) is not None:
        has = [feature for feature, present in module.cpu_features().items() if present]
        found += f"; the processor has {', '.join(has) or 'none that pyvit looks for'}"
    if devices.cpu_isa(torch.bfloat16) == "amx":
        found += "; PyTorch's AMX kernels come first in bfloat16"
    if forced := os.environ.get("PYVIT_CPU_ISA"):
        return Check(name, PASS, f"{found}; PYVIT_CPU_ISA={forced} is set", "unset PYVIT_CPU_ISA to use the best")
    return Check(name, PASS, found)


def _threads() -> Check:
    threads, cpus = torch.get_num_threads(), usable_cpus()
    found = f"{threads} threads on {cpus} usable CPUs of {os.cpu_count()}"
    if variable := os.environ.get("OMP_NUM_THREADS"):
        found += f", OMP_NUM_THREADS={variable}"
    if threads > cpus:
        return Check(
            "threads", FAIL, found, f"set OMP_NUM_THREADS={cpus}: threads that wait for a CPU hold up all others"
        )
    fewer = variable is not None and threads < cpus
    return Check("threads", PASS, found, f"OMP_NUM_THREADS={cpus} would use all of them" if fewer else "")


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The logical processors that this process may use: by its affinity, and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        if (cgroup / "cpu.max").exists():  # version 2
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period")
            )
        if quota not in ("max", "-1"):
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count


def _gpu() -> Check:
    name, driver = "GPU", _driver()
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    )
    if not build:
        advice = "a torch for GPUs: https://pytorch.org/get-started/locally" if driver else ""
        return Check(name, SKIPPED, f"torch is built for CPUs{f'; {driver} is installed' if driver else ''}", advice)
    if not devices.present():
        if driver:
            return Check(name, FAIL, f"torch with {build} sees no GPU under {driver}", "see torch.cuda.init()'s error")
        return Check(name, SKIPPED, f"torch with {build} sees no GPU, and no driver is installed")
    try:
        triton = f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        triton = "no Triton"
    gpus = ", ".join(f"{gpu.name} ({gpu.arch})" for gpu in devices.present())
    refused = [
        f"{backend}: {why}"
        for backend in ("cuda", "triton")
        if (why := absent("flash_attention", backend, "cuda") or devices.refused(backend, torch.bfloat16)) is not None
    ]
    return Check(name, PASS, "; ".join([gpus, build, driver or "driver unknown", triton, *refused]))


def _driver() -> str:
    """The GPU driver of this machine, empty without one."""
    try:
        lines = Path("/proc/driver/nvidia/version").read_text().splitlines()
        return lines[0].removeprefix("NVRM version:").strip() if lines else "NVIDIA's driver"
    except OSError:
        return "AMD's driver" if Path("/dev/kfd").exists() else "NVIDIA's driver" if shutil.which("nvidia-smi") else ""
