"""``pyvit predict``: the table, the sheet, damaged files, and checkpoints of others."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import pyvit
from pyvit.cli import application
from pyvit.data import load_data
from pyvit.eval import predictions
from pyvit.eval.features import predict
from pyvit.train import Config, train
from pyvit.train.runs import load_network, load_run


def invoke(*arguments):
    done = CliRunner().invoke(application(), ["predict", *map(str, arguments)], catch_exceptions=False)
    return done.output


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images in two classes, and the folders of a supervised run and of a probe on it."""
    root = tmp_path_factory.mktemp("predict")
    for c, name in enumerate(("dark", "light, grey")):
        (root / "data" / name).mkdir(parents=True)
        for i in range(10):
            grey = np.random.default_rng(100 * c + i).integers(20 + 180 * c, 70 + 180 * c, (40, 50, 3))
            Image.fromarray(grey.astype(np.uint8)).save(root / "data" / name / f"{i}.png")
    common = {"data": str(root / "data"), "batch_size": 6, "image_size": 32, "set": ["depth=1"]}
    train(
        Config(**common, model="vit_pico_patch8_32", steps=20, lr=3e-3, out=str(root / "run"),
               option=["augment=none", "mixup=0.0", "cutmix=0.0"])
    )  # fmt: skip
    train(Config(recipe="linear", data=common["data"], batch_size=6, init=str(root / "run"), steps=1,
                 out=str(root / "probe")))  # fmt: skip
    return root


def test_the_table(place, tmp_path):
    """Paths in a fixed order, probabilities as in evaluation, whatever the batch and the workers."""
    out, again = tmp_path / "a.csv", tmp_path / "b.csv"
    said = invoke(place / "run", place / "data", "-o", out, "--batch-size", 7)
    assert "wrote" in said
    assert "20 images" in said
    found = rows(out)
    assert list(found[0]) == ["path", "class", "probability", "class_2", "probability_2"]
    files = sorted((place / "data").rglob("*.png"))
    assert [row["path"] for row in found] == list(map(str, files))
    recipe, data = load_run(place / "run")
    for part in (data.train, data.test):
        logits, _ = predict(recipe.model, part, recipe.normalize)
        for at, want in zip(part.items, logits.softmax(1), strict=True):
            row = next(row for row in found if row["path"] == str(at))
            assert row["class"] == data.classes[int(want.argmax())]
            assert float(row["probability"]) == pytest.approx(float(want.max()), abs=2e-6)
            assert float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1, abs=2e-6)
    right = [row["class"] in row["path"] for row in found]
    assert sum(right) >= 18  # light and dark are told apart
    invoke(place / "run", place / "data", "-o", again, "--batch-size", 7, "--workers", 2)
    assert again.read_bytes() == out.read_bytes()


def test_damaged_files_and_the_sheet(place, tmp_path):
    folder = tmp_path / "new"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (folder / name).write_bytes((place / "data" / "dark" / "1.png").read_bytes())
    for i in range(6):  # more than a training would bear
        (folder / f"broken{i}.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"skipped .*broken0\.jpg"):
        said = invoke(place / "run", folder, "-o", tmp_path / "out.csv", "--sheet", tmp_path / "sheet.png", "--top", 1)
    assert "2 images; 6 files cannot be read and are left out" in said
    assert "left out: 1 .txt files" in said
    assert [row["path"] for row in rows(tmp_path / "out.csv")] == [str(folder / "a.png"), str(folder / "deep/b.png")]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 100
    with pytest.raises(FileNotFoundError, match="does not exist"):
        invoke(place / "run", tmp_path / "nowhere", "-o", tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_a_probe_and_bf16(place, tmp_path):
    """A linear probe classifies too; bfloat16 changes little."""
    outs = [tmp_path / f"{dtype}.csv" for dtype in ("fp32", "bf16")]
    for out in outs:
        invoke(place / "probe", place / "data" / "dark", "-o", out, "--dtype", out.stem)
    full, half = (
        [{row["class"]: float(row["probability"]), row["class_2"]: float(row["probability_2"])} for row in rows(out)]
        for out in outs
    )
    assert len(full) == 10
    assert full != half
    assert all(a[name] == pytest.approx(b[name], abs=0.03) for a, b in zip(full, half, strict=True) for name in a)


def test_a_run_without_classes_says_what_to_do(tmp_path):
    out = tmp_path / "mae"
    small = {"model": "vit_pico_patch8_32", "steps": 1, "batch_size": 4, "set": ["depth=1"]}
    train(
        Config(
            recipe="mae",
            data="digits",
            out=str(out),
            option=["decoder_depth=1", "decoder_dim=24", "decoder_heads=1"],
            **small,
        )
    )
    with pytest.raises(
        ValueError, match="run of mae, which gives no class scores; train a classifier on it: pyvit train"
    ):
        load_network(out)
    assert load_network(out / "model.safetensors", needs_classes=False).classes is None


def test_a_checkpoint_of_timm(tmp_path):
    """Normalisation, crop and class names are those of the configuration beside the weights."""
    torch.manual_seed(0)
    model = pyvit.create_model("vit_pico_patch8_32", depth=1, num_classes=3).eval()
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_pico_patch8_32",
        "num_classes": 3,
        "label_names": ["n1", "n2", "n3"],
        "label_descriptions": {"n1": "cat", "n2": "dog", "n3": "owl"},
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "crop_pct": 1.0},
        "model_args": {"num_heads": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = load_network(tmp_path)
    assert network.classes == ["cat", "dog", "owl"]
    assert network.centre == 1.0
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(network.normalize(pixels), (pixels / 255 - 0.5) / 0.25)
    torch.testing.assert_close(network.model(network.normalize(pixels)), model(network.normalize(pixels)))
    (tmp_path / "config.json").unlink()
    bare = load_network(tmp_path)
    assert bare.classes == ["0", "1", "2"]
    assert any("ImageNet's mean" in note for note in bare.notes)
    assert any("does not name its classes" in note for note in bare.notes)


def test_several_labels(tmp_path):
    """With several labels an image has all classes that reach the threshold, or none."""
    names = ["a", "b", "c"]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        table = predictions.Table(file, names, 2, threshold=0.5)
        for values in ([0.9, 0.2, 0.5], [0.1, 0.2, 0.3]):
            table.add(predictions.Prediction("x", torch.tensor(values), torch.zeros(3, 1, 1)))
    both, none = rows(tmp_path / "t.csv")
    assert both["class"] == "a|c"
    assert none["class"] == ""
    assert (both["class_1"], both["probability_2"], none["class_1"]) == ("a", "0.500000", "c")
    data = load_data("digits")
    files = predictions.Files([data.test.images[i] for i in range(2)], _Identity())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    model(torch.zeros(1, 3, 32, 32))
    found = next(iter(predictions.predictions(model, files, lambda x: x / 255, multi_label=True)))
    want = model(data.test.images[:1] / 255).sigmoid()[0]
    torch.testing.assert_close(found.probabilities, want.detach())


class _Identity:
    shape = (3, 32, 32)

    def whole(self, image):
        return image


def test_the_most_and_the_least_certain():
    kept = predictions.Extremes(2)
    for p in (0.6, 0.9, 0.5, 0.99, 0.7):
        kept.add(predictions.Prediction(str(p), torch.tensor([p, 1 - p]), torch.zeros(3, 1, 1)))
    assert [found.path for found in kept.most()] == ["0.99", "0.9"]
    assert [found.path for found in kept.least()] == ["0.5", "0.6"]
    few = predictions.Extremes(2)
    few.add(predictions.Prediction("only", torch.tensor([1.0]), torch.zeros(3, 1, 1)))
    assert few.least() == []
