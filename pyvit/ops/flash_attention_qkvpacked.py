"""Attention of q, k and v that lie in one tensor, so that its gradient is of one piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch, torch_private
from pyvit.dispatch import Call
from pyvit.ops import checks
from pyvit.ops.flash_attention import ATTENTION, ATTENTION_BACKWARD, check
from pyvit.ops.tracing import traced, transformed

_OP = "flash_attention_qkvpacked"


def flash_attention_qkvpacked(
    qkv: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyvit.ops.flash_attention` of qkv (B, N, 3, H, D), as one projection leaves them: out (B, N, H, D).

    The result is that of the three parts. The ``cpu`` backend writes their gradients where they belong in one tensor,
    which otherwise autograd puts together by a copy; the other backends compute the parts'.

    Args:
        qkv: queries at [:, :, 0], keys at [:, :, 1], values at [:, :, 2].
        bias: any broadcast of (B, H, N, N); this and the rest as in :func:`pyvit.ops.flash_attention`.

    Returns out (B, N, H, D); with ``return_lse`` also lse (B, H, N) float32. Raises as
    :func:`pyvit.ops.flash_attention`.
    """
    dropout_p = checks.dropout(_OP, dropout_p)
    call, qkv, bias = _prepare(qkv, bias, is_causal, dropout_p, return_lse)
    scale = checks.scale(_OP, scale, qkv.shape[4])
    chosen = dispatch.select(call, backend)
    wanted = torch.is_grad_enabled() and (qkv.requires_grad or (bias is not None and bias.requires_grad))
    if chosen == "cpu" and wanted and not traced(qkv, *([] if bias is None else [bias])):
        out, lse = _Packed.apply(qkv, bias, is_causal, scale)
    else:
        seed = checks.dropout_seed(dropout_p, qkv)
        out, lse = ATTENTION(*parts(qkv), bias, is_causal, scale, dropout_p, seed, chosen)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D): views of qkv (B, N, 3, H, D)."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return q, k, v


def _prepare(
    qkv: Tensor, bias: Tensor | None, is_causal: bool, dropout_p: float, return_lse: bool
) -> tuple[Call, Tensor, Tensor | None]:
    checks.tensor(_OP, "qkv", qkv, "(B, N, 3, H, D)", 5)
    checks.floating(_OP, "qkv", qkv)
    if qkv.shape[2] != 3:
        checks.fail(_OP, "qkv", "of shape (B, N, 3, H, D)", checks.shape(qkv))
    (qkv,) = dispatch.autocast(qkv.device.type, qkv)
    bias = checks.with_leading(_OP, bias)
    return check(*parts(qkv), bias, is_causal, dropout_p, False, return_lse, _OP), qkv, bias


@dispatch.describes(flash_attention_qkvpacked)
def _describe(
    qkv: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: Any,
    dropout_p: Any,
    return_lse: bool,
    backend: str | None,
) -> tuple[Call, list[str]]:
    dropout_p = checks.dropout(_OP, dropout_p)
    call, qkv, bias = _prepare(qkv, bias, is_causal, dropout_p, return_lse)
    checks.scale(_OP, scale, qkv.shape[4])
    return call, dispatch.copy_notes(qkv=qkv)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        with torch_private.below_autograd():
            out, lse = ATTENTION.kernel("cpu")(*parts(qkv), bias, is_causal, scale, 0.0, None, "cpu")
        ctx.options = (is_causal, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, bias, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        qkv, bias, out, lse = ctx.saved_tensors
        bias_grad = bias is not None and ctx.needs_input_grad[1]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if torch.is_grad_enabled():  # a gradient of the gradient was asked for: by the parts, which have one
            given = (grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse)

            def formula(qkv: Tensor, bias: Tensor | None) -> Any:
                return ATTENTION(*parts(qkv), bias, *ctx.options, 0.0, None, "cpu")

            return *dispatch.formula_gradients(formula, (qkv, bias), ctx.needs_input_grad[:2], *given), None, None
        if any(transformed(grad) for grad in (grad_out, grad_lse) if grad is not None):
            call = (*parts(qkv), bias, *ctx.options, 0.0, None, "cpu")
            q, k, v, grad_bias = ATTENTION_BACKWARD(grad_out, grad_lse, out, lse, bias_grad, *call)
            return torch.stack((q, k, v), 2).transpose(1, 3), grad_bias if bias_grad else None, None, None
        grad, grad_bias = torch.ops.pyvit.flash_attention_qkvpacked_backward(
            grad_out, grad_lse, out, lse, bias_grad, qkv, bias, *ctx.options
        )
        return grad, grad_bias if bias_grad else None, None, None
