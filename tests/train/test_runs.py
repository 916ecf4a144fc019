"""Evaluation needs only the run's folder and images, and uses the run's labels."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pyvit.cli import evaluate as commands
from pyvit.data import load_data
from pyvit.train import Config, train
from pyvit.train.checkpoint import save_weights
from pyvit.train.runs import load_run

TINY = {"model": "vit_pico_patch8_32", "image_size": 32, "batch_size": 4, "steps": 1, "set": ["depth=1"]}
PLAIN = ["augment='none'", "mixup=0.0", "cutmix=0.0"]


def shades(root, names=("dark", "light"), n=8):
    for c, name in enumerate(names):
        for i in range(n):
            (root / name).mkdir(parents=True, exist_ok=True)
            value = 30 + 200 * c // max(len(names) - 1, 1) + i
            Image.fromarray(
                np.random.default_rng(100 * c + i).integers(value - 8, value + 8, (40, 40, 3)).astype(np.uint8)
            ).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def run(tmp_path):
    """A finished run whose data has been moved."""
    train(Config(**TINY, data=str(shades(tmp_path / "old")), out=str(tmp_path / "run"), option=PLAIN))
    (tmp_path / "old").rename(tmp_path / "new")
    return tmp_path / "run"


def test_images_may_have_moved(run, tmp_path, capsys):
    recipe, data = load_run(run, str(tmp_path / "new"))
    assert recipe.data.classes == data.classes == ["dark", "light"]
    assert commands.knn(str(run), str(tmp_path / "new")).keys() == {"k=10"}
    assert "2 classes: dark, light" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"old' does not exist; give the images to evaluate on with --data"):
        load_run(run)


def test_the_folder_says_what_the_network_takes(run):
    kept = json.loads((run / "data.json").read_text())
    assert kept["classes"] == ["dark", "light"]
    assert kept["size"] == [32, 32]
    assert len(kept["mean"]) == len(kept["std"]) == 3
    assert kept["images"] == ["14", "2"]
    assert kept["centre"] == 0.875


def test_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch):
    shades(tmp_path / "work" / "data")
    monkeypatch.chdir(tmp_path / "work")
    train(Config(**TINY, data="data", out=str(tmp_path / "run"), option=PLAIN))
    (tmp_path / "work" / "digits").mkdir()  # a folder of the name of a built-in set is not what was trained on
    train(Config(data="digits", steps=1, batch_size=16, set=["depth=1"], out=str(tmp_path / "digits")))
    monkeypatch.chdir(tmp_path)
    assert load_run(tmp_path / "run")[1].classes == ["dark", "light"]
    assert len(load_run(tmp_path / "digits")[1].test) == 355


@pytest.mark.parametrize("recipe", ["finetune", "linear"])
def test_the_run_that_it_began_from_may_be_gone(run, tmp_path, recipe):
    out = tmp_path / recipe
    settings = {**TINY, "data": str(tmp_path / "new"), "out": str(out), "init": str(run), "recipe": recipe}
    results = train(Config(**settings, option=PLAIN if recipe == "finetune" else []))
    shutil.rmtree(run)
    again, data = load_run(out)
    assert again.evaluate(data)["accuracy"] == results["accuracy"]
    assert "k=10" in commands.knn(str(out))
    assert "linear" in commands.linear(str(out), epochs=1)
    assert commands.attention(str(out), count=2).exists()


def test_labels_follow_the_classes_of_the_run_by_name(run, tmp_path):
    """Data with only one of the classes: its label is the run's, not 0."""
    for part in ("train", "val"):
        shades(tmp_path / "two" / part)
    shutil.rmtree(tmp_path / "two" / "val" / "dark")
    data = load_run(run, str(tmp_path / "two"))[1]
    assert data.test.fetch([0])["label"].tolist() == [1]
    kept = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**kept, "classes": ["light", "middle", "dark"]}))
    found = load_data(str(tmp_path / "new"), 32).with_classes(["light", "middle", "dark"])
    assert found.train.fetch([0])["label"].tolist() == [2]
    assert found.test.labels == [2, 0]
    assert "no image of middle" in found.summary()


def test_classes_that_the_run_does_not_know_are_listed(run, tmp_path):
    shades(tmp_path / "other", ("dark", "grey", "pale"))
    with pytest.raises(ValueError, match=r"that the run was trained on, dark, light; it has grey, pale"):
        load_run(run, str(tmp_path / "other"))


def test_spectrograms_are_not_images(run):
    with pytest.raises(ValueError, match="the run was trained on images, words has spectrograms"):
        load_run(run, "words")


def test_self_supervised_runs_are_measured_on_other_classes(run, tmp_path):
    settings = {**TINY, "recipe": "simclr", "option": ["hidden=16", "out=8"], "out": str(tmp_path / "simclr")}
    train(Config(**settings, data=str(tmp_path / "new")))
    shades(tmp_path / "other", ("a", "b", "c"))
    assert load_run(tmp_path / "simclr", str(tmp_path / "other"))[1].classes == ["a", "b", "c"]


@pytest.mark.parametrize("damage", ["config.json", "data.json", "model.safetensors", "weights"])
def test_a_damaged_run_names_its_file(run, tmp_path, damage):
    if damage == "weights":
        save_weights(run / "model.safetensors", {"x": torch.zeros(1)})
        damage = "model.safetensors"
    else:
        (run / damage).write_bytes((run / damage).read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"run: .*{damage} is damaged"):
        load_run(run, str(tmp_path / "new"))


def test_settings_of_another_version_are_named(run, tmp_path):
    kept = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**kept, "warp": 9}))
    with pytest.raises(ValueError, match="settings of another version of pyvit: warp"):
        load_run(run, str(tmp_path / "new"))


@pytest.mark.parametrize("command", ["zero_shot_command", "retrieval_command", "reconstruct"])
def test_measurements_that_do_not_fit_the_run_are_refused(run, tmp_path, command):
    with pytest.raises(ValueError, match="the run must be of the recipe"):
        getattr(commands, command)(str(run), str(tmp_path / "new"))


def test_a_vocabulary_is_kept_with_the_run(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "shade": 1, **{str(i): i + 2 for i in range(20)}, "[END]": 22}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 22)])
    made.save(str(tmp_path / "vocabulary.json"))
    shades(tmp_path / "images", ("all",), n=20)
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"images/all/{i}.png,shade {i}\n" for i in range(20)))
    option = [f"tokenizer='{tmp_path / 'vocabulary.json'}'", "context=8"]
    settings = {
        **TINY,
        "model": "clip_pico_patch8_32",
        "recipe": "clip",
        "data": str(tmp_path / "t.csv"),
        "option": option,
    }
    results = train(Config(**settings, out=str(tmp_path / "run")))
    (tmp_path / "vocabulary.json").unlink()
    recipe, data = load_run(tmp_path / "run")
    assert recipe.evaluate(data) == pytest.approx(results)
    other = load_run(tmp_path / "run", str(shades(tmp_path / "other")))[1]
    assert (
        other.test.decoder.centre == other.train.decoder.centre == 1.0
    )  # as the run's own images were seen, not a folder's 0.875


def test_retrieval_of_towers_without_parts_gives_its_figures(tmp_path, capsys):
    settings = {**TINY, "model": "siglip_pico_patch8_32", "recipe": "siglip", "option": ["context=16"]}
    train(Config(**{**settings, "data": "digits"}, out=str(tmp_path / "run")))
    commands.retrieval_command(str(tmp_path / "run"))
    assert "no sheet of phrases" in capsys.readouterr().out
    assert commands.zero_shot_command(str(tmp_path / "run"), count=2) >= 0


def test_unreadable_images_are_counted_at_the_end(tmp_path, capsys):
    for part in ("train", "val"):
        shades(tmp_path / "d" / part)
        (tmp_path / "d" / part / "dark" / "3.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped"):
        train(
            Config(**{**TINY, "steps": 4}, data=str(tmp_path / "d"), out=str(tmp_path / "run"), option=PLAIN, workers=1)
        )
    said = capsys.readouterr().out
    assert "16 training images, 16 held out; 2 classes: dark, light" in said
    assert "1 of 16 training images were replaced by others" in said
    assert "1 of 16 held-out images are not evaluated" in said
    assert "on 15 held-out images" in said


@pytest.mark.parametrize("n", [2, 4, 20])
def test_neighbours_of_few_images(tmp_path, n):
    for part in ("train", "val"):
        shades(tmp_path / "d" / part, n=n // 2)
    train(Config(**{**TINY, "batch_size": 2}, data=str(tmp_path / "d"), out=str(tmp_path / "run"), option=PLAIN))
    assert list(commands.knn(str(tmp_path / "run"))) == {2: ["k=1"], 4: ["k=1"], 20: ["k=10", "k=20"]}[n]
