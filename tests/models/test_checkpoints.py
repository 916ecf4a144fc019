"""load_checkpoint: wrappers, resampling, reports and errors."""

from __future__ import annotations

import argparse

import pytest
import torch

import pyvit
from pyvit.models.checkpoints import CheckpointError, load_checkpoint
from tests.models.checkpoint_models import VIT, swin, vit


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = vit(), vit()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_checkpoint(other, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_positions_and_windows_are_resampled():
    report = load_checkpoint(vit(img_size=48), vit().state_dict())
    assert report.adapted == ["pos_embed 4x4 -> 6x6"]
    report = load_checkpoint(swin(window_size=4), swin().state_dict())
    assert len(report.adapted) == 4  # the last stage's map is one window of 2 in both
    assert "3x3 -> 7x7" in report.adapted[0]


def test_class_position_moves_into_the_token():
    source, target = vit(), vit(no_embed_class=True)
    load_checkpoint(target, source.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(source.eval().forward_features(images), target.eval().forward_features(images), atol=1e-6)


def test_what_does_not_fit_is_reported_and_nothing_is_loaded():
    state = vit().state_dict()
    state["surprise"] = torch.zeros(3)
    del state["norm.bias"]
    model = vit(num_classes=9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, state)
    report = caught.value.report
    assert report.missing == ["norm.bias"]
    assert report.unexpected == ["surprise"]
    assert report.mismatched == ["head.weight (5, 32) for (9, 32)", "head.bias (5,) for (9,)"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = load_checkpoint(model, state, strict=False)
    assert "norm.bias" in str(report)
    assert torch.equal(model.cls_token, state["cls_token"])
    del state["surprise"]
    load_checkpoint(model, state, allow=(r"head\..*", r"norm\.bias"))


def test_mae_encoder_loads_into_a_vit():
    mae = pyvit.create_model(
        "mae_vit_base_patch16_224",
        **{**VIT, "num_classes": 0},
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    report = load_checkpoint(vit(num_classes=0), {"model": mae.state_dict()})
    assert all(k.startswith(("decoder", "mask_token")) for k in report.unused)
    assert not report.missing


def test_create_model_with_checkpoint():
    state = vit().state_dict()
    model = pyvit.create_model("vit_tiny_patch16_224", **VIT, checkpoint=state)
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    with pytest.warns(UserWarning, match=r"mismatched.*head\.weight"):
        model = pyvit.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 9}, checkpoint=state)
    assert not model.head.weight.any()
    settings = {k: v for k, v in VIT.items() if k != "num_classes"}
    with pytest.raises(CheckpointError):
        pyvit.create_model("vit_tiny_patch16_224", **settings, checkpoint=state)


def test_empty_source_is_refused():
    with pytest.raises(ValueError, match="no tensors in source"):
        load_checkpoint(vit(), {"epoch": 3})
    with pytest.raises(ValueError, match="format must be one of"):
        load_checkpoint(vit(), vit().state_dict(), name="keras")


def test_training_scripts_checkpoints(tmp_path):
    """As DINO saves them: student and teacher, wrapped, with arguments and the optimizer. The teacher is loaded."""
    student, teacher = vit(num_classes=0), vit(num_classes=0)
    head = {"head.mlp.0.weight": torch.zeros(3, 3), "head.last_layer.weight_g": torch.zeros(3, 1)}
    saved = {
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()}
        | {f"module.{k}": v for k, v in head.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()} | head,
        "optimizer": {"state": {0: {"step": 3}}},
        "args": argparse.Namespace(lr=1.0),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    model = vit(num_classes=0)
    assert load_checkpoint(model, tmp_path / "checkpoint.pth").unused == list(head)
    assert torch.equal(model.pos_embed, teacher.pos_embed)
    assert not torch.equal(model.pos_embed, student.pos_embed)


def test_own_checkpoints_of_nested_models():
    """The prefixes "encoder.", "teacher." and "backbone." belong to wrappers for a ViT, and to the model itself for
    models that contain a ViT."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    for name, more in {
        "dino_vit_tiny_patch16_224": {"prototypes": 16, "head_hidden": 16, "bottleneck": 8},
        "simclr_vit_small_patch16_224": {},
    }.items():
        source, target = (pyvit.create_model(name, **small, **more) for _ in range(2))
        load_checkpoint(target, source.state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
        )
        backbone = vit(num_classes=0, depth=1)
        load_checkpoint(backbone, source.state_dict())
        wanted = source.teacher.backbone if name.startswith("dino") else source.encoder
        assert torch.equal(backbone.pos_embed, wanted.pos_embed)


def test_a_tensor_beside_the_wrapped_weights():
    model = vit()
    assert not load_checkpoint(model, {"model": vit().state_dict(), "scale": torch.tensor(3.0)}).unexpected


def test_torchscript_archive(tmp_path):
    source, target = (torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2))
    torch.jit.script(source).save(tmp_path / "archive.pt")
    load_checkpoint(target, tmp_path / "archive.pt")
    assert torch.equal(source[0].weight, target[0].weight)


@pytest.mark.parametrize("name", ["junk.pth", "junk.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, name):
    (tmp_path / name).write_bytes(b"neither pickle nor header")
    with pytest.raises(ValueError, match=rf"{name} is not a (file of torch.save|safetensors file)"):
        load_checkpoint(vit(), tmp_path / name)


def test_a_whole_module_is_refused_with_its_name(tmp_path):
    torch.save(vit(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"holds objects besides tensors and plain values.*VisionTransformer"):
        load_checkpoint(vit(), tmp_path / "model.pth")


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        load_checkpoint(3, vit().state_dict())
    with pytest.raises(CheckpointError, match=r"cls_token torch.int32 for torch.float32"):
        load_checkpoint(vit(), {k: v.int() for k, v in vit().state_dict().items()})
    twice = vit().state_dict()
    with pytest.raises(ValueError, match=r"with and without the prefix 'module.': module.cls_token"):
        load_checkpoint(vit(), {**twice, "module.cls_token": twice["cls_token"]})
