"""The GPU benchmarks, as far as they run without a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_cost, loss_specs, report, runner, specs
from benchmarks.cases import Case
from benchmarks.ceiling import Ceiling
from benchmarks.runner import Settings
from benchmarks.workload import OURS

TOP = Ceiling({"fp32": 100.0, "bf16": 200.0}, 10.0, 1, "fixed for the test")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_says_what_it_needs(capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "needs a GPU that torch can use" in said[0]


def test_gpu_cases_run_on_any_device(capsys):
    """The GPU cases end to end with tiny shapes. On a CPU the SDPA backends refuse them, and each row says so."""
    floor = lambda case: gpu_cost.floor_ms(case, "NVIDIA H200")  # noqa: E731
    settings = Settings(seconds=0.01, rounds=(2, 2), both_sources=False, extra=_uncompiled, floor=floor)
    so_far: list[int] = []
    results = runner.run(gpu_cases.tiny(), settings, TOP, lambda line: None, keep=lambda rows: so_far.append(len(rows)))
    assert not results.red
    assert len(so_far) == len(gpu_cases.tiny())
    assert so_far == sorted(set(so_far))
    assert so_far[-1] == len(results.rows)
    assert len(results.outcomes) == 5
    rows = {(row.op, row.mode, row.provider): row for row in results.rows}
    assert rows["flash_attention", "forward+backward", "sdpa math"].timed
    assert rows["flash_attention", "forward+backward", "sdpa cuDNN"].status.startswith("missing: RuntimeError")
    assert rows["window_attention", "backward", OURS].percent_of_roofline > 0
    assert rows["window_attention", "backward", OURS].floor_ms > rows["window_attention", "forward", OURS].floor_ms > 0
    for op in loss_specs.SPECS:
        assert rows[op, "forward+backward", OURS].timed
        assert rows[op, "forward+backward", "naive"].timed
        assert rows[op, "forward+backward", OURS].floor_ms > 0
    report.show_rows(results.rows)
    printed = capsys.readouterr().out
    assert "floor ms" in printed
    assert "missing: flash_attention tiny" in printed


def test_gpu_targets_are_all_there():
    """Every GPU target exists once, and every attention case is compared with a pinned SDPA backend."""
    by = {case.id: case.target for case in gpu.chosen_cases(gpu.STEPS) if case.target}
    for batch, n in ((256, 197), (192, 257), (64, 577), (32, 1025)):
        target = by[f"flash_attention {batch}x12x{n}x64 bf16 forward+backward"]
        assert target.ratio == 1.2
        assert target.against == ("sdpa cuDNN", "sdpa flash", "sdpa efficient")
    windows = {name: target for name, target in by.items() if name.startswith("window")}
    assert {t.each for t in windows.values()} == {(("compile", 2.0), ("timm path", 5.0))}
    for mode, percent in (("forward", 60), ("backward", 40)):
        assert [t.roofline for name, t in windows.items() if name.endswith(f" {mode}")] == [percent] * 5
    assert by["patch_embed 256x224 patch 16 bf16 forward"].roofline == 80
    assert by["swin_base_patch4_window7_224 batch 128 bf16 inference"].ratio == 1.5
    assert by["swin_tiny_patch4_window7_224 batch 64 bf16 train"].memory == 0.7
    kinds = [case.op for case in gpu.chosen_cases(gpu.STEPS)[:10]]
    assert {"flash_attention", "window_attention", "patch_embed", "info_nce", "swin_base_patch4_window7_224"} <= set(
        kinds
    )


def test_gpu_run_keeps_to_its_time(monkeypatch):
    """Cases of 30 s within 100 s: three run, the others are listed, and their targets are reported as not measured."""
    now, chosen = [0.0], gpu_cases.ordered(gpu_cases.tiny())

    def run(cases, *_):
        now[0] += 30.0
        return runner.Results(rows=[case.id for case in cases])

    monkeypatch.setattr(gpu.runner, "run", run)
    results = gpu.measure_within(chosen, Settings(), TOP, lambda: 100.0 - now[0], lambda line: None)
    assert now[0] == 90.0
    assert results.left_out == [case.id for case in chosen[3:]]
    assert {o.case.id for o in results.outcomes} == {case.id for case in chosen[3:] if case.target}
    assert all(o.passed is None for o in results.outcomes)


def test_floor_of_the_cost_model():
    """Bytes over bandwidth for short sequences, flops over rate for long ones, NaN for an unknown GPU."""
    short = next(case for case in gpu_cases.ops() if case.op == "window_attention" and case.mode == "forward")
    moved = 4 * 128 * 56 * 56 * 96 * 2  # qkv and out
    assert gpu_cost.floor_ms(short, "NVIDIA H200") == pytest.approx(1e3 * moved / 4.8e12, rel=0.1)
    assert math.isnan(gpu_cost.floor_ms(short, "NVIDIA GeForce GTX 970"))
    assert all(gpu_cost.floor_ms(case, "NVIDIA H100 80GB HBM3") > 0 for case in gpu_cases.ops() + gpu_cases.losses())
    assert all(math.isnan(gpu_cost.floor_ms(case, "H100")) for case in gpu_cases.models())


def _uncompiled(case: Case, spec: specs.Spec):
    return [provider for provider in gpu_cases.extra(case, spec) if provider.name != "flex"]


def test_gpu_folder():
    assert gpu.folder("NVIDIA H200") == "nvidia-h200"
    assert gpu.folder("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"
