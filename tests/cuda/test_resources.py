"""What ptxas says of the compiled kernels: recorded by csrc/cuda/resources.py, held to budgets here."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "csrc" / "cuda" / "resources.py"


@pytest.fixture(scope="module")
def resources():
    spec = importlib.util.spec_from_file_location("resources", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record(resources):
    return json.loads(resources.DATA.read_text())


def test_the_record_is_of_these_sources(resources, record):
    assert record["digest"] == resources.digest(), "kernels changed since: run python csrc/cuda/resources.py"


def test_every_kernel_is_compiled_for_every_architecture(resources, record):
    assert len(record["kernels"]) > 80
    assert all(set(per_arch) == set(resources.ARCHS) for per_arch in record["kernels"].values())


def test_budgets(resources, record):
    assert resources.over_budget(record["kernels"]) == []


def test_a_kernel_over_budget_is_named(resources):
    table = {"patch_embed_forward<bf16>": {"80": {"registers": 255, "spill_stores": 4, "spill_loads": 4, "tensor": 1}}}
    assert resources.over_budget(table) == ["patch_embed_forward<bf16> on sm_80: 255 registers (at most 255), 4 bytes spilled (at most 0)"]


def test_products_use_the_tensor_cores(record):
    kernels = {name: f for name, f in record["kernels"].items() if name.startswith(("attention_", "patch_embed_")) and "_delta" not in name}
    assert len(kernels) > 60
    assert all(figures["tensor"] > 0 for per_arch in kernels.values() for figures in per_arch.values())


def test_occupancy(resources):
    assert resources.occupancy("80", 128, 256, 0) == 0.25  # registers: two blocks of 256 threads
    assert resources.occupancy("80", 32, 128, 80 << 10) == 0.125  # shared memory: two blocks of 128
    assert resources.occupancy("90a", 32, 128, 0) == 1.0


@pytest.mark.slow
def test_a_fresh_compilation_agrees(resources, record, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    fresh = resources.compile_all(tmp_path, ("80",), ("patch_embed",))
    assert {name: per_arch["80"] for name, per_arch in record["kernels"].items() if name in fresh} == {n: f["80"] for n, f in fresh.items()}


def test_the_table_is_of_the_record(resources, record):
    assert resources.TABLE.read_text() == resources.document(record["kernels"])


def test_the_table_knows_how_kernels_are_launched(resources, emulator):
    emulator.call("pyvit_emulation_forget_sites")
    q = torch.randn(1, 1, 197, 64).bfloat16()
    out, lse = emulator.op("flash_attention", q, q, q, None, False, 0.1, 0.0, None, "cuda")
    emulator.op("flash_attention_backward", q, None, out, lse, False, q, q, q, None, False, 0.1, 0.0, None, "cuda")
    qkv, grad = torch.randn(1, 7, 7, 96).bfloat16(), torch.randn(1, 7, 7, 32).bfloat16()
    options = ([7, 7], [0, 0], 1, None, None, None, 0.1, 0.0, None, "cuda")
    out, lse = emulator.op("window_attention", qkv, *options)
    emulator.op("window_attention_backward", grad, out, lse, qkv, *options)
    launches = [line.split(";") for line in emulator.call("pyvit_emulation_launches")[0].splitlines()]
    seen = {(int(threads), int(shared)) for name, threads, shared in launches if "delta" not in name}
    assert seen == {(threads, shared) for what, _, threads, shared in resources.shapes() if what.startswith(("ViT, 197", "Swin, window 7"))}
