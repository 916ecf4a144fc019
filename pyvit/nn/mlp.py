"""The feed-forward half of a block."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.nn.linear import Linear, apply, bypassed, idle, plain
from pyvit.nn.quantized import quantized, quantized_mlp
from pyvit.ops import mlp
from pyvit.ops.prepacked import Norm


@bypassed
class Mlp(nn.Module):
    """fc2(activation(fc1(x))): (..., C) -> (..., C)."""

    fuses_residual = True  # see pyvit.nn.residual.fusion_args

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str = "gelu",
        drop: float = 0.0,
        bias: bool = True,
        out_dim: int | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, bias, activation, **factory)
        self.fc2 = Linear(hidden_dim, out_dim or dim, bias, **factory)
        self.drop = nn.Dropout(drop)

    def forward(
        self, x: Tensor, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """With ``norm``, ``scale`` and ``residual`` the whole branch, see :func:`pyvit.ops.mlp`."""
        parts: dict[str, Any] = self._modules  # attributes of a module take half a microsecond each
        fc1, fc2, drop = parts["fc1"], parts["fc2"], parts["drop"]
        if self._is_one(fc1, fc2, drop):
            first, second = fc1._parameters, fc2._parameters
            weights = (first["weight"], first["bias"], second["weight"], second["bias"])
            return mlp(x, *weights, activation=fc1.activation, norm=norm, scale=scale, residual=residual)
        if quantized(fc1, fc2) and fc1.activation and not fc2.activation and fc2.smoothing is None and idle(drop):
            return quantized_mlp(x, fc1, fc2, fc1.activation, norm, scale, residual)
        return apply(fc2, apply(fc1, x, drop, norm=norm), drop, scale=scale, residual=residual)

    @staticmethod
    def _is_one(fc1: Linear, fc2: Linear, drop: nn.Module) -> bool:
        """Whether the layers are what :func:`pyvit.ops.mlp` computes."""
        return plain(fc1) and plain(fc2) and bool(fc1.activation) and not fc2.activation and idle(drop)


@bypassed
class SwiGLU(nn.Module):
    """fc2(silu(a) * b) with (a, b) = fc1(x): (..., C) -> (..., C). Shazeer, "GLU Variants Improve Transformer" (2020).

    ``hidden_dim`` is the width of a and of b. :func:`swiglu_hidden` gives DINOv2's width for a given MLP ratio.
    """

    fuses_residual = True  # see pyvit.nn.residual.fusion_args

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, bias: bool = True, **factory: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden_dim, bias, **factory)
        self.fc2 = Linear(hidden_dim, dim, bias, **factory)
        self.drop = nn.Dropout(drop)

    def forward(
        self, x: Tensor, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """With ``norm``, ``scale`` and ``residual`` the whole branch, as of :class:`Mlp`."""
        gate, value = apply(self.fc1, x, norm=norm).chunk(2, -1)
        return apply(self.fc2, F.silu(gate) * value, self.drop, scale=scale, residual=residual)


def swiglu_hidden(hidden_dim: int) -> int:
    """Two thirds of ``hidden_dim`` rounded up to a multiple of 8: as many parameters as a plain MLP of ``hidden_dim``
    (DINOv2)."""
    return (int(hidden_dim * 2 / 3) + 7) // 8 * 8
