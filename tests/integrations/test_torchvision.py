"""torchvision's models accelerated."""

import re
import sys

import pytest
import torch

from tests.integrations.checks import check_accelerated
from tests.models.parity import randomise


def _torchvision():
    """torchvision's Python part, which is all that these models are of.

    One that was built for another torch lacks compiled operators (of detection), whose names it asks for at import.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision

            return torchvision, library
        except ImportError:
            pytest.skip("torchvision is not installed", allow_module_level=True)
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


torchvision, _library = _torchvision()


def on(*size):
    images = torch.randn(2, 3, *size)
    return lambda m: m(images.to(next(m.parameters()).dtype))


def test_vit():
    model = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7)
    check_accelerated(randomise(model), on(32, 32), {"Conv2d": 1, "MultiheadAttention": 2, "MLPBlock": 2})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (58, 86), (12, 40)], ids=str)
def test_swin(version, size):
    from torchvision.models import swin_transformer as swin

    v2 = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    model = swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=7, **v2)
    block = "ShiftedWindowAttentionV2" if version == 2 else "ShiftedWindowAttention"
    check_accelerated(randomise(model), on(*size), {block: 4, "MLP": 4})
