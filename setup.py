"""Build of the two native artefacts with ninja: ``pyvit/lib/libpyvit_ops.so`` (torch operators) and ``pyvit._C``
(pybind11).

The operators need no Python and use only LibTorch's stable ABI at 2.10: one binary serves every torch >= 2.10 and every
Python. CUDA kernels are compiled in when nvcc is found, whether or not the torch at hand is a CUDA build.

Environment: PYVIT_CUDA=0|1 (forbid or require CUDA), TORCH_CUDA_ARCH_LIST (default DEFAULT_ARCHS below), MAX_JOBS,
CXX.
"""

import ast
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
#: Machine code for the first architecture of a major version runs on its later ones, PTX on those after the last. No
#: kernel uses an architecture's own features: code for them ("9.0a") would run nowhere else.
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# -fno-math-errno lets sqrt and rounding inline; contraction gives the multiply-adds. No -ffast-math: NaN and infinity
# keep their meaning.
CXXFLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
]
KERNEL_FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
ISAS = {"avx512bf16": [*AVX512, "-mavx512bf16"], "avx512": AVX512, "avx2": ["-march=x86-64-v3"]} if X86 else {}
ISAS["portable"] = []
COMMON_UNITS = ["isa", "parallel"]
# Each once per instruction set. What takes longest to compile comes first, so that all cores are busy to the end.
KERNEL_UNITS = sorted(
    (path.stem for path in (CSRC / "cpu").glob("*.cpp") if path.stem not in COMMON_UNITS),
    key=lambda unit: (not unit.startswith("window_attention"), unit),
)


def schemas() -> dict[str, str]:
    """SCHEMAS of pyvit/schemas.py, without importing the package."""
    scope: dict[str, object] = {}
    source = (ROOT / "pyvit/schemas.py").read_text()
    exec(compile(ast.parse(source), "schemas.py", "exec"), scope)
    return scope["SCHEMAS"]  # type: ignore[return-value]


def cuda_archs() -> list[str]:
    """Compute capabilities to build for, such as "9.0" or "12.0+PTX"; empty without CUDA."""
    wanted = os.environ.get("PYVIT_CUDA", "")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if wanted == "0" or not sources:
        return []
    if shutil.which("nvcc") is None:
        if wanted == "1":
            sys.exit("PYVIT_CUDA=1, but nvcc is not on PATH")
        return []
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).replace(" ", ";").split(";")


def cuda_library_paths() -> list[str]:
    """Where the toolkit's libraries are, by nvcc's own account: the command on PATH may be a wrapper elsewhere."""
    said = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    return re.findall(r'"(-L[^"]+)"', next(line for line in said.splitlines() if "LIBRARIES=" in line))


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        code = arch.removesuffix("+PTX").replace(".", "")
        flags += [f"-gencode=arch=compute_{code},code=sm_{code}"]
        if arch.endswith("+PTX"):
            flags += [f"-gencode=arch=compute_{code},code=compute_{code}"]
    return flags


class Ninja(build_ext):
    """Writes one build.ninja for both artefacts and runs it."""

    def run(self) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
            sys.exit(f"pyvit needs torch >= 2.10 (stable ABI), found {torch.__version__}")
        in_tree = self.editable_mode or self.inplace
        build = ROOT / "build/native" if in_tree else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        lines = [f'  m.def("{name}{schema}");' for name, schema in schemas().items()]
        write(build / "schemas.inc", "\n".join(lines) + "\n")
        destination = ROOT if in_tree else Path(self.build_lib).resolve()
        library = destination / "pyvit/lib/libpyvit_ops.so"
        module = destination / "pyvit" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
        for path in (library, module):
            path.parent.mkdir(parents=True, exist_ok=True)
        write(
            build / "build.ninja",
            self.rules(build, include_paths(), Path(torch.__file__).parent / "lib", library, module),
        )
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([*ninja(), "-C", str(build), *(["-j", jobs] if jobs else [])], check=True)

    def rules(self, build: Path, torch_includes: list[str], torch_lib: Path, library: Path, module: Path) -> str:
        import pybind11

        archs = cuda_archs()
        cxx = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
        digests = runpy.run_path(str(CSRC / "cuda/digests.py"))["digests"]() if archs else {}
        said = ";".join(f"{op}={digest}" for op, digest in digests.items())
        define = f"-DPYVIT_CUDA_ARCHS='\"{';'.join(archs)}\"' -DPYVIT_COMPILER='\"{version}\"'"
        includes = " ".join(f"-isystem {p}" for p in torch_includes)
        rule = (
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            "rule nvcc\n  command = nvcc -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            "rule link\n  command = $cxx -shared -o $out $in $libs\n"
        )
        text = [f"cxx = {cxx}", f"flags = {' '.join(CXXFLAGS)}", rule]
        stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{build}", includes, define]
        about = [*stable, f"-DPYVIT_CUDA_DIGESTS='\"{said}\"'"]  # cpu.cpp alone is compiled again when a kernel changes
        ops = [
            target(build / f"torch_{unit}.o", CSRC / f"torch/{unit}.cpp", about if unit == "cpu" else stable, text)
            for unit in ("cpu", "cpu_internal", "prepacked", "sdpa_override")
        ]
        # libstdc++ first: torch carries parts of it, and a reference bound to those would tie the library to this
        # torch.
        libs = [
            "-lstdc++",
            f"-L{torch_lib}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-Wl,--no-undefined",
            "-Wl,-z,defs",
            "-lpthread",
        ]
        if archs:
            flags = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode(archs)]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                ops.append(target(build / f"{source.stem}.cuda.o", source, flags, text, "nvcc"))
            ops.append(target(build / "torch_cuda.o", CSRC / "torch/cuda.cpp", stable, text))
            libs += [*cuda_library_paths(), "-lcudart_static", "-ldl", "-lrt"]
        python = ["-O1", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", define]
        module_object = target(build / "module.o", CSRC / "module.cpp", python, text)
        kernels = []
        for unit in KERNEL_UNITS:
            for name, extra in ISAS.items():
                flags = [*KERNEL_FLAGS, *extra, f"-DPYVIT_ISA={name}"]
                kernels.append(target(build / f"{unit}.{name}.o", CSRC / f"cpu/{unit}.cpp", flags, text))
        kernels += [target(build / f"{unit}.o", CSRC / f"cpu/{unit}.cpp", [], text) for unit in COMMON_UNITS]
        text.append(f"build {library}: link {' '.join([*ops, *kernels])}\n  libs = {' '.join(libs)}")
        text.append(f"build {module}: link {' '.join([module_object, *kernels])}\n  libs = -lpthread")
        return "\n".join(text) + "\n"

    def get_outputs(self) -> list[str]:
        return []


def target(output: Path, source: Path, flags: list[str], text: list[str], rule: str = "cxx") -> str:
    prefix = "$flags " if rule == "cxx" else ""
    text.append(f"build {output}: {rule} {source}\n  flags = {prefix}{' '.join(flags)}")
    return str(output)


def write(path: Path, content: str) -> None:
    """Only when it changed, so that ninja rebuilds nothing in vain."""
    if not path.exists() or path.read_text() != content:
        path.write_text(content)


def ninja() -> list[str]:
    return ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]


setup(ext_modules=[Extension("pyvit._C", sources=[])], cmdclass={"build_ext": Ninja})
