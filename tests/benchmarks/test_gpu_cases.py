"""The cases of the GPU benchmarks, computed with tiny shapes on a CPU."""

from __future__ import annotations

import math

import pytest

from benchmarks import gpu_cases, gpu_cost, gpu_model, loss_specs, measure, report, runner, specs
from benchmarks.cases import Case
from benchmarks.ceiling import Ceiling
from benchmarks.runner import Settings
from benchmarks.workload import OURS
from pyvit.dispatch import choice

TOP = Ceiling({"fp32": 100.0, "bf16": 200.0}, 10.0, 1, "fixed for the test")


@pytest.fixture
def no_collection(monkeypatch):
    """Garbage collection before every timing would take most of the time of tiny cases."""
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)


def _uncompiled(case: Case, spec: specs.Spec):
    return [provider for provider in gpu_cases.extra(case, spec) if provider.name != "flex"]


@pytest.mark.usefixtures("no_collection")
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
    by = {case.id: case.target for case in gpu_cases.every() if case.target}
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


def test_dispatch_measures_twenty_calls():
    """Ten shapes, forward and with the backward: each kind of tile once, as the recorded measurements have them."""
    cases = gpu_cases.dispatch()
    assert len({case.id for case in cases}) == len(cases) == 20
    assert {(c.op, gpu_model.shape(c)) for c in cases} == {(r.op, r.shape) for r in choice.MEASURED}


def test_every_feature_has_a_case():
    shapes = [case.shape for case in gpu_cases.features()]
    for name in ("lengths", "bias", "kv_heads", "dropout", "causal"):
        assert any(name in shape for shape in shapes)
    assert sum(shape.get("batch") == 1 for shape in shapes) == 2


@pytest.mark.usefixtures("no_collection")
def test_features_are_computed():
    """Tiny cases of every feature: ours passes the check, with the dropout mask of the definition; peers that cannot be
    compared or are missing say why."""
    settings = Settings(seconds=0.01, rounds=(1, 1), both_sources=False, extra=_uncompiled)
    results = runner.run(gpu_cases.tiny_features(), settings, TOP, lambda line: None)
    assert not results.red
    rows = {(row.op, row.case, row.provider): row for row in results.rows}
    ours = [row for row in results.rows if row.provider == OURS]
    assert len(ours) == len(gpu_cases.tiny_features())
    assert all(row.timed for row in ours)
    dropout = {provider: row for (_, case, provider), row in rows.items() if "dropout" in case}
    assert dropout[OURS].max_err <= dropout[OURS].allowed_err
    assert dropout["sdpa math"].status == "unchecked: its dropout mask is its own"
    assert dropout["sdpa math"].timed
    assert dropout["flex FLASH"].status == "missing: has no dropout"
    grouped = {provider: row for (_, case, provider), row in rows.items() if "GQA" in case}
    assert grouped["sdpa math"].status == grouped["naive"].status == "ok"
    one = {provider: row for (_, case, provider), row in rows.items() if case == "tiny launch-bound"}
    assert one[gpu_cases.GRAPH].status == "missing: CUDA graphs need a GPU"
    if gpu_cases.missing("flash_attn.cute"):
        assert one[gpu_cases.FA4].status.startswith("missing: flash_attn.cute")
        assert one["flex FLASH"].status.startswith("missing: flash_attn.cute")
    packed = {row.provider: row for row in results.rows if row.op == "flash_attention_varlen"}
    assert packed["varlen_attn"].status.startswith("missing: ")


def test_peers_are_asked_for_by_torch_s_names():
    """The interfaces that pin FlashAttention 4 and FlexAttention's backend exist in this torch."""
    from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls
    from torch.nn.attention.flex_attention import FlexKernelOptions

    assert "FA4" in list_flash_attention_impls()
    assert "FLASH" in str(FlexKernelOptions.__annotations__["BACKEND"]) or "_Backend" in str(
        FlexKernelOptions.__annotations__["BACKEND"]
    )
    if gpu_cases.missing("flash_attn.cute"):
        with pytest.raises(ImportError):
            activate_flash_attention_impl("FA4")


def test_floor_of_the_cost_model():
    """Bytes over bandwidth for short sequences, flops over rate for long ones, NaN for an unknown GPU."""
    short = next(case for case in gpu_cases.ops() if case.op == "window_attention" and case.mode == "forward")
    moved = 4 * 128 * 56 * 56 * 96 * 2  # qkv and out
    assert gpu_cost.floor_ms(short, "NVIDIA H200") == pytest.approx(1e3 * moved / 4.8e12, rel=0.1)
    assert math.isnan(gpu_cost.floor_ms(short, "NVIDIA GeForce GTX 970"))
    assert all(gpu_cost.floor_ms(case, "NVIDIA H100 80GB HBM3") > 0 for case in gpu_cases.ops() + gpu_cases.losses())
    assert all(math.isnan(gpu_cost.floor_ms(case, "H100")) for case in gpu_cases.models())
