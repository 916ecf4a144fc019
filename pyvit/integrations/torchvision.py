"""torchvision: ViT, Swin and Swin V2. ViT's attention is torch's module: see
:func:`pyvit.integrations.common.multihead`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from pyvit.integrations.common import Rule, biased, cosine_table, patch_conv, project, sequential, share
from pyvit.integrations.forwards import Replacement, refuse_int8
from pyvit.ops import window_attention


def swin(module: nn.Module) -> Iterator[Replacement]:
    needs = "window_size shift_size num_heads attention_dropout dropout qkv proj "
    needs += (
        "logit_scale cpb_mlp relative_coords_table"
        if hasattr(module, "logit_scale")
        else "relative_position_bias_table"
    )
    may, layers = "relative_position_index", ("qkv", "proj")
    int8 = {"layers": layers, "reads_weights": True}
    yield Replacement(module, _swin, "window_attention", needs=needs, may=may, parts=layers, **int8)


def _swin(module: Any, x: Tensor) -> Tensor:
    """Window attention of both versions, x (B, H, W, C) -> (B, H, W, C). Padding tokens have the value of the
    qkv bias."""
    drop = share(module.attention_dropout, module.training)
    if drop is None:
        refuse_int8(module, module.qkv, module.proj)
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    window = tuple(module.window_size)
    heads = module.num_heads
    bias = module.qkv.bias
    cosine = hasattr(module, "logit_scale")
    if cosine and bias is not None:
        q, k, v = bias.chunk(3)
        bias = torch.cat((q, torch.zeros_like(k), v))
    qkv = biased(module.qkv, x, bias)
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
    return dropout(project(module.proj, out), module.dropout, module.training)


RULES: dict[str, Rule] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": swin,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": swin,
    "torchvision.models.vision_transformer.MLPBlock": sequential,
    "torchvision.models.vision_transformer.VisionTransformer": patch_conv("conv_proj"),
    "torchvision.ops.misc.MLP": sequential,
}
