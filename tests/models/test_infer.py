"""model_from_checkpoint: the model's settings from the shapes of its weights."""

from __future__ import annotations

import pytest
import torch

import pyvit
from pyvit.models.checkpoints import from_native
from pyvit.models.infer import model_from_checkpoint
from tests.models.checkpoint_models import CLIP, MODELS, VIT, dinov2


@pytest.mark.parametrize("layout", [k for k in MODELS if "V2" not in k])
def test_settings_are_inferred_from_shapes(layout):
    source = MODELS[layout]().eval()
    heads = {"num_heads": [1, 2, 4, 8] if "Swin" in layout else 2}
    if "CLIP" in layout or layout == "open_clip":
        heads["text_heads"] = 2
    model, report = model_from_checkpoint(from_native(source.state_dict(), layout), **heads)
    assert not report.missing
    assert not report.adapted
    inputs = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in source.example_inputs(2))
    for a, b in zip(flat(source(*inputs)), flat(model.eval()(*inputs)), strict=True):
        assert torch.equal(a, b)


def test_a_bag_of_words_is_inferred():
    source = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, text="cbow").eval()
    model, report = model_from_checkpoint(source.state_dict(), num_heads=2)
    assert not report.missing
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 20, (2, 5))
    for a, b in zip(flat(source(images, ids)), flat(model.eval()(images, ids)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [None, (3, 3)])
def test_swin_v2s_windows_are_inferred_from_buffers(trained):
    sizes = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "num_classes": 5,
    }
    source = pyvit.create_model("swinv2_tiny_window8_256", **sizes, pretrained_window_sizes=trained).eval()
    state = source.state_dict()
    with pytest.raises(ValueError, match="give window_size"):
        model_from_checkpoint(state)
    for name, module in source.named_modules():
        if hasattr(module, "coords"):  # as Microsoft's and torchvision's checkpoints hold it
            wh, ww = module.window_size
            state[name + ".relative_coords_table"] = module.coords.view(1, 2 * wh - 1, 2 * ww - 1, 2)
    model, report = model_from_checkpoint(state)
    assert not report.missing
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.eval()(images), source(images), atol=1e-6)


def flat(out):
    return [t for t in out if t is not None] if isinstance(out, tuple) else [out]


def test_dinov2_and_mae_are_inferred():
    mae = pyvit.create_model("mae_vit_base_patch16_224", **{**VIT, "num_classes": 0})
    for source in (dinov2(activation="swiglu", reg_tokens=4, mlp_ratio=3.0), mae):
        model, report = model_from_checkpoint(source.state_dict(), num_heads=2)
        assert type(model) is type(source)
        assert not report.missing


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="not a ViT, Swin or CLIP"):
        model_from_checkpoint({"layer1.0.conv1.weight": torch.zeros(3, 3, 1, 1)})
