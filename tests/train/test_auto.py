"""``pyvit train auto``: what is chosen, and that the printed command gives the same run. Default batches that fit."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import pyvit.train
from pyvit.cli import application
from pyvit.data import Data, TensorImages
from pyvit.train import Config, auto, cost, train


def folder(root, classes=("dark", "light"), n=8, size=(40, 36)):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            grey = np.random.default_rng(100 * c + i).integers(30 + 150 * c, 60 + 150 * c, (*size[::-1], 3))
            Image.fromarray(grey.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def parsed(command, monkeypatch):
    """The Config that a command line gives to train."""
    found = []
    monkeypatch.setattr(pyvit.train, "train", found.append)
    words = shlex.split(command)
    assert words[0] == "pyvit"
    done = CliRunner().invoke(application(), words[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found[0]


def test_the_command_gives_the_config(monkeypatch):
    config = Config(
        data="a folder/of 'images'", recipe="finetune", init="runs/x", lr=1.2345678901e-4, epochs=0.3, flip=False,
        set=["width=16", "small=True"], option=["mixup=0.0", "augment=mild"], workers=3, precision="bf16", fsdp=True,
    )  # fmt: skip
    assert parsed(auto.command(config), monkeypatch) == config


@pytest.fixture
def imagined(monkeypatch):
    """A data set and a speed that exist only as numbers: plan() of them."""

    def plan(images, per_second, side=500, classes=10, gpu=False, fits=1024, **asked):
        labels = torch.arange(images) % classes
        data = Data("x", TensorImages(torch.zeros(images, 3, 1, 1, dtype=torch.uint8), labels),
                    TensorImages(torch.zeros(9, 3, 1, 1, dtype=torch.uint8), torch.arange(9)),
                    (side, side), [f"class {c}" for c in range(classes)])  # fmt: skip
        rates = per_second if isinstance(per_second, dict) else dict.fromkeys([c.size for c in auto.LADDER], per_second)
        monkeypatch.setattr(auto, "load_data", lambda *_: data)
        monkeypatch.setattr(auto, "measure", lambda config, _: auto.Cost(1 / rates[config.image_size], fits, 2))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        return auto.plan("x", **asked)

    return plan


def test_few_images_on_two_cores(imagined):
    found = imagined(270, {128: 60.0, 64: 250.0, 32: 700.0})
    c = found.config
    assert (c.model, c.image_size, c.epochs, c.batch_size) == ("resnet18", 128, 100, 16)
    assert c.recipe == "supervised"
    assert {"augment=mild", "mixup=0.8", "cutmix=1.0"} == set(c.option)
    assert c.precision == "no"
    assert (
        imagined(270, {128: 60.0, 64: 250.0, 32: 700.0}, minutes=1).config.image_size == 64
    )  # 54 s x 60 / s < 30 x 270
    assert imagined(270, {32: 700.0}, side=28).config.image_size == 32  # not larger than the images
    assert imagined(20, 200.0).config.batch_size <= 5


def test_a_million_images_on_a_gpu(imagined):
    found = imagined(1_200_000, 3000.0, gpu=True, fits=256, minutes=60 * 24 * 7)
    c = found.config
    assert (c.model, c.image_size, c.batch_size, c.accumulate) == ("vit_base_conv_s16_224", 224, 1024, 4)
    assert c.epochs == 300
    assert {"augment=standard", "mixup=0.8", "cutmix=1.0", "drop_path=0.1"} <= set(c.option)
    assert c.precision == "bf16"
    assert c.lr == pytest.approx(5e-4 * 2**0.5 / 2, rel=0.05)  # twice DeiT's batch and width


def test_too_little_time_is_said(imagined):
    found = imagined(1_000_000, 500.0, minutes=5)
    assert found.config.epochs == pytest.approx(0.135, abs=0.006)
    assert found.config.image_size == 32  # the cheapest
    assert "these are few; 30 epochs need --minutes 1112" in str(found)
    assert {"augment=mild", "mixup=0.0", "cutmix=0.0"} == set(found.config.option)
    assert "too slow: vit_base_conv_s16_224 at 224 pixels" in str(found)


def test_letters_are_not_mirrored(monkeypatch, tmp_path):
    monkeypatch.setattr(auto, "measure", lambda *_: auto.Cost(0.01, 64, 0))
    found = auto.plan(str(folder(tmp_path / "x", ("b", "d"))))
    assert not found.config.flip
    assert "no flips" in str(found)
    assert "held out: 2 images, one in ten of each class" in str(found)


def test_data_without_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least 2 classes .* train mae, dino"):
        auto.plan(str(folder(tmp_path / "x", ("one",))))


def test_a_run_its_command_and_its_resumption(monkeypatch, tmp_path, capsys):
    """The same call takes the recorded plan, whatever the speed is now; the printed command gives the same weights."""
    monkeypatch.setattr(auto, "measure", lambda *_: auto.Cost(5.0, 64, 0))
    data, out = str(folder(tmp_path / "data")), tmp_path / "run"
    results = auto.auto(data, minutes=1.5, out=str(out))
    said = capsys.readouterr().out
    assert "95 % interval of the accuracy, from 2 held-out images" in said
    line = next(line for line in said.splitlines() if line.startswith("  pyvit train"))
    monkeypatch.setattr(auto, "measure", lambda *_: pytest.fail("measured again"))
    assert auto.auto(data, minutes=1.5, out=str(out)) == results
    assert "chosen before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"minutes was 1\.5, is 2\.0"):
        auto.auto(data, minutes=2.0, out=str(out))
    with monkeypatch.context() as patch:
        config = parsed(line.strip(), patch)
    config.out = str(tmp_path / "again")
    train(config)
    with pytest.raises(ValueError, match="again holds a run of another command"):
        auto.auto(data, out=config.out)
    first, second = (load_file(str(at / "model.safetensors")) for at in (out, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_it_is_measured_and_fine_tuned(tmp_path, capsys):
    """From a run, and from its weights alone: the model, its settings and size are theirs."""
    data = str(folder(tmp_path / "data"))
    sizes = {"model": "vit_pico_patch8_32", "image_size": 32, "set": ["depth=1", "embed_dim=48"]}
    train(Config(data=data, out=str(tmp_path / "run"), steps=1, batch_size=4, option=["augment=mild"], **sizes))
    (tmp_path / "alone").mkdir()
    alone = (tmp_path / "run" / "model.safetensors").rename(tmp_path / "alone" / "weights.safetensors")
    found = auto.plan(data, minutes=0.05, init=str(alone))
    assert (found.config.recipe, found.config.model, found.config.image_size) == ("finetune", "vit_pico_patch8_32", 32)
    assert {"depth=1", "embed_dim=48"} <= set(found.config.set)
    assert found.config.epochs > 0
    capsys.readouterr()
    assert auto.auto(data, minutes=0.05, init=str(alone), out=str(tmp_path / "tuned")).keys() >= {"accuracy"}
    assert "left as initialised: head" not in (said := capsys.readouterr().out)  # two classes, as before
    assert "parameters loaded" in said


def test_kept_activations_are_counted():
    layer = torch.nn.Linear(8, 16)
    x = torch.randn(32, 8)
    # The input and the output of tanh; the weight is a parameter.
    assert cost.activations(lambda: layer(x).tanh().sum(), layer) == 4 * 32 * (8 + 16)


def test_wilson():
    low, high = auto.wilson(0.9, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert auto.wilson(1.0, 10)[1] == 1


@pytest.mark.parametrize(("recipe", "given"), [("mae", {}), ("supervised", {"lr": 1e-3})])
def test_default_batches_fit_few_images(tmp_path, capsys, recipe, given):
    """A default of 4096 or 1024 is no reason to refuse 14 images. The same command resumes the run."""
    data = str(folder(tmp_path / "data"))
    config = Config(
        data=data, recipe=recipe, model="vit_pico_patch8_32", image_size=32, steps=2, set=["depth=1"],
        option=["decoder_depth=1", "decoder_dim=24", "decoder_heads=1"] if recipe == "mae" else [],
        out=str(tmp_path / "run"), **given,
    )  # fmt: skip
    for _ in range(2):
        train(config)
        assert "note: batches of 2 instead of the default" in capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["batch_size"] == 2
    assert kept["lr"] == given.get("lr", pytest.approx(1.5e-4 * 2 / 256))
    assert kept["min_lr"] <= kept["lr"]
    with pytest.raises(ValueError, match="batch_size must be at most the 14 images"):
        train(Config(**{**vars(config), "batch_size": 64, "out": str(tmp_path / "other")}))
