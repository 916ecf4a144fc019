"""Layer norm before a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyvit.nn.linear import bypassed
from pyvit.ops import layer_norm


@bypassed
class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, by parameters and keys, on :func:`pyvit.ops.layer_norm`.

    ``before_linear``: under autocast the result has autocast's dtype, to which the linear layer that follows would
    round it anyway.
    """

    def __init__(self, dim: int, eps: float = 1e-5, before_linear: bool = False, **rest: Any) -> None:
        super().__init__(dim, eps, **rest)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"LayerNorm: dim must be the size of the last dimension, got {dim!r}")
        self.before_linear = before_linear

    def forward(self, x: Tensor) -> Tensor:
        dtype = dtype_before_linear(x) if self.before_linear else None
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype)


def dtype_before_linear(x: Tensor) -> torch.dtype | None:
    """The dtype to which a linear layer on a CPU would round norm(x) under autocast; None for x's own."""
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.get_autocast_dtype("cpu")
    return None
