"""Exact attention that never stores the score matrix: contract, fake kernels and gradients of the dense and packed forms."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Operator
from pyvit.ops import checks, reference


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
        q: queries (B, H, Nq, D). Any strides; kernels copy when the last dimension is not contiguous.
        k: keys (B, Hkv, Nk, D); Hkv = H, or a divisor of H with ``enable_gqa``.
        v: values (B, Hkv, Nk, Dv).
        bias: added to the scaled scores (float32 or the dtype of q), or bool with True = attend; any broadcast of (B, H, Nq, Nk).
            A float bias gets its gradient, summed over the broadcast dimensions. -inf and False keep a query from a key. A finite number
            does not, however large: a row with ``torch.finfo(dtype).min`` everywhere attends to all keys alike.
        is_causal: query i attends to keys 0..i (top-left aligned, as in ``F.scaled_dot_product_attention``).
        scale: factor on the scores, default 1/sqrt(D).
        dropout_p: probability of dropping an attention weight, in [0, 1).
        enable_gqa: grouped-query attention: each key head serves H / Hkv consecutive query heads.
        return_lse: also return the log-sum-exp of the scores.
        backend: force one of ``pyvit.backends.BACKENDS``; see :func:`pyvit.explain`.

    Returns:
        out (B, H, Nq, Dv), stored as (B, Nq, H, Dv) so that ``out.transpose(1, 2).flatten(2)`` is free; with ``return_lse`` also
        lse (B, H, Nq) float32, natural logarithm. A row that may attend to nothing gives zeros, no gradient, and lse -inf.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device does not fit; the message names it.
        BackendError: ``backend`` cannot serve the call.

    Sources: Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023); Milakov and Gimelshein, "Online normalizer calculation
    for softmax" (2018).
    """
    q, k, v, bias = _prepare("flash_attention", q, k, v, bias)
    call = check(q, k, v, bias, is_causal, dropout_p, enable_gqa, return_lse)
    chosen = dispatch.select(call, backend)
    out, lse = ATTENTION(
        q, k, v, bias, is_causal, q.shape[-1] ** -0.5 if scale is None else scale, dropout_p, checks.dropout_seed(dropout_p, q), chosen
    )
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` by signature and meaning, on :func:`flash_attention`.

    query (..., H, Nq, D) with any number of leading dimensions, at least (Nq, D). One difference, on purpose: a fully masked row gives
    zeros in every dtype and on every device.
    """
    if query.dim() == 4:
        return flash_attention(  # type: ignore[return-value]
            query, key, value, bias=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead = query.shape[:-2]
    if query.dim() < 2 or key.shape[:-2] != lead or value.shape[:-2] != lead:
        checks.fail("scaled_dot_product_attention", "key and value", f"of leading shape {tuple(lead)} like query", tuple(key.shape))
    flat = [t.reshape(-1, 1, *t.shape[-2:]) for t in (query, key, value)]
    if attn_mask is not None and attn_mask.dim() > 2:
        if any(have not in (1, want) for have, want in zip(reversed(attn_mask.shape[:-2]), reversed(lead), strict=False)):
            wanted = (*lead, query.shape[-2], key.shape[-2])
            checks.fail("scaled_dot_product_attention", "attn_mask", f"broadcastable to {tuple(wanted)}", checks.shape(attn_mask))
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-2:]).reshape(-1, 1, *attn_mask.shape[-2:])
    out = flash_attention(*flat, bias=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    return out.reshape(*lead, *out.shape[-2:])  # type: ignore[union-attr]


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
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 or int64, ascending, from 0 to Tq (Tk): sequence s is rows cu[s] to cu[s + 1].
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        bias: any broadcast of (S, H, max_seqlen_q, max_seqlen_k); each sequence uses the top-left corner. Float or bool, as in
            :func:`flash_attention`, and with a gradient.
        is_causal, scale, return_lse, backend: as in :func:`flash_attention`.

    Returns:
        out (Tq, H, Dv); with ``return_lse`` also lse (H, Tq) float32.

    Raises ValueError, TypeError, BackendError as :func:`flash_attention`.
    """
    q, k, v, bias = _prepare("flash_attention_varlen", q, k, v, bias)
    call = _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, is_causal, return_lse)
    chosen = dispatch.select(call, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, is_causal, scale, chosen)
    return (out, lse) if return_lse else out


def _prepare(op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Operands in autocast's dtype, bias with its leading dimensions."""
    device = checks.device(op, "q", q)
    q, k, v = dispatch.autocast(device, q, k, v)
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    return q, k, v, bias


def _features(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, dropout_p: float, gqa: bool, lse: bool
) -> tuple[str, ...]:
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad))
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
    if dropout_p:
        checks.probability(op, "dropout_p", dropout_p)
    features = _features(q, k, v, bias, is_causal, dropout_p, hk != h, return_lse)
    device = q.device.type
    dims = (d,) if d == dv else (d, dv)
    return Call("flash_attention", device, q.dtype, features, dims, dispatch.sizes(device, b, h, hk, nq, nk, max(d, dv)))


def _check_varlen(
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
    op = "flash_attention_varlen"
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
                checks.fail(op, name, f"ascending from 0 to {total.shape[0]}", ends if len(ends) < 12 else [*ends[:5], "...", *ends[-5:]])
            if max(lengths, default=0) > longest:
                checks.fail(op, most, f"at least the longest sequence, {max(lengths)}", longest)
    if bias is not None:
        checks.bias(op, bias, q, (cu_q.shape[0] - 1, h, max_q, max_k))
    features = _features(q, k, v, bias, is_causal, 0.0, hk != h, return_lse)
    device, dims = q.device.type, sorted({q.shape[2], v.shape[2]})
    return Call(op, device, q.dtype, features, tuple(dims), dispatch.sizes(device, cu_q.shape[0] - 1, h, hk, max_q, max_k, dims[-1]))


@dispatch.describes("flash_attention")
def _describe(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, **kw: Any) -> tuple[Call, list[str]]:
    q, k, v, bias = _prepare("flash_attention", q, k, v, bias)
    flags = [kw.get(name, 0) for name in ("is_causal", "dropout_p", "enable_gqa", "return_lse")]
    return check(q, k, v, bias, *flags), dispatch.copy_notes(q=q, k=k, v=v)


@dispatch.describes("flash_attention_varlen")
def _describe_varlen(
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
    return_lse: bool = False,
    **_: Any,
) -> tuple[Call, list[str]]:
    q, k, v, bias = _prepare("flash_attention_varlen", q, k, v, bias)
    call = _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias, is_causal, return_lse)
    return call, dispatch.copy_notes(q=q, k=k, v=v)


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
    return grads[0], grads[1], grads[2], _fake_bias_grad(q, bias, bias_grad)


def _fake_bias_grad(q: Tensor, bias: Tensor | None, bias_grad: bool) -> Tensor:
    return bias.new_empty(bias.shape) if bias is not None and bias_grad else q.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, *ctx.options, seed, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, seed, *output)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, seed, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    *grads, grad_bias = ATTENTION_BACKWARD(grad_out, grad_lse, out, lse, bias_grad, q, k, v, bias, *ctx.options, seed, ctx.backend)
    return *grads, grad_bias if bias_grad else None, None, None, None, None, None


def _reference_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *args: Any
) -> tuple[Tensor, ...]:
    wanted = [0, 1, 2, 3] if bias_grad else [0, 1, 2]
    grads = dispatch.reference_backward(reference.flash_attention, (grad_out, grad_lse), args, wanted)
    # Strides are part of the contract that the fake kernel states.
    stored = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads[:3]]  # type: ignore[union-attr]
    return *stored, grads[3].contiguous() if bias_grad else args[0].new_empty(0)  # type: ignore[union-attr]


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.flash_attention(*args)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


_TRITON = "pyvit.triton_kernels.flash_attention:"

ATTENTION_BACKWARD = Operator(
    "flash_attention_backward",
    reference=_reference_backward,
    fake=_fake_backward,
    kernels={"triton": _TRITON + "flash_attention_backward"},
    **dispatch.double_backward(reference.flash_attention, n_grads=2, n_skipped=3, inputs=(0, 1, 2, 3)),
)
ATTENTION = Operator(
    "flash_attention",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast_args=(0, 1, 2),
    kernels={"triton": _TRITON + "flash_attention"},
)


def _fake_varlen(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=checks.wide(q.dtype))


def _fake_varlen_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    return grads[0], grads[1], grads[2], _fake_bias_grad(q, rest[4], bias_grad)


def _setup_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, bias, *ctx.options = inputs
    ctx.lengths = (max_q, max_k)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, cu_q, cu_k, bias, *output)


def _backward_varlen(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, bias, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    bias_grad = bias is not None and ctx.needs_input_grad[7]
    *grads, grad_bias = VARLEN_BACKWARD(grad_out, grad_lse, out, lse, bias_grad, q, k, v, cu_q, cu_k, *ctx.lengths, bias, *ctx.options)
    return *grads, None, None, None, None, grad_bias if bias_grad else None, None, None, None


def _reference_varlen_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *args: Any
) -> tuple[Tensor, ...]:
    wanted = [0, 1, 2, 7] if bias_grad else [0, 1, 2]
    grads = dispatch.reference_backward(reference.flash_attention_varlen, (grad_out, grad_lse), args, wanted)
    filled = [torch.zeros_like(args[i]) if g is None else g.contiguous() for i, g in zip(wanted, grads, strict=True)]
    return *filled[:3], filled[3] if bias_grad else args[0].new_empty(0)


VARLEN_BACKWARD = Operator(
    "flash_attention_varlen_backward",
    reference=_reference_varlen_backward,
    fake=_fake_varlen_backward,
    kernels={"triton": _TRITON + "flash_attention_varlen_backward"},
    **dispatch.double_backward(reference.flash_attention_varlen, n_grads=2, n_skipped=3, inputs=(0, 1, 2, 7)),
)
VARLEN = Operator(
    "flash_attention_varlen",
    reference=reference.flash_attention_varlen,
    fake=_fake_varlen,
    setup_context=_setup_varlen,
    backward=_backward_varlen,
    autocast_args=(0, 1, 2),
    kernels={"triton": _TRITON + "flash_attention_varlen"},
)
