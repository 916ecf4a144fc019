"""timm: ViT and its relatives built of ``Attention`` and ``Mlp``, Swin and Swin V2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.integrations.common import (
    Left,
    Replacement,
    Rule,
    are_one,
    cosine_table,
    hooked,
    known,
    layer_norm,
    patch_conv,
    plain,
    project,
    replaced,
    surroundings,
    two_layers,
    windows_match,
)
from pyvit.nn.linear import idle
from pyvit.ops import flash_attention, flash_attention_qkvpacked, linear, window_attention
from pyvit.ops.packed import Norm


def attention(module: nn.Module) -> Iterator[Replacement]:
    yield Replacement(module, _attention, "flash_attention")


def _attention(
    module: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """With ``norm``, ``scale`` and ``residual`` (see :func:`pyvit.ops.linear`) the branch, where the module is :func:`_whole_attention`."""
    if (is_causal and attn_mask is not None) or (not module.fused_attn and hooked(module.attn_drop)):
        options = {"attn_mask": attn_mask, "is_causal": is_causal} if is_causal else {} if attn_mask is None else {"attn_mask": attn_mask}
        return type(module).forward(module, x, **options)
    gate, norm_of_heads = getattr(module, "gate", None), getattr(module, "norm", None)
    options = {
        "bias": attn_mask,
        "is_causal": is_causal,
        "scale": None if module.fused_attn else module.scale,
        "dropout_p": module.attn_drop.p if module.training else 0.0,
    }
    qkv = project(module.qkv, x, norm=norm).unflatten(-1, (3, module.num_heads, -1))  # (B, N, 3, H, d)
    if type(module.q_norm) is type(module.k_norm) is nn.Identity and not hooked(module.q_norm, module.k_norm):
        out = flash_attention_qkvpacked(qkv, **options).flatten(2)
    else:
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, d)
        out = flash_attention(module.q_norm(q), module.k_norm(k), v, **options).transpose(1, 2).flatten(2)
    if norm_of_heads is not None:
        out = norm_of_heads(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return module.proj_drop(project(module.proj, out, scale=scale, residual=residual))


def _whole_attention(module: Any) -> bool:
    """Whether nothing stands between the branch's ends and its two projections."""
    return (
        replaced(module, _attention)
        and plain(module.qkv)
        and plain(module.proj)
        and getattr(module, "gate", None) is None
        and idle(module.proj_drop)
        and (module.fused_attn or not hooked(module.attn_drop))
        and not hooked(module)
    )


def block(module: Any) -> Iterator[Replacement]:
    yield Replacement(module, _block, "branches of one pass, where weights are packed")


def _block(module: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    first = surroundings(x, module.norm1, module.ls1, module.drop_path1)
    second = surroundings(x, module.norm2, module.ls2, module.drop_path2)
    simple = not args and all(value is None or value is False for value in options.values())
    if first is None or second is None or not simple or not _whole_attention(module.attn) or not _whole_mlp(module.mlp):
        return type(module).forward(module, x, *args, **options)  # type: ignore[no-any-return]
    x = _attention(module.attn, x, residual=x, **first)
    return _mlp(module.mlp, x, residual=x, **second)


def mlp(module: Any) -> Iterator[Replacement]:
    if isinstance(module.fc1, nn.Linear):  # else convolutions, on maps
        yield Replacement(module, _mlp, "mlp")


def _mlp(module: Any, x: Tensor, **around: Any) -> Tensor:
    """With ``norm``, ``scale`` and ``residual`` the branch, where the module is :func:`_whole_mlp`."""
    norm = getattr(module, "norm", nn.Identity())
    if type(norm) is nn.Identity and not (module.drop1.p and module.drop1.training) and not hooked(norm, module.drop1):
        return module.drop2(two_layers(module.fc1, module.act, module.fc2, x, **around))
    return module.drop2(project(module.fc2, norm(module.drop1(project(module.fc1, x, module.act)))))


def _whole_mlp(module: Any) -> bool:
    norm = getattr(module, "norm", None)
    return (
        replaced(module, _mlp)
        and (norm is None or type(norm) is nn.Identity)
        and are_one(module.fc1, module.act, module.fc2)
        and idle(module.drop1)
        and idle(module.drop2)
        and not hooked(module, norm)
    )


def swin(block: Any) -> Iterator[Replacement | Left]:
    attn = block.attn
    if plain(attn.qkv):
        yield Replacement(block, _swin, "window_attention", "_attn")
        if not hasattr(attn, "logit_scale"):  # V2 normalises after its branches
            yield Replacement(block, _swin_block, "branches of one pass, where weights are packed")
    else:
        yield Left(block, "its qkv is not a plain Linear")


def _swin_block(block: Any, x: Tensor) -> Tensor:
    """Of a block of the first version."""
    attn = block.attn
    first = surroundings(x, block.norm1, None, block.drop_path1)
    second = surroundings(x, block.norm2, None, block.drop_path2)
    whole = replaced(block, _swin, "_attn") and _fits(block, x) and plain(attn.proj) and idle(attn.proj_drop) and _whole_mlp(block.mlp)
    if first is None or second is None or not whole:
        return type(block).forward(block, x)  # type: ignore[no-any-return]
    x = _swin(block, x, residual=x, **first)
    return _mlp(block.mlp, x, residual=x, **second)


def _fits(block: Any, x: Tensor) -> bool:
    """Whether :func:`pyvit.ops.window_attention` computes what the block does on such a map."""
    attn, size = block.attn, tuple(x.shape[1:3])
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    # timm rolls before it pads, and its stored mask is that of one size.
    stored = getattr(block, "dynamic_mask", False) or size == tuple(block.input_resolution)
    same = not any(shift) or (_divides(size, window) and stored)
    return same and windows_match(size, window, shift) and plain(attn.qkv) and not hooked(attn, attn.attn_drop, attn.softmax)


def _divides(size: tuple[int, ...], window: tuple[int, ...]) -> bool:
    return all(n % w == 0 for n, w in zip(size, window, strict=True))


def _swin(block: Any, x: Tensor, *, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Of a block of either version: roll, partition, attention and the reverse, x (B, H, W, C) -> (B, H, W, C); or the whole branch."""
    attn, window = block.attn, tuple(block.window_size)
    if not _fits(block, x):
        return type(block)._attn(block, x)
    cosine = hasattr(attn, "logit_scale")
    bias = attn.qkv.bias
    if cosine and attn.q_bias is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = linear(x, attn.qkv.weight, bias, norm=norm)
    pad = None
    if not _divides(tuple(x.shape[1:3]), window):
        pad = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias
    out = window_attention(
        qkv,
        window,
        tuple(block.shift_size),
        num_heads=attn.num_heads,
        bias_table=cosine_table(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads) if cosine else attn.relative_position_bias_table,
        logit_scale=attn.logit_scale.flatten() if cosine else None,
        pad_qkv=pad,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
    )
    return attn.proj_drop(project(attn.proj, out, scale=scale, residual=residual))


def merging(module: Any) -> Iterator[Replacement]:
    yield Replacement(module, _merging, "linear")


def _merging(module: Any, x: Tensor) -> Tensor:
    """2 x 2 neighbours to one token, normalised and reduced: (B, H, W, C) -> (B, H/2, W/2, 2C)."""
    b, h, w, c = x.shape
    if h % 2 or w % 2:
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)  # row offset runs fastest
    around = surroundings(x, module.norm, None, None)
    if around is None or not plain(module.reduction):
        return project(module.reduction, module.norm(x))
    return project(module.reduction, x, norm=around["norm"])


RULES: dict[str, Rule] = {
    "timm.layers.attention.Attention": attention,
    "timm.models.vision_transformer.Attention": attention,
    "timm.models.vision_transformer.Block": block,
    "timm.layers.mlp.Mlp": mlp,
    "timm.layers.norm.LayerNorm": layer_norm,
    "timm.layers.patch_embed.PatchEmbed": patch_conv("proj"),
    "timm.layers.patch_embed.PatchEmbedWithSize": patch_conv("proj"),
    "timm.models.swin_transformer.SwinTransformerBlock": swin,
    "timm.models.swin_transformer.WindowAttention": known,
    "timm.models.swin_transformer.PatchMerging": merging,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": swin,
    "timm.models.swin_transformer_v2.WindowAttention": known,
}
