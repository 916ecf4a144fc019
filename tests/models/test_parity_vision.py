"""ViT, DINOv2 and Swin against transformers, with random weights: outputs and all gradients."""

import pytest
import torch

import pyvit
from pyvit.models.infer import model_from_checkpoint
from tests.models.parity import check_parity, randomise, relative_error, share
from tests.peers import peer

transformers = peer("transformers")

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
OURS = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


@pytest.mark.parametrize("size", [(32, 32), (48, 24)], ids=str)
def test_vit(size):
    config = transformers.ViTConfig(**TINY, image_size=32, patch_size=8, num_labels=7, layer_norm_eps=1e-6)
    theirs = randomise(transformers.ViTForImageClassification(config))
    ours = pyvit.create_model(
        "vit_tiny_patch16_224", **OURS, img_size=32, patch_size=8, num_classes=7, interpolate_antialias=False
    )
    share(ours, theirs)
    images = torch.randn(2, 3, *size)
    check_parity(ours, theirs, ours(images), theirs(images, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [(28, 28), (42, 28)], ids=str)
def test_dinov2(swiglu, registers, size):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = {"num_register_tokens": registers} if registers else {}
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2}
    config = getattr(transformers, kind + "Config")(
        **sizes, **extra, image_size=28, patch_size=7, num_labels=5, use_swiglu_ffn=swiglu
    )
    theirs = randomise(getattr(transformers, kind + "ForImageClassification")(config))
    ours = pyvit.create_model(
        "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2",
        **OURS,
        img_size=28,
        patch_size=7,
        num_classes=5,
        global_pool="token_avg",
        activation="swiglu" if swiglu else "gelu",
        interpolate_antialias=bool(registers),
        interpolate_offset=0.0,
    )
    share(ours, theirs)
    images = torch.randn(2, 3, *size)
    check_parity(ours, theirs, ours(images), theirs(images).logits)


def test_gated_dinov2_from_a_folder(tmp_path):  # its configuration names an activation that it does not use
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2}
    config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=7, use_swiglu_ffn=True)
    theirs = randomise(transformers.Dinov2Model(config))
    theirs.save_pretrained(tmp_path)
    ours, report = model_from_checkpoint(tmp_path, global_pool="token")
    assert not report.missing
    assert not report.differs
    images = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert relative_error(ours.eval()(images), theirs(images).pooler_output) < 1e-4


def test_dinov2_masks():
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=28, patch_size=7
    )
    theirs = randomise(transformers.Dinov2Model(config))
    ours = pyvit.create_model("vit_small_patch14_dinov2", **OURS, img_size=28, patch_size=7)
    share(ours, theirs)
    images, masks = torch.randn(2, 3, 28, 28), torch.rand(2, 16) < 0.4
    check_parity(
        ours,
        theirs,
        ours.forward_features(images, masks=masks),
        theirs(images, bool_masked_pos=masks).last_hidden_state,
    )


SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (29, 43), (24, 40)], ids=str)
def test_swin(version, size):
    kind = "Swin" if version == 1 else "Swinv2"
    config = getattr(transformers, kind + "Config")(image_size=32, num_labels=7, **SWIN)
    theirs = randomise(getattr(transformers, kind + "ForImageClassification")(config))
    ours = pyvit.create_model("swin_tiny_patch4_window7_224", **SWIN, img_size=32, num_classes=7, version=version)
    share(ours, theirs)
    images = torch.randn(2, 3, *size)
    check_parity(ours, theirs, ours(images), theirs(images, interpolate_pos_encoding=True).logits)
