"""SAM's image encoder against transformers and timm, with random weights: outputs and all gradients."""

import pytest
import torch

import pyvit
from tests.models.checkpoint_models import sam
from tests.models.parity import check_parity, randomise, share
from tests.peers import peer


def test_parity_transformers():
    transformers = peer("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_dim=64,
        image_size=32,
        patch_size=4,
        window_size=3,
        global_attn_indexes=[1],
        output_channels=24,
        attn_implementation="eager",
    )
    theirs = randomise(transformers.SamVisionModel(config))
    ours = sam(mlp_ratio=2.0, out_channels=24)
    share(ours, theirs)
    images = torch.randn(2, 3, 32, 32)
    check_parity(ours, theirs, ours(images), theirs(images).last_hidden_state)


def test_parity_timm():
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 4, "window_size": 3}
    theirs = peer("timm").create_model(
        "samvit_base_patch16", **sizes, img_size=(24, 32), global_attn_indexes=[1], neck_chans=16
    )
    randomise(theirs)
    ours = sam(mlp_ratio=2.0, out_channels=16, img_size=(24, 32))
    share(ours, theirs)
    images = torch.randn(2, 3, 24, 32)
    check_parity(ours, theirs, ours(images), theirs.forward_features(images))


def test_other_parts_of_a_checkpoint_are_left_out():
    source = sam()
    state = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in source.state_dict().items()}
    state |= {"mask_decoder.iou_token.weight": torch.zeros(1, 4), "prompt_encoder.no_mask_embed.weight": torch.zeros(1)}
    report = pyvit.load_checkpoint(sam(), state)
    assert report.format == "facebookresearch SAM"
    assert sorted(report.unused) == ["mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"]


@pytest.mark.parametrize("size", [(40, 24), (30, 33)], ids=str)
def test_positions_are_resampled_for_another_size(size):
    source = randomise(sam())
    target = sam(img_size=size).eval()
    report = pyvit.load_checkpoint(target, source.state_dict())
    assert any("pos_embed 8x8 -> " in note for note in report.adapted)
    images = torch.randn(1, 3, *size)
    assert torch.allclose(target(images), source(images), atol=1e-4)
