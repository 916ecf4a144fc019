"""No kernel of the CPU reads past either end of a tensor, on any instruction set of this processor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvit import library
from tests.fuzz import draws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library.problem() is not None, reason=str(library.problem())),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mmap and mprotect of glibc"),
]
ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("PYVIT_FUZZ_CASES", "100")) // 4
ISAS = ("portable", "avx2", "avx512", "avx512bf16")


def run(*command: str, isa: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (
        {"PYVIT_CPU_ISA": isa} if isa else {}
    )
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("isa", ISAS)
def test_reads_end_with_the_tensors(isa: str) -> None:
    asked = run("-c", "import torch, pyvit; print(torch.ops.pyvit.cpu_isa())", isa=isa)
    if "not supported by this processor" in asked.stderr:
        pytest.skip("this processor does not have it")
    cases = CASES if torch.ops.pyvit.cpu_isa() == isa else max(1, CASES // 4)
    done = run("tests/fuzz/guard_pages.py", str(cases), *draws.DRAWS, isa=isa)
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr[-4000:]}"
    assert done.stdout.count("calls in each dtype") == len(draws.DRAWS)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_read_past_the_end_is_noticed(by: int) -> None:
    code = f"""
import ctypes, torch
from tests.fuzz.guard_pages import guarded
values = torch.arange(6.0).view(2, 3)
t = guarded(values, at_end={by > 0})
assert torch.equal(t, values)
print("placed", flush=True)
ctypes.c_char.from_address(t.data_ptr() + {24 if by > 0 else -1}).value
"""
    done = run("-c", code)
    assert done.stdout == "placed\n"
    assert done.returncode == -signal.SIGSEGV, done.stderr
