"""benchmarks.learning: its runs can be trained, and docs/results.md shows their records."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path

import pytest
import torch

from benchmarks.learning import __main__ as command
from benchmarks.learning import page, peers, record, run
from benchmarks.learning.record import Record
from benchmarks.learning.rows import ABLATION, ROWS, Row
from pyvit.data import load_data
from pyvit.data.load import builtin
from pyvit.train import presets
from pyvit.train.engine import resolve_config


@pytest.mark.parametrize("row", [*ROWS, *ABLATION], ids=lambda row: row.name)
def test_settings(row: Row) -> None:
    config = run.settings(row, 1)
    if config.data not in builtin():
        pytest.skip(f"{config.data} is not installed")
    if row.init:
        config = dataclasses.replace(config, init=None)
    if config.recipe == "finetune":
        config = dataclasses.replace(config, recipe="supervised")
    found = resolve_config(config)
    assert (found.seed, bool(found.batch_size)) == (1, True)
    assert 0 < (found.epochs or 0) <= 300


def test_names_are_unique() -> None:
    names = [row.name for row in (*ROWS, *ABLATION)] + list(peers.NAMES)
    assert len(set(names)) == len(names)
    assert all(callable(getattr(peers, name)) for name in peers.NAMES)


def test_page_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "results.md"
    copy.write_text(page.PAGE.read_text())
    monkeypatch.setattr(page, "PAGE", copy)
    monkeypatch.setattr(page, "CURVES", tmp_path / "curves.svg")
    page.write()
    assert copy.read_text() == (record.ROOT / "docs" / "results.md").read_text(), (
        "run 'python -m benchmarks.learning.page'"
    )


def test_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    def three(*values: float) -> list[Record]:
        return [Record("x", seed, "", {"knn": value}, 60.0) for seed, value in enumerate(values)]

    assert page._effect(three(80.0, 80.4, 80.2), three(75.0, 75.6, 75.1), "knn") == "-5.0"
    assert page._effect(three(80.0, 82.0, 84.0), three(81.0, 83.0, 85.0), "knn") == "no effect at this scale"
    assert page._effect(three(80.0), three(75.0), "knn") == "not known from one seed"
    assert page.cell(three(80.0, 80.4, 80.2), "knn") == "80.2 ± 0.2"
    assert page.minutes(three(1.0)) == "1.0"


def test_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    row = Row("small", "mae --data digits --steps 3 --batch-size 32 --train-images 200", "self-supervised", probe=True)
    monkeypatch.setattr(command, "ROWS", (row,))
    monkeypatch.setattr(command, "ABLATION", ())
    assert command.wanted([], 2, False) == [("small", 0, None), ("small", 1, None)]
    made = run.run(row, 0)
    assert made == record.read("small", 0)
    assert {"test_loss", "knn", "linear", "untrained knn", "untrained linear"} <= made.results.keys()
    assert made.command == f"pyvit train {row.command} --seed 0"
    assert made.curve
    assert made.cpu_seconds > 0
    assert command.wanted([], 2, False) == [("small", 1, None)]
    assert command.wanted([], 1, True) == [("small", 0, None)]
    monkeypatch.setattr(command, "ROWS", (dataclasses.replace(row, command=row.command + " --lr 0.001"),))
    assert command.wanted([], 1, False) == [("small", 0, None)]
    monkeypatch.setattr(command, "ROWS", (row,))
    monkeypatch.setitem(presets.PRESETS, ("mae", "digits"), {"epochs": 7, "option": {"crop": 0.5}})
    assert command.wanted([], 1, False) == [("small", 0, None)]
    with pytest.raises(SystemExit, match="ROW must be one of small, got large"):
        command.wanted(["large"], 1, False)


def _write(folder: Path, name: str, values: torch.Tensor, packed: bool) -> None:
    head = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    content = head + values.numpy().tobytes()
    (folder / f"{name}.gz" if packed else folder / name).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    images = torch.randint(256, (60, 28, 28), dtype=torch.uint8)
    for split in ("train", "t10k"):
        _write(folder, f"{split}-images-idx3-ubyte", images, packed)
        _write(folder, f"{split}-labels-idx1-ubyte", (torch.arange(60) % 10).byte(), packed)
    monkeypatch.setenv("PYVIT_DATASETS", str(tmp_path))
    data = load_data("fashion-mnist")
    assert (len(data.train), len(data.test), data.size, data.flip) == (60, 60, (28, 28), True)
    batch = data.train.fetch([3, 59])
    assert torch.equal(batch["image"], images[[3, 59], None].expand(-1, 3, -1, -1))
    assert batch["label"].tolist() == [3, 9]
    assert load_data("fashion-mnist", 32).train.fetch([0])["image"].shape == (1, 3, 32, 32)
    few = load_data("fashion-mnist", train_images=20)
    assert torch.as_tensor(few.train.labels).bincount().tolist() == [2] * 10
    assert len(few.test) == 60
    assert few.notes[-1] == "20 of the 60 training images are used"
    with pytest.raises(ValueError, match=r"train_images: must be in 1..60, the training images, got 61"):
        load_data("fashion-mnist", train_images=61)
    with pytest.raises(ValueError, match="5 images need 0 of each of 10 classes, and at least 1"):
        load_data("fashion-mnist", train_images=5)


def test_fashion_mnist_is_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvit.data import fashion_mnist

    with pytest.raises(FileNotFoundError, match="images-idx3-ubyte does not exist"):
        fashion_mnist.read_idx(tmp_path, "images-idx3-ubyte")
    (tmp_path / "short").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 9) + b"12345")
    with pytest.raises(ValueError, match=r"must hold \(9,\) values, got 5"):
        fashion_mnist.read_idx(tmp_path, "short")
    (tmp_path / "other").write_bytes(b"not an array")
    with pytest.raises(ValueError, match="is no array of bytes in IDX format"):
        fashion_mnist.read_idx(tmp_path, "other")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 99)[:20])
    with pytest.raises(ValueError, match="is damaged"):
        fashion_mnist.read_idx(tmp_path, "cut")
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.raises(
        FileNotFoundError, match="Install Debian's or Ubuntu's package dataset-fashion-mnist, or download"
    ):
        load_data("fashion-mnist")
