"""Activations and gates of linear layers and their gradients, each in one pass over memory.

The compiled library computes them where it can, PyTorch otherwise. Names are those of
:data:`pyvit.ops.reference.ACTIVATIONS`. Autograd records nothing here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyvit import library
from pyvit.memory import recycled, scratch
from pyvit.ops import reference
from pyvit.ops.tracing import transformed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_aten = torch.ops.aten

#: d activation(inner) / d inner times the gradient. As x sigmoid(a x) = silu(a x) / a, its slope is silu's at a x.
_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda grad, inner: _aten.gelu_backward(grad, inner),
    "gelu_tanh": lambda grad, inner: _aten.gelu_backward(grad, inner, approximate="tanh"),
    "quick_gelu": lambda grad, inner: _aten.silu_backward(grad, inner * 1.702),
    "silu": lambda grad, inner: _aten.silu_backward(grad, inner),
    "relu": lambda grad, inner: _aten.threshold_backward(grad, inner, 0),
}


def ours(x: Tensor) -> bool:
    """Whether the library computes activations, gates and norms of ``x``."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and library.problem() is None


def activate(x: Tensor, name: str, temporary: bool = False) -> Tensor:
    """activation(x) as a new tensor. A ``temporary`` result is valid until the next call with ``temporary``."""
    if not ours(x):
        return reference.ACTIVATIONS[name](x)
    x = x.contiguous()
    out = scratch("activation", x.shape, x.dtype) if temporary else torch.empty_like(x)
    torch.ops.pyvit.activation.default(x, name, out)
    return out


def activate_(x: Tensor, name: str) -> Tensor:
    """``x``, contiguous, replaced by activation(x)."""
    if ours(x):
        torch.ops.pyvit.activation.default(x, name, x)
        return x
    return x.copy_(reference.ACTIVATIONS[name](x))


def gradient(grad: Tensor, inner: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The gradient of ``inner`` (..., C) for the gradient of activation(inner), and its sum (C,) over the other
    dimensions. The library returns the sum in float32.

    For relu, ``inner`` may also be activation(inner).
    """
    if not ours(inner) or transformed(grad):
        found = _GRADIENTS[name](grad, inner)
        return found, found.reshape(-1, found.shape[-1]).sum(0)
    grad, inner = grad.contiguous(), inner.contiguous()
    found = torch.empty_like(inner)
    return found, torch.ops.pyvit.activation_backward(grad, inner, name, found, None)


def gradient_(grad: Tensor, inner: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """As :func:`gradient`, with the gradient of ``inner`` written to ``grad``, which is contiguous. Returns
    activation(inner), which is temporary as in :func:`activate`, and the sum."""
    if not ours(inner) or transformed(grad):
        grad.copy_(_GRADIENTS[name](grad, inner))
        return reference.ACTIVATIONS[name](inner), grad.reshape(-1, grad.shape[-1]).sum(0)
    inner = inner.contiguous()
    out = scratch("activation", inner.shape, inner.dtype)
    return out, torch.ops.pyvit.activation_backward(grad, inner, name, grad, out)


def gated(gate: Tensor, value: Tensor, name: str, temporary: bool = False) -> Tensor:
    """activation(gate) * value, of (rows, H) with contiguous rows, as a new tensor. A ``temporary`` result as of
    :func:`activate`."""
    if not ours(gate):
        return reference.ACTIVATIONS[name](gate) * value
    out = scratch("gated", gate.shape, gate.dtype) if temporary else torch.empty(gate.shape, dtype=gate.dtype)
    torch.ops.pyvit.gate.default(gate, value, name, out)
    return out


def gate_gradient_(
    grad: Tensor, gate: Tensor, value: Tensor, name: str, packed: bool, gate_last: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """activation(gate) * value, which may replace ``grad``, its gradient, and the gradients of values and gates (rows,
    H), which are contiguous.

    ``packed``: both are halves of one tensor (rows, 2 H), and None stands for the gates. Also returns the sums of the
    gates' and the values' gradients, (2, H), of the library in float32.
    """
    rows, width = gate.shape
    if not ours(gate) or transformed(grad):
        y = reference.ACTIVATIONS[name](gate)
        gates, both = _GRADIENTS[name](grad * value, gate), grad * y
        sums = torch.stack((gates.sum(0), both.sum(0)))
        if packed:
            return y * value, torch.cat((both, gates) if gate_last else (gates, both), -1), None, sums
        return y * value, both, gates, sums
    if packed:
        both, of_gates = recycled((rows, 2 * width), gate.dtype), None
        of_gate, of_value = reversed(both.chunk(2, -1)) if gate_last else both.chunk(2, -1)
    else:
        both = of_value = recycled((rows, width), gate.dtype)
        of_gates = of_gate = recycled((rows, width), gate.dtype)
    sums = torch.ops.pyvit.gate_backward.default(grad, gate, value, name, of_gate, of_value)
    return grad, both, of_gates, sums
