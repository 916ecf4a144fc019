"""EVA-02, EVA-CLIP and Perception Encoder against timm, with random weights: outputs and all gradients."""

import json

import pytest
import torch
from safetensors.torch import save_file

import pyvit
from pyvit.models.infer import model_from_checkpoint
from tests.models.parity import check_parity, randomise, relative_error, share
from tests.peers import peer

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": (24, 32), "num_classes": 5}
#: name -> whether the MLP's width has another ratio in the test
EVA = {
    "eva02_tiny_patch14_224": 8 / 3,
    "eva02_base_patch14_448": 8 / 3,
    "eva02_large_patch14_clip_224": 8 / 3,
    "eva02_enormous_patch14_clip_224": 2.0,
    "vit_pe_core_base_patch16_224": 2.0,
    "vit_pe_core_gigantic_patch14_448": 3.0,
    "vit_pe_lang_large_patch14_448": 2.0,
    "vit_pe_spatial_small_patch16_512": 2.0,
}


def pair(name):
    """timm's model and ours with its weights. The grid, 3 x 4, is not that of pre-training."""
    more = {"mlp_ratio": EVA[name]}
    if "core" in name:
        more |= {"pool_heads": 4, "pool_mlp_ratio": 1.5}
    renamed = {"pool_heads": "attn_pool_num_heads", "pool_mlp_ratio": "attn_pool_mlp_ratio"}
    theirs = peer("timm").create_model(name, **TINY, **{renamed.get(k, k): v for k, v in more.items()})
    randomise(theirs)
    ours = pyvit.create_model(name, **TINY, **more)
    share(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("name", EVA)
def test_parity_timm(name):
    ours, theirs = pair(name)
    images = torch.randn(2, 3, 24, 32)
    check_parity(ours, theirs, ours(images), theirs(images))


@pytest.mark.parametrize("name", ["eva02_base_patch14_448", "eva02_enormous_patch14_clip_224"])
def test_inference_and_packed(name):
    ours, theirs = pair(name)
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-4
        found = ours.forward_packed([images, images[:1, :, :16, :16]])
        assert relative_error(found[0], ours.forward_features(images)) < 1e-5
        assert relative_error(found[1], ours.forward_features(images[:1, :, :16, :16])) < 1e-5


@pytest.mark.parametrize("name", EVA)
def test_settings_are_inferred_from_metadata(name):
    ours, _ = pair(name)
    again, report = model_from_checkpoint(ours.state_dict())
    assert not report.missing
    assert not report.adapted
    images = torch.randn(1, 3, 24, 32)
    assert torch.equal(again.eval()(images), ours(images))


def test_timms_folder(tmp_path):
    name = "eva02_tiny_patch14_224"
    theirs = randomise(peer("timm").create_model(name, depth=1, num_classes=3))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 3, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, report = model_from_checkpoint(tmp_path)
    assert not report.missing
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(ours.eval()(images), theirs(images)) < 1e-4
    with pytest.raises(ValueError, match="create the model by name"):
        model_from_checkpoint(dict(theirs.state_dict()))


@pytest.mark.parametrize("options", [{"post_norm": True, "swiglu": True}, {"scale_mlp": True}])
def test_options_that_do_not_go_together(options):
    with pytest.raises(ValueError, match="Eva: "):
        pyvit.models.eva.Eva(**TINY, **options)
