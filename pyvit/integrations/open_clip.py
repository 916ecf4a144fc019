"""open_clip: image and text towers. Most of their attention is torch's own module, see :func:`pyvit.integrations.parts.multihead`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.integrations.parts import Left, Replacement, Rule, known, patch_conv, project, sequential
from pyvit.ops import flash_attention, linear


def block(module: Any) -> Iterator[Replacement | Left]:
    if type(module.mlp) is nn.Sequential:
        yield from sequential(module.mlp)


def attention(module: Any) -> Iterator[Replacement | Left]:
    if module.logit_scale is not None:
        yield Left(module, "scaled cosine attention")
    else:
        yield Replacement(module, _attention, "flash_attention")


def _attention(module: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    q, k, v = (
        linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    if attn_mask is not None:
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)  # True means masked there
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, module.num_heads))
    dropout = module.attn_drop.p if module.training else 0.0
    out = flash_attention(module.ln_q(q), module.ln_k(k), v, bias=attn_mask, dropout_p=dropout)  # (B, H, N, d)
    if module.head_scale is not None:
        out = out * module.head_scale
    out = module.ln_inner(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr]
    return module.out_drop(project(module.out_proj, out))


RULES: dict[str, Rule] = {
    "open_clip.transformer.ResidualAttentionBlock": block,
    "open_clip.transformer.CustomResidualAttentionBlock": block,
    "open_clip.transformer.Attention": attention,
    "open_clip.transformer.AttentionalPooler": known,
    "open_clip.transformer.VisionTransformer": patch_conv("conv1"),
}
