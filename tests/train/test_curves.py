"""Curves, and what the log tells about the speed of model and data."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import torch

from pyvit.cli.evaluate import curves_command
from pyvit.data import loading
from pyvit.data.dataset import TensorImages
from pyvit.train import Config, engine, train
from pyvit.train.log import Log, Progress

TINY = ["embed_dim=12", "depth=1", "num_heads=1", "patch_size=16"]
SMALL = {"data": "digits", "set": TINY, "batch_size": 8, "steps": 12, "log_every": 1, "option": ["augment=none"]}


def write_log(folder, steps: int, offset: float = 0.0):
    folder.mkdir()
    lines = [{"step": s, "loss": offset + 1 / (s + 1), "lr": 0.1, "time": 1.0} for s in range(steps)]
    lines.insert(steps // 2, {"step": steps // 2 - 1, "knn": 50.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo')
    return folder


def test_curves_of_one_run_and_of_several(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn: dict[str, list] = {}
    plot, title = Axes.plot, Axes.set_title
    lines: list = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **kw: (lines.append((x, y)), plot(self, x, y, **kw))[1])
    monkeypatch.setattr(
        Axes,
        "set_title",
        lambda self, t, **kw: (drawn.update({t: list(lines)}), lines.clear(), title(self, t, **kw))[2],
    )
    one, two = write_log(tmp_path / "one", 20), write_log(tmp_path / "two", 10, 0.5)
    path = curves_command([str(one), str(two)])
    assert path == one / "curves_compared.png"
    assert list(drawn) == ["loss", "learning rate", "knn"]
    assert [(x[-1], y[0]) for x, y in drawn["loss"]] == [(19, 1.0), (9, 1.5)]
    assert drawn["knn"] == [([9], [50.0]), ([4], [50.0])]
    from PIL import Image

    with Image.open(path) as picture:
        assert picture.size[0] > 600
    assert curves_command([str(one)]) == one / "curves.png"
    with pytest.raises(FileNotFoundError, match=r"must hold log\.jsonl"):
        curves_command([str(tmp_path / "nothing")])


def test_a_run_draws_its_curves(tmp_path, capsys, monkeypatch):
    train(Config(**SMALL, out=str(tmp_path / "run")))
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for record in logged[:-1]:
        waited = record["images_per_s"] / record["model_images_per_s"]
        assert 0 <= record["data_wait"] == pytest.approx(1 - waited, abs=1e-4)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "run" / "curves.png").unlink()
    train(Config(**SMALL, out=str(tmp_path / "run")))
    assert "note: no curves.png: curves need matplotlib: pip install matplotlib" in capsys.readouterr().out


def test_a_run_says_that_it_waits_for_data(tmp_path, capsys, monkeypatch):
    draw = TensorImages.draw
    monkeypatch.setattr(TensorImages, "draw", lambda self, *arguments: (time.sleep(0.1), draw(self, *arguments))[1])
    run = engine.Run(Config(**SMALL, out=str(tmp_path / "step")))
    run.step(0, run.batches())
    assert run.waited >= 0.1
    run.close()
    monkeypatch.setattr(engine, "MUCH_WAITING", 0.0)
    train(Config(**{**SMALL, "steps": 3}, out=str(tmp_path / "run")))
    said = capsys.readouterr().out
    assert "% of the time is spent waiting for data, which comes at" in said
    assert "(--workers is 0)" in said


def test_rates_leave_out_the_first_step():
    progress = Progress(10, 3, 8, enabled=False)
    progress.update(3, 100.0, 50.0, {})  # starts workers and compiles
    assert progress.rates()["images_per_s"] == pytest.approx(0.08)
    for step in (4, 5):
        progress.update(step, 2.0, 0.5, {})
    assert progress.rates() == pytest.approx({"images_per_s": 4.0, "model_images_per_s": 16 / 3, "data_wait": 0.25})


def test_the_progress_line_shows_what_the_recipe_names(capsys, monkeypatch, tmp_path):
    from pyvit.train.supervised import Supervised

    monkeypatch.setattr(Supervised, "shown", ("loss", "lr", "nothing"))
    train(Config(**{**SMALL, "steps": 2}, out=str(tmp_path)))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2/2"))
    assert " images/s" in line
    assert "  loss 2." in line
    assert "  lr " in line
    assert "nothing" not in line


def test_the_log_keeps_small_numbers(tmp_path):
    log = Log(tmp_path, 0, False)
    log.write(0, lr=1.23456789e-7, time=1796073661.882, loss=2.3456789)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "step": 0, "lr": 1.23457e-7, "time": 1796073661.882, "loss": 2.345679
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cores", "processes", "gpu", "want"),
    [(2, 1, False, 1), (16, 1, False, 8), (16, 4, False, 2), (16, 4, True, 3), (1, 1, True, 1), (128, 1, True, 16)],
)
def test_workers_by_default(monkeypatch, cores, processes, gpu, want):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    images = TensorImages(torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    assert loading.default_workers(images, 10_000) == 0
    images.decodes = True
    assert loading.default_workers(images, 10_000) == want
    assert loading.default_workers(images, 100) == 0  # fewer than workers are worth


def test_workers_are_used_as_the_default_says(monkeypatch, tmp_path):
    """For the images that the run has still to read, and only if no number is given."""
    asked, used = [], []
    monkeypatch.setattr(engine, "default_workers", lambda images, count: asked.append(count) or 3)
    monkeypatch.setattr(engine.loading, "training_batches", lambda *arguments: used.append(arguments[-1]) or iter([{}]))
    run = engine.Run(Config(**SMALL, out=str(tmp_path / "auto")))
    next(run.batches())
    run.close()
    run = engine.Run(Config(**SMALL, workers=2, out=str(tmp_path / "given")))
    next(run.batches())
    run.close()
    assert (asked, used) == ([12 * 8], [3, 2])
