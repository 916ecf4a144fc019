"""torchvision's models accelerated."""

import pytest
import torch

from tests import peers
from tests.integrations.checks import check_accelerated
from tests.models.parity import randomise

torchvision = peers.torchvision()


def on(*size):
    images = torch.randn(2, 3, *size)
    return lambda m: m(images.to(next(m.parameters()).dtype))


def test_vit():
    model = torchvision.models.VisionTransformer(
        32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7
    )
    check_accelerated(randomise(model), on(32, 32), {"Conv2d": 1, "MultiheadAttention": 2, "MLPBlock": 2})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (58, 86), (12, 40)], ids=str)
def test_swin(version, size):
    from torchvision.models import swin_transformer as swin

    v2 = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    model = swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=7, **v2)
    block = "ShiftedWindowAttentionV2" if version == 2 else "ShiftedWindowAttention"
    check_accelerated(randomise(model), on(*size), {block: 4, "MLP": 4})
