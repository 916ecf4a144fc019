"""DINOv3's ViT against transformers and timm, with random weights: outputs and all gradients."""

import json

import pytest
import torch
from safetensors.torch import save_file

import pyvit
from pyvit.models.infer import model_from_checkpoint
from tests.models.parity import check_parity, randomise, share
from tests.peers import peer

OURS = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}


def transformers_model(swiglu, bias=True):
    transformers = peer("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    biases = {"query_bias": bias, "value_bias": bias, "num_register_tokens": 4}
    # The gate of the 7B model is SiLU, and of the plus models too.
    gate = {"use_gated_mlp": swiglu, "hidden_act": "silu" if swiglu else "gelu"}
    config = transformers.DINOv3ViTConfig(**sizes, **biases, **gate, patch_size=8, image_size=32)
    return randomise(transformers.DINOv3ViTModel(config))


@pytest.mark.parametrize(
    ("name", "swiglu", "bias"),
    [
        ("vit_small_patch16_dinov3_qkvb", False, True),
        ("vit_small_plus_patch16_dinov3_qkvb", True, True),
        ("vit_7b_patch16_dinov3", True, False),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_transformers(name, swiglu, bias, size):
    theirs = transformers_model(swiglu, bias)
    ours = pyvit.create_model(name, **OURS, mlp_ratio=3.0 if swiglu else 2.0)
    share(ours, theirs)
    images, masks = torch.randn(2, 3, *size), torch.rand(2, size[0] * size[1] // 64) < 0.4
    out = theirs(images, bool_masked_pos=masks)
    check_parity(ours, theirs, ours.forward_features(images, masks=masks), out.last_hidden_state)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images).pooler_output, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"])
def test_timm(name):
    settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
    theirs = randomise(peer("timm").create_model(name, **settings, img_size=32, mlp_ratio=2.0, global_pool="token"))
    ours = pyvit.create_model(name, **OURS, mlp_ratio=3.0 if "plus" in name else 2.0, mask_token=False)
    share(ours, theirs)
    images = torch.randn(2, 3, 24, 40)
    check_parity(ours, theirs, ours(images), theirs(images))


@pytest.mark.parametrize("swiglu", [False, True])
def test_checkpoint_with_configuration(tmp_path, swiglu):
    theirs = transformers_model(swiglu)
    theirs.save_pretrained(tmp_path)
    ours, report = model_from_checkpoint(tmp_path)
    assert report.format == "transformers DINOv3"
    assert not report.missing
    assert not report.differs
    images = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), theirs(images).pooler_output, atol=1e-5)


def test_another_rotary_base_is_refused(tmp_path):
    config = transformers_model(False).config.to_dict() | {"rope_theta": 50.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = pyvit.create_model("vit_small_patch16_dinov3_qkvb", **OURS, mlp_ratio=2.0)
    save_file(transformers_model(False).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"rope\.base 50\.0 in the file, 100\.0 in the model"):
        pyvit.load_checkpoint(ours, tmp_path)


def test_keys_have_no_bias():
    ours = pyvit.create_model("vit_small_patch16_dinov3_qkvb", **OURS)
    assert ours.blocks[0].attn.qkv.bias is None
    with pytest.raises(ValueError, match="qkv_bias must be True, False or 'qv'"):
        pyvit.create_model("vit_small_patch16_dinov3", qkv_bias="kv")
