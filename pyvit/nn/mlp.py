"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyvit.nn.linear import Linear, apply, bypassed, idle, plain
from pyvit.nn.quantized import quantized, quantized_mlp
from pyvit.ops import layer_norm, mlp
from pyvit.ops.prepacked import Norm
from pyvit.ops.reference import ACTIVATIONS


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
class GatedMlp(nn.Module):
    """fc2(norm(activation(a) * b)): (..., C) -> (..., C). Shazeer, "GLU Variants Improve Transformer" (2020).

    Packed, (a, b) = fc1(x), with timm's names of ``GluMlp`` and ``SwiGLUPacked``. With ``split``, a = fc1_g(x) and
    b = fc1_x(x), with timm's names of ``SwiGLU``.

    Args:
        dim, hidden_dim: C, and the width of a and of b.
        activation: of the gate a: "silu" (SwiGLU), "gelu" (GEGLU) or another of :func:`pyvit.ops.linear`.
        drop: dropout of the result.
        bias: of all layers.
        out_dim: of the result; None for dim.
        split: two layers for a and b.
        gate_last: the gate a is the second half of fc1(x), as in timm's ``GluMlp``; packed only.
        norm_layer: of the norm before fc2, made by norm_layer(hidden_dim); None for none.
    """

    fuses_residual = True  # see pyvit.nn.residual.fusion_args

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str = "silu",
        drop: float = 0.0,
        bias: bool = True,
        out_dim: int | None = None,
        *,
        split: bool = False,
        gate_last: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if split and gate_last:
            raise ValueError(f"{type(self).__name__}: gate_last must be False with split, whose layers have names")
        self.activation, self.gate_last = activation, gate_last
        if split:
            self.fc1_g = Linear(dim, hidden_dim, bias, **factory)
            self.fc1_x = Linear(dim, hidden_dim, bias, **factory)
        else:
            self.fc1 = Linear(dim, 2 * hidden_dim, bias, **factory)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden_dim, **factory)
        self.fc2 = Linear(hidden_dim, out_dim or dim, bias, **factory)
        self.drop = nn.Dropout(drop)

    def forward(
        self, x: Tensor, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """With ``norm``, ``scale`` and ``residual`` the whole branch, as of :class:`Mlp`."""
        if "fc1" in self._modules:
            gate, value = apply(self.fc1, x, norm=norm).chunk(2, -1)
            if self.gate_last:
                gate, value = value, gate
        else:
            x = x if norm is None else layer_norm(x, *norm)
            gate, value = self.fc1_g(x), self.fc1_x(x)
        hidden = self.norm(ACTIVATIONS[self.activation](gate) * value)
        return apply(self.fc2, hidden, self.drop, scale=scale, residual=residual)


@bypassed
class SwiGLU(GatedMlp):
    """fc2(norm(silu(a) * b)): :class:`GatedMlp` with the activation of DINOv2's, DINOv3's and EVA-02's.

    ``hidden_dim`` is the width of a and of b. :func:`swiglu_hidden` gives DINOv2's width for a given MLP ratio.
    """

    fuses_residual = True

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        bias: bool = True,
        out_dim: int | None = None,
        *,
        split: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(dim, hidden_dim, "silu", drop, bias, out_dim, split=split, norm_layer=norm_layer, **factory)


def swiglu_hidden(hidden_dim: int) -> int:
    """Two thirds of ``hidden_dim`` rounded up to a multiple of 8: as many parameters as a plain MLP of ``hidden_dim``
    (DINOv2)."""
    return (int(hidden_dim * 2 / 3) + 7) // 8 * 8
