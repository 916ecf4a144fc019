"""open_clip: image and text towers. Most of their attention is torch's module: see
:func:`pyvit.integrations.common.multihead`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pyvit.integrations.common import (
    Rule,
    fused_rate,
    known,
    layer_norm,
    patch_conv,
    project,
    rate,
    sequential,
    torch_mask,
)
from pyvit.integrations.forwards import Left, Replacement
from pyvit.ops import flash_attention, linear


def block(module: Any) -> Iterator[Replacement | Left]:
    if type(module.mlp) is nn.Sequential:
        yield from sequential(module.mlp)


def attention(module: Any) -> Iterator[Replacement | Left]:
    if getattr(module, "logit_scale", None) is not None:
        yield Left(module, "scaled cosine attention")
    else:
        needs = (
            "in_proj_weight in_proj_bias num_heads scale use_fsdpa ln_q ln_k attn_drop head_scale ln_inner "
            "out_proj out_drop"
        )
        may = "head_dim logit_scale logit_scale_max scaled_cosine scale_heads"
        yield Replacement(module, _attention, "flash_attention", needs=needs, may=may, layers=("out_proj",))


def _attention(module: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    drop = fused_rate(module) if module.use_fsdpa else rate(module.attn_drop)
    if drop is None or not (attn_mask is None or attn_mask.dim() in (2, 3)):
        return type(module).forward(module, x, attn_mask)
    qkv = linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
    bias = None if attn_mask is None else torch_mask(attn_mask, q)
    out = flash_attention(
        module.ln_q(q), module.ln_k(k), v, bias=bias, dropout_p=drop, scale=None if module.use_fsdpa else module.scale
    )
    if module.head_scale is not None:
        out = out * module.head_scale
    out = module.ln_inner(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr]
    return module.out_drop(project(module.out_proj, out))


RULES: dict[str, Rule] = {
    "open_clip.transformer.ResidualAttentionBlock": block,
    "open_clip.transformer.CustomResidualAttentionBlock": block,
    "open_clip.transformer.Attention": attention,
    "open_clip.transformer.LayerNorm": layer_norm,
    "open_clip.transformer.AttentionalPooler": known,
    "open_clip.transformer.VisionTransformer": patch_conv("conv1"),
}
