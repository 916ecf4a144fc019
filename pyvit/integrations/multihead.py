"""Torch's multi-head attention with linear layers that :func:`pyvit.quantize` can replace."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.integrations.common import torch_mask, untouched
from pyvit.nn.linear import Linear, apply, bypassed, hooked
from pyvit.nn.quantized import quantized, quantized_attention
from pyvit.ops import flash_attention


@bypassed
class MultiheadAttention(nn.Module):
    """What :func:`pyvit.quantize` puts in place of a ``torch.nn.MultiheadAttention``, whose input projection is a
    parameter and no layer: ``in_proj`` and ``out_proj`` are linear layers with its parameters.

    Called as torch's module, with the same result up to rounding. Its queries, keys and values must have one width, and
    ``add_bias_kv`` and ``add_zero_attn`` must be off.

    Args:
        original: the module replaced. It is kept, as no submodule, to be put back (:meth:`restored`).
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = original.embed_dim, original.num_heads, original.head_dim
        self.dropout, self.batch_first = original.dropout, original.batch_first
        self.in_proj = _layer(original.in_proj_weight, original.in_proj_bias)
        self.out_proj = _layer(original.out_proj.weight, original.out_proj.bias)
        self.original = [original]
        self.train(original.training)

    def restored(self) -> nn.MultiheadAttention:
        """The module replaced, with the parameters that the layers, which must not be quantized, have now."""
        module = self.original[0]
        module.in_proj_weight, module.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        module.out_proj.weight, module.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return module.train(self.training)

    def release(self) -> None:
        """Frees the memory of the original parameters, which :meth:`restored` sets anew."""
        module = self.original[0]
        module.in_proj_weight = module.in_proj_bias = module.out_proj.weight = module.out_proj.bias = None  # type: ignore[assignment]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C), or (N, B, C) without ``batch_first``, or (N, C); returns the output and, with ``need_weights``,
        the attention probabilities."""
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal needs attn_mask, as torch's module does")
        dropout_p = self.dropout if self.training else 0.0
        bare = key_padding_mask is None and attn_mask is None and not need_weights and not dropout_p
        in_proj: Any = self.in_proj
        out_proj: Any = self.out_proj
        if bare and self.batch_first and query is key and key is value and quantized(in_proj, out_proj):
            out = quantized_attention(query, in_proj, out_proj, self.num_heads, False)
            if out is not None:
                return out, None
        q, k, v = self._heads(query, key, value)  # (B, H, N, d)
        bias = _bias(attn_mask, key_padding_mask, q)
        probabilities = None
        if need_weights:
            out, probabilities = _explicit(q, k, v, bias, dropout_p)
            probabilities = probabilities.mean(1) if average_attn_weights else probabilities
        else:
            out = flash_attention(q, k, v, bias=bias, dropout_p=dropout_p)  # type: ignore[assignment]
        out = apply(self.out_proj, out.transpose(1, 2).flatten(2))  # type: ignore[union-attr]
        if query.dim() == 2:
            return out[0], None if probabilities is None else probabilities[0]
        return out if self.batch_first else out.transpose(0, 1), probabilities

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, each (B, H, N, d). An input that serves for several is multiplied once."""
        projected: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in projected:
                projected[id(x)] = apply(self.in_proj, x)
        found = []
        for i, x in enumerate((query, key, value)):
            heads = projected[id(x)].chunk(3, -1)[i].unflatten(-1, (self.num_heads, self.head_dim))
            if x.dim() == 2:
                heads = heads[None]
            elif not self.batch_first:
                heads = heads.transpose(0, 1)
            found.append(heads.transpose(1, 2))
        return found[0], found[1], found[2]

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _layer(weight: Tensor, bias: Tensor | None) -> Linear:
    """A linear layer of these parameters."""
    layer = Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer._parameters.update(weight=weight, bias=bias)  # type: ignore[arg-type]
    return layer


def _bias(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks in the form of :func:`pyvit.ops.flash_attention`; of key_padding_mask (B, N), True where padded."""
    bias = None if attn_mask is None else torch_mask(attn_mask, q)
    if key_padding_mask is None:
        return bias
    padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
    padding = padding[:, None, None]  # (B, 1, 1, N)
    if padding.dtype == torch.bool:
        if bias is None or bias.dtype == torch.bool:
            return ~padding if bias is None else bias & ~padding
        return bias.masked_fill(padding, -math.inf)
    if bias is not None and bias.dtype == torch.bool:
        return padding.to(q.dtype).masked_fill(~bias, -math.inf)
    return padding.to(q.dtype) if bias is None else bias + padding


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Attention and its probabilities (B, H, N, N)."""
    scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    probabilities = scores.softmax(-1)
    if dropout_p:
        probabilities = torch.nn.functional.dropout(probabilities, dropout_p)
    return probabilities @ v, probabilities


def replaceable(module: nn.MultiheadAttention, parent: nn.Module) -> str | None:
    """Why a :class:`MultiheadAttention` cannot take the place of ``module`` in ``parent``, or None."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "TransformerEncoderLayer reads the weights of its attention"
    if hooked(module):
        return "it has hooks"
    return None if untouched(module.out_proj) else "its out_proj has hooks, another forward or another kind of weight"
