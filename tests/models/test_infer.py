"""model_from_checkpoint: the model's settings from the shapes of its weights."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file

import pyvit
from pyvit.models.checkpoints import from_native, open_source
from pyvit.models.infer import model_from_checkpoint, registered_model
from tests.models.checkpoint_models import CLIP, MODELS, VIT, dinov2
from tests.peers import peer

#: Layouts whose models cannot be inferred from weights alone.
NAMED = ("V2", "timm EVA", "timm PE", "SAM 2")


@pytest.mark.parametrize("layout", [k for k in MODELS if not any(n in k for n in NAMED)])
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


@pytest.mark.parametrize(
    ("name", "settings", "want"),
    [
        ("vit_tiny_patch16_384", {"depth": 2}, ("vit_tiny_patch16_384", {"depth": 2}, 384)),
        ("vit_pico_patch8_64", {}, ("vit_pico_patch8_64", {}, 64)),
        ("swin_pico_patch4_window4_32", {}, ("swin_pico_patch4_window4_32", {}, 32)),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, ("deit_tiny_distilled_patch16_224", {"depth": 1}, 224)),
        ("clip_pico_patch8_32", {}, ("vit_pico_patch8_32", {}, 32)),
        ("siglip_pico_patch8_32", {}, ("siglip_pico_patch8_32", {}, 32)),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1}, ("vit_small_patch14_reg4_dinov2", {"depth": 1}, 518)),
        ("resnet18", {"width": 8, "small": True}, ("resnet18", {"width": 8, "small": True}, None)),
    ],
)
def test_weights_name_the_registered_model(name, settings, want):
    """The model of ``--init`` without ``--model``: its name, and settings with which it is built again."""
    source = pyvit.create_model(name, **settings)
    assert registered_model(open_source(source.state_dict())) == want


def test_a_resnet_is_inferred():
    source = pyvit.create_model("resnet18", width=8, num_classes=4).eval()
    model, report = model_from_checkpoint(source.state_dict())
    assert not report.missing
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), source(images))


def test_a_resnet_of_timm_is_inferred():
    source = peer("timm").create_model("resnet18", num_classes=4).eval()
    assert registered_model(open_source(source.state_dict())) == ("resnet18", {}, None)
    model, _ = model_from_checkpoint(source.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(images), source(images), rtol=1e-4, atol=1e-4)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of huggingface_hub, without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_models_of_the_hub_by_name(hub, monkeypatch):
    """From the cache; without it, an error that says what to do."""
    source = pyvit.create_model("vit_pico_patch8_32", depth=1)
    place = hub / "models--timm--vit_small_patch16_224.dino"
    (place / "snapshots" / "0").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    save_file(source.state_dict(), place / "snapshots" / "0" / "model.safetensors")
    peer("timm")
    for name in ("hf-hub:timm/vit_small_patch16_224.dino", "timm:vit_small_patch16_224.dino"):
        target = pyvit.create_model("vit_pico_patch8_32", depth=1, checkpoint=name)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    with pytest.raises(OSError, match=r"hf-hub:a/b is not in the cache and cannot be downloaded .*'hf download a/b'"):
        open_source("hf-hub:a/b")
    with pytest.raises(ValueError, match="must be hf-hub:OWNER/NAME"):
        open_source("hf-hub:alone")
    with pytest.raises(ValueError, match=r"timm has no weights named 'vit_small_patch16_224\.no'; did you mean"):
        open_source("timm:vit_small_patch16_224.no")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        open_source("hf-hub:a/b")
