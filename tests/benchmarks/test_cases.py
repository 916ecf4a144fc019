"""The benchmarks' cases and targets."""

from __future__ import annotations

import math

import pytest

from benchmarks import cases, gpu_cases, runner
from benchmarks.cases import Case, Target
from benchmarks.runner import Row
from benchmarks.workload import OURS


def test_design_targets_are_all_there():
    by = {case.id: case.target for case in cases.select(tuple(cases.SUITES), "full") if case.target}
    ratios = {
        "flash_attention 8x12x197x64 fp32 forward": (2.7, 75),
        "flash_attention 8x16x577x64 fp32 forward": (2.6, 82),
        "flash_attention 8x12x1025x64 fp32 forward": (2.4, 87),
        "flash_attention 8x12x197x64 bf16 forward": (2.1, 75),
        "flash_attention 8x16x577x64 bf16 forward": (4.5, 80),
        "flash_attention 8x12x1025x64 bf16 forward": (4.5, 83),
        "flash_attention 8x12x197x64 fp32 forward+backward": (6.0, None),
        "flash_attention 4x12x1025x64 fp32 forward+backward": (2.2, None),
        "flash_attention 8x12x197x64 bf16 forward+backward": (1.5, None),
        "flash_attention 4x12x1025x64 bf16 forward+backward": (3.0, None),
    }
    assert {name: (by[name].ratio, by[name].ceiling) for name in ratios} == ratios
    windows = [
        t.ratio
        for name, t in by.items()
        if name.startswith("window") and "fp32 forward" in name and "backward" not in name
    ]
    assert windows == [12.0, 8.0, 8.0]
    assert sum(name.startswith("window") for name in by) == 12
    assert sum("inference" in name and t.against == ("openvino",) for name, t in by.items()) == 4
    assert sum("train" in name and t.against == ("timm",) for name, t in by.items()) == 4
    assert by["info_nce batch 32768 d 512 fp32 forward+backward"].memory == 0.05
    assert sum(t.extra_us == 10.0 for t in by.values()) == 1


def test_a_run_that_ends_early_covers_every_operator():
    chosen = cases.select(tuple(cases.SUITES), "default")
    spread = cases.spread(chosen)
    ops = {case.op for case in chosen}
    assert {case.op for case in spread[: len(ops)]} == ops
    assert sorted(case.id for case in spread) == sorted(case.id for case in chosen)


def test_ids_are_unique():
    own = [suite for name, suite in cases.SUITES.items() if name != "memory"]  # which has cases of the others
    everything = [case for suite in own for case in suite()] + gpu_cases.every()
    ids = [case.id for case in everything]
    assert len(ids) == len(set(ids))


def _row(provider: str, ms: float, **kw) -> Row:
    return Row("op", "c", provider, "fp32", "forward", 2, median_ms=ms, **kw)


@pytest.mark.parametrize(
    ("target", "rows", "passed"),
    [
        (Target(2.0, ("a", "b")), [_row(OURS, 1.0), _row("a", 3.0), _row("b", 1.9)], False),
        (Target(2.0, ("a", "b")), [_row(OURS, 1.0), _row("a", 3.0), _row("b", 2.1)], True),
        (Target(2.0, ("a",), ceiling=80), [_row(OURS, 1.0, percent_of_ceiling=79.0), _row("a", 3.0)], False),
        (Target(1.4, ("a",), memory=0.05), [_row(OURS, 1.0, peak_mem=4.0), _row("a", 1.5, peak_mem=100.0)], True),
        (Target(1.4, ("a",), memory=0.05), [_row(OURS, 1.0, peak_mem=6.0), _row("a", 1.5, peak_mem=100.0)], False),
        (Target(against=("a",), extra_us=10.0), [_row(OURS, 0.020), _row("a", 0.012)], True),
        (Target(against=("a",), extra_us=10.0), [_row(OURS, 0.023), _row("a", 0.012)], False),
        (
            Target(1.0, ("openvino",)),
            [_row(OURS, 1.0), _row("openvino", math.nan, status="missing: not installed")],
            None,
        ),
        (Target(roofline=60, each=(("a", 5.0),)), [_row(OURS, 1.0, percent_of_roofline=70.0), _row("a", 4.0)], False),
        (Target(roofline=60, each=(("a", 5.0),)), [_row(OURS, 1.0, percent_of_roofline=70.0), _row("a", 5.5)], True),
    ],
)
def test_targets_are_held(target, rows, passed):
    outcome = runner.hold(Case("op", "c", "fp32", "forward", {}, target), rows)
    assert outcome.passed is passed
    assert "not installed" in outcome.measured or passed is not None


def test_a_target_half_measured_is_not_met():
    case = Case("x", "", "bf16", "forward", {}, Target(roofline=60, each=(("compile", 2.0),)))
    ours = Row("x", "", OURS, "bf16", "forward", 1, median_ms=1.0, percent_of_roofline=70)
    peer = Row("x", "", "compile", "bf16", "forward", 1, median_ms=3.0)
    assert runner.hold(case, [ours, peer]).passed is True
    assert runner.hold(case, [ours]).passed is None
    ours.percent_of_roofline = 50
    assert runner.hold(case, [ours]).passed is False


def test_groups_share_cases_and_run_them_once():
    memory = {case.id for case in cases.SUITES["memory"]()}
    assert memory <= {case.id for case in cases.select(("ops", "losses", "training"), "full")} | {
        case.id for case in cases.select(("ops", "losses", "training"), "quick")
    }
    chosen = [case.id for case in cases.select(tuple(cases.SUITES), "full")]
    assert len(chosen) == len(set(chosen))
    assert {case.mode for case in cases.SUITES["models"]()} == {"inference"}
    assert {case.mode for case in cases.SUITES["training"]()} == {"train"}
