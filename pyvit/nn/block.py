"""A transformer block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvit.nn import replay
from pyvit.nn.attention import Attention, Packing
from pyvit.nn.layer_norm import LayerNorm
from pyvit.nn.mlp import Mlp, SwiGLU, swiglu_hidden
from pyvit.nn.residual import DropPath, LayerScale, add_branch, prepared, surroundings


class Block(nn.Module):
    """x + LS(Attention(LN(x))), then x + LS(MLP(LN(x))): (B, N, C) -> (B, N, C). Dosovitskiy et al. (2021), equations 2
    and 3.

    Args:
        dim, num_heads, qkv_bias, qk_norm, attn_drop: of :class:`pyvit.nn.Attention`.
        mlp_ratio: hidden width of the MLP over dim.
        activation: of the MLP, or "swiglu", which takes two thirds of the width (:func:`pyvit.nn.swiglu_hidden`).
        proj_drop: dropout after both branches.
        drop_path, drop_path_form: see :class:`pyvit.nn.DropPath`.
        init_values: initial value of LayerScale; None for none.
        eps: of the layer norms.
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
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = LayerNorm(dim, eps, before_linear=True)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, attn_drop=attn_drop, proj_drop=proj_drop)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path, drop_path_form)
        self.norm2 = LayerNorm(dim, eps, before_linear=True)
        self.mlp = (
            SwiGLU(dim, swiglu_hidden(hidden), proj_drop)
            if activation == "swiglu"
            else Mlp(dim, hidden, activation, proj_drop)
        )
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path, drop_path_form)

    def forward(
        self, x: Tensor, *, packing: Packing | None = None, rope: Tensor | None = None, **attend: Any
    ) -> Tensor:
        """x (B, N, C), or (T, C) with ``packing``; the rest as for :class:`pyvit.nn.Attention`."""
        causal = attend.get("is_causal", False)
        simple = packing is None and rope is None and len(attend) == ("is_causal" in attend)
        if simple and (out := replay.again(self, x, causal)) is not None:
            return out
        out = self._forward(x, packing, rope, attend)
        if simple:
            replay.record(self, x, causal)
        return out

    def _forward(self, x: Tensor, packing: Packing | None, rope: Tensor | None, attend: dict[str, Any]) -> Tensor:
        drop = self.drop_path1
        if (
            rope is not None
            and packing is not None
            and drop.training
            and getattr(drop, "form", "") == "batch"
            and drop.p
        ):
            raise ValueError("Block: drop_path_form must be 'sample' to train with rope on packed sequences")
        if (around := surroundings(self.norm1, self.ls1, self.drop_path1, self.attn)) is not None:
            x = self.attn(x, packing=packing, rope=rope, residual=x, **around, **attend)
        else:
            x = add_branch(
                self.drop_path1,
                x,
                lambda y, p: self.ls1(self.attn(self.norm1(y), packing=p, rope=rope, **attend)),
                packing,
            )
        if (around := surroundings(self.norm2, self.ls2, self.drop_path2, self.mlp)) is not None:
            return self.mlp(x, residual=x, **around)
        return add_branch(self.drop_path2, x, lambda y, p: self.ls2(self.mlp(self.norm2(y))), packing)

    def prepared(self, x: Tensor, is_causal: bool) -> replay.Run | None:
        """:meth:`forward` as :mod:`pyvit.nn.replay` wants it."""
        first = prepared(x, self.norm1, self.ls1, self.drop_path1, self.attn, is_causal=is_causal)
        second = prepared(x, self.norm2, self.ls2, self.drop_path2, self.mlp)
        return None if first is None or second is None else lambda x: second(first(x))
