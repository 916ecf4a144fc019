"""The machine's name and state, energy counters, and files of results."""

from __future__ import annotations

import csv
import itertools
import math
import time
from pathlib import Path

import pytest

from benchmarks import docs, energy, machine, records
from benchmarks.__main__ import main
from benchmarks.ceiling import Ceiling
from benchmarks.runner import Row


def test_a_loaded_machine_is_busy() -> None:
    steady = lambda: time.sleep(0.001)  # noqa: E731
    assert "load average is 9999.0" in machine.busy(steady, lambda: (9999.0, 0.0, 0.0), seconds=0.01)
    turns = itertools.count()
    uneven = lambda: time.sleep(0.02 if next(turns) % 3 == 0 else 0.002)  # noqa: E731
    assert "equal matrix products took" in machine.busy(uneven, lambda: (0.0,), seconds=0.01)


def test_a_run_on_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(machine, "busy", lambda: "the load average is 7.0 on 2 cores")
    only = ["ops", "--only", "linear 64x32x96", "--seconds", "0.01", "--no-plots", "--out", str(tmp_path)]
    assert main(only) == 2
    assert "--busy measures all the same" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*only, "--busy"]) == 0
    assert "load average is 7.0" in (tmp_path / "results.md").read_text()
    assert records.read(tmp_path)[0]["busy"] == "the load average is 7.0 on 2 cores"


def test_names_of_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def slug(**info: str) -> str:
        monkeypatch.setattr(machine, "_cpuinfo", lambda: info)
        monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
        return machine.slug()

    amd = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC"}
    assert slug(**amd, **{"cpu family": "25", "model": "17"}) == "amd-epyc-zen4-2-cores"
    assert slug(**amd, **{"cpu family": "26", "model": "2"}) == "amd-epyc-zen5-2-cores"
    assert slug(**{"model name": "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.4GHz"}) == "intel-xeon-platinum-8488c-2-cores"


def test_energy_of_a_call_from_a_counter_that_wraps(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("999999")
    (package / "energy_uj").write_text("900000")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package
    joules, source = energy.counter("cpu", tmp_path)
    assert joules is not None
    assert "RAPL" in source
    values = itertools.cycle(["400000", "900000"])
    spend = lambda: (package / "energy_uj").write_text(next(values))  # noqa: E731
    assert energy.per_call(spend, joules, "cpu", seconds=0.0) == pytest.approx(0.5)
    assert energy.per_call(spend, joules, "cpu", seconds=0.0) == pytest.approx(0.5)
    none, why = energy.counter("cpu", tmp_path / "absent")
    assert none is None
    assert "no RAPL counters" in why


def test_what_bounds_a_case() -> None:
    top = Ceiling({"fp32": 100.0}, 10.0, 1, "fixed")
    assert [top.bound(flops, 1e9, "fp32") for flops in (20e9, 5e9)] == ["compute", "memory"]
    assert top.bound(1e9, math.nan, "fp32") == top.bound(1e9, 1e9, "int8") == ""


def test_models_in_columns_of_timm(tmp_path: Path) -> None:
    row = Row("vit_tiny_patch16_224", "batch 4", "ours", "fp32", "inference", 2, median_ms=20.0, best_peer="timm")
    row.batch_size, row.img_size, row.images_per_s = 4, 224, 200.0
    train = Row("vit_tiny_patch16_224", "batch 4", "timm", "fp32", "train", 2, median_ms=80.0)
    train.batch_size, train.img_size, train.images_per_s = 4, 224, 50.0
    operator = Row("linear", "x", "ours", "fp32", "forward", 2, median_ms=1.0)
    assert records.write_models([row, train, operator], tmp_path / "models.csv", price=0.36)
    first, second = csv.DictReader((tmp_path / "models.csv").open())
    assert list(first)[:7] == [
        "model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs",
        "train_samples_per_sec",
    ]  # fmt: skip
    assert float(first["infer_samples_per_sec"]) == 200
    assert float(first["param_count"]) == pytest.approx(5.72, abs=0.01)  # as timm lists them
    assert float(first["infer_gmacs"]) == pytest.approx(1.26, abs=0.05)
    assert float(first["images_per_dollar"]) == 2e6
    assert (first["train_step_time"], second["infer_step_time"], second["train_step_time"]) == ("", "", "80.000")
    assert not records.write_models([operator], tmp_path / "none.csv")


def test_older_results_have_images_per_second(tmp_path: Path) -> None:
    head = "op,case,provider,dtype,mode,threads,median_ms\n"
    (tmp_path / "results.csv").write_text(f"{head}vit,batch 8,ours,fp32,inference,2,16\n")
    assert records.read(tmp_path)[1][0].images_per_s == 500


def test_shared_results_are_in_the_table_of_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "slug", lambda device: "some-machine")
    out = ["--no-plots", "--out", str(tmp_path / "out"), "--share", str(tmp_path / "shared")]
    assert main(["ops", "--quick", "--only", "linear 64x32x96", "--seconds", "0.01", *out]) == 0
    folder = tmp_path / "shared" / "some-machine"
    assert {path.name for path in folder.iterdir()} == {"results.csv", "results.json", "results.md"}
    about, rows = records.read(folder)
    assert "linear 64x32x96" in about["command"]
    assert about["ceiling"]["copy_gbs"] > 0
    assert len(rows[0].samples) >= 3
    monkeypatch.setattr(docs, "RESULTS", tmp_path / "shared")
    line = docs.machines("results/").splitlines()[2]
    assert line.startswith(f"| some-machine | {about['date'][:10]} | {about['torch']} | 1 | ")
    assert " of 1 | " in line
    assert "(results/some-machine/results.md)" in line
