"""timm: ViT and its relatives built of ``Attention`` and ``Mlp``, Swin and Swin V2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.integrations.parts import (
    Left,
    Replacement,
    Rule,
    cosine_table,
    hooked,
    known,
    layer_norm,
    patch_conv,
    plain,
    project,
    two_layers,
    windows_match,
)
from pyvit.ops import flash_attention, flash_attention_qkvpacked, linear, window_attention


def attention(module: nn.Module) -> Iterator[Replacement]:
    yield Replacement(module, _attention, "flash_attention")


def _attention(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    if (is_causal and attn_mask is not None) or (not module.fused_attn and hooked(module.attn_drop)):
        options = {"attn_mask": attn_mask, "is_causal": is_causal} if is_causal else {} if attn_mask is None else {"attn_mask": attn_mask}
        return type(module).forward(module, x, **options)
    gate, norm = getattr(module, "gate", None), getattr(module, "norm", None)
    options = {
        "bias": attn_mask,
        "is_causal": is_causal,
        "scale": None if module.fused_attn else module.scale,
        "dropout_p": module.attn_drop.p if module.training else 0.0,
    }
    qkv = project(module.qkv, x).unflatten(-1, (3, module.num_heads, -1))  # (B, N, 3, H, d)
    if type(module.q_norm) is type(module.k_norm) is nn.Identity and not hooked(module.q_norm, module.k_norm):
        out = flash_attention_qkvpacked(qkv, **options).flatten(2)
    else:
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, d)
        out = flash_attention(module.q_norm(q), module.k_norm(k), v, **options).transpose(1, 2).flatten(2)
    if norm is not None:
        out = norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return module.proj_drop(project(module.proj, out))


def mlp(module: Any) -> Iterator[Replacement]:
    if isinstance(module.fc1, nn.Linear):  # else convolutions, on maps
        yield Replacement(module, _mlp, "mlp")


def _mlp(module: Any, x: Tensor) -> Tensor:
    norm = getattr(module, "norm", nn.Identity())
    if type(norm) is nn.Identity and not (module.drop1.p and module.drop1.training) and not hooked(norm, module.drop1):
        return module.drop2(two_layers(module.fc1, module.act, module.fc2, x))
    return module.drop2(project(module.fc2, norm(module.drop1(project(module.fc1, x, module.act)))))


def swin(block: Any) -> Iterator[Replacement | Left]:
    attn = block.attn
    if plain(attn.qkv):
        yield Replacement(block, _swin, "window_attention", "_attn")
    else:
        yield Left(block, "its qkv is not a plain Linear")


def _swin(block: Any, x: Tensor) -> Tensor:
    """Of a block of either version: roll, partition, attention and the reverse, x (B, H, W, C) -> (B, H, W, C)."""
    attn, size = block.attn, tuple(x.shape[1:3])
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    divides = all(n % w == 0 for n, w in zip(size, window, strict=True))
    # timm rolls before it pads, and its stored mask is that of one size.
    same = not any(shift) or (divides and (getattr(block, "dynamic_mask", False) or size == tuple(block.input_resolution)))
    if not same or not windows_match(size, window, shift) or not plain(attn.qkv) or hooked(attn, attn.attn_drop, attn.softmax):
        return type(block)._attn(block, x)
    cosine = hasattr(attn, "logit_scale")
    bias = attn.qkv.bias
    if cosine and attn.q_bias is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = linear(x, attn.qkv.weight, bias)
    pad = None
    if not divides:
        pad = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias
    out = window_attention(
        qkv,
        window,
        shift,
        num_heads=attn.num_heads,
        bias_table=cosine_table(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads) if cosine else attn.relative_position_bias_table,
        logit_scale=attn.logit_scale.flatten() if cosine else None,
        pad_qkv=pad,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
    )
    return attn.proj_drop(project(attn.proj, out))


RULES: dict[str, Rule] = {
    "timm.layers.attention.Attention": attention,
    "timm.models.vision_transformer.Attention": attention,
    "timm.layers.mlp.Mlp": mlp,
    "timm.layers.norm.LayerNorm": layer_norm,
    "timm.layers.patch_embed.PatchEmbed": patch_conv("proj"),
    "timm.layers.patch_embed.PatchEmbedWithSize": patch_conv("proj"),
    "timm.models.swin_transformer.SwinTransformerBlock": swin,
    "timm.models.swin_transformer.WindowAttention": known,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": swin,
    "timm.models.swin_transformer_v2.WindowAttention": known,
}
