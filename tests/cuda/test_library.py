"""The compiled library contains the CUDA kernels, loads without a GPU, and raises errors instead of crashing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from pyvit import library
from pyvit.schemas import SCHEMAS


@pytest.fixture(scope="module")
def operators():
    if not library.has_cuda():
        pytest.skip(library.problem() or "the library is built without CUDA (no nvcc at build time)")
    return torch.ops.pyvit_cuda


def test_same_schemas_as_the_cpu_operators(operators):
    for name in SCHEMAS:
        ours, theirs = (str(getattr(ops, name).default._schema) for ops in (operators, torch.ops.pyvit))
        assert ours.replace("pyvit_cuda::", "pyvit::") == theirs


def test_cpu_tensors_are_refused(operators):
    q = torch.randn(1, 1, 4, 32)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        operators.flash_attention(q, q, q, None, False, 1.0, 0.0, None, "cuda")


def test_the_library_needs_no_cuda_runtime(operators):
    needed = subprocess.run(["readelf", "-d", str(library.PATH)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(libcuda|libcudart|libtorch_cuda)", needed)


@pytest.mark.gpu
def test_an_error_of_the_runtime_names_the_call(operators):
    q = torch.randn(1, 1, 4, 136, device="cuda")
    with pytest.raises(RuntimeError, match="head dimensions that are multiples of 8 up to 128, got 136"):
        operators.flash_attention(q, q, q, None, False, 1.0, 0.0, None, "cuda")


def test_sources_use_no_atomics():
    sources = (Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu*")
    assert not [path.name for path in sources if re.search(r"\batomic[A-Z]|\b(atom|red)\.", path.read_text())]
