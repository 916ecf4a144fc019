"""open_clip's towers accelerated."""

import pytest
import torch

from tests.integrations.checks import check_accelerated
from tests.models.parity import randomise
from tests.peers import peer

open_clip = peer("open_clip")


@pytest.mark.parametrize("quick", [True, False])
def test_clip(quick):
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 10, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model = randomise(open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=quick))
    images, words = torch.randn(2, 3, 32, 32), torch.randint(1, 49, (2, 10))

    def call(m):
        m.attn_mask = m.attn_mask.to(m.text_projection.dtype)
        return torch.cat((m.encode_image(images.to(m.text_projection.dtype)), m.encode_text(words)))

    check_accelerated(model, call, {"Conv2d": 1, "MultiheadAttention": 4, "Sequential": 4})


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_custom_blocks(options, causal):
    model = randomise(
        open_clip.transformer.CustomResidualAttentionBlock(32, 2, norm_layer=torch.nn.LayerNorm, **options)
    )
    x, mask = torch.randn(2, 9, 32), torch.full((9, 9), -torch.inf).triu(1) if causal else None
    check_accelerated(
        model, lambda m: m(x.to(m.mlp.c_fc.weight.dtype), attn_mask=mask), {"Attention": 1, "Sequential": 1}
    )
