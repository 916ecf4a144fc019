"""What is installed, what is missing and how to install it. Does not initialise a GPU."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from pyvit import library, torch_private
from pyvit.dispatch.capabilities import BACKENDS, CAPABILITIES, absent
from pyvit.version import __version__

#: Optional packages: import name -> (extra that installs it, what it is for).
PACKAGES = {
    "triton": ("gpu", "Triton kernels"),
    "typer": ("cli", "command line"),
    "rich": ("cli", "tables and progress bars"),
    "accelerate": ("train", "training"),
    "datasets": ("train", "Hugging Face data sets"),
    "safetensors": ("train", "weights"),
    "sklearn": ("train", "digits, linear probes"),
    "matplotlib": ("train", "plots"),
    "tensorboard": ("train", "TensorBoard logs"),
    "tokenizers": ("train", "tokenizer files"),
    "pyarrow": ("embed", "parquet files"),
}


@dataclass(frozen=True)
class Info:
    """The report of :func:`info`; ``print`` it."""

    system: dict[str, str]
    backends: dict[str, str]
    operators: dict[str, str]
    packages: dict[str, str]
    advice: list[str]

    def __str__(self) -> str:
        lines = []
        for title, table in (
            ("pyvit", self.system),
            ("backends", self.backends),
            ("operators", self.operators),
            ("packages", self.packages),
        ):
            lines.append(title)
            lines += [f"  {key:<28} {value}" for key, value in table.items()]
        return "\n".join(lines + [f"* {line}" for line in self.advice])

    __repr__ = __str__


def info() -> Info:
    """Versions, the processor's instruction set, backends and why each is missing, the backends of each operator,
    optional packages.
    """
    advice = []
    system = {"version": f"{__version__} in {Path(__file__).parent}", "python": platform.python_version(), **setting()}
    problem = library.problem()
    system["compiled library"] = (
        f"{library.PATH} ({library.PATH.stat().st_size / 1e6:.1f} MB)" if problem is None else f"not in use: {problem}"
    )
    if problem is not None and os.environ.get("PYVIT_NO_LIBRARY") != "1":
        advice.append(
            "without the compiled library operators run as PyTorch's, some of them naively; 'pip install .' or "
            "'make build' builds it"
        )
    elif problem is None:
        archs = torch.ops.pyvit.cuda_archs()
        system["CUDA in the library"] = f"for {archs}" if archs else "no (built without nvcc)"
    if lacking := torch_private.missing():
        system["torch lacks"] = f"{', '.join(lacking)}: slower stand-ins serve"
    system["CUDA in torch"] = torch.version.cuda or (
        f"ROCm {torch.version.hip}" if torch.version.hip else "no, a CPU build"
    )
    backends = {}
    for backend in BACKENDS:
        why = {device: absent("flash_attention", backend, device) for device in ("cpu", "cuda")}
        able = [device for device, reason in why.items() if reason is None]
        backends[backend] = (
            f"on {', '.join(able)} tensors" if able else str(why["cuda" if backend in ("cuda", "triton") else "cpu"])
        )
    operators = {op: _served(op) for op in CAPABILITIES}
    packages, missing = {}, dict[str, list[str]]()
    for name, (extra, use) in PACKAGES.items():
        found = importlib.util.find_spec(name) is not None
        packages[name] = "installed" if found else f"missing: {use}"
        if not found and (extra != "gpu" or torch.version.cuda or torch.version.hip):
            missing.setdefault(extra, []).append(name)
    for extra, names in missing.items():
        uses = dict.fromkeys(PACKAGES[name][1] for name in names)
        advice.append(f"pip install 'pyvit-kernels[{extra}]' for {', '.join(uses)} ({', '.join(names)})")
    return Info(system, backends, operators, packages, advice)


def setting() -> dict[str, str]:
    """Everything that affects a CPU's rounding: torch and its threads, the processor, and pyvit's settings."""
    found = {
        "pyvit": __version__,
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "processor": _processor(),
        "kernels' instruction set": _isa(),
    }
    names = ("PYVIT_BACKEND", "PYVIT_CPU_ISA", "PYVIT_LINEAR", "PYVIT_NO_LIBRARY", "TRITON_INTERPRET")
    return found | {name: os.environ[name] for name in names if os.environ.get(name)}


def _served(op: str) -> str:
    able = [b for b in BACKENDS if absent(op, b, "cpu") is None and b in CAPABILITIES[op]]
    dtypes = {b: ", ".join(str(d).removeprefix("torch.") for d in CAPABILITIES[op][b].dtypes) for b in able}
    return "; ".join(f"{b} ({dtypes[b]})" for b in able if b != "reference") or "reference alone"


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} logical cores"


def _isa() -> str:
    return str(torch.ops.pyvit.cpu_isa()) if library.problem() is None else "none (no compiled library)"
