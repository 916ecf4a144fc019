"""Budgets for the kernels' registers, spills and shared memory, which csrc/cuda/resources.py records from ptxas."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from pyvit.dispatch import cost_model

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


def test_no_budget_is_wider_than_its_worst_kernel_needs(resources, record):
    """Budgets are tight, so that no kernel grows unnoticed: within 8 registers, the allocation unit, and with no spare
    byte."""
    worst = dict.fromkeys(resources.BUDGETS, (0, 0))
    for kernel, per_arch in record["kernels"].items():
        prefix = resources.governing(kernel)
        for figures in per_arch.values():
            pair = figures["registers"], figures["spill_stores"]
            worst[prefix] = tuple(map(max, worst[prefix], pair))
    for prefix, (registers, spills) in resources.BUDGETS.items():
        assert registers - 8 < worst[prefix][0] <= registers, (prefix, worst[prefix])
        assert worst[prefix][1] == spills, (prefix, worst[prefix])


@pytest.mark.parametrize(("registers", "spills"), [(152, 0), (120, 4)])
def test_a_kernel_over_budget_is_named(resources, registers, spills):
    table = {
        "patch_embed_forward<bf16>": {
            "80": {"registers": registers, "spill_stores": spills, "spill_loads": 4, "tensor": 1}
        }
    }
    said = (
        f"patch_embed_forward<bf16> on sm_80: {registers} registers (at most 144), {spills} bytes spilled (at most 0)"
    )
    assert resources.over_budget(table) == [said]


def test_products_use_the_tensor_cores(record):
    products = ("attention_", "window_backward", "patch_embed_")
    kernels = {name: f for name, f in record["kernels"].items() if name.startswith(products)}
    assert len(kernels) > 60
    assert all(figures["tensor"] > 0 for per_arch in kernels.values() for figures in per_arch.values())


def test_occupancy(resources):
    assert resources.occupancy("80", 128, 256, 0) == 0.25  # registers: two blocks of 256 threads
    assert resources.occupancy("80", 32, 128, 80 << 10) == 0.125  # shared memory: two blocks of 128
    assert resources.occupancy("90", 32, 128, 0) == 1.0
    assert resources.occupancy("120", 32, 128, 99 << 10) == 1 / 12
    assert resources.occupancy("120", 32, 128, 100 << 10) == 0
    assert resources.occupancy("80", 168, 288, 0) == 9 / 64  # twelve warps have registers: one block of nine


@pytest.mark.slow
def test_a_fresh_compilation_agrees(resources, record, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    fresh = resources.compile_all(tmp_path, ("80",), ("patch_embed",))
    assert {name: per_arch["80"] for name, per_arch in record["kernels"].items() if name in fresh} == {
        n: f["80"] for n, f in fresh.items()
    }


def test_the_table_is_of_the_record(resources, record):
    assert resources.TABLE.read_text() == resources.document(record["kernels"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_table_knows_how_kernels_are_launched(resources, emulator, dtype):
    """Every launch of these calls is in the table, with its threads and shared memory, and every launch of the table
    occurs."""
    emulator.call("pyvit_emulation_forget_sites")
    q, bias = torch.randn(1, 1, 197, 64).to(dtype), torch.randn(1, 1, 197, 197)
    options = (bias, False, 0.1, 0.0, None, "cuda")
    out, lse = emulator.op("flash_attention", q, q, q, *options)
    emulator.op("flash_attention_backward", q, None, out, lse, True, q, q, q, *options)
    for side in (7, 12, 16, 24):
        qkv, grad, table = (
            torch.randn(1, side, side, 96).to(dtype),
            torch.randn(1, side, side, 32).to(dtype),
            torch.randn((2 * side - 1) ** 2, 1),
        )
        options = ([side, side], [0, 0], 1, table, None, None, 0.1, 0.0, None, "cuda")
        out, lse = emulator.op("window_attention", qkv, *options)
        emulator.op("window_attention_backward", grad, out, lse, qkv, *options)
    seen = {(threads, shared) for _, threads, shared in emulator.launches() if shared}
    kinds = ("bf16", 8) if dtype == torch.bfloat16 else ("float", 4)
    names = [
        f"attention_forward<Dense<{kinds[0]}>, 64, {kinds[1]}>",
        f"attention_forward<Windows<{kinds[0]}>, 32, {kinds[1]}>",
    ]
    names += [
        f"attention_backward_{part}<Dense<{kinds[0]}>, 64, {kinds[1]}{end}>"
        for part, end in (("queries", ", false"), ("bias", ""))
    ]
    ends = (("queries", ", true"), ("queries", ", false"), ("keys", ""), ("bias", ""))
    names += [f"attention_backward_{part}<Windows<{kinds[0]}>, 32, {kinds[1]}{end}>" for part, end in ends]
    names += [f"window_backward<{kinds[0]}, 32, 8, 1>"] + ["window_backward<bf16, 32, 6, 3>"] * (kinds[0] == "bf16")
    assert {resources.launch_of(name)[1:] for name in names} <= seen
    fits = [cost_model.cuda_table_sums_fit(side**2, 32, q.element_size()) for side in (16, 24)]
    assert fits == [True, False], "predictions count the passes that these windows took"
