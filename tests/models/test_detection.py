"""Detection backbones: ViTDet against transformers, and feature pyramids as torchvision uses them."""

import importlib

import pytest
import torch

import pyvit
from pyvit.models.detection import DecomposedAttention
from tests.models.parity import check_parity, randomise, share
from tests.peers import peer, torchvision

BODY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "window_size": 3, "global_blocks": [1]}


@pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=str)
def test_vitdet(size):
    transformers = peer("transformers")
    config = transformers.VitDetConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=32,
        pretrain_image_size=32,
        patch_size=4,
        window_block_indices=[0],
        window_size=3,
        use_relative_position_embeddings=True,
        residual_block_indices=[],
    )
    theirs = randomise(transformers.VitDetModel(config))
    ours = pyvit.create_model("vitdet_base_patch16_1024", **BODY, img_size=32, pretrain_img_size=32, patch_size=4)
    share(ours, theirs)
    images = torch.randn(2, 3, *size)
    check_parity(ours, theirs, ours(images), theirs(images).last_hidden_state)


def test_plain_windows_equal_windows_with_zero_positions():
    with_positions = DecomposedAttention(32, 2, (4, 4), 4)
    plain = DecomposedAttention(32, 2, None, 4)
    plain.load_state_dict(with_positions.state_dict(), strict=False)
    x = torch.randn(2, 6, 9, 32)
    assert torch.allclose(plain(x), with_positions(x), atol=1e-5)


@pytest.mark.parametrize("name", ["fpn_vitdet_base_patch16_1024", "fpn_swin_tiny_patch4_window7"])
def test_pyramid(name):
    swin = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    model = pyvit.create_model(name, out_channels=24, **(BODY | {"img_size": 64} if "vitdet" in name else swin))
    maps = model(torch.randn(1, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for i, x in enumerate(maps.values()):
        assert x.shape == (1, model.out_channels, 64 >> (i + 2), -(-96 >> (i + 2)) if i < 4 else 2) or i == 4
    sum(x.square().mean() for x in maps.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ["fpn_vitdet_base_patch16_1024", "fpn_swin_tiny_patch4_window7"])
def test_mask_rcnn_step(name, monkeypatch):
    vision = torchvision()
    detection = importlib.import_module("torchvision.models.detection")
    if (
        not vision.extension._has_ops()
    ):  # its Python asks for its compiled library, and would take the operator that is there
        monkeypatch.setattr("torchvision.ops.boxes._assert_has_ops", lambda: None)
    swin = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    backbone = pyvit.create_model(name, out_channels=32, **(BODY | {"img_size": 64} if "vitdet" in name else swin))
    model = detection.MaskRCNN(backbone, num_classes=3, min_size=64, max_size=64)
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}
    sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
    assert backbone.body.patch_embed.proj.weight.grad is not None
