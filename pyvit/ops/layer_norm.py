"""Layer norm over the last dimension, which may round its result to the dtype that the next layer multiplies in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call
from pyvit.dispatch.capabilities import CAPABILITIES, MISSING
from pyvit.memory import recycled
from pyvit.ops import checks, reference
from pyvit.ops.tracing import traced, transformed

_DTYPES = CAPABILITIES["layer_norm"]["cpu"].dtypes


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, with mean and biased variance of the last dimension. Ba et al.
    (2016).

    Args:
        x: (..., C).
        weight, bias: (C,), of x's dtype or float32; None for ones and zeros.
        eps: added to the variance.
        dtype: of the result (default: x's). With bfloat16 or float16, rows of float32 are rounded as they are written,
            and their gradient is taken from the rounded one's: a cast that costs no pass of its own.
        backend: "cpu", "reference" (PyTorch's), or None: "cpu" where it can serve.

    Statistics are float32 (float64 for float64). Returns (..., C). Raises ValueError or TypeError naming the argument
    that does not fit, BackendError where ``backend`` cannot serve.
    """
    device, eps = check(x, weight, bias), checks.number("layer_norm", "eps", eps)
    dtype = x.dtype if dtype is None else dtype
    if _select(device, x.dtype, dtype, backend) == "reference" or traced(x):
        return reference.layer_norm(x, weight, bias, eps, dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _LayerNorm.apply(x, weight, bias, eps, dtype)
    return _forward(x.contiguous(), weight, bias, eps, dtype, None)


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    device = checks.device("layer_norm", "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        checks.fail("layer_norm", "x", "of shape (..., C), C at least 1", checks.shape(x))
    checks.floating("layer_norm", "x", x)
    wanted = x.shape[-1:]
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        checks.dense("layer_norm", name, t)
        if t.shape != wanted:
            checks.tensor("layer_norm", name, t, f"({wanted[0]},)", 1)
            checks.fail("layer_norm", name, f"of shape ({wanted[0]},)", checks.shape(t))
        if t.device != x.device or t.dtype not in (x.dtype, torch.float32):
            checks.same("layer_norm", name, t, "x", x)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        checks.same("layer_norm", "bias", bias, "weight", weight)
    return device


def _select(device: str, given: torch.dtype, wanted: torch.dtype, backend: str | None) -> str:
    if not wanted.is_floating_point:
        raise TypeError(f"layer_norm: dtype must be a floating point dtype, got {wanted}")
    if backend is None and dispatch._override in (None, "cuda", "triton"):
        able = device == "cpu" and given in _DTYPES and MISSING["cpu", "cpu"] is None
        backend = "cpu" if able else "reference"
    else:
        backend = dispatch.select(Call("layer_norm", device, given, ()), backend)
    return backend if wanted == given or (given == torch.float32 and wanted in _DTYPES) else "reference"


@dispatch.describes("layer_norm")
def _describe(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: Any = 1e-5, *_: Any, **__: Any
) -> tuple[Call, list[str]]:
    checks.number("layer_norm", "eps", eps)
    return Call("layer_norm", check(x, weight, bias), x.dtype, ()), dispatch.copy_notes(x=x)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, statistics: Tensor | None
) -> Tensor:
    out = torch.empty_like(x, dtype=dtype) if torch.is_grad_enabled() else recycled(x.shape, dtype)
    torch.ops.pyvit.layer_norm.default(x, weight, bias, eps, out, statistics)
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        statistics = torch.empty(2, x.numel() // x.shape[-1], dtype=torch.float32, device="cpu")
        rows = x.contiguous()
        ctx.save_for_backward(rows, weight, bias, statistics)
        ctx.eps, ctx.dtype = eps, dtype
        return _forward(rows, weight, bias, eps, dtype, statistics)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        needs, formula = ctx.needs_input_grad, functools.partial(reference.layer_norm, eps=ctx.eps, dtype=ctx.dtype)
        if (
            torch.is_grad_enabled()
        ):  # a gradient of the gradient was asked for: by the plain formula, which autograd sees through
            return (*dispatch.formula_gradients(formula, (x, weight, bias), needs[:3], grad), None, None)
        if transformed(grad):
            wanted = [i for i in range(3) if needs[i]]
            found = dict(
                zip(wanted, dispatch.reference_backward(formula, (grad,), (x, weight, bias), wanted), strict=True)
            )
            return found.get(0), found.get(1), found.get(2), None, None
        grad_x = recycled(x.shape, x.dtype)
        sums = torch.empty(2, x.shape[-1], dtype=torch.float32, device="cpu") if needs[1] or needs[2] else None
        torch.ops.pyvit.layer_norm_backward(grad.contiguous(), x, weight, statistics, grad_x, sums)
        return (
            grad_x if needs[0] else None,
            sums[0].to(weight.dtype) if sums is not None and needs[1] else None,
            sums[1].to(bias.dtype) if sums is not None and needs[2] else None,
            None,
            None,
        )
