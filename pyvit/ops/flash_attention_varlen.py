"""Attention of sequences of different lengths packed one after another: contract, fake kernels and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, reference
from pyvit.ops.flash_attention import TRITON, asked, check_results, prepare

_OP = "flash_attention_varlen"


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths packed one after another: multi-crop batches, images of any size.

    Args:
        q: queries (Tq, H, D), the sequences' tokens concatenated.
        k, v: keys (Tk, Hkv, D) and values (Tk, Hkv, Dv); Hkv divides H.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 or int64, ascending, from 0 to Tq (Tk): sequence s is rows cu[s] to
            cu[s + 1].
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        bias: any broadcast of (S, H, max_seqlen_q, max_seqlen_k); each sequence uses the top-left corner. Float or
            bool, as in :func:`flash_attention`, and with a gradient.
        is_causal, scale, return_lse, backend: as in :func:`flash_attention`.

    Returns:
        out (Tq, H, Dv); with ``return_lse`` also lse (H, Tq) float32.

    Raises ValueError, TypeError, BackendError as :func:`flash_attention`.
    """
    q, k, v, bias = prepare(_OP, q, k, v, bias)
    max_seqlen_q, max_seqlen_k = (
        checks.whole(_OP, f"max_seqlen_{x}", n, 0) for x, n in (("q", max_seqlen_q), ("k", max_seqlen_k))
    )
    call = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, is_causal, return_lse)
    scale = checks.scale(_OP, scale, q.shape[2])
    chosen = dispatch.select(call, backend)
    out, lse = VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, is_causal, scale, chosen)
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    bias: Tensor | None,
    is_causal: bool,
    return_lse: bool,
) -> Call:
    op = _OP
    checks.tensor(op, "q", q, "(Tq, H, D)", 3)
    checks.tensor(op, "k", k, "(Tk, Hkv, D)", 3)
    checks.tensor(op, "v", v, "(Tk, Hkv, Dv)", 3)
    checks.floating(op, "q", q)
    checks.same(op, "k", k, "q", q)
    checks.same(op, "v", v, "q", q)
    if k.shape[2] != q.shape[2]:
        checks.fail(op, "k", f"of shape (Tk, Hkv, {q.shape[2]}) to fit q", checks.shape(k))
    if v.shape[:2] != k.shape[:2]:
        checks.fail(op, "v", f"of shape ({k.shape[0]}, {k.shape[1]}, Dv) to fit k", checks.shape(v))
    h, hk = q.shape[1], k.shape[1]
    if hk == 0 or h % hk:
        checks.fail(op, "k", f"with a number of heads that divides q's {h}", hk)
    if q.shape[2] == 0 or v.shape[2] == 0:
        checks.fail(op, "q, k and v", "of at least one channel per head", f"D = {q.shape[2]}, Dv = {v.shape[2]}")
    checks.flag(op, "is_causal", is_causal)
    for name, cu, total, longest, most in (
        ("cu_seqlens_q", cu_q, q, max_q, "max_seqlen_q"),
        ("cu_seqlens_k", cu_k, k, max_k, "max_seqlen_k"),
    ):
        checks.tensor(op, name, cu, "(S + 1,)", 1)
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64, got {cu.dtype}")
        checks.same(op, name, cu, "q", q, dtype=False)
        if cu.shape[0] < 1 or cu.shape[0] != cu_q.shape[0]:
            checks.fail(op, name, f"of the length of cu_seqlens_q, {cu_q.shape[0]}, at least 1", cu.shape[0])
        if cu.device.type == "cpu" and not torch.compiler.is_compiling() and not checks.is_fake(cu):
            ends = cu.tolist()
            lengths = [hi - lo for lo, hi in itertools.pairwise(ends)]
            if ends[0] != 0 or ends[-1] != total.shape[0] or min(lengths, default=0) < 0:
                checks.fail(
                    op,
                    name,
                    f"ascending from 0 to {total.shape[0]}",
                    ends if len(ends) < 12 else [*ends[:5], "...", *ends[-5:]],
                )
            if max(lengths, default=0) > longest:
                checks.fail(op, most, f"at least the longest sequence, {max(lengths)}", longest)
    if bias is not None:
        checks.bias(op, bias, q, (cu_q.shape[0] - 1, h, max_q, max_k))
    features = asked(q, k, v, bias, is_causal, 0.0, hk != h, return_lse)
    device, dims = q.device.type, sorted({q.shape[2], v.shape[2]})
    return Call(
        op,
        device,
        q.dtype,
        features,
        tuple(dims),
        dispatch.sizes(device, cu_q.shape[0] - 1, h, hk, max_q, max_k, dims[-1]),
    )


@dispatch.describes(flash_attention_varlen)
def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    is_causal: bool,
    scale: Any,
    return_lse: bool,
    backend: str | None,
) -> tuple[Call, list[str]]:
    q, k, v, bias = prepare(_OP, q, k, v, bias)
    max_seqlen_q, max_seqlen_k = (
        checks.whole(_OP, f"max_seqlen_{x}", n, 0) for x, n in (("q", max_seqlen_q), ("k", max_seqlen_k))
    )
    call = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, is_causal, return_lse)
    checks.scale(_OP, scale, q.shape[2])
    return call, dispatch.copy_notes(q=q, k=k, v=v)


def _check_low(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    bias: Tensor | None,
    is_causal: bool,
    _scale: float,
) -> Call:
    if not 0 <= max_q < 2**31 or not 0 <= max_k < 2**31:
        checks.fail(_OP, "max_seqlen_q and max_seqlen_k", "at least 0 and below 2**31", (max_q, max_k))
    return _check(q, k, v, cu_q, cu_k, max_q, max_k, bias, is_causal, False)


def _check_low_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    bias: Tensor | None,
    *rest: Any,
) -> Call:
    call = _check_low(q, k, v, cu_q, cu_k, max_q, max_k, bias, *rest)
    shapes = (*q.shape[:2], v.shape[2]), (q.shape[1], q.shape[0])
    check_results(grad_out, grad_lse, out, lse, bias_grad, bias, *shapes, q)
    return call


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(
        q.shape[1], q.shape[0], dtype=checks.wide(q.dtype)
    )


VARLEN_BACKWARD = Gradient(
    "flash_attention_varlen",
    formula=reference.flash_attention_varlen,
    check=_check_low_backward,
    kernels={"triton": TRITON + "flash_attention_varlen_backward"},
)
VARLEN = Operator(
    "flash_attention_varlen",
    reference=reference.flash_attention_varlen,
    fake=_fake,
    check=_check_low,
    gradient=VARLEN_BACKWARD,
    autocast=("q", "k", "v"),
    kernels={"triton": TRITON + "flash_attention_varlen"},
)
