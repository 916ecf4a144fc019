"""RMS norm before a linear layer, and norms as arguments of fused layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvit.nn.layer_norm import LayerNorm, dtype_before_linear
from pyvit.nn.linear import bypassed, plain
from pyvit.ops import rms_norm
from pyvit.ops.prepacked import Norm


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


def norm_args(norm: nn.Module) -> Norm | None:
    """``norm`` as an argument of a fused layer, such as :func:`pyvit.ops.linear`; None where it is not an unwatched
    LayerNorm or RMSNorm."""
    parameters = norm._parameters
    if plain(norm, LayerNorm):
        return parameters["weight"], parameters["bias"], norm.eps  # type: ignore[return-value]
    return (parameters["weight"], norm.eps) if plain(norm, RMSNorm) else None  # type: ignore[return-value]
