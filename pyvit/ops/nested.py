"""Attention of nested tensors: their values are packed sequences already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit.ops import checks

_OP = "flash_attention"


def _packed(name: str, t: Any) -> tuple[Tensor, Tensor, int]:
    """Values (T, H, D), cumulative lengths (S + 1,) and the longest sequence of nested t (B, H, j, D)."""
    if not isinstance(t, Tensor) or not t.is_nested or t.layout is not torch.jagged:
        got = "a nested one of layout torch.strided" if isinstance(t, Tensor) and t.is_nested else type(t).__name__
        raise TypeError(
            f"{_OP}: {name} must be a nested Tensor of layout torch.jagged, as q, k and v all are or none, got {got}"
        )
    jagged: Any = t
    if t.dim() != 4 or jagged._ragged_idx != 2:
        checks.fail(_OP, name, "of shape (B, H, j, D), of sequences of different lengths j", f"shape {tuple(t.shape)}")
    if jagged.lengths() is not None:
        checks.fail(
            _OP, name, "without gaps between the sequences; call contiguous() before transposing", "a view with gaps"
        )
    tokens: Any = t.transpose(1, 2)
    return tokens.values(), tokens.offsets(), tokens._get_max_seqlen()


def arguments(q: Tensor, k: Tensor, v: Tensor, dropout_p: Any, enable_gqa: bool) -> tuple[Any, ...]:
    """Those of :func:`pyvit.ops.flash_attention_varlen` by position."""
    (x, cu_q, longest_q), (y, cu_k, longest_k), (z, cu_v, _) = (
        _packed(name, t) for name, t in (("q", q), ("k", k), ("v", v))
    )
    if checks.dropout(_OP, dropout_p):
        checks.fail(_OP, "dropout_p", "0 for nested q, k and v, whose packed sequences have no dropout", dropout_p)
    if cu_v is not cu_k and (cu_v.shape != cu_k.shape or not torch.equal(cu_v, cu_k)):
        checks.fail(_OP, "v", "of sequences as long as those of k", "others")
    if x.dim() == y.dim() == 3 and y.shape[1] != x.shape[1] and not enable_gqa:
        checks.fail(_OP, "k", f"with {x.shape[1]} heads like q (or pass enable_gqa=True)", f"{y.shape[1]} heads")
    return x, y, z, cu_q, cu_k, longest_q, longest_k


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyvit.ops.flash_attention` of nested q, k and v: nested results, (B, H, j, Dv) and (B, H, j)."""
    from pyvit.ops.flash_attention_varlen import flash_attention_varlen

    given = arguments(q, k, v, dropout_p, enable_gqa)
    out, lse = flash_attention_varlen(
        *given, bias=bias, is_causal=is_causal, scale=scale, return_lse=True, backend=backend
    )

    def nested(t: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(t, given[3], max_seqlen=given[5]).transpose(1, 2)

    return (nested(out), nested(lse.t())) if return_lse else nested(out)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    return_lse: bool,
    backend: str | None,
) -> Any:
    """For :func:`pyvit.explain`."""
    from pyvit.ops.flash_attention_varlen import describe

    return describe(*arguments(q, k, v, dropout_p, enable_gqa), bias, is_causal, scale, return_lse, backend)
