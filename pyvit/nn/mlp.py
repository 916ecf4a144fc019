"""The feed-forward half of a block."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.nn.linear import Linear, hooked, plain
from pyvit.ops import mlp


class Mlp(nn.Module):
    """fc2(activation(fc1(x))): (..., C) -> (..., C)."""

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

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2, drop = self.fc1, self.fc2, self.drop
        if plain(fc1) and plain(fc2) and fc1.activation and not fc2.activation and not (drop.p and drop.training) and not hooked(drop):
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=fc1.activation)
        return drop(fc2(drop(fc1(x))))


class SwiGLU(nn.Module):
    """fc2(silu(a) * b) with (a, b) = fc1(x): (..., C) -> (..., C). Shazeer, "GLU Variants Improve Transformer" (2020).

    ``hidden_dim`` is the width of a and of b. :func:`swiglu_hidden` gives DINOv2's width for a given MLP ratio.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, bias: bool = True, **factory: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden_dim, bias, **factory)
        self.fc2 = Linear(hidden_dim, dim, bias, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.drop(self.fc2(F.silu(gate) * value))


def swiglu_hidden(hidden_dim: int) -> int:
    """Two thirds of ``hidden_dim`` rounded up to a multiple of 8: as many parameters as a plain MLP of ``hidden_dim`` (DINOv2)."""
    return (int(hidden_dim * 2 / 3) + 7) // 8 * 8
