"""Exact attention that never stores the score matrix: contract, fake kernels and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, nested, reference, sdpa


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v, without the (Nq, Nk) matrix in memory, in forward or backward.

    Args:
        q: queries (B, H, Nq, D). Any strides; kernels copy when the last dimension is not contiguous. Nested q, k and v
            (B, H, j, D) of layout torch.jagged are served as packed sequences, and the result is nested; they have no
            dropout.
        k: keys (B, Hkv, Nk, D); Hkv = H, or a divisor of H with ``enable_gqa``.
        v: values (B, Hkv, Nk, Dv).
        bias: added to the scaled scores (float32 or the dtype of q), or bool with True = attend; any broadcast of (B,
            H, Nq, Nk). A float bias gets its gradient, summed over the broadcast dimensions. -inf and False keep a
            query from a key. A finite number
            does not, however large: a row with ``torch.finfo(dtype).min`` everywhere attends to all keys alike.
        is_causal: query i attends to keys 0..i (top-left aligned, as in ``F.scaled_dot_product_attention``).
        scale: factor on the scores, default 1/sqrt(D); a number, without a gradient.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        enable_gqa: grouped-query attention: each key head serves H / Hkv consecutive query heads.
        return_lse: also return the log-sum-exp of the scores.
        backend: force one of ``pyvit.dispatch.capabilities.BACKENDS``; see :func:`pyvit.explain`.

    Returns:
        out (B, H, Nq, Dv), stored as (B, Nq, H, Dv) so that ``out.transpose(1, 2).flatten(2)`` is free; with
        ``return_lse`` also lse (B, H, Nq) float32, natural logarithm. A row that may attend to nothing gives zeros, no
        gradient, and lse -inf.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device does not fit; the message names it.
        BackendError: ``backend`` cannot serve the call.

    Sources: Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023); Milakov and Gimelshein, "Online
    normalizer calculation for softmax" (2018).
    """
    if isinstance(q, Tensor) and q.is_nested:
        return nested.attention(q, k, v, bias, is_causal, scale, dropout_p, enable_gqa, return_lse, backend)
    q, k, v, bias = prepare("flash_attention", q, k, v, bias)
    dropout_p = checks.dropout("flash_attention", dropout_p)
    call = check(q, k, v, bias, is_causal, dropout_p, enable_gqa, return_lse)
    scale = checks.scale("flash_attention", scale, q.shape[3])
    chosen = dispatch.select(call, backend)
    out, lse = ATTENTION(q, k, v, bias, is_causal, scale, dropout_p, checks.dropout_seed(dropout_p, q), chosen)
    return (out, lse) if return_lse else out


def prepare(
    op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Operands in autocast's dtype, bias with its leading dimensions."""
    device = checks.device(op, "q", q)
    q, k, v = dispatch.autocast(device, q, k, v)
    return q, k, v, checks.with_leading(op, bias)


def asked(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, dropout_p: float, gqa: bool, lse: bool
) -> tuple[str, ...]:
    grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    )
    found = []
    if bias is not None:
        found.append("bool_mask" if bias.dtype == torch.bool else "bias")
        if grad and bias.requires_grad:
            found.append("bias_grad")
    if is_causal:
        found.append("causal")
    if dropout_p:
        found.append("dropout")
    if gqa:
        found.append("gqa")
    if lse:
        found.append("lse")
    if grad:
        found.append("lse_grad" if lse else "grad")
    return tuple(found)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    enable_gqa: bool,
    return_lse: bool,
    op: str = "flash_attention",
) -> Call:
    """The call that these arguments of ``op`` are, for :func:`pyvit.dispatch.select`."""
    checks.tensor(op, "q", q, "(B, H, Nq, D)", 4)
    checks.tensor(op, "k", k, "(B, Hkv, Nk, D)", 4)
    checks.tensor(op, "v", v, "(B, Hkv, Nk, Dv)", 4)
    checks.floating(op, "q", q)
    checks.same(op, "k", k, "q", q)
    checks.same(op, "v", v, "q", q)
    (b, h, nq, d), (bk, hk, nk, dk), (bv, hv, nv, dv) = q.shape, k.shape, v.shape
    if bk != b or dk != d:
        checks.fail(op, "k", f"of shape ({b}, Hkv, Nk, {d}) to fit q", checks.shape(k))
    if bv != b or hv != hk or nv != nk:
        checks.fail(op, "v", f"of shape ({b}, {hk}, {nk}, Dv) to fit k", checks.shape(v))
    if hk != h and not enable_gqa:
        checks.fail(op, "k", f"with {h} heads like q (or pass enable_gqa=True)", f"{hk} heads")
    if hk != h and (hk == 0 or h % hk):
        checks.fail(op, "k", f"with a number of heads that divides q's {h}", hk)
    if d == 0 or dv == 0:
        checks.fail(op, "q, k and v", "of at least one channel per head", f"D = {d}, Dv = {dv}")
    if bias is not None:
        checks.bias(op, bias, q, (b, h, nq, nk))
    checks.flag(op, "is_causal", is_causal)
    features = asked(q, k, v, bias, is_causal, dropout_p, hk != h, return_lse)
    device = q.device.type
    dims = (d,) if d == dv else (d, dv)
    return Call(
        "flash_attention", device, q.dtype, features, dims, dispatch.sizes(device, b, h, hk, nq, nk, max(d, dv))
    )


@dispatch.describes(flash_attention)
def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: Any,
    dropout_p: Any,
    enable_gqa: bool,
    return_lse: bool,
    backend: str | None,
) -> tuple[Call, list[str]]:
    if isinstance(q, Tensor) and q.is_nested:
        return nested.describe(q, k, v, bias, is_causal, scale, dropout_p, enable_gqa, return_lse, backend)
    q, k, v, bias = prepare("flash_attention", q, k, v, bias)
    dropout_p = checks.dropout("flash_attention", dropout_p)
    call = check(q, k, v, bias, is_causal, dropout_p, enable_gqa, return_lse)
    checks.scale("flash_attention", scale, q.shape[3])
    return call, dispatch.copy_notes(q=q, k=k, v=v)


def _check_low(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    _scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Call:
    call = check(q, k, v, bias, is_causal, checks.dropout("flash_attention", dropout_p), True, True)
    checks.seed("flash_attention", seed, dropout_p, q)
    return call


def _check_low_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Call:
    call = _check_low(q, k, v, bias, *rest)
    check_results(grad_out, grad_lse, out, lse, bias_grad, bias, (*q.shape[:3], v.shape[3]), q.shape[:3], q)
    return call


def check_results(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    bias: Tensor | None,
    of_out: Sequence[int],
    of_lse: Sequence[int],
    q: Tensor,
) -> None:
    """What a backward takes before its forward's arguments: results of the shapes ``of_out`` and ``of_lse``, and their
    gradients."""
    op = "attention's backward"
    for name, t, shape, dtype in (
        ("grad_out", grad_out, of_out, q.dtype),
        ("out", out, of_out, q.dtype),
        ("lse", lse, of_lse, checks.wide(q.dtype)),
        ("grad_lse", grad_lse, of_lse, checks.wide(q.dtype)),
    ):
        if t is not None:
            checks.exactly(op, name, t, shape, dtype, q)
    if bias_grad and (bias is None or bias.dtype == torch.bool):
        checks.fail(op, "bias_grad", "False without a float bias", bias_grad)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, h, n, _d = q.shape
    return q.new_empty(b, n, h, v.shape[3]).transpose(1, 2), q.new_empty(b, h, n, dtype=checks.wide(q.dtype))


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v)]
    grad_bias = bias.new_empty(bias.shape) if bias is not None and bias_grad else q.new_empty(0)
    return grads[0], grads[1], grads[2], grad_bias


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.flash_attention(*args)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


TRITON = "pyvit.triton_kernels.flash_attention:"

ATTENTION_BACKWARD = Gradient(
    "flash_attention",
    formula=reference.flash_attention,
    fake=_fake_backward,
    check=_check_low_backward,
    kernels={"triton": TRITON + "flash_attention_backward"},
)
ATTENTION = Operator(
    "flash_attention",
    reference=_reference,
    fake=_fake,
    check=_check_low,
    gradient=ATTENTION_BACKWARD,
    autocast=("q", "k", "v"),
    kernels={"triton": TRITON + "flash_attention"},
    plain=sdpa.flash_attention,
)
