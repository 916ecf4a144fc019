"""Wheels and the source distribution, into dist/: ``make wheel [ARGS="linux-x86_64 ..."]``.

A wheel is the pure Python wheel with the compiled library and one ``pyvit._C`` for each Python added, so that one file
serves every Python and every torch >= 2.10. Objects are GNU's compiler's, with which the kernels were tuned, and whose
exceptions PyTorch understands; zig links them against the symbols of an old glibc, and against a stub of LibTorch with
nothing but its stable ABI. For macOS and Windows zig compiles too; no wheel is made of that, since nothing has run it.

PYVIT_CUDA=1 makes the CUDA wheel (linux-x86_64), whose version says so: +cu130.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import native
from native import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ZIG = f"{sys.executable} -m ziglang"


@dataclass(frozen=True)
class Target:
    """A platform to build for; ``zig`` is zig's name of it."""

    system: str
    machine: str
    zig: str
    tag: str = ""  # of the wheel; without one it is compiled and linked only

    @property
    def cxx(self) -> str:
        """The command that compiles."""
        if self.system != "linux":
            return f"{ZIG} c++ -target {self.zig}"
        return "g++" if self.machine == native.machine() else f"{self.machine}-linux-gnu-g++"

    @property
    def link(self) -> str:
        """The command that links."""
        return f"{ZIG} cc -target {self.zig} -s" if self.system == "linux" else self.cxx


TARGETS = {
    "linux-x86_64": Target("linux", "x86_64", "x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"),
    "linux-aarch64": Target("linux", "aarch64", "aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64"),
    "macos-arm64": Target("darwin", "aarch64", "aarch64-macos.11.0"),
    "windows-x86_64": Target("win32", "x86_64", "x86_64-windows-gnu"),
}


def build(name: str) -> list[Path]:
    """Compile and link for a target; returns the library and the extension modules."""
    from torch.utils.cpp_extension import include_paths

    target = TARGETS[name]
    archs = native.cuda_archs() if os.environ.get("PYVIT_CUDA") == "1" else []
    folder = ROOT / "build" / (name + ("-cuda" if archs else ""))
    package = folder / "pyvit"
    if shutil.which(target.cxx.split()[0]) is None:
        sys.exit(f"{name}: {target.cxx} is not on PATH (Debian: g++-{target.machine.replace('_', '-')}-linux-gnu)")
    stub = torch_stub(target, folder / "stub", stable_functions(include_paths()))
    libraries = [f"-L{stub}", "-ltorch_cpu"]
    library = package / "lib" / native.SYSTEMS[target.system].library
    modules = extension_modules(target, package) if target.system == "linux" else {}
    native.Build(
        folder=folder,
        library=library,
        modules=modules,
        cxx=target.cxx,
        link=target.link,
        torch_includes=include_paths(),
        libraries=libraries,
        runtime=gnu_runtime(target, folder) if target.system == "linux" else (),
        system=target.system,
        machine=target.machine,
        archs=archs,
    ).run()
    return [library, *modules]


def stable_functions(includes: Sequence[str]) -> list[str]:
    """The C functions of LibTorch's stable ABI at 2.10, as its headers declare them."""
    flags = [f"-I{path}" for path in includes]
    header = ["-include", "torch/csrc/stable/c/shim.h", f"-DTORCH_TARGET_VERSION={native.TORCH_TARGET}"]
    command = ["g++", "-E", "-P", "-x", "c++", *flags, *header, os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    declared = r'__attribute__\(\(__visibility__\("default"\)\)\)[\s\w*]*?\b((?:aoti_)?torch_\w+)\s*\('
    return sorted(set(re.findall(declared, text)))


def torch_stub(target: Target, folder: Path, functions: Sequence[str]) -> Path:
    """A library of LibTorch's name with these functions alone: what links with it needs nothing else of PyTorch."""
    folder.mkdir(parents=True, exist_ok=True)
    export = "__declspec(dllexport) " if target.system == "win32" else ""
    source = folder / "torch_cpu.c"
    source.write_text("".join(f"{export}void {function}(void) {{}}\n" for function in functions))
    names = {
        "linux": ["-o", "libtorch_cpu.so", "-Wl,-soname,libtorch_cpu.so"],
        "darwin": ["-o", "libtorch_cpu.dylib", "-install_name", "@rpath/libtorch_cpu.dylib"],
        "win32": ["-o", "torch_cpu.dll", "-Wl,--out-implib,libtorch_cpu.dll.a"],
    }
    command = [*ZIG.split(), "cc", "-target", target.zig, "-shared", *names[target.system], source.name]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def gnu_runtime(target: Target, folder: Path) -> list[str]:
    """The C++ library, linked in: it is newer than that of the oldest systems. The unwinder is shared with PyTorch."""
    found = []
    for name in ("libstdc++.a", "libgcc_s.so.1"):
        command = [target.cxx, f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    newer = folder / "old_glibc.o"
    command = [*target.link.split(), "-O2", "-fPIC", "-fvisibility=hidden", "-c", "-o", str(newer)]
    subprocess.run([*command, str(ROOT / "packaging/old_glibc.c")], check=True)
    return [str(newer), *found, "-lpthread", "-ldl", "-lm"]


def extension_modules(target: Target, package: Path) -> dict[Path, tuple[list[str], list[str]]]:
    """pyvit._C of each Python -> the flags that compile it. The headers are this machine's: they differ between Linux's
    64-bit processors in nothing that pybind11 uses.
    """
    import pybind11

    modules: dict[Path, tuple[list[str], list[str]]] = {}
    for version in PYTHONS:
        python = interpreter(version)
        if python is None:
            sys.exit(f"Python {version} and its headers are not found (python{version} on PATH, or pyenv)")
        name = f"_C.cpython-{version.replace('.', '')}-{target.machine}-linux-gnu.so"
        modules[package / name] = ([f"-I{pybind11.get_include()}", f"-I{python_headers(python)}"], [])
    return modules


def interpreter(version: str) -> str | None:
    """That Python, on PATH or one of pyenv's, with its headers."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in (f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))):
        if shutil.which(python) and (headers := python_headers(python)) and Path(headers, "Python.h").exists():
            return python
    return None


def python_headers(python: str) -> str:
    code = "import sysconfig; print(sysconfig.get_paths()['include'])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def setup(*commands: str) -> None:
    """Run setup.py without native code."""
    environment = {**os.environ, "PYVIT_NATIVE": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", *commands], cwd=ROOT, env=environment, check=True)


def pure_wheel(out: Path, suffix: str = "") -> Path:
    """The wheel without native code."""
    with tempfile.TemporaryDirectory() as folder:
        version = ["--tag-build", suffix] if suffix else []
        setup("egg_info", "-e", folder, *version, "build", "-b", folder, "bdist_wheel", "-d", folder)
        (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name))


def source_distribution(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        setup("egg_info", "-e", folder, "sdist", "-d", str(out))


def binary_wheel(pure: Path, files: Sequence[Path], tag: str, out: Path) -> Path:
    """``pure`` with the files of ``.../pyvit`` added."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "wheel", "unpack", "-d", folder, pure], check=True, capture_output=True)
        (root,) = Path(folder).iterdir()
        for file in files:
            inside = root / file.relative_to(next(p for p in file.parents if p.name == "pyvit").parent)
            inside.parent.mkdir(exist_ok=True)
            shutil.copy(file, inside)
        (about,) = root.glob("*.dist-info/WHEEL")
        text = about.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        about.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{tag}"))
        packed = Path(folder, "packed")
        packed.mkdir()
        subprocess.run([sys.executable, "-m", "wheel", "pack", "-d", packed, root], check=True, capture_output=True)
        (wheel,) = packed.iterdir()
        return Path(shutil.move(wheel, out / wheel.name))


def audit(wheel: Path, tag: str) -> None:
    """Raise unless the wheel keeps what its tag promises, PyTorch's own library apart."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    lacking = found["policy_upgrades"].get(tag)
    if lacking != {"libs_to_eliminate": ["libtorch_cpu.so"]} or found["unsupported_isa"]:
        raise RuntimeError(f"{wheel.name} is not {tag}: {json.dumps(found, indent=2)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = os.environ.get("PYVIT_CUDA") == "1"
    default = ["linux-x86_64"] if cuda else [name for name, target in TARGETS.items() if target.tag]
    parser.add_argument("targets", nargs="*", default=default, help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target is called {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    options.out.mkdir(exist_ok=True)
    suffix = cuda_suffix() if cuda else ""
    pure = pure_wheel(options.out, suffix)
    for name in options.targets:
        files = build(name)
        tag = TARGETS[name].tag
        if not tag:
            print(f"{name}: compiled and linked, never run: {files[0].relative_to(ROOT)}")
            continue
        wheel = binary_wheel(pure, files, tag, options.out)
        audit(wheel, tag)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    if cuda:
        pure.unlink()
    else:
        source_distribution(options.out)


def cuda_suffix() -> str:
    """Of the version, as PyTorch's wheels have it: +cu130."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    assert found is not None, said
    return f"+cu{found[1]}{found[2]}"


if __name__ == "__main__":
    main()
