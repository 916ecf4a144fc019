"""RMS norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvit.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last dimension, by parameters and keys, on :func:`pyvit.ops.rms_norm`."""

    def __init__(self, dim: int, eps: float | None = None, **rest: Any) -> None:
        super().__init__(dim, eps, **rest)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"RMSNorm: dim must be the size of the last dimension, got {dim!r}")

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
