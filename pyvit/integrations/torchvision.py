"""torchvision: ViT, Swin and Swin V2. ViT's attention is torch's module: see
:func:`pyvit.integrations.common.multihead`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from pyvit.integrations.common import Rule, cosine_table, patch_conv, sequential, share
from pyvit.integrations.forwards import Replacement
from pyvit.ops import linear, window_attention


def swin(module: nn.Module) -> Iterator[Replacement]:
    needs = "window_size shift_size num_heads attention_dropout dropout qkv proj "
    needs += (
        "logit_scale cpb_mlp relative_coords_table"
        if hasattr(module, "logit_scale")
        else "relative_position_bias_table"
    )
    yield Replacement(
        module, _swin, "window_attention", needs=needs, may="relative_position_index", parts=("qkv", "proj")
    )


def _swin(module: Any, x: Tensor) -> Tensor:
    """Window attention of both versions, x (B, H, W, C) -> (B, H, W, C). Padding tokens have the value of the
    qkv bias."""
    drop = share(module.attention_dropout, module.training)
    if drop is None:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    window = tuple(module.window_size)
    heads = module.num_heads
    bias = module.qkv.bias
    cosine = hasattr(module, "logit_scale")
    if cosine and bias is not None:
        q, k, v = bias.chunk(3)
        bias = torch.cat((q, torch.zeros_like(k), v))
    qkv = linear(x, module.qkv.weight, bias)
    divides = all(n % w == 0 for n, w in zip(x.shape[1:3], window, strict=True))
    out = window_attention(
        qkv,
        window,
        tuple(module.shift_size),
        num_heads=heads,
        bias_table=cosine_table(module.cpb_mlp, module.relative_coords_table, heads)
        if cosine
        else module.relative_position_bias_table,
        logit_scale=module.logit_scale.flatten() if cosine else None,
        pad_qkv=None if divides else qkv.new_zeros(qkv.shape[-1]) if bias is None else bias,
        dropout_p=drop,
    )
    return dropout(linear(out, module.proj.weight, module.proj.bias), module.dropout, module.training)


RULES: dict[str, Rule] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": swin,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": swin,
    "torchvision.models.vision_transformer.MLPBlock": sequential,
    "torchvision.models.vision_transformer.VisionTransformer": patch_conv("conv_proj"),
    "torchvision.ops.misc.MLP": sequential,
}
