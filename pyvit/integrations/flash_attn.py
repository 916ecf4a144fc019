"""The functions of the flash_attn package, by its names, arguments and layouts, on pyvit's kernels.

transformers calls them: with ``attn_implementation="pyvit_flash"``, and from the package for the Hub. It looks at the
names of their arguments and leaves out the options that a function does not take; ``window_size``, ``softcap`` and
``s_aux`` are here to be refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit.ops import flash_attention, flash_attention_varlen


def refuse(what: str, **options: Any) -> None:
    """Raise ValueError if an option is set: nothing is ignored."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{what} does not support {option}; use another attn_implementation")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """q (B, Nq, H, D), k (B, Nk, Hkv, D), v (B, Nk, Hkv, Dv) -> (B, Nq, H, Dv).

    ``causal`` is aligned to the last query and key. Raises ValueError for an option that is not supported, and what
    :func:`pyvit.ops.flash_attention` raises.
    """
    refuse("pyvit's flash attention", sliding_window=window_size, softcap=softcap, s_aux=s_aux)
    nq, nk = q.shape[1], k.shape[1]
    bias = None
    if causal and nq != nk:
        bias = torch.ones(nq, nk, dtype=torch.bool, device=q.device).tril(nk - nq)
    out = flash_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        bias=bias,
        is_causal=causal and bias is None,
        scale=softmax_scale,
        dropout_p=dropout_p,
        enable_gqa=True,
    )
    return out.transpose(1, 2)  # type: ignore[union-attr]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Packed sequences: q (Tq, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), cu_seqlens (S + 1,) -> (Tq, H, Dv).

    ``causal`` is aligned to the last query and key of each sequence. Raises ValueError for an option that is not
    supported, dropout among them, and what :func:`pyvit.ops.flash_attention_varlen` raises.
    """
    refuse("pyvit's flash attention", sliding_window=window_size, softcap=softcap, s_aux=s_aux)
    refuse("pyvit's attention on packed or padded sequences", dropout=dropout_p or None)
    bias = None
    if causal and cu_seqlens_q is not cu_seqlens_k:
        ahead = cu_seqlens_k.diff() - cu_seqlens_q.diff()  # (S,)
        rows, columns = (torch.arange(int(n), device=q.device) for n in (max_seqlen_q, max_seqlen_k))
        bias = (columns <= rows[:, None] + ahead[:, None, None])[:, None]  # (S, 1, max_seqlen_q, max_seqlen_k)
    return flash_attention_varlen(  # type: ignore[return-value]
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        bias=bias,
        is_causal=causal and bias is None,
        scale=softmax_scale,
    )
