"""Two-dimensional rotary positions, and attention with them, against transformers' DINOv3."""

import pytest
import torch

from pyvit.nn import Attention, RotaryEmbedding
from tests.models.parity import randomise, relative_error

transformers = pytest.importorskip("transformers")
dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")


def _config():
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    return transformers.DINOv3ViTConfig(**sizes, rope_theta=100.0, key_bias=True, attn_implementation="eager")


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)], ids=str)
def test_angles(grid):
    theirs = dinov3.DINOv3ViTRopePositionEmbedding(_config()).eval()
    cos, sin = theirs(torch.zeros(1, 3, 8 * grid[0], 8 * grid[1]))
    ours = RotaryEmbedding(16, base=100.0).eval()(grid)
    assert relative_error(ours[:, 0], sin) < 1e-5
    assert relative_error(ours[:, 1], cos) < 1e-5


@pytest.mark.parametrize("prefix", [0, 3])
def test_attention(prefix):
    grid = (3, 5)
    theirs = randomise(dinov3.DINOv3ViTAttention(_config()))
    ours = Attention(48, 3, qkv_bias=True).eval()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(theirs, f"{letter}_proj"), kind) for letter in "qkv"]
            getattr(ours.qkv, kind).copy_(torch.cat(parts))
            getattr(ours.proj, kind).copy_(getattr(theirs.o_proj, kind))
    x = torch.randn(2, prefix + 15, 48, requires_grad=True)
    cos, sin = dinov3.DINOv3ViTRopePositionEmbedding(_config()).eval()(torch.zeros(1, 3, 24, 40))
    expected = theirs(x, position_embeddings=(cos, sin))[0]
    found = ours(x, rope=RotaryEmbedding(16, base=100.0).eval()(grid, prefix))
    assert relative_error(found, expected) < 1e-4
    weights = torch.randn_like(expected)
    grads = [
        torch.autograd.grad((out * weights).sum(), [x, *inner])
        for out, inner in ((found, [ours.proj.weight]), (expected, [theirs.o_proj.weight]))
    ]
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*grads, strict=True))
