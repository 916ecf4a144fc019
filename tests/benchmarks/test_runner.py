"""Providers agree, wrong results get no time, and missing peers are reported."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import providers, report, runner
from benchmarks.cases import Case, Target
from benchmarks.ceiling import Ceiling
from benchmarks.gate import Gate, worst
from benchmarks.runner import Settings
from benchmarks.workload import OURS, Contender, Workload

TOP = Ceiling({"fp32": 100.0, "bf16": 200.0}, 10.0, 1, "fixed for the test")
QUICK = Settings(seconds=0.01, rounds=(3, 3), both_sources=False)
WINDOW = Case(
    "window_attention",
    "x",
    "fp32",
    "forward+backward",
    {"batch": 2, "side": 14, "width": 32, "heads": 2, "window": 7, "shift": 3, "version": 1},
    against=("timm path",),
)


@pytest.mark.parametrize("op", sorted(providers.SPECS))
def test_providers_agree(op):
    """Every provider of every operator on a small case, under the numerics rule; gradients too if it has them."""
    small = {
        "flash_attention": {"batch": 2, "heads": 2, "length": 50, "dim": 16, "bias": True},
        "flash_attention_varlen": {"lengths": (17, 17, 5), "heads": 2, "dim": 16},
        "rope_attention": {"batch": 2, "heads": 2, "length": 50, "dim": 16, "norm": "layer"},
        "decomposed_attention": {"batch": 2, "heads": 2, "side": 5, "dim": 16},
        "window_attention": WINDOW.shape,
        "patch_embed": {"batch": 2, "size": 32, "patch": 8, "width": 24, "keep": 5},
        "linear": {"m": 33, "k": 40, "n": 24, "activation": "gelu"},
        "gated_mlp": {"rows": 33, "width": 40, "hidden": 24, "split": True, "norm": True},
        "layer_norm": {"rows": 33, "width": 40},
        "rms_norm": {"rows": 33, "width": 40},
        "info_nce": {"batch": 40, "dim": 32},
        "nt_xent": {"batch": 21, "dim": 32},
        "sigmoid_contrastive": {"batch": 40, "dim": 32},
        "vit_block": {"batch": 2, "length": 20, "width": 32, "heads": 2},
        "swin_block": {"batch": 2, "side": 14, "width": 32, "heads": 2, "window": 7, "shift": 3},
        "distillation_cross_entropy": {"crops": 3, "views": 2, "batch": 5, "dim": 16, "prototypes": 70},
    }[op]
    case = Case(op, "small", "fp32", "forward+backward", small)
    work = providers.build(case, "random", ())
    assert len(work.contenders) > 1
    verdicts = {name: contender.verdict() for name, contender in work.contenders.items() if not contender.unchecked}
    assert verdicts.pop(OURS).passed if OURS in verdicts else OURS in work.unavailable
    assert all(verdict.error <= 4 * verdict.allowed for verdict in verdicts.values()), verdicts
    for contender in work.contenders.values():
        contender.run()


@pytest.mark.parametrize("shape", [{"causal": True}, {}])
def test_causal_providers_agree(shape):
    work = providers.build(
        Case("flash_attention", "s", "fp32", "forward", dict(batch=1, heads=2, length=20, dim=8, **shape)), "random", ()
    )
    assert all(c.verdict().error <= 4 * c.verdict().allowed for c in work.contenders.values())


def test_window_v2_agrees():
    work = providers.build(
        Case("window_attention", "v2", "fp32", "forward", dict(WINDOW.shape, version=2)), "random", ()
    )
    assert set(work.contenders) == {OURS, "timm path", "reference"}
    assert all(c.verdict().error <= 4 * c.verdict().allowed for c in work.contenders.values())


def test_gate_refuses_a_wrong_kernel():
    x = torch.randn(2, 8, 16)
    gate = Gate({"x": x}, lambda x: x.softmax(-1), ["x"])
    assert worst(gate("right", lambda x: x.softmax(-1))).passed
    wrong = worst(gate("wrong", lambda x: x.softmax(-1) * 1.0001))
    assert not wrong.passed
    assert wrong.wrong
    assert "grad_x" in worst(gate("backward", lambda x: _wrong_gradient(x))).detail
    unwritten = worst(gate("unwritten", lambda x: torch.empty_like(x) + 0 * x))
    assert unwritten.wrong
    assert unwritten.error == math.inf


def _wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    y = x.softmax(-1)
    return y + 0.01 * (x - x.detach())


def _workload(factor: float) -> Workload:
    x = torch.randn(4, 64)
    gate = Gate({"x": x}, lambda x: x.softmax(-1))
    functions = {OURS: lambda x: x.softmax(-1) * factor, "naive": lambda x: x.softmax(-1)}
    work = Workload(Case("op", "c", "fp32", "forward", {}, Target(2.0, ("naive",))), "random", 1e6, 1e3)
    work.contenders = {
        name: Contender(lambda f=f: f(x), lambda n=name, f=f: worst(gate(n, f))) for name, f in functions.items()
    }
    work.unavailable["openvino"] = "not installed: openvino"
    return work


def test_no_time_on_a_red_gate():
    rows = {row.provider: row for row in runner.run_workload(_workload(1.01), QUICK, TOP)}
    assert rows[OURS].status.startswith("red")
    assert not rows[OURS].timed
    assert math.isnan(rows[OURS].ratio)
    assert rows["naive"].timed
    assert runner.Results(list(rows.values())).red == [rows[OURS]]
    outcome = runner.hold(_workload(1.01).case, list(rows.values()))
    assert outcome.passed is False
    assert "no time" in outcome.measured


def test_green_rows_and_missing_peers():
    rows = {row.provider: row for row in runner.run_workload(_workload(1.0), QUICK, TOP)}
    assert rows[OURS].timed
    assert rows[OURS].baseline == "naive"
    assert rows["naive"].ratio == 1.0
    assert rows["openvino"].status == "missing: not installed: openvino"
    assert rows[OURS].gflops == pytest.approx(1e6 / rows[OURS].median_ms / 1e6)
    assert rows[OURS].percent_of_ceiling == pytest.approx(rows[OURS].gflops)
    assert rows[OURS].percent_of_roofline == pytest.approx(
        100 * max(1e6 / 100 / 1e6, 1e3 / 10 / 1e6) / rows[OURS].median_ms
    )


def test_the_best_peer_is_named_and_a_loss_said():
    """Of the others only those under the rule count; the worst loss comes first."""
    work = _workload(1.0)
    slow, x = work.contenders["naive"], torch.randn(4, 64)
    gate = Gate({"x": x}, lambda x: x.softmax(-1))
    crude = lambda: x.softmax(-1).mul_(1.0 + 1e-6)  # noqa: E731
    work.contenders["crude"] = Contender(crude, lambda: worst(gate("crude", lambda x: x.softmax(-1) * (1.0 + 3e-6))))
    work.contenders["slow"] = Contender(lambda: [slow.run() for _ in range(50)], slow.verdict)
    rows = {row.provider: row for row in runner.run_workload(work, QUICK, TOP)}
    assert rows["crude"].status == "outside rule"
    assert rows[OURS].best_peer == "naive"
    assert rows[OURS].best_ratio == pytest.approx(rows["naive"].median_ms / rows[OURS].median_ms, rel=0.5)
    assert not any(row.best_peer for row in rows.values() if row.provider != OURS)
    won, lost, worse = (replace(rows[OURS], best_ratio=ratio) for ratio in (0.97, 0.9, 0.5))
    assert [row.loses for row in (won, lost, worse)] == [False, True, True]
    head, *lines = report.never_lose([lost, won, worse])
    assert head.endswith("1 of 3 rows")
    assert [line[:11] for line in lines] == ["0.50x naive", "0.90x naive"]
