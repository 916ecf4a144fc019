"""Attention by ``F.scaled_dot_product_attention``: the backend "torch" of :mod:`pyvit.ops.flash_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyvit import dispatch
from pyvit.dispatch import devices
from pyvit.ops import reference
from pyvit.ops.tracing import traced


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, _bias: None, is_causal: bool, scale: float, _p: float, _seed: None, _backend: str
) -> tuple[Tensor, None]:
    """out (B, H, Nq, Dv) of q (B, H, Nq, D), k and v (B, Hkv, Nk, D and Dv); there is no log-sum-exp."""
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    if q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    if q.is_cuda and _prefers_cudnn():
        with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, **options)
    else:
        out = F.scaled_dot_product_attention(q, k, v, **options)
    if out.requires_grad and not traced(q, k, v):
        out = _SecondDerivative.apply(out, q, k, v, is_causal, scale)
    return out, None


_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _prefers_cudnn() -> bool:
    """On Hopper and Blackwell cuDNN's attention is the fastest of PyTorch's (on an H100 at every length measured)."""
    present = devices.present()
    return bool(present) and present[0].arch.startswith(("sm_9", "sm_10"))


#: The compiler runs it while tracing, instead of tracing it.
_prefers_cudnn._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _SecondDerivative(torch.autograd.Function):
    """Hands out on as it is. PyTorch's fused kernels have no second derivative: where one is asked for, the gradients
    of q, k and v come from the reference formula instead, which can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = (is_causal, scale)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None, None
        is_causal, scale = ctx.options

        def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.flash_attention(q, k, v, None, is_causal, scale, 0.0, None)[0]

        inputs = ctx.saved_tensors
        return None, *dispatch.formula_gradients(formula, inputs, ctx.needs_input_grad[1:4], grad), None, None
