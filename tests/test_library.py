"""The compiled library, and running without it: symbols, instruction sets, imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvit import library
from pyvit.schemas import SCHEMAS

needs_library = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
ISAS = ("avx512bf16", "avx512", "avx2", "portable")


def python(code: str, **environment: str) -> str:
    """Standard output of a new interpreter; raises its error."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_RULES = (Path(__file__).parents[1] / "packaging/native.py").read_text()
DEFAULT_ARCHS = re.search(r'DEFAULT_ARCHS = "(.+)"', _RULES)[1].split(";")


@pytest.mark.parametrize(
    ("archs", "capability", "code"),
    [
        (DEFAULT_ARCHS, (6, 1), None),
        (DEFAULT_ARCHS, (7, 5), None),
        (DEFAULT_ARCHS, (8, 0), "sm_80"),
        (DEFAULT_ARCHS, (8, 6), "sm_80"),
        (DEFAULT_ARCHS, (8, 9), "sm_80"),
        (DEFAULT_ARCHS, (9, 0), "sm_90"),
        (DEFAULT_ARCHS, (10, 0), "sm_100"),
        (DEFAULT_ARCHS, (10, 3), "sm_100"),
        (DEFAULT_ARCHS, (11, 0), None),
        (DEFAULT_ARCHS, (12, 0), "sm_120"),
        (DEFAULT_ARCHS, (12, 1), "sm_120"),
        (DEFAULT_ARCHS, (13, 0), "compute_120"),
        (["9.0a"], (9, 0), "sm_90a"),
        (["10.0a"], (10, 0), "sm_100a"),
        (["10.0a"], (10, 3), None),
        (["10.0a+PTX"], (10, 3), None),
        (["10.0f+PTX"], (10, 3), "sm_100f"),
        (["10.0f+PTX"], (12, 0), None),
        (["8.9"], (8, 6), None),
        (["8.6"], (8, 9), "sm_86"),
        (["8.0"], (9, 0), None),
        (["7.5+PTX"], (12, 0), "compute_75"),
        (["7.5+PTX", "9.0"], (9, 0), "sm_90"),
        (["12.0+PTX"], (10, 0), None),
        ([], (9, 0), None),
    ],
)
def test_which_gpus_a_build_runs_on(archs: list[str], capability: tuple[int, int], code: str | None) -> None:
    assert library.code_for(archs, capability) == code
    major, minor = capability
    reason = f"the library was built for {';'.join(archs)}: no code for compute capability {major}.{minor}"
    assert library.runs_on(archs, capability) == (reason if code is None else None)


def test_an_unreadable_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="'Hopper' is not an architecture"):
        library.runs_on(["8.0", "Hopper"], (9, 0))


USE = """
import torch, pyvit
q = torch.randn(1, 2, 5, 8, requires_grad=True)
out = pyvit.ops.flash_attention(q, q, q)
out.sum().backward()
out = pyvit.ops.window_attention(torch.randn(1, 5, 6, 24), 3, 1, num_heads=2)
out = pyvit.ops.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4))
torch.ops.pyvit.flash_attention(q, q, q, None, False, 1.0, 0.0, None, "auto")[0].sum().backward()
assert not torch.cuda.is_initialized()
print(pyvit.explain("flash_attention", q, q, q))
"""


def test_without_the_library() -> None:
    """Everything works with PyTorch's operators, and explain says what is missing."""
    report = python(USE, PYVIT_NO_LIBRARY="1")
    assert "-> torch" in report
    assert "PYVIT_NO_LIBRARY=1 is set" in report


def test_without_triton_and_numpy() -> None:
    """Import and use without the packages, which torch does not need."""
    hide = """
import sys, importlib.abc, importlib.util
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('triton', 'numpy'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition('.')[0] == 'triton' else find(name, *rest)
"""
    report = python(hide + USE + "pyvit.create_model('vit_tiny_patch16_224')")
    assert "the package 'triton' is not installed" in report


def test_import_is_light() -> None:
    """Importing pyvit initialises no GPU, imports no optional package and nothing of pyvit but the operators, and
    leaves garbage collection on; the other names are imported when they are first used."""
    code = """
import gc, sys, torch
had = set(sys.modules)
import pyvit
assert gc.isenabled()
print(*(set(sys.modules) - had))
assert {*pyvit.__all__, "models", "nn", "losses", "integrations"} <= {*dir(pyvit)}
for name in dir(pyvit):
    getattr(pyvit, name)
assert callable(pyvit.info) and callable(pyvit.accelerate) and pyvit.models.create_model is pyvit.create_model
"""
    loaded = {tuple(name.split(".")) for name in python(code).split()}
    assert {name[0] for name in loaded} <= {"pyvit", *sys.stdlib_module_names}, loaded
    parts = {name[1] for name in loaded if len(name) > 1}
    light = {"dispatch", "info", "library", "memory", "ops", "schemas", "torch_private", "triton_kernels", "version"}
    assert parts <= light, parts
    kernels = {name[2] for name in loaded if name[1:2] == ("triton_kernels",) and len(name) > 2}
    assert kernels <= {"digests", "tiles"}, kernels


def test_a_library_that_does_not_load_is_reported(tmp_path: object) -> None:
    """A damaged library: the reference is used, and the report has the reason."""
    code = f"""
import pathlib, pyvit.library as library
library.PATH = pathlib.Path({str(tmp_path)!r}) / 'x.so'
for content in (None, 'no'):
    if content:
        library.PATH.write_text(content)
    library.problem.cache_clear()
    print(library.problem())
"""
    missing, broken = python(code).splitlines()[-2:]
    assert "is missing (x.so); build it with" in missing
    assert "does not load" in broken


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_only_the_stable_abi() -> None:
    """Undefined symbols are only torch's stable shims and the C and C++ runtimes: no Python, no ATen, no c10."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library.PATH)], capture_output=True, text=True, check=True
    ).stdout
    symbols = {line.split()[-1].partition("@") for line in listed.splitlines() if line.strip()}
    foreign = sorted(
        name
        for name, _, version in symbols
        if not version and not re.match(r"aoti_torch_|torch_|_ITM_|__gmon_start__|__cxa_finalize", name)
    )
    demangled = (
        subprocess.run(["c++filt", *foreign], capture_output=True, text=True).stdout.split("\n") if foreign else []
    )
    assert not foreign, demangled
    versions = {re.match(r"@?([A-Z]+)", version)[1] for _, _, version in symbols if version}
    assert versions <= {"GLIBC", "GLIBCXX", "CXXABI", "GCC", "GOMP"}, versions
    names = {name for name, _, _ in symbols}
    assert not [n for n in names if n.startswith(("Py", "_Py")) or "2at" in n or "3c10" in n]
    needed = subprocess.run(["readelf", "-d", str(library.PATH)], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in needed


@needs_library
def test_the_library_defines_every_operator() -> None:
    for name, schema in SCHEMAS.items():
        defined = str(getattr(torch.ops.pyvit, name).default._schema)
        assert defined.removeprefix(f"pyvit::{name}").replace("SymInt", "int") == str(
            torch._C.parse_schema(name + schema)
        ).removeprefix(name)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvit::{name}", "CPU"), name


@needs_library
def test_the_library_loads_without_python_code() -> None:
    """As in a C++ program: load and call, without the pyvit package."""
    code = f"""
import torch
torch.ops.load_library({str(library.PATH)!r})
q = torch.randn(1, 2, 50, 64)
out, lse = torch.ops.pyvit.flash_attention(q, q, q, None, False, 0.125, 0.0, None, "auto")
print(float((out - torch.nn.functional.scaled_dot_product_attention(q, q, q)).abs().max()) < 1e-5)
"""
    assert python(code) == "True"


@needs_library
def test_instruction_sets() -> None:
    """PYVIT_CPU_ISA selects a supported instruction set; an unknown one is an error that names it."""
    use = (
        "import torch, pyvit; q = torch.randn(1, 1, 9, 8); pyvit.ops.flash_attention(q, q, q); "
        "print(torch.ops.pyvit.cpu_isa())"
    )
    assert python(use, PYVIT_CPU_ISA="") in ISAS
    assert python(use, PYVIT_CPU_ISA="portable") == "portable"
    int8 = "import torch, pyvit; print(torch.ops.pyvit.cpu_isa(), torch.ops.pyvit.int8_isa())"
    assert python(int8, PYVIT_CPU_ISA="portable") == "portable portable"
    done = subprocess.run(
        [sys.executable, "-c", use], env={**os.environ, "PYVIT_CPU_ISA": "sse9"}, capture_output=True, text=True
    )
    assert done.returncode
    assert "PYVIT_CPU_ISA must be portable, avx2, avxvnni, avx512, avx512vnni or avx512bf16, got sse9" in done.stderr
