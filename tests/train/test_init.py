"""--init: from runs of every recipe to every recipe, from folders of other libraries, and at the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import pyvit
from pyvit.data import Data, TensorImages
from pyvit.models.checkpoints import from_native
from pyvit.models.metadata import header_of
from pyvit.nn import resample_positions
from pyvit.train import Config, checkpoint
from pyvit.train.engine import resolve_config
from pyvit.train.recipe import initialise, load_recipe

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
CLIP = {"width": 24, "depth": 2, "num_heads": 2, "text_width": 16, "text_depth": 1, "text_heads": 2}
HEADS = {"prototypes": 16, "hidden": 16, "bottleneck": 8, "local_crops": 1}
OPTIONS = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "dino": HEADS,
    "dinov2": {**HEADS, "layer_scale": 0.5},
    "simclr": {"hidden": 16, "out": 8},
    "clip": {"context": 12},
    "siglip": {"context": 12},
}
MODELS = {"clip": "clip_pico_patch8_32", "siglip": "siglip_pico_patch8_32"}
#: The module of a recipe's trained network that has the encoder's parameters.
ENCODER = {"clip": "visual", "siglip": "visual"}


def pairs(settings):
    return [f"{k}={v!r}" for k, v in settings.items()]


def data(size=32, classes=2, channels=3):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, channels, size, size), dtype=torch.uint8)
    part = TensorImages(images, torch.arange(8) % classes, [f"image {i}" for i in range(8)])
    one = {"mean": (0.5,), "std": (0.5,), "sound": True, "flip": False} if channels == 1 else {}
    return Data("noise", part, part, (size, size), [f"class {i}" for i in range(classes)], **one)


def config(recipe, **more):
    sizes = {k: v for k, v in CLIP.items() if recipe == "clip" or not k.startswith("text")} if recipe in MODELS else VIT
    settings = {
        "model": MODELS.get(recipe, "vit_pico_patch8_32"),
        "set": pairs(sizes),
        "option": pairs(OPTIONS.get(recipe, {})),
    }
    return Config(recipe=recipe, **{"data": "nowhere", "batch_size": 4, "steps": 1, **settings, **more})


def run(recipe, folder, **more):
    """A run's folder with random weights in every parameter. Returns its network."""
    chosen = resolve_config(config(recipe, **more))
    made = load_recipe(recipe)(chosen, data())
    network = made.exported()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    folder.mkdir()
    checkpoint.save_weights(folder / "model.safetensors", network.state_dict(), header_of(network))
    checkpoint.save_json(folder / "config.json", {**vars(chosen), "image_size": 32})
    return network


def start(recipe, init, at=None, **more):
    """The recipe as ``train`` creates it from --init, without a given model."""
    free = {"model": None, "set": []} if recipe not in MODELS or "set" not in more else {}
    return load_recipe(recipe)(resolve_config(config(recipe, init=str(init), **{**free, **more})), at or data())


def encoder_of(recipe, network):
    return network["model"] if recipe == "linear" else getattr(network, ENCODER.get(recipe, ""), network)


def tokens(model, images):
    return model.eval().forward_features(images)


SOURCES = ("supervised", "mae", "dino", "dinov2", "simclr", "clip", "siglip", "linear", "finetune")
TARGETS = ("supervised", "finetune", "linear", "mae", "dino", "simclr")


@pytest.mark.parametrize("source", SOURCES)
def test_every_run_starts_every_recipe(source, tmp_path):
    """The whole encoder is loaded, including LayerScale and pooling, and gives the same outputs."""
    more = {}
    if source in ("linear", "finetune"):
        run("dinov2", tmp_path / "before")
        more = {"init": str(tmp_path / "before"), "model": None, "set": []}
    there = encoder_of(source, run(source, tmp_path / "run", **more))
    images = torch.randn(2, 3, 32, 32)
    for target in TARGETS:
        made = start(target, tmp_path / "run")
        here = made.backbone
        if (source, target) == ("mae", "finetune"):  # the mean of the patches, with a norm of its own
            assert here.global_pool == "avg"
            here.norm = there.norm
        assert torch.equal(tokens(there, images), tokens(here, images)), target
    if source == "dinov2":
        assert isinstance(start("linear", tmp_path / "run").model.blocks[0].ls1, pyvit.nn.residual.LayerScale)


def test_teachers_start_equal_to_students(tmp_path):
    there = run("dinov2", tmp_path / "run")
    made = start("dinov2", tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    for network in (made.backbone, made.exported()):
        assert torch.equal(tokens(there, images), tokens(network, images))


@pytest.mark.parametrize("recipe", ["clip", "siglip"])
def test_two_towers_start_two_towers(recipe, tmp_path):
    there = run(recipe, tmp_path / "run")
    here = start(recipe, tmp_path / "run", model=None, set=[]).model
    assert all(torch.equal(v, here.state_dict()[k]) for k, v in there.state_dict().items())
    # An image tower of its own kind alone; the text tower stays.
    torch.save(there.visual.state_dict(), tmp_path / "tower.pth")
    here = start(recipe, tmp_path / "tower.pth", model=MODELS[recipe], set=config(recipe).set).model
    assert torch.equal(here.visual.pos_embed, there.visual.pos_embed)
    assert not torch.equal(here.text.token_embedding.weight, there.text.token_embedding.weight)


def test_another_image_size_patch_class_count_and_channels(tmp_path, capsys):
    there = run("supervised", tmp_path / "run")
    capsys.readouterr()
    here = start("finetune", tmp_path / "run", data(48, 3)).model
    assert torch.allclose(
        here.pos_embed[0, 1:], resample_positions(there.pos_embed.detach()[0, 1:], (4, 4), (6, 6)), atol=1e-6
    )
    assert here.head.weight.shape[0] == 3
    report = capsys.readouterr().out
    assert "adapted: pos_embed 4x4 -> 6x6" in report
    assert "left as initialised: head.* (2)" in report
    here = start("finetune", tmp_path / "run", data(64), set=["patch_size=16"]).model
    assert here.patch_embed.proj.weight.shape[2:] == (16, 16)
    assert "patch 8x8 -> 16x16" in capsys.readouterr().out
    here = start("finetune", tmp_path / "run", data(32, channels=1)).model
    assert torch.allclose(here.patch_embed.proj.weight, there.patch_embed.proj.weight.sum(1, keepdim=True))
    assert "3 -> 1 channels" in capsys.readouterr().out


REFUSED = {
    "another width": ({"set": ["embed_dim=32", "depth=2", "num_heads=2"]}, "embed_dim=24"),
    "another depth": ({"set": ["embed_dim=24", "depth=3", "num_heads=2"]}, r"missing \(16\): blocks\.2\.norm1\.weight"),
    "other heads": (
        {"set": ["embed_dim=24", "depth=2", "num_heads=3"]},
        r"blocks\.\*\.attn\.num_heads|num_heads 2 in the file, 3 in the model",
    ),
    "no LayerScale": (
        {"set": [*pairs(VIT), "init_values=None"]},
        r"unexpected \(4\): blocks\.0\.ls1\.gamma|ls1\.gamma",
    ),
    "registers": ({"set": [*pairs(VIT), "reg_tokens=4"]}, r"missing \(3\): reg_token"),
    "another family": ({"model": "swin_pico_patch4_window4_32", "set": []}, "VisionTransformer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_weights_of_another_network_are_refused(what, tmp_path):
    more, message = REFUSED[what]
    run("dinov2", tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        start("finetune", tmp_path / "run", **{"model": "vit_pico_patch8_32", **more})


def test_swin_tables_and_merges(tmp_path):
    settings = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 2}
    a = pyvit.create_model("swin_tiny_patch4_window7_224", **settings, window_size=4)
    for state in (a.state_dict(), from_native(a.state_dict(), "Microsoft Swin")):
        torch.save(state, tmp_path / "a.pth")
        b = pyvit.create_model("swin_tiny_patch4_window7_224", **settings, window_size=6)
        report = initialise(b, str(tmp_path / "a.pth"))
        assert not report.missing
        assert len(report.adapted) == 2
        assert torch.equal(a.layers[1].downsample.reduction.weight, b.layers[1].downsample.reduction.weight)


@pytest.mark.parametrize("head", [None, 10])
def test_other_libraries_folders(head, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = pyvit.create_model("vit_pico_patch8_32", **VIT, num_classes=head or 0, norm_eps=1e-12)
    state = {k: v.contiguous() for k, v in from_native(source.state_dict(), "transformers ViT").items()}
    safetensors.save_file(state, tmp_path / "model.safetensors")
    facts = {
        "model_type": "vit",
        "image_size": 32,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    for init in (tmp_path, tmp_path / "model.safetensors"):
        made = start("finetune", init, model="vit_pico_patch8_32", set=pairs(VIT))
        assert torch.equal(made.model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
        assert made.model.norm.eps == 1e-12  # taken over
        assert made.model.head.weight.shape == (2, 24)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"PK\x03\x04cut", "is not a file of torch.save"),
        (None, "does not exist"),
    ],
)
def test_files_without_weights_are_a_one_line_error(content, reason, tmp_path):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    command = [
        "train",
        "linear",
        "--data",
        "digits",
        "--init",
        str(path),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pyvit", *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    assert reason in done.stderr
    assert str(path) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
