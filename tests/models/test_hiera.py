"""Hiera against timm and transformers, with random weights: outputs and all gradients."""

import pytest
import torch

import pyvit
from pyvit.models.infer import model_from_checkpoint
from tests.models.checkpoint_models import hiera
from tests.models.parity import check_parity, check_same_names, randomise, relative_error, share
from tests.peers import peer

SIZES = {"embed_dim": 16, "num_heads": 2, "stages": (1, 2, 2, 1)}


@pytest.mark.parametrize("windows", [False, True])
def test_parity_timm(windows):
    more = {"abs_win_pos_embed": True, "global_pos_size": (5, 5)} if windows else {}
    theirs = peer("timm").models.hiera.Hiera(img_size=(64, 96), num_classes=5, **SIZES, **more)
    ours = hiera(img_size=(64, 96), global_pos_size=(5, 5) if windows else None)
    check_same_names(ours, theirs, torch.randn(2, 3, 64, 96), relu=False)


def test_parity_transformers(tmp_path):
    transformers = peer("transformers")
    sizes = {"embed_dim": 16, "depths": [1, 2, 2, 1], "num_heads": [2, 4, 8, 16], "image_size": [64, 64]}
    config = transformers.HieraConfig(**sizes, num_labels=5)
    theirs = randomise(transformers.HieraForImageClassification(config))
    ours = hiera()
    share(ours, theirs)
    images = torch.randn(2, 3, 64, 64)
    theirs.save_pretrained(tmp_path)
    again, report = model_from_checkpoint(tmp_path)
    assert not report.missing
    assert torch.equal(again.eval()(images), ours(images))
    check_parity(ours, theirs, ours(images), theirs(images).logits)


def test_maps_and_inference():
    ours = randomise(hiera())
    images = torch.randn(1, 3, 96, 64)
    maps = ours.forward_pyramid(images)
    assert [tuple(m.shape) for m in maps] == [(1, 16, 24, 16), (1, 32, 12, 8), (1, 64, 6, 4), (1, 128, 3, 2)]
    with torch.no_grad():
        assert relative_error(ours(images), ours.head(maps[-1].permute(0, 2, 3, 1))) < 1e-5
    ours.set_grad_checkpointing()
    assert relative_error(ours(images), ours.head(maps[-1].permute(0, 2, 3, 1))) < 1e-5


def test_settings_are_inferred():
    ours = randomise(hiera(global_pos_size=(5, 5)))
    again, report = model_from_checkpoint(ours.state_dict())
    assert not report.missing
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(images), ours(images))


def test_sizes_that_windows_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 32, got \(64, 80\)"):
        hiera()(torch.randn(1, 3, 64, 80))
    with pytest.raises(ValueError, match="four numbers"):
        pyvit.create_model("hiera_tiny_224", stages=(1, 2))
    with pytest.raises(ValueError, match="must be even"):
        hiera(window_sizes=(8, 5, 0, 0))
