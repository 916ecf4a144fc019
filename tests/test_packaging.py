"""The build's rules for every platform, and what distributions contain. Nothing here compiles: ``make wheel`` does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from pyvit import library

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "packaging"))
import native  # noqa: E402
import wheels  # noqa: E402

CSRC = ROOT / "csrc"


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def build(target: wheels.Target, folder: Path = Path("/build"), **changes: object) -> native.Build:
    name = native.SYSTEMS[target.system].library
    given = {
        "folder": folder,
        "library": folder / name,
        "modules": {folder / "_C.so": (["-Iheaders"], ["-lpython"])},
        "cxx": target.cxx,
        "torch_includes": ["torch/include"],
        "libraries": ["-ltorch_cpu"],
        "system": target.system,
        "machine": target.machine,
    }
    return native.Build(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", wheels.TARGETS)
def test_rules_of_each_platform(name: str) -> None:
    """Every source is compiled, once per instruction set where it is a kernel; every object is linked."""
    target = wheels.TARGETS[name]
    text = build(target).ninja()
    compiled = re.findall(r"^build (.+): cxx (.+)\n  flags = (.+)", text, re.MULTILINE)
    sources = [Path(source) for _, source, _ in compiled]
    assert all(source.exists() for source in sources)
    assert set(sources) == {CSRC / "module.cpp", *(CSRC / "cpu").glob("*.cpp"), *(CSRC / "torch").glob("*.cpp")} - {
        CSRC / "torch/cuda.cpp"
    }
    isas = list(native.ISAS.get(target.machine, native.PORTABLE))
    assert isas[-1] == "portable"
    int8_isas = list(native.INT8_ISAS.get(target.machine, native.INT8_PORTABLE))
    assert int8_isas[-1] == "int8_portable"
    for unit in native.KERNEL_UNITS:
        flags = [flags for _, source, flags in compiled if Path(source).name == f"{unit}.cpp"]
        assert [re.findall(r"PYVIT_ISA=(\w+)", f) for f in flags] == [
            [isa] for isa in (int8_isas if "int8" in unit else isas)
        ]
        if "int8" in unit:  # the same bits on every instruction set
            assert {re.findall(r"-ffp-contract=(\w+)", f)[-1] for f in flags} == {"off"}
    linked = re.search(rf"^build /build/{native.SYSTEMS[target.system].library}: link (.+)", text, re.MULTILINE)
    assert sorted(linked[1].split()) == sorted(out for out, _, _ in compiled if "module" not in out)
    assert ("-fPIC" in text) == (target.system != "win32")


def test_the_package_looks_for_the_names_that_the_build_writes() -> None:
    names = {system: library._NAMES.get(system, library.PATH.name) for system in native.SYSTEMS}
    assert names == {system: rules.library for system, rules in native.SYSTEMS.items()}


def test_paths_are_escaped() -> None:
    text = build(wheels.TARGETS["windows-x86_64"], Path("/a folder/with a colon:")).ninja()
    assert "build /a$ folder/with$ a$ colon$:/isa.o: cxx" in text


def test_zig_has_its_own_names_of_processors() -> None:
    windows, linux = (build(wheels.TARGETS[name]).ninja() for name in ("windows-x86_64", "linux-x86_64"))
    assert "-march=x86_64_v4" in windows
    assert "-march=x86-64" not in windows
    assert "-march=x86-64-v4" in linux


def test_cuda_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cuda_library_paths", lambda: ["-Lcuda"])
    text = build(wheels.TARGETS["linux-x86_64"], archs=["8.0", "12.0+PTX"]).ninja()
    assert {Path(p) for p in re.findall(r": nvcc (.+)", text)} == set((CSRC / "cuda").glob("*.cu"))
    assert text.count("code=sm_80 -gencode=arch=compute_120,code=sm_120 -gencode=arch=compute_120,code=compute_120") > 0
    assert str(CSRC / "torch/cuda.cpp") in text


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_library_needs_functions_of_the_stable_abi_alone() -> None:
    """Those that the wheels' stub of LibTorch has, and one of a later version that may be absent."""
    functions = wheels.stable_functions(include_paths())
    assert {"torch_call_dispatcher", "torch_parallel_for", "aoti_torch_empty_strided"} <= set(functions)
    assert "torch_from_blob" not in functions
    if library.problem() is None and shutil.which("nm"):
        listed = subprocess.run(["nm", "-D", str(library.PATH)], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"U ((?:aoti_)?torch_\w+)", listed))
        assert needed
        assert needed <= set(functions)


def test_no_compiler_is_an_error_that_names_the_way_out() -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "PYVIT_NATIVE=0 installs pyvit without its native code" in done.stderr


def test_wheels(tmp_path: Path) -> None:
    """The pure wheel has every module; the binary one that, the compiled files, and its platform's tag."""
    pure = wheels.pure_wheel(tmp_path, "+test")
    assert re.fullmatch(r"pyvit_kernels-.+\+test-py3-none-any\.whl", pure.name)
    modules = {path.replace("triton_kernels/", "pyvit/triton_kernels/") for path in tracked("pyvit", "triton_kernels")}
    modules |= {f"pyvit/{path}" for path in tracked("benchmarks/*.py", "benchmarks/*.html") if path.count("/") == 1}
    assert modules == {name for name in zipfile.ZipFile(pure).namelist() if name.startswith("pyvit/")}

    made = tmp_path / "build/pyvit/lib/libpyvit_ops.so"
    made.parent.mkdir(parents=True)
    made.write_bytes(os.urandom(1000))
    binary = zipfile.ZipFile(wheels.binary_wheel(pure, [made], "manylinux_2_28_x86_64", tmp_path))
    assert Path(binary.filename or "").name == pure.name.replace("none-any", "none-manylinux_2_28_x86_64")
    assert set(binary.namelist()) == {*zipfile.ZipFile(pure).namelist(), "pyvit/lib/libpyvit_ops.so"}
    assert binary.read("pyvit/lib/libpyvit_ops.so") == made.read_bytes()
    about = binary.read(next(name for name in binary.namelist() if name.endswith("/WHEEL"))).decode()
    assert "Root-Is-Purelib: false" in about
    assert "Tag: py3-none-manylinux_2_28_x86_64" in about
    assert binary.testzip() is None


def test_the_source_distribution_has_what_the_build_needs(tmp_path: Path) -> None:
    wheels.source_distribution(tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    needed = tracked("csrc", "packaging", "pyvit", "triton_kernels", "setup.py", "pyproject.toml", "LICENSE")
    needed |= {path for path in tracked("benchmarks/*.py", "benchmarks/*.html") if path.count("/") == 1}
    assert needed <= inside, needed - inside


def test_the_installed_command_runs_the_benchmarks(tmp_path: Path) -> None:
    """``pyvit bench`` without a checkout: from the wheel's files, in a folder that has a ``benchmarks`` of its own."""
    wheels.pure_wheel(tmp_path, "+test")
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    other = tmp_path / "work" / "benchmarks"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('not the suite of pyvit')\n")
    code = "import sys; from pyvit.cli import main; sys.argv[0] = 'pyvit'; main()"
    only = ["--quick", "--only", "linear 64x32x96", "--seconds", "0.01", "--no-plots", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYVIT_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "bench", "ops", *only]
    done = subprocess.run(command, cwd=other.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "linear 64x32x96 gelu" in done.stdout
    assert "linear 64x32x96 gelu" in (other.parent / "out" / "report.html").read_text()
