"""The machine of a run: its name, what a reader needs to judge the times, and whether it is quiet enough to measure."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import pyvit
from benchmarks.ceiling import Ceiling

#: A run is refused if the load average is more than this part of the cores,
MOST_LOAD = 0.5
#: or if the slowest tenth of equal pieces of work takes more than this many times the fastest tenth.
MOST_SPREAD = 1.25

#: AMD's families of processors: (family, lowest model, highest model) -> architecture.
_ZEN = (
    (23, 0x00, 0x2F, "Zen"), (23, 0x30, 0xFF, "Zen 2"), (25, 0x00, 0x0F, "Zen 3"), (25, 0x10, 0x1F, "Zen 4"),
    (25, 0x20, 0x5F, "Zen 3"), (25, 0x60, 0xAF, "Zen 4"), (26, 0x00, 0xFF, "Zen 5"),
)  # fmt: skip


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def architecture(info: dict[str, str]) -> str:
    """Of AMD's processors, whose names often do not tell it; else empty."""
    if info.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    return next((name for f, low, high, name in _ZEN if f == family and low <= model <= high), "")


def processor() -> str:
    """The processor's name, with AMD's architecture."""
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    zen = architecture(info)
    return f"{name} ({zen})" if zen else name


def slug(device: str = "cpu") -> str:
    """The machine's folder among the results: ``amd-epyc-zen4-2-cores``."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*$|\bProcessor\b|\d+-Core", " ", processor()).replace("Zen ", "Zen")
        name += f" {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _revision() -> str:
    """The git revision of the checkout, with "+" if files are changed; empty outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if changed else "")


def describe(ceiling: Ceiling | None, device: str = "cpu", **more: object) -> dict[str, Any]:
    """What results.json holds of the machine and the run; ``more`` is added."""
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    about: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name in wanted if name in flags],
        "system": " ".join([platform.system(), platform.release(), *platform.libc_ver()]).strip(),
        "device": device,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyvit": pyvit.__version__,
        "revision": _revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    if ceiling is not None:
        about["ceiling"] = {"gflops": ceiling.gflops, "copy_gbs": ceiling.copy_gbs, "source": ceiling.source}
    return about | more


def lines(about: dict[str, Any]) -> list[str]:
    """The first lines of a report, from :func:`describe`'s data."""
    found = [
        *([about["gpu"]] if "gpu" in about else []),
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads",
        f"torch {about['torch']}, Python {about['python']}, pyvit {about['pyvit']}"
        + (f" ({about['revision']})" if about.get("revision") else ""),
    ]
    if "ceiling" in about:
        c = about["ceiling"]
        found.append(f"ceiling: {Ceiling(c['gflops'], c['copy_gbs'], about['threads'], c['source'])}")
    found += [str(about[key]) for key in ("date",) if about.get(key)]
    found += [f"{key}: {about[key]}" for key in ("command", "energy", "busy") if about.get(key)]
    return found


def _equal_work() -> Callable[[], object]:
    a = torch.randn(384, 384)
    return lambda: a @ a


def busy(
    work: Callable[[], object] | None = None,
    load: Callable[[], Sequence[float]] | None = None,
    seconds: float = 0.5,
) -> str:
    """Why this machine is too busy to measure, in words; empty if it is quiet.

    Looks at the load average of the last minute, and times equal pieces of ``work`` (a matrix product) on all threads.
    """
    found, cores = [], os.cpu_count() or 1
    load = load or getattr(os, "getloadavg", lambda: (0.0,))  # Windows has none
    average = load()[0]
    if average > MOST_LOAD * cores:
        found.append(f"the load average is {average:.1f} on {cores} cores")
    run = work or _equal_work()
    for _ in range(10):
        run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 20 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    tenths = statistics.quantiles(times, n=10)
    if tenths[-1] > MOST_SPREAD * tenths[0]:
        found.append(f"equal matrix products took {tenths[0]:.2f} to {tenths[-1]:.2f} ms (10th and 90th percentile)")
    return "; ".join(found)


def command(arguments: Sequence[str] | None = None) -> str:
    """The command line of this run."""
    return " ".join(["pyvit bench", *(sys.argv[1:] if arguments is None else arguments)])
