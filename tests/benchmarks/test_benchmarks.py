"""The benchmark suite measures what it says: its arithmetic is right, its gate refuses, its report tells of
everything."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    baselines,
    cases,
    gpu,
    gpu_cases,
    gpu_cost,
    inputs,
    loss_specs,
    measure,
    peers,
    providers,
    report,
    runner,
    specs,
)
from benchmarks.__main__ import main, parse
from benchmarks.cases import Case, Target
from benchmarks.ceiling import Ceiling
from benchmarks.gate import Gate, worst
from benchmarks.runner import Row, Settings
from benchmarks.workload import OURS, Contender, Workload
from pyvit import library

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


def sleeper(seconds: float):
    return lambda: time.sleep(seconds)


def test_interleave_orders_and_ratio():
    timings = measure.interleave(
        {"slow": sleeper(0.004), "fast": sleeper(0.001)}, seconds=0.1, rounds=(7, 7), sample_ms=0.1
    )
    assert len(timings["slow"].samples) == len(timings["fast"].samples) == 7
    assert 2.0 < measure.ratio(timings["slow"], timings["fast"]) < 4.5
    assert timings["slow"].quantile(0.2) <= timings["slow"].median <= timings["slow"].quantile(0.8)


def test_ratio_is_taken_within_rounds():
    # The machine halves its speed midway: a ratio of medians would call these equal, or worse.
    base, ours = measure.Timing((2.0, 4.0, 8.0)), measure.Timing((1.0, 2.0, 4.0))
    assert measure.ratio(base, ours) == 2.0
    assert measure.ratio(base, base) == 1.0


def test_every_contender_runs_in_every_round():
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    measure.interleave(contenders, seconds=0.0, rounds=(4, 4), sample_ms=0.0)
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]  # two calls each to warm up
    assert len(rounds) == 4
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({r[0] for r in rounds}) > 1, "the order never changes"


def test_peak_memory_sees_a_temporary():
    kept = []
    run = lambda: kept.append(torch.ones(12 * 2**20).sum())  # noqa: E731
    used = measure.peak_memory(run)
    assert math.isnan(used) or 40 < used < 120


@pytest.mark.parametrize("source", inputs.SOURCES)
def test_inputs_are_tokens(source):
    x = inputs.tokens(source, 2, 7, 64)
    assert x.shape == (2, 49, 64)
    assert torch.isfinite(x).all()
    assert 0.5 < x.std() < 2.0
    assert inputs.pixels(source, 3, 448).shape == (3, 3, 448, 448)
    if source == "photos":  # neighbouring patches of a photograph resemble each other, noise does not
        assert torch.nn.functional.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1).mean() > 0.1


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


def test_a_run_that_ends_early_has_seen_something_of_each():
    chosen = cases.select(tuple(cases.SUITES), "default")
    spread = cases.spread(chosen)
    ops = {case.op for case in chosen}
    assert {case.op for case in spread[: len(ops)]} == ops
    assert sorted(case.id for case in spread) == sorted(case.id for case in chosen)


def test_ids_are_unique():
    everything = [case for suite in cases.SUITES.values() for case in suite()] + gpu.chosen_cases(gpu.STEPS)
    ids = [case.id for case in everything]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("op", sorted(providers.SPECS))
def test_providers_agree(op):
    """Every provider of every op, on a small case, under the numerics rule; gradients too where it has them."""
    small = {
        "flash_attention": {"batch": 2, "heads": 2, "length": 50, "dim": 16, "bias": True},
        "flash_attention_varlen": {"lengths": (17, 17, 5), "heads": 2, "dim": 16},
        "window_attention": WINDOW.shape,
        "patch_embed": {"batch": 2, "size": 32, "patch": 8, "width": 24, "keep": 5},
        "linear": {"m": 33, "k": 40, "n": 24, "activation": "gelu"},
        "layer_norm": {"rows": 33, "width": 40},
        "rms_norm": {"rows": 33, "width": 40},
        "info_nce": {"batch": 40, "dim": 32},
        "nt_xent": {"batch": 21, "dim": 32},
        "sigmoid_contrastive": {"batch": 40, "dim": 32},
        "distillation_cross_entropy": {"crops": 3, "views": 2, "batch": 5, "dim": 16, "prototypes": 70},
    }[op]
    case = Case(op, "small", "fp32", "forward+backward", small)
    work = providers.build(case, "random", ())
    assert len(work.contenders) > 1
    verdicts = {name: contender.verdict() for name, contender in work.contenders.items()}
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


def test_plain_models_equal_ours():
    from benchmarks import models

    images = inputs.normalised(inputs.pixels("photos", 1, 224))
    name = "vit_tiny_patch16_224"
    with torch.no_grad():
        outs = [models.MODULES[kind](name).eval()(images) for kind in (OURS, "eager SDPA", "eager naive")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-4)
    assert models.flops("vit_base_patch16_224", 1, False) == pytest.approx(2 * 17.56e9, rel=0.01)
    assert models.flops("swin_tiny_patch4_window7_224", 1, False) == pytest.approx(2 * 4.5e9, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_plain_models_equal_timm(name):
    state = baselines.create(name).state_dict()
    model = baselines.create(name, attention="naive").eval()
    model.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), peers.timm_model(name, state).eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_plain_models_equal_transformers(name):
    pytest.importorskip("transformers")
    state = baselines.create(name).state_dict()
    model = baselines.create(name, attention="naive").eval()
    model.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), peers.transformers_model(name, state).eval()(images), rtol=1e-4, atol=1e-5
        )


def test_absent_peers_say_why(monkeypatch):
    from benchmarks import models

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    case = Case("vit_tiny_patch16_224", "batch 1", "bf16", "train", {"batch": 1, "size": 224})
    names, unavailable = models._wanted(case, ("timm", "openvino"), "cpu")
    assert names == [OURS, "eager SDPA", "eager naive"]
    assert unavailable == {"timm": "not installed: timm", "openvino": "not installed: openvino"}


def test_command_line_end_to_end(tmp_path: Path, capsys):
    assert main(["ops", "--quick", "--only", "patch_embed 2x64", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "GF/s fp32" in printed
    assert "patch_embed 2x64 patch 16" in printed
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    wanted = "op,case,provider,dtype,mode,threads,median_ms,p20,p80,ratio,gflops,percent_of_ceiling,max_err,allowed_err,peak_mem,versions"
    assert list(rows[0])[:16] == wanted.split(",")
    ours = next(row for row in rows if row["provider"] == OURS)
    assert float(ours["max_err"]) <= float(ours["allowed_err"])
    assert float(ours["median_ms"]) > 0
    assert f"torch {torch.__version__}" in ours["versions"]
    assert (tmp_path / "patch_embed.png").stat().st_size > 1000
    assert "## Every row" in (tmp_path / "results.md").read_text()


def test_command_line_refuses_what_it_does_not_know(capsys):
    for bad in (["nonsense"], ["ops", "--peers", "tensorrt"]):
        with pytest.raises(SystemExit):
            parse(bad)
        assert bad[-1] in capsys.readouterr().err


def test_table_without_rich(monkeypatch, capsys):
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (
            (_ for _ in ()).throw(ImportError(name)) if name.startswith("rich") else real(name, *a, **k)
        ),
    )
    report.show("title", ("a", "b"), [["1", "two"], ["", "3"]])
    assert capsys.readouterr().out.splitlines()[1:] == ["title", "a  b", "1  two", "   3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_says_what_it_needs(capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "needs a GPU that torch can use" in said[0]


def test_gpu_cases_run_on_any_device(capsys):
    """The GPU's rows end to end at tiny size; on a CPU its SDPA backends are refused, and each says so."""
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
    """Every promise about a GPU, once each, and a rival pinned for every row of attention."""
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
    """Cases of 30 s within 100 s: three start, the others are named, and the targets among them are not measured."""
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


def test_a_target_half_measured_is_not_met():
    case = Case("x", "", "bf16", "forward", {}, Target(roofline=60, each=(("compile", 2.0),)))
    ours = Row("x", "", OURS, "bf16", "forward", 1, median_ms=1.0, percent_of_roofline=70)
    peer = Row("x", "", "compile", "bf16", "forward", 1, median_ms=3.0)
    assert runner.hold(case, [ours, peer]).passed is True
    assert runner.hold(case, [ours]).passed is None
    ours.percent_of_roofline = 50
    assert runner.hold(case, [ours]).passed is False


def test_floor_of_the_cost_model():
    """Bytes over bandwidth for short sequences, flops over rate for long ones, NaN for a part without figures."""
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


def test_profile_counts_products_and_knows_kinds() -> None:
    from benchmarks import profile

    x, w, b = torch.randn(2, 5, 7), torch.randn(11, 7), torch.randn(11)
    flops = 2.0 * 2 * 5 * 7 * 11
    assert profile.product_flops("mkldnn::_linear_pointwise", [x.shape, w.shape, b.shape]) == flops
    assert profile.product_flops("aten::addmm", [b.shape, (10, 7), (7, 11)]) == flops
    assert profile.product_flops("aten::mm", [(10, 7), (7, 11)]) == flops
    if library.problem() is None:
        for dtype in (torch.float32, torch.bfloat16):
            words = [
                torch.ops.pyvit.pack_layer(torch.zeros(shape, dtype=dtype)).shape for shape in ((64, 48), (32, 64))
            ]
            shapes = [(2, 5, 48), (), (), (), (), words[0], (), (64,), (), words[1], (), (), (), (), (2, 5, 32)]
            assert profile.product_flops("pyvit::packed_layers", shapes, dtype.itemsize) == 2 * 10 * (64 * 48 + 32 * 64)
    found = profile.by_kind(lambda: torch.nn.functional.gelu(torch.randn(10, 7) @ torch.randn(7, 11)), 4, rounds=1)
    assert found["matrix products"][1] == flops
    assert found["activation"][2] == 4 * 2 * 10 * 11
    assert profile.attention_flops("vit_tiny_patch16_224", 2) == 2 * 12 * 4 * 197 * 197 * 192


@pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")
def test_products_report_what_the_rules_lose(tmp_path, capsys):
    from benchmarks import products

    only = "packed branch, float32, 197 x 192"
    assert (
        products.main(["--only", only, "--seconds", "2", "--threads", "1", "--out", str(tmp_path / "products.csv")])
        == 0
    )
    said = capsys.readouterr().out
    assert "packed branch  float32      1 cases" in said
    assert "rules 1." in said
    rows = (tmp_path / "products.csv").read_text().splitlines()
    assert len(rows) == 4  # layer by layer, pyvit, torch
    assert sum(row.endswith("True") for row in rows) == 1
    with pytest.raises(SystemExit):
        products.main(["--isa", "mmx"])


def test_products_are_those_of_every_layer():
    from benchmarks.products import cases
    from pyvit.ops.product_rules import KINDS

    found = cases()
    assert len(set(found)) == len(found) > 1000
    assert {case.kind for case in found} == set(KINDS)
    assert {case.rows for case in found} >= {197, 1576, 3136, 25088, 49, 392}
