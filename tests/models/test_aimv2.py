"""AIMv2 against transformers and timm, with random weights: outputs and all gradients."""

import pytest
import torch

import pyvit
from pyvit.models.infer import model_from_checkpoint
from tests.models.parity import check_parity, randomise, relative_error, share
from tests.peers import peer

OURS = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 8, "img_size": 32}


def transformers_model(native):
    transformers = peer("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.Aimv2VisionConfig(**sizes, patch_size=8, image_size=32, use_head=False, is_native=native)
    return randomise(transformers.Aimv2VisionModel(config))


@pytest.mark.parametrize(("native", "size"), [(False, (32, 32)), (True, (32, 32)), (True, (24, 40))], ids=str)
def test_parity_transformers(native, size):
    theirs = transformers_model(native)
    ours = pyvit.create_model("aimv2_large_patch14_native" if native else "aimv2_large_patch14_224", **OURS)
    share(ours, theirs)
    images = torch.randn(2, 3, *size)
    check_parity(ours, theirs, ours.forward_features(images), theirs(images).last_hidden_state)


def test_parity_timm():
    settings = {**OURS, "img_size": (24, 40), "num_classes": 5}
    theirs = randomise(peer("timm").create_model("aimv2_large_patch14_224", **settings))
    ours = pyvit.create_model("aimv2_large_patch14_224", **settings)
    share(ours, theirs)
    images = torch.randn(2, 3, 24, 40)
    check_parity(ours, theirs, ours(images), theirs(images))
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-4


@pytest.mark.parametrize("native", [False, True])
def test_from_a_folder(tmp_path, native):
    theirs = transformers_model(native)
    theirs.save_pretrained(tmp_path)
    ours, report = model_from_checkpoint(tmp_path)
    assert not report.missing
    assert not report.differs
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(ours.eval().forward_features(images), theirs(images).last_hidden_state) < 1e-4
    again, _ = model_from_checkpoint(ours.state_dict())
    assert torch.equal(again.eval()(images), ours(images))


def test_masks_are_refused():
    ours = pyvit.create_model("aimv2_large_patch14_224", **OURS)
    with pytest.raises(ValueError, match="masks and keep"):
        ours.forward_features(torch.randn(1, 3, 32, 32), masks=torch.zeros(1, 16, dtype=torch.bool))
