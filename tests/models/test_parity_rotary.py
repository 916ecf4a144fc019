"""Two-dimensional rotary positions, and attention with them, against transformers' DINOv3."""

import pytest
import torch

from pyvit.nn import Attention, RotaryEmbedding
from tests.models.parity import check_parity, randomise, relative_error
from tests.peers import peer

transformers = peer("transformers")
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
    x = torch.randn(2, prefix + 15, 48)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    cos, sin = dinov3.DINOv3ViTRopePositionEmbedding(_config()).eval()(torch.zeros(1, 3, 24, 40))
    found = ours(mine, rope=RotaryEmbedding(16, base=100.0).eval()(grid, prefix))
    check_parity(ours, theirs, found, theirs(other, position_embeddings=(cos, sin))[0], translate=_fused)
    assert relative_error(mine.grad, other.grad) < 1e-4


def _fused(theirs):
    """The gradients of their three projections as those of one qkv projection."""
    ours = {
        f"qkv.{kind}": torch.cat([theirs[f"{letter}_proj.{kind}"] for letter in "qkv"]) for kind in ("weight", "bias")
    }
    return ours | {f"proj.{kind}": theirs[f"o_proj.{kind}"] for kind in ("weight", "bias")}
