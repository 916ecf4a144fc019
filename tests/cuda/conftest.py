"""The CUDA kernels on a CPU: built with g++ and sanitizers against csrc/cuda/emulation, and run in a worker process."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from pyvit.dispatch import capabilities
from pyvit.schemas import SCHEMAS

# The package's attributes of these names are the functions.
flash_attention, flash_attention_varlen, window_attention, patch_embed = (
    importlib.import_module(f"pyvit.ops.{name}")
    for name in ("flash_attention", "flash_attention_varlen", "window_attention", "patch_embed")
)

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda-emulation"
CXX = os.environ.get("CXX", "g++")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Cutting work into few, small parts sends small problems down the ways of large ones. -O1: the optimiser's time is most
# of the build's.
FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -fno-omit-frame-pointer "
    f"-DPYVIT_TARGET_BLOCKS=6 -DPYVIT_LEAST_SUM=8 -I{CUDA}"
)


def _ninja_file() -> str:
    torch_home = Path(torch.__file__).parent
    includes = " ".join(f"-isystem {path}" for path in include_paths())
    stable = f"-DPYVIT_CUDA_DISPATCH=CPU -DTORCH_TARGET_VERSION=0x020a000000000000 {includes} -I{BUILD}"
    lines = [
        "rule cxx",
        f"  command = {CXX} -x c++ {FLAGS} {SANITIZE} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} -shared {SANITIZE} -o $out $in -L{torch_home}/lib -ltorch -ltorch_cpu -lc10",
    ]
    sources = [
        *sorted(CUDA.glob("*.cu")),
        *sorted((CUDA / "emulation").glob("*.cpp")),
        Path(__file__).with_name("probe.cu"),
    ]
    objects = []
    for source in [ROOT / "csrc/torch/cuda.cpp", *sources]:
        extra = stable if source.parent.name == "torch" else "-O2" if source.parent.name == "emulation" else ""
        objects.append(f"{BUILD / source.stem}.o")
        lines.append(f"build {objects[-1]}: cxx {source}\n  extra = {extra}")
    lines.append(f"build {BUILD / 'libemulated.so'}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_emulation() -> Path:
    """The library that registers torch.ops.pyvit_cuda for CPU tensors; ninja keeps it up to date."""
    BUILD.mkdir(parents=True, exist_ok=True)
    contents = {
        "schemas.inc": "".join(f'm.def("{name}{schema}");\n' for name, schema in SCHEMAS.items()),
        "build.ninja": _ninja_file(),
    }
    for name, content in contents.items():
        path = BUILD / name
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
    done = subprocess.run(["ninja", "-C", str(BUILD)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulation does not build:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return BUILD / "libemulated.so"


def _runtime(name: str) -> str:
    return subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


class Emulator:
    """A worker process with the sanitizers preloaded. An error that a sanitizer finds ends the process and becomes a
    RuntimeError here.
    """

    def __init__(self, library: Path) -> None:
        preload = ":".join(map(_runtime, ("libasan.so", "libubsan.so", "libstdc++.so")))
        # New memory is filled with NaN, so that elements a kernel does not write are noticed.
        options = "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
        self._environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"}
        self._command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(library)]
        self._process: subprocess.Popen[bytes] | None = None
        self._seeds = itertools.count(1)

    def _request(self, *request: Any) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
            )
        try:
            pickle.dump(request, self._process.stdin)  # type: ignore[arg-type]
            self._process.stdin.flush()  # type: ignore[union-attr]
            kind, value = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (BrokenPipeError, EOFError):
            errors = self._process.communicate()[1].decode(errors="replace")
            self._process = None
            raise RuntimeError(f"the worker ended: {errors[:6000]}") from None
        if kind == "error":
            raise RuntimeError(value)
        return value

    def op(self, name: str, *args: Any, seed: int | None = None) -> Any:
        """torch.ops.pyvit_cuda.<name>(*args), with a new random order of threads."""
        return self._request("op", name, args, next(self._seeds) if seed is None else seed)

    def call(self, function: str, *args: Any) -> Any:
        """Call an extern "C" function of the library. Tensors are passed as pointers and returned as they are
        afterwards, with the returned text.
        """
        return self._request("call", function, args, next(self._seeds))

    def skip_barrier(self, site: str) -> None:
        """Leave out the barrier at "file:line"; "" for none."""
        file, _, line = site.partition(":")
        self.call("pyvit_emulation_skip", file.encode(), int(line or 0))

    def limit_shared(self, limit: int = 163 << 10) -> None:
        """How many bytes of shared memory a block may have; by default as on sm_80."""
        self.call("pyvit_emulation_limit", limit)

    def launches(self) -> list[tuple[str, int, int]]:
        """Names, threads and bytes of shared memory of the launches since pyvit_emulation_forget_sites."""
        lines = self.call("pyvit_emulation_launches")[0].splitlines()
        return [(name, int(threads), int(shared)) for name, threads, shared in (line.split(";") for line in lines)]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    for tool in (CXX, "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"the emulation is built with {CXX} and ninja; {tool} is not on PATH")
    emulator = Emulator(build_emulation())
    yield emulator
    emulator.close()


@pytest.fixture
def cuda_on_host(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """pyvit.ops serve backend="cuda" on CPU tensors, through the emulation: contract, capabilities and autograd are the
    real ones."""
    monkeypatch.setitem(capabilities.MISSING, ("cuda", "cpu"), None)
    monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})
    for operator in (
        flash_attention.ATTENTION,
        flash_attention.ATTENTION_BACKWARD,
        flash_attention_varlen.VARLEN,
        flash_attention_varlen.VARLEN_BACKWARD,
        window_attention.WINDOW,
        window_attention.WINDOW_BACKWARD,
        patch_embed.PATCH,
        patch_embed.PATCH_BACKWARD,
    ):
        monkeypatch.setitem(operator._kernels, "cuda", functools.partial(_emulated, emulator, operator.name))
    return emulator


@pytest.fixture
def least_shared_memory(emulator: Emulator) -> Iterator[None]:
    """Blocks have as little shared memory as on any GPU that the kernels are built for."""
    emulator.limit_shared(99 << 10)
    yield
    emulator.limit_shared()


def _emulated(emulator: Emulator, name: str, *args: Any) -> Any:
    return emulator.op(name, *(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
