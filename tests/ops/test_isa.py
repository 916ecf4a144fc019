"""Runs the tests marked ``isa`` for every other instruction set that this processor supports: every value of every
parameter, and every other combination of them. The default instruction set has all combinations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvit import library

HERE = Path(__file__).parent
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
REPORT = "import torch, pyvit; print(torch.ops.pyvit.cpu_isa())"


@pytest.mark.slow
@pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
@pytest.mark.skipif(bool(os.environ.get("PYVIT_CPU_ISA")), reason="an instruction set is forced already")
@pytest.mark.parametrize("isa", ISAS)
def test_isa(isa: str, seeded: int) -> None:
    if torch.ops.pyvit.cpu_isa() == isa:
        pytest.skip("the default, tested by every other test")
    half = str(ISAS.index(isa) % 2)
    environment = {**os.environ, "PYVIT_CPU_ISA": isa, "PYVIT_TEST_SEED": str(seeded), "PYVIT_TEST_HALF": half}
    asked = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True)
    if "not supported by this processor" in asked.stderr:
        pytest.skip("this processor does not have it")
    assert asked.stdout.strip() == isa, asked.stderr
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "isa",
        "-k",
        "cpu-",
        "-p",
        "no:cacheprovider",
        str(HERE),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"PYVIT_CPU_ISA={isa}" in done.stdout or " passed" in done.stdout
