"""A transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyvit.nn.attention import Attention, Packing
from pyvit.nn.layer_norm import LayerNorm
from pyvit.nn.mlp import Mlp, SwiGLU, swiglu_hidden
from pyvit.nn.residual import DropPath, LayerScale, add_branch, fusion_args
from pyvit.nn.rms_norm import RMSNorm


class Block(nn.Module):
    """x + LS(Attention(LN(x))), then x + LS(MLP(LN(x))): (B, N, C) -> (B, N, C). Dosovitskiy et al. (2021), equations 2
    and 3.

    Args:
        dim, num_heads, qkv_bias, qk_norm, attn_drop: of :class:`pyvit.nn.Attention`.
        mlp_ratio: hidden width of the MLP over dim.
        activation: of the MLP, or "swiglu", which takes two thirds of the width (:func:`pyvit.nn.swiglu_hidden`).
        mlp_layer: makes another MLP, by mlp_layer(dim, int(dim * mlp_ratio), drop=proj_drop): as
            ``functools.partial(SwiGLU, split=True)``. ``activation`` has no meaning then.
        proj_drop: dropout after both branches.
        drop_path, drop_path_form: see :class:`pyvit.nn.DropPath`.
        init_values: initial value of LayerScale; None for none.
        eps: of the norms.
        norm_layer: of both norms: :class:`pyvit.nn.LayerNorm` or :class:`pyvit.nn.RMSNorm`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        activation: str = "gelu",
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        drop_path_form: str = "sample",
        init_values: float | None = None,
        eps: float = 1e-6,
        norm_layer: type[LayerNorm] | type[RMSNorm] = LayerNorm,
        mlp_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = norm_layer(dim, eps, before_linear=True)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, attn_drop=attn_drop, proj_drop=proj_drop)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path, drop_path_form)
        self.norm2 = norm_layer(dim, eps, before_linear=True)
        self.mlp: nn.Module
        if mlp_layer is not None:
            self.mlp = mlp_layer(dim, hidden, drop=proj_drop)
        elif activation == "swiglu":
            self.mlp = SwiGLU(dim, swiglu_hidden(hidden), proj_drop)
        else:
            self.mlp = Mlp(dim, hidden, activation, proj_drop)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path, drop_path_form)

    def forward(
        self, x: Tensor, *, packing: Packing | None = None, rope: Tensor | None = None, **attend: Any
    ) -> Tensor:
        """x (B, N, C), or (T, C) with ``packing``; the rest as for :class:`pyvit.nn.Attention`."""
        parts: dict[str, Any] = self._modules  # attributes of a module take half a microsecond each
        norm, attn, scale, drop = parts["norm1"], parts["attn"], parts["ls1"], parts["drop_path1"]
        if (
            rope is not None
            and packing is not None
            and drop.training
            and getattr(drop, "form", "") == "batch"
            and drop.p
        ):
            raise ValueError("Block: drop_path_form must be 'sample' to train with rope on packed sequences")
        if (fused := fusion_args(norm, scale, drop, attn)) is not None:
            x = attn(x, packing=packing, rope=rope, residual=x, **fused, **attend)
        else:
            x = self._add_attention(x, packing, rope, attend)
        norm, mlp, scale, drop = parts["norm2"], parts["mlp"], parts["ls2"], parts["drop_path2"]
        if (fused := fusion_args(norm, scale, drop, mlp)) is not None:
            return mlp(x, residual=x, **fused)  # type: ignore[no-any-return]
        return add_branch(drop, x, lambda y, p: scale(mlp(norm(y))), packing)

    def _add_attention(self, x: Tensor, packing: Packing | None, rope: Tensor | None, attend: dict[str, Any]) -> Tensor:
        def branch(y: Tensor, packing: Packing | None) -> Tensor:
            return self.ls1(self.attn(self.norm1(y), packing=packing, rope=rope, **attend))  # type: ignore[no-any-return]

        return add_branch(self.drop_path1, x, branch, packing)
