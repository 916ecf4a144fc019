"""The attention of a Swin block, on the map: no window is ever cut out in memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.nn.constants import Constants
from pyvit.nn.linear import Linear, apply, bypassed, idle, plain
from pyvit.nn.patch_embed import pair
from pyvit.nn.quantized import quantized, quantized_window_attention
from pyvit.nn.rates import check_rate
from pyvit.ops import window_attention
from pyvit.ops.prepacked import Norm, normalize, window_attention_branch
from pyvit.ops.reference import relative_position_index


@bypassed
class WindowAttention(nn.Module):
    """Attention in (shifted) windows with a relative-position bias: (B, H, W, C) -> (B, H, W, C), any H and W.

    Liu et al., "Swin Transformer" (2021), section 3.2.

    Args:
        dim, num_heads: C and heads.
        window_size: (wh, ww). shift_size: (sy, sx), half a window in every second block; an axis that is one window is
            not shifted.
        qkv_bias, attn_drop, proj_drop: as in :class:`pyvit.nn.Attention`.
        mask_padding: what padding is on maps that do not divide by the window. False: tokens that hold the qkv bias and
            take part (torchvision, transformers). True: masked out.
    """

    fuses_residual = True  # see pyvit.nn.residual.fusion_args

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{type(self).__name__}: num_heads must divide dim = {dim}, got {num_heads}")
        check_rate(f"{type(self).__name__}: attn_drop", attn_drop, one=True)
        self.num_heads, self.window_size, self.shift_size = num_heads, pair(window_size), pair(shift_size)
        self.attn_drop, self.mask_padding = attn_drop, mask_padding
        self._make_qkv(dim, qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _make_qkv(self, dim: int, qkv_bias: bool) -> None:
        wh, ww = self.window_size
        self.qkv = Linear(dim, 3 * dim, qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * wh - 1) * (2 * ww - 1), self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def project(self, x: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor | None]:
        """qkv (B, H, W, 3C), and what the projection makes of a zero token (3C,)."""
        return apply(self.qkv, x, norm=norm), self.qkv.bias

    def bias_table(self) -> Tensor:
        """((2 wh - 1) (2 ww - 1), heads), see :func:`pyvit.ops.window_attention`."""
        return self.relative_position_bias_table

    def _pad_qkv(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        (h, w), (wh, ww) = x.shape[1:3], self.window_size
        if self.mask_padding or not (h % wh or w % ww):
            return None
        return bias if bias is not None else x.new_zeros(3 * x.shape[3])

    def forward(
        self, x: Tensor, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """With ``norm``, ``scale`` and ``residual`` (see :func:`pyvit.ops.linear`) the branch: residual + scale *
        attention(norm(x))."""
        dropout = self.attn_drop if self.training else 0.0
        if not dropout and type(self) is WindowAttention:
            windows = (self.window_size, self.shift_size, self.num_heads, self.bias_table(), self.mask_padding)
            fused = self._branch(x, windows, norm, scale, residual)
            if fused is not None:
                return fused
        qkv, bias = self.project(x, norm)
        out = window_attention(
            qkv,
            self.window_size,
            self.shift_size,
            num_heads=self.num_heads,
            bias_table=self.bias_table(),
            logit_scale=self._logit_scale(),
            pad_qkv=self._pad_qkv(x, bias),
            dropout_p=dropout,
        )
        return apply(self.proj, out, self.proj_drop, scale=scale, residual=residual)

    def _branch(
        self,
        x: Tensor,
        windows: tuple[Any, Any, int, Tensor, bool],
        norm: Norm | None,
        scale: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor | None:
        """The branch in one call, None where that does not compute these layers."""
        parts: dict[str, Any] = self._modules  # attributes of a module take half a microsecond each
        qkv, proj = parts["qkv"], parts["proj"]
        if not idle(parts["proj_drop"]):
            return None
        if plain(qkv) and plain(proj) and not qkv.activation and not proj.activation:
            return window_attention_branch(x, qkv, proj, *windows, norm, scale, residual)
        if quantized(qkv, proj):
            return quantized_window_attention(x, qkv, proj, *windows, norm, scale, residual)
        return None

    def score_shape(self, x: Tensor) -> tuple[int, int, int]:
        """Windows times heads, queries and keys of the scores that x (B, H, W, C) stands for."""
        (b, h, w, _), (wh, ww) = x.shape, self.window_size
        return b * -(-h // wh) * -(-w // ww) * self.num_heads, wh * ww, wh * ww

    def _logit_scale(self) -> Tensor | None:
        return None

    def relative_position_bias(self) -> Tensor:
        """The bias spread out, (heads, window area, window area): for inspection and for other attention kernels."""
        table = self.bias_table()
        return table[relative_position_index(self.window_size, table.device)].permute(2, 0, 1)


class WindowAttentionV2(Constants, WindowAttention):
    """Swin V2's window attention: cosine similarity with a learned temperature, and the bias table made by a small
    network from log-spaced offsets, so that it carries over between window sizes. Liu et al., "Swin Transformer V2"
    (2022), section 3.

    ``pretrained_window_size``: the window at which the network was trained, by which offsets are normalised; 0 for this
    window.
    """

    coords: Tensor

    def __init__(self, *args: object, pretrained_window_size: int | Sequence[int] = 0, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, self.num_heads, bias=False))
        trained = zip(pair(pretrained_window_size), self.window_size, strict=True)
        self.pretrained_window_size = tuple(n or own for n, own in trained)
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        return {"coords": log_offsets(self.window_size, self.pretrained_window_size)}

    def _make_qkv(self, dim: int, qkv_bias: bool) -> None:
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def project(self, x: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor | None]:
        if self.q_bias is None or self.v_bias is None:
            return apply(self.qkv, x, norm=norm), None
        x = x if norm is None else normalize(x, norm)
        bias = torch.cat(
            (self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)
        )  # a key bias would not survive the cosine
        return (F.linear(x, self.qkv.weight, bias) if plain(self.qkv) else self.qkv(x) + bias), bias

    def bias_table(self) -> Tensor:
        # A few thousand numbers, every window's bias: not worth autocast's rounding.
        kind = self.coords.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
            return 16.0 * torch.sigmoid(self.cpb_mlp(self.coords.to(self.cpb_mlp[0].weight.dtype)))

    def _logit_scale(self) -> Tensor | None:
        return self.logit_scale.flatten()


def log_offsets(window: tuple[int, int], pretrained: tuple[int, int] = (0, 0)) -> Tensor:
    """Query minus key for each row of the bias table, in Swin V2's coordinates: sign(o) log2(1 + |o|) / 3 with o = 8
    offset / (window - 1).

    Returns ((2 wh - 1) (2 ww - 1), 2), in float32.
    """
    axes = []
    for n, trained in zip(window, pretrained, strict=True):
        offset = torch.arange(1 - n, n, dtype=torch.float32, device="cpu") * (8.0 / max((trained or n) - 1, 1))
        axes.append(offset.sign() * torch.log2(offset.abs() + 1.0) / 3.0)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
