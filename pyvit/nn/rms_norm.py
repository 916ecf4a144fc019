"""RMS norm before a linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvit.nn.layer_norm import dtype_before_linear
from pyvit.nn.linear import bypassed
from pyvit.ops import rms_norm


@bypassed
class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last dimension, by parameters and keys, on :func:`pyvit.ops.rms_norm`.

    ``before_linear``: as of :class:`pyvit.nn.LayerNorm`.
    """

    def __init__(self, dim: int, eps: float | None = None, before_linear: bool = False, **rest: Any) -> None:
        super().__init__(dim, eps, **rest)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"RMSNorm: dim must be the size of the last dimension, got {dim!r}")
        self.before_linear = before_linear

    def forward(self, x: Tensor) -> Tensor:
        dtype = dtype_before_linear(x) if self.before_linear else None
        return rms_norm(x, self.weight, self.eps, dtype=dtype)
