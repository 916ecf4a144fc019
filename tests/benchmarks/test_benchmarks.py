"""The benchmarks' command line, report, profile and comparison of matrix products."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main, parse
from benchmarks.workload import OURS
from pyvit import library


def test_command_line_end_to_end(tmp_path: Path, capsys):
    assert main(["ops", "--quick", "--only", "patch_embed 2x64", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "GF/s fp32" in printed
    assert "patch_embed 2x64 patch 16" in printed
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert list(rows[0])[:16] == [
        "op", "case", "provider", "dtype", "mode", "threads", "median_ms", "p20", "p80", "ratio", "gflops",
        "percent_of_ceiling", "max_err", "allowed_err", "peak_mem", "versions",
    ]  # fmt: skip
    ours = next(row for row in rows if row["provider"] == OURS)
    assert float(ours["max_err"]) <= float(ours["allowed_err"])
    assert float(ours["median_ms"]) > 0
    assert f"torch {torch.__version__}" in ours["versions"]
    assert (tmp_path / "patch_embed.png").stat().st_size > 1000
    assert "## Every row" in (tmp_path / "results.md").read_text()
    assert "patch_embed 2x64 patch 16" in (tmp_path / "report.html").read_text()


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


def test_profile_counts_products_and_knows_kinds() -> None:
    from benchmarks import profile

    x, w, b = torch.randn(2, 5, 7), torch.randn(11, 7), torch.randn(11)
    flops = 2.0 * 2 * 5 * 7 * 11
    assert profile.product_flops("mkldnn::_linear_pointwise", [x.shape, w.shape, b.shape]) == flops
    assert profile.product_flops("aten::addmm", [b.shape, (10, 7), (7, 11)]) == flops
    assert profile.product_flops("aten::mm", [(10, 7), (7, 11)]) == flops
    shapes = [(2, 5, 48), (), (), (), (), (64, 48), (999,), (64,), (), (32, 64), (999,), (), (), (2, 5, 32)]
    assert profile.product_flops("pyvit::prepacked_mlp", shapes) == 2 * 10 * (64 * 48 + 32 * 64)
    found = profile.by_kind(lambda: torch.nn.functional.gelu(torch.randn(10, 7) @ torch.randn(7, 11)), 4, rounds=1)
    assert found["matrix products"][1] == flops
    assert found["activation"][2] == 4 * 2 * 10 * 11
    assert profile.attention_flops("vit_tiny_patch16_224", 2) == 2 * 12 * 4 * 197 * 197 * 192


@pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")
def test_products_report_what_the_rules_lose(tmp_path, capsys):
    from benchmarks import matmul

    only = "prepacked branch, float32, 197 x 192"
    assert matmul.main(["--only", only, "--seconds", "2", "--threads", "1", "--out", str(tmp_path / "matmul.csv")]) == 0
    said = capsys.readouterr().out
    assert "prepacked branch float32      1 cases" in said
    assert "rules 1." in said
    rows = (tmp_path / "matmul.csv").read_text().splitlines()
    assert len(rows) == 5  # layer by layer, onednn, pyvit, torch
    assert sum(row.endswith("True") for row in rows) == 1
    with pytest.raises(SystemExit):
        matmul.main(["--isa", "mmx"])


def test_products_are_those_of_every_layer():
    from benchmarks.matmul import cases
    from pyvit.ops.matmul_rules import KINDS

    found = cases()
    assert len(set(found)) == len(found) > 1000
    assert {case.kind for case in found} == {*KINDS, "prepacked branch"}
    assert {case.rows for case in found} >= {197, 1576, 3136, 25088, 49, 392}
