"""What layer norm and RMS norm share: the contract, and the operators on the library's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit.dispatch import Call
from pyvit.memory import recycled
from pyvit.ops import checks, reference


def check(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Call:
    """The call that these arguments of ``op`` are."""
    checks.dense(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        checks.fail(op, "x", "of shape (..., C), C at least 1", checks.shape(x))
    checks.floating(op, "x", x)
    wanted = x.shape[-1:]
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        checks.dense(op, name, t)
        if t.shape != wanted:
            checks.tensor(op, name, t, f"({wanted[0]},)", 1)
            checks.fail(op, name, f"of shape ({wanted[0]},)", checks.shape(t))
        if t.device != x.device or t.dtype not in (x.dtype, checks.wide(x.dtype)):
            checks.same(op, name, t, "x", x)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        checks.same(op, "bias", bias, "weight", weight)
    if dtype is None or dtype == x.dtype:
        return Call(op, x.device.type, x.dtype, ())
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be a floating point dtype, got {dtype}")
    rounded = x.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    return Call(op, x.device.type, x.dtype, () if rounded else ("wider_dtype",))


def fake(x: Tensor, dtype: torch.dtype, statistics: int) -> tuple[Tensor, Tensor]:
    """The result, and ``statistics`` numbers per row."""
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(statistics, rows, dtype=checks.wide(x.dtype))


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.to(checks.wide(x.dtype)), -1, correction=0)
    statistics = torch.stack([mean.flatten(), (variance + eps).rsqrt().flatten()])
    return reference.layer_norm(x, weight, bias, eps, dtype).contiguous(), statistics


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rstd = (x.to(checks.wide(x.dtype)).square().mean(-1) + eps).rsqrt()
    return reference.rms_norm(x, weight, eps, dtype).contiguous(), rstd.view(1, -1)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, _backend: str
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, eps, dtype, 2)


def layer_norm_inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, _backend: str
) -> tuple[Tensor, None]:
    out = recycled(x.shape, dtype)
    torch.ops.pyvit._norm_out.default(x, _dense(weight), _dense(bias), eps, True, out, None)
    return out, None


def layer_norm_backward(
    grad: Tensor,
    statistics: Tensor,
    weight_grad: bool,
    bias_grad: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, sums = _backward(grad, statistics, weight_grad or bias_grad, x, weight)
    return grad_x, _sum(sums, 0, weight, weight_grad), _sum(sums, 1, bias, bias_grad)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, _backend: str) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, None, eps, dtype, 1)


def rms_norm_inference(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, _backend: str
) -> tuple[Tensor, None]:
    out = recycled(x.shape, dtype)
    torch.ops.pyvit._norm_out.default(x, _dense(weight), None, eps, False, out, None)
    return out, None


def rms_norm_backward(
    grad: Tensor, rstd: Tensor, weight_grad: bool, x: Tensor, weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    grad_x, sums = _backward(grad, rstd, weight_grad, x, weight)
    return grad_x, _sum(sums, 0, weight, weight_grad)


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, n: int
) -> tuple[Tensor, Tensor]:
    """``n`` statistics of each row: mean and reciprocal deviation, or the latter alone."""
    x, out = x.contiguous(), recycled(x.shape, dtype)
    statistics = torch.empty(n, x.numel() // x.shape[-1], dtype=torch.float32, device="cpu")
    torch.ops.pyvit._norm_out.default(x, _dense(weight), _dense(bias), eps, n == 2, out, statistics)
    return out, statistics


def _backward(
    grad: Tensor, statistics: Tensor, parameters: bool, x: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and with ``parameters`` float32 ones of the weight and the bias, as many as statistics."""
    x, n, grad_x = x.contiguous(), len(statistics), recycled(x.shape, x.dtype)
    sums = torch.empty(n if parameters else 0, x.shape[-1], dtype=torch.float32, device="cpu")
    torch.ops.pyvit._norm_backward_out.default(
        grad.contiguous(), x, _dense(weight), statistics, n == 2, grad_x, sums if parameters else None
    )
    return grad_x, sums


def gradients(
    grad: Tensor, statistics: Tensor, parameters: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x and, with ``parameters``, of weight and bias: of a layer norm or, with as many statistics, of
    an RMS norm. None where a parameter is."""
    grad_x, sums = _backward(grad, statistics, parameters, x, weight)
    found = [None if p is None or not parameters else _sum(sums, at, p, True) for at, p in enumerate((weight, bias))]
    return grad_x, found[0], found[1]


def _sum(sums: Tensor, at: int, parameter: Tensor | None, wanted: bool) -> Tensor:
    if not wanted or parameter is None:
        return sums.new_empty(0)
    return sums[at] if parameter.dtype == torch.float32 else sums[at].to(parameter.dtype)
