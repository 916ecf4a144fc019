"""How the native code is built on each operating system, as data, and the ninja file that says so.

Two artefacts: the operators' library in ``pyvit/lib`` and ``pyvit._C`` (pybind11). The library needs no Python and uses
only LibTorch's stable ABI at 2.10: one file serves every torch >= 2.10 and every Python. ``setup.py`` builds with what
the machine has, ``packaging/wheels.py`` for other machines too.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

#: The oldest torch whose stable ABI the library needs, as its headers write versions.
TORCH_TARGET = "0x020a000000000000"
#: Machine code for the first architecture of a major version runs on its later ones, PTX on those after the last. No
#: kernel uses an architecture's own features: code for them ("9.0a") would run nowhere else.
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"

_EXPORTS = f"-Wl,--version-script={CSRC / 'exports.map'}"


@dataclass(frozen=True)
class System:
    """An operating system's names and flags."""

    library: str  # pyvit/library.py knows it too
    compilers: tuple[str, ...]  # the first one found, unless CXX names another
    compile: tuple[str, ...]
    library_link: tuple[str, ...]  # before the objects
    module_link: tuple[str, ...]
    runtime: tuple[str, ...]  # after the objects: the C++ library


#: By ``sys.platform``. Threads are torch's on all of them.
SYSTEMS = {
    "linux": System(
        "libpyvit_ops.so",
        ("g++", "c++", "clang++"),
        ("-fPIC", "-fvisibility=hidden"),
        ("-shared", "-Wl,-z,defs", _EXPORTS),
        ("-shared", _EXPORTS),
        # Before torch, which carries parts of it: a reference bound to those would tie the library to this torch.
        ("-lstdc++", "-lpthread", "-ldl"),
    ),
    "darwin": System(
        "libpyvit_ops.dylib",
        ("clang++", "c++"),
        ("-fPIC", "-fvisibility=hidden"),
        ("-dynamiclib",),
        ("-bundle", "-undefined", "dynamic_lookup"),
        (),
    ),
    # The kernels use vector extensions that Microsoft's compiler lacks; clang++ has them, for the same ABI.
    "win32": System(
        "pyvit_ops.dll",
        ("clang++",),
        ("-DNOMINMAX", "-D_CRT_SECURE_NO_WARNINGS"),
        ("-shared",),
        ("-shared",),
        (),
    ),
}

# -fno-math-errno lets sqrt and rounding inline; contraction gives the multiply-adds. No -ffast-math: NaN and infinity
# keep their meaning.
CXXFLAGS = ("-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-unknown-warning-option", "-fno-math-errno")
CXXFLAGS += ("-ffp-contract=fast", *shlex.split(os.environ.get("CXXFLAGS", "")))
KERNEL_FLAGS = ("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-pass-failed")

_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
PORTABLE: dict[str, tuple[str, ...]] = {"portable": ()}
#: Machine -> the instruction sets that each kernel is compiled for, and their flags. csrc/cpu/isa.cpp chooses. Other
#: machines have PORTABLE alone.
ISAS = {
    "x86_64": {
        "avx512bf16": (*_AVX512, "-mavx512bf16"),
        "avx512": _AVX512,
        "avx2": ("-march=x86-64-v3",),
        **PORTABLE,
    }
}
#: The same of the kernels on int8 weights. Their results are the same on all of them: without contraction, which the
#: portable set has no instruction for.
_UNCONTRACTED = ("-ffp-contract=off",)
INT8_PORTABLE: dict[str, tuple[str, ...]] = {"int8_portable": _UNCONTRACTED}
INT8_ISAS = {
    "x86_64": {
        "int8_avx512vnni": (*_AVX512, "-mavx512vnni", *_UNCONTRACTED),
        "int8_avx512": (*_AVX512, *_UNCONTRACTED),
        "int8_avxvnni": ("-march=x86-64-v3", "-mavxvnni", *_UNCONTRACTED),
        "int8_avx2": ("-march=x86-64-v3", *_UNCONTRACTED),
        **INT8_PORTABLE,
    }
}
COMMON_UNITS = ("isa", "parallel")
TORCH_UNITS = sorted(path.stem for path in (CSRC / "torch").glob("*.cpp") if path.stem != "cuda")
# Each once per instruction set. What takes longest to compile comes first, so that all cores are busy to the end.
KERNEL_UNITS = sorted(
    (path.stem for path in (CSRC / "cpu").glob("*.cpp") if path.stem not in COMMON_UNITS),
    key=lambda unit: (not unit.startswith("window_attention"), unit),
)


@dataclass(frozen=True)
class Build:
    """One run of ninja.

    ``modules`` maps each ``pyvit._C`` to the flags that compile it (its Python's headers) and those that link it.
    """

    folder: Path
    library: Path
    modules: Mapping[Path, tuple[Sequence[str], Sequence[str]]]
    cxx: str
    torch_includes: Sequence[str]
    libraries: Sequence[str]
    system: str
    machine: str
    link: str = ""  # the command that links, if not cxx
    runtime: Sequence[str] = ()  # what is linked for the C++ library, if not the system's default
    archs: Sequence[str] = ()

    def run(self) -> None:
        for path in (self.folder, self.library.parent, *(module.parent for module in self.modules)):
            path.mkdir(parents=True, exist_ok=True)
        lines = [f'  m.def("{name}{schema}");' for name, schema in _schemas().items()]
        _write(self.folder / "schemas.inc", "\n".join(lines) + "\n")
        digests = runpy.run_path(str(CSRC / "cuda/digests.py"))["digests"]() if self.archs else {}
        version = subprocess.run([*shlex.split(self.cxx), "--version"], capture_output=True, text=True, check=True)
        facts = {
            "COMPILER": version.stdout.splitlines()[0],
            "CUDA_ARCHS": ";".join(self.archs),
            "CUDA_DIGESTS": ";".join(f"{op}={digest}" for op, digest in digests.items()),
        }
        _write(self.folder / "build_facts.h", "".join(f'#define PYVIT_{k} "{v}"\n' for k, v in facts.items()))
        _write(self.folder / "build.ninja", self.ninja())
        command = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([*command, "-C", str(self.folder), *(["-j", jobs] if jobs else [])], check=True)

    def ninja(self) -> str:
        """The text of build.ninja."""
        system = SYSTEMS[self.system]
        text = [
            f"cxx = {self.cxx}",
            f"link = {self.link or self.cxx}",
            f"flags = {' '.join((*CXXFLAGS, *system.compile))}",
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = nvcc -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $link $flags -o $out $in $libs",
        ]

        def compiled(output: str, source: str, flags: Sequence[str], rule: str = "cxx") -> str:
            target = self.folder / output
            flags = ("$flags", *flags) if rule == "cxx" else flags
            if "ziglang" in self.cxx:  # has its own names of processors
                flags = [re.sub(r"^-march=x86-64-", "-march=x86_64_", flag) for flag in flags]
            text.append(f"build {_path(target)}: {rule} {_path(CSRC / source)}\n  flags = {' '.join(flags)}")
            return _path(target)

        def linked(target: Path, objects: Sequence[str], flags: Sequence[str], libraries: Sequence[str]) -> None:
            text.append(
                f"build {_path(target)}: link {' '.join(objects)}\n"
                f"  flags = {' '.join(flags)}\n  libs = {' '.join(libraries)}"
            )

        runtime = self.runtime or system.runtime
        generated = f"-I{self.folder}"
        stable = [generated, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-isystem {p}" for p in self.torch_includes)]
        ops = [compiled(f"torch_{unit}.o", f"torch/{unit}.cpp", stable) for unit in TORCH_UNITS]
        cuda_libraries: list[str] = []
        if self.archs:
            flags = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode(self.archs)]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                ops.append(compiled(f"{source.stem}.cuda.o", f"cuda/{source.name}", flags, "nvcc"))
            ops.append(compiled("torch_cuda.o", "torch/cuda.cpp", stable))
            cuda_libraries = [*_cuda_library_paths(), "-lcudart_static", "-ldl", "-lrt"]
        isas = ISAS.get(self.machine, PORTABLE)
        int8_isas = INT8_ISAS.get(self.machine, INT8_PORTABLE)
        kernels = {
            unit: [
                compiled(f"{unit}.{isa}.o", f"cpu/{unit}.cpp", [*KERNEL_FLAGS, *flags, f"-DPYVIT_ISA={isa}"])
                for isa, flags in (int8_isas if "int8" in unit else isas).items()
            ]
            for unit in KERNEL_UNITS
        }
        common = {unit: compiled(f"{unit}.o", f"cpu/{unit}.cpp", []) for unit in COMMON_UNITS}
        for i, (module, (flags, libraries)) in enumerate(self.modules.items()):
            made = compiled(f"module{i}.o", "module.cpp", ["-O1", generated, *flags])
            linked(
                module,
                [made, common["isa"], *kernels["peak"], *kernels["int8_peak"]],
                system.module_link,
                [*libraries, *runtime],
            )
        objects = [*ops, *(made for unit in kernels.values() for made in unit), *common.values()]
        libraries = [*runtime, *self.libraries, *cuda_libraries]
        linked(self.library, objects, system.library_link, libraries)
        return "\n".join(text) + "\n"


def machine() -> str:
    """The processor at hand, as :data:`ISAS` calls it."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def compiler() -> str | None:
    """The C++ compiler of this machine, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else SYSTEMS[sys.platform].compilers
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def cuda_archs() -> list[str]:
    """Compute capabilities to build for, such as "9.0" or "12.0+PTX"; empty without CUDA."""
    wanted = os.environ.get("PYVIT_CUDA", "")
    if wanted == "0" or sys.platform != "linux":
        return []
    if shutil.which("nvcc") is None:
        if wanted == "1":
            sys.exit("PYVIT_CUDA=1, but nvcc is not on PATH")
        return []
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).replace(" ", ";").split(";")


def gencode(archs: Sequence[str]) -> list[str]:
    flags = []
    for arch in archs:
        code = arch.removesuffix("+PTX").replace(".", "")
        flags += [f"-gencode=arch=compute_{code},code=sm_{code}"]
        if arch.endswith("+PTX"):
            flags += [f"-gencode=arch=compute_{code},code=compute_{code}"]
    return flags


def _cuda_library_paths() -> list[str]:
    """Where the toolkit's libraries are, by nvcc's own account: the command on PATH may be a wrapper elsewhere."""
    said = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    return re.findall(r'"(-L[^"]+)"', next(line for line in said.splitlines() if "LIBRARIES=" in line))


def _schemas() -> dict[str, str]:
    """SCHEMAS of pyvit/schemas.py, without importing the package."""
    scope: dict[str, object] = {}
    source = (ROOT / "pyvit/schemas.py").read_text()
    exec(compile(ast.parse(source), "schemas.py", "exec"), scope)
    return scope["SCHEMAS"]  # type: ignore[return-value]


def _path(path: Path) -> str:
    """As ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _write(path: Path, content: str) -> None:
    """Only when it changed, so that ninja rebuilds nothing in vain."""
    if not path.exists() or path.read_text() != content:
        path.write_text(content)
