"""open_clip: image and text towers. Most of their attention is torch's own module, see :func:`pyvit.integrations.common.multihead`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pyvit.integrations.common import Left, Replacement, Rule, hooked, known, layer_norm, patch_conv, project, sequential, torch_mask
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
    if hooked(module.attn_drop) and not module.use_fsdpa:
        return type(module).forward(module, x, attn_mask)
    qkv = linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
    bias = None if attn_mask is None else torch_mask(attn_mask, q)
    out = flash_attention(module.ln_q(q), module.ln_k(k), v, bias=bias, dropout_p=module.attn_drop.p if module.training else 0.0)
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
