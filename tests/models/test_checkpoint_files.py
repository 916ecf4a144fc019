"""Checkpoint files and folders: read without executing code from them, or refused with a one-line error."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
import torch

import pyvit
from pyvit.models import checkpoint_files
from pyvit.models.checkpoints import from_native, load_checkpoint
from pyvit.models.infer import model_from_checkpoint

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


def vit(**more):
    return pyvit.create_model("vit_tiny_patch16_224", **{**VIT, **more})


def same(model, state):
    return all(torch.equal(v, state[k].to(v.dtype)) for k, v in model.state_dict().items())


class Ran(Exception):
    """Code from a file was executed."""


def ran(*_):
    raise Ran


class Trap:
    def __reduce__(self):
        return ran, ()


class ListConfig:
    """Like OmegaConf's containers: an object with further objects in its state."""

    def __init__(self, **content):
        self.__dict__["_content"] = {k: Trap() for k in content}
        self.metadata = collections.defaultdict(list, a=[1])

    def __setstate__(self, state):
        raise Ran


HTML = b"\n<!DOCTYPE html><html><title>404</title></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346\n"

#: name and bytes of a file, and what is said about it
NOT_WEIGHTS = {
    "empty.pth": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "pointer.bin": (LFS, "is a git-lfs pointer"),
    "pointer.safetensors": (LFS, "is a git-lfs pointer"),
    "page.pth": (HTML, "is a web page"),
    "page.safetensors": (HTML, "is a web page"),
    "error.pth": (b'{"error": "not found"}', "is JSON text"),
    "packed.pth": (b"\x1f\x8b\x08\x00abc", "is compressed"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "words.pth": (b"neither pickle nor header", "is not a file of torch.save"),
    "words.safetensors": (b"neither pickle nor header", "is not a safetensors file"),
    "short.safetensors": (b"\x01", "is not a safetensors file"),
    "plain.pkl": (pickle.dumps({"a": np.zeros(3)}), "is not a file of torch.save"),
    "zeros.pth": (bytes(4096), "is not a file of torch.save"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_file_of_weights(name, tmp_path):
    content, reason = NOT_WEIGHTS[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, reason)


def refused(path, reason, kind=ValueError):
    with pytest.raises(kind) as caught:
        load_checkpoint(vit(), path)
    message = str(caught.value)
    assert reason in message
    assert pathlib.Path(path).name in message
    assert "\n" not in message


@pytest.mark.parametrize("form", ["zip", "before 1.6", "safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_files(form, share, tmp_path):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(vit().state_dict(), path)
    else:
        torch.save(vit().state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "is no")


def test_missing_files_folders_and_links(tmp_path):
    refused(tmp_path / "none.pth", "does not exist", FileNotFoundError)
    (tmp_path / "hub.bin").symlink_to(tmp_path / "gone")
    refused(tmp_path / "hub.bin", "is a link to a file that does not exist", FileNotFoundError)
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "it holds nothing")
    for name in ("a.pth", "b.pth"):
        torch.save(vit().state_dict(), tmp_path / "folder" / name)
    refused(tmp_path / "folder", "name one of its files; it holds a.pth, b.pth")
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "config.json"):
        (tmp_path / "run" / name).write_text("{}")
    refused(tmp_path / "run", "holds a run that has not finished")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")


def test_archives_that_are_not_torchs(tmp_path):
    np.savez(tmp_path / "vit.npz", a=np.zeros(3))
    refused(tmp_path / "vit.npz", "NumPy")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        (tmp_path / "x").write_text("x")
        archive.add(tmp_path / "x", "x")
    refused(tmp_path / "old.tar", "is not a file of torch.save")


@pytest.mark.parametrize("new", [True, False])
def test_objects_beside_the_weights_are_not_made(new, tmp_path):
    state = vit().state_dict()
    saved = {
        "model": state,
        "args": argparse.Namespace(lr=1.0, out=pathlib.Path("x")),
        "cfg": ListConfig(a=1),
        "best": np.float64(3.0),
        "when": datetime.datetime(2024, 1, 1),
        "trap": Trap(),
        "meters": collections.defaultdict(list, loss=[1.0]),
    }
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    model = vit()
    load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, state)


@pytest.mark.parametrize("new", [True, False])
def test_objects_in_the_place_of_weights_are_named(new, tmp_path):
    for content in (vit(), {"model": vit()}, Trap(), {"model": {"a": np.zeros(3)}}):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        refused(tmp_path / "a.pth", "holds objects besides tensors and plain values")


def test_system_calls_are_refused(tmp_path):
    class Shell:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"model": vit().state_dict(), "x": Shell()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_checkpoint(vit(), tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


WRAPPED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "hparams": {}},
    "ddp": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled inside ddp": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "compiled blocks": lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()},
    "moving average": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    "timm's moving average": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "averaged model": lambda s: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}},
    "another name": lambda s: {"my_network": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "nested": lambda s: {"checkpoint": {"model": {"backbone": s}}},
    "half": lambda s: {k: v.half() for k, v in s.items()},
    "bfloat16": lambda s: {k: v.bfloat16() for k, v in s.items()},
    "parameters": lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers(wrapper, tmp_path):
    state = {k: v.bfloat16().float() for k, v in vit().state_dict().items()}
    if wrapper == "half":
        state = {k: v.half().float() for k, v in state.items()}
    torch.save(WRAPPED[wrapper](state), tmp_path / "a.pth")
    model = vit()
    report = load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, state)
    assert not report.unexpected
    if "average" in wrapper and wrapper != "averaged model":
        assert any("ema" in note for note in report.notes)


def folder_of(path, state, config, form):
    safetensors = pytest.importorskip("safetensors.torch")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if form == "safetensors":
        safetensors.save_file(state, path / "model.safetensors", {"format": "pt"})
    elif form == "bin":
        torch.save(state, path / "pytorch_model.bin")
    else:
        names = sorted(state)
        places = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(names)}
        for i in range(2):
            safetensors.save_file(
                {k: state[k] for k in names if places[k] == f"model-{i}.safetensors"}, path / f"model-{i}.safetensors"
            )
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


HF = {
    "model_type": "vit",
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_folders_of_transformers(form, tmp_path):
    source = vit()
    folder = folder_of(tmp_path / "hf", from_native(source.state_dict(), "transformers ViT"), HF, form)
    model = vit()
    report = load_checkpoint(model, folder)
    assert same(model, source.state_dict())
    assert report.notes == ["eps 1e-12 in the file, 1e-06 in the model"]
    if form == "shards":
        load_checkpoint(model, folder / "model.safetensors.index.json")
        (folder / "model-1.safetensors").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"index\.json names model-1\.safetensors, which is not in its folder"
        ):
            load_checkpoint(model, folder)


def test_heads_activation_and_epsilon_are_those_of_the_configuration(tmp_path):
    """Settings that shapes do not show."""
    source = vit(num_heads=4, norm_eps=1e-12)
    config = {**HF, "num_attention_heads": 4}
    folder = folder_of(tmp_path / "hf", from_native(source.state_dict(), "transformers ViT"), config, "safetensors")
    with pytest.raises(ValueError, match=r"differs \(1\): blocks\.0\.attn\.num_heads 4 in the file, 2 in the model"):
        load_checkpoint(vit(), folder)
    load_checkpoint(vit(), folder, allow=(r".*num_heads",))
    load_checkpoint(vit(), folder, strict=False)
    model, report = model_from_checkpoint(folder)
    assert model.blocks[0].attn.num_heads == 4
    assert model.norm.eps == 1e-12
    assert not report.notes
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), source.eval()(images))
    config = {**config, "hidden_act": "gelu_new"}
    folder = folder_of(tmp_path / "other", from_native(source.state_dict(), "transformers ViT"), config, "bin")
    with pytest.raises(ValueError, match=r"activation 'gelu_tanh' in the file, 'gelu' in the model"):
        load_checkpoint(vit(num_heads=4), folder)
    assert model_from_checkpoint(folder)[0].blocks[0].mlp.fc1.activation == "gelu_tanh"


def test_numbers_that_are_none_are_refused():
    for value in (float("nan"), float("inf")):
        state = vit().state_dict()
        state["blocks.0.attn.qkv.weight"][3, 4] = value
        with pytest.raises(ValueError, match=r"not_finite \(1\): blocks\.0\.attn\.qkv\.weight"):
            load_checkpoint(vit(), state)
        model = vit()
        assert load_checkpoint(model, state, strict=False).not_finite == ["blocks.0.attn.qkv.weight"]
        assert torch.isfinite(model.blocks[0].attn.qkv.weight).all()


def test_the_meta_device_holds_no_weights():
    with torch.device("meta"):
        model = vit()
    with pytest.raises(ValueError, match="model is on the meta device"):
        load_checkpoint(model, vit().state_dict())
    with pytest.raises(ValueError, match=r"cls_token \(on the meta device\)"):
        load_checkpoint(vit(), model.state_dict())


def test_suffixes_do_not_decide(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = vit()
    safetensors.save_file(source.state_dict(), tmp_path / "a.bin")
    model = vit()
    load_checkpoint(model, tmp_path / "a.bin")
    assert same(model, source.state_dict())
    assert checkpoint_files.read(tmp_path / "a.bin")[1] == {}


def test_configurations_of_timm_and_open_clip(tmp_path):
    """timm's configuration has the architecture and image size, open_clip's the heads and activation."""
    source = vit(img_size=(16, 64))
    config = {
        "architecture": "vit_small_patch16_224",
        "pretrained_cfg": {"input_size": [3, 16, 64]},
        "model_args": {"num_heads": 2},
    }
    folder = folder_of(tmp_path / "timm", source.state_dict(), config, "safetensors")
    assert load_checkpoint(vit(), folder).adapted == ["pos_embed 2x8 -> 4x4"]
    del config["model_args"]
    (folder / "config.json").write_text(json.dumps(config))  # the architecture's own 6 heads
    with pytest.raises(ValueError, match=r"num_heads 6 in the file, 2 in the model"):
        load_checkpoint(vit(), folder)
    towers = {
        "img_size": 32,
        "patch_size": 8,
        "width": 64,
        "depth": 1,
        "num_heads": 1,
        "text_width": 24,
        "text_depth": 1,
        "text_heads": 2,
    }

    def make(**more):
        settings = {**towers, **more, "vocab_size": 20, "context_length": 8}
        return pyvit.create_model("clip_vit_base_patch32_224", **settings)

    text = {"context_length": 8, "vocab_size": 20, "width": 24, "heads": 2, "layers": 1}
    named = {
        "model_cfg": {"vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}, "text_cfg": text}
    }
    path = tmp_path / "open_clip"
    path.mkdir()
    torch.save(from_native(make().state_dict(), "OpenAI CLIP"), path / "open_clip_pytorch_model.bin")
    (path / "open_clip_config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"activation 'gelu' in the file, 'quick_gelu' in the model"):
        load_checkpoint(make(), path)
    assert not load_checkpoint(make(activation="gelu"), path).notes
    with pytest.raises(ValueError, match=r"num_heads 1 in the file, 2 in the model"):
        load_checkpoint(make(activation="gelu", num_heads=2), path)


def test_wrapped_models():
    source, model = vit(), vit()
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model, backend="eager")):
        with torch.no_grad():
            model.pos_embed.zero_()
        load_checkpoint(wrapped, source.state_dict())
        assert same(model, source.state_dict())
