"""torch's attention function, on the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.ops import checks
from pyvit.ops.flash_attention import flash_attention

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` by signature and meaning, on :func:`flash_attention`.

    query (..., H, Nq, D), key (..., H, Nk, D) and value (..., H, Nk, Dv) with any number of leading dimensions, which
    broadcast; nested of layout torch.jagged too. attn_mask is bool, True = attend, or float. One difference, on
    purpose: a fully masked row gives zeros in every dtype and on every device. Where torch takes ``is_causal`` beside a
    mask on some devices alone, both hold here.

    Raises ValueError or TypeError naming the argument that does not fit.
    """
    scale = float(scale) if isinstance(scale, bool) else scale  # a number to torch
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    dropout_p = checks.number(_OP, "dropout_p", dropout_p)
    if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
        return flash_attention(query, key, value, bias=attn_mask, dropout_p=dropout_p, **options)  # type: ignore[return-value]
    for name, t in (("query", query), ("key", key), ("value", value)):
        checks.dense(_OP, name, t)
        if t.dim() < 2:
            checks.fail(_OP, name, "of shape (..., N, D)", checks.shape(t))
    if not 0.0 <= dropout_p <= 1.0:
        checks.fail(_OP, "dropout_p", "in [0, 1]", dropout_p)
    if dropout_p == 1.0:  # every weight is dropped
        return scaled_dot_product_attention(query, key, value, attn_mask, **options) * 0.0
    lead: Sequence[int] = query.shape[:-2]
    if not (
        len(lead) == 2
        and key.shape[:-2] == value.shape[:-2]
        and key.shape[:-2] == (lead if not enable_gqa else (lead[0], key.shape[-3]))
    ):
        query, key, value, lead = _broadcast(query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, query, (*lead, query.shape[-2], key.shape[-2]))
    dv = value.shape[-1]
    if query.shape[-1] == key.shape[-1] == 0:  # no channels: scores of zero, as of one channel of zeros
        query, key = F.pad(query, (0, 1)), F.pad(key, (0, 1))
    if dv == 0:
        value = F.pad(value, (0, 1))
    out: Tensor = flash_attention(query, key, value, bias=attn_mask, dropout_p=dropout_p, **options)  # type: ignore[assignment]
    out = out if dv else out[..., :0]
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Sequence[int]]:
    """All three as (B, H, N, D) of one B and H, and the leading dimensions that those are."""
    tensors = [query, key, value]
    if enable_gqa:
        if min(t.dim() for t in tensors) < 3:
            checks.fail(
                _OP,
                "query, key and value",
                "of shape (..., H, N, D) with enable_gqa",
                [tuple(t.shape) for t in tensors],
            )
        heads = [t.shape[-3] for t in tensors]
        if len({*heads}) > 1:
            for name, h in (("key", heads[1]), ("value", heads[2])):
                if h == 0 or heads[0] % h:
                    checks.fail(_OP, name, f"with a number of heads that divides query's {heads[0]}", h)
            tensors = [
                t.repeat_interleave(heads[0] // h, -3) if h != heads[0] else t
                for t, h in zip(tensors, heads, strict=True)
            ]
    try:
        lead: Sequence[int] = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
    except RuntimeError:
        checks.fail(
            _OP, "query, key and value", "of leading dimensions that broadcast", [tuple(t.shape) for t in tensors]
        )
    tensors = [t.expand(*lead, *t.shape[-2:]) for t in tensors]
    if len(lead) < 2:
        tensors = [t[(None,) * (2 - len(lead))] for t in tensors]
    elif len(lead) > 2:
        tensors = [t.flatten(0, -4) for t in tensors]
    return tensors[0], tensors[1], tensors[2], lead


def _mask(mask: Tensor, query: Tensor, scores: tuple[int, ...]) -> Tensor:
    """A mask for scores of this shape with the leading dimensions of :func:`_broadcast`."""
    checks.dense(_OP, "attn_mask", mask)
    fits = mask.dim() <= len(scores) and all(
        have in (1, want) for have, want in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    if not fits:
        checks.fail(_OP, "attn_mask", f"broadcastable to {scores}", checks.shape(mask))
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"{_OP}: attn_mask must be bool, float32 or of the dtype of query, {query.dtype}, got {mask.dtype}"
        )
    if mask.dim() <= 4 and len(scores) <= 4:
        return mask
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(mask.shape[-3:])
    return mask.expand(*scores[:-3], *mask.shape[-3:]).flatten(0, -4)
