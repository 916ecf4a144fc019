"""Positions: fixed sines and cosines, resampling of learned ones, and rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.nn.constants import Constants


def sincos_2d(dim: int, grid: Sequence[int], temperature: float = 10000.0) -> Tensor:
    """Fixed 2-D positions (rows * columns, dim), dim divisible by 4.

    The first half encodes the column, the second the row, each as sines then cosines (He et al., "Masked Autoencoders",
    2022, after Vaswani et al., 2017).
    """
    if dim % 4:
        raise ValueError(f"sincos_2d: dim must be divisible by 4, got {dim}")
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (x, y)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()


def relative_biases(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The biases for :func:`pyvit.ops.decomposed_attention` of queries (B, H, rows * columns, d) on the keys' grid:
    their products with the embeddings of the distances to each row and column (B, H, N, rows), (B, H, N, columns).

    rel_pos_h, rel_pos_w: embeddings (L, d) of distances from -(n - 1) to n - 1 along an axis of n tokens; resampled
    linearly if L is not 2n - 1.
    """
    at = q.unflatten(2, tuple(grid))  # (B, H, rows, columns, d)
    rows, columns = (_by_distance(table, n).to(q.dtype) for table, n in zip((rel_pos_h, rel_pos_w), grid, strict=True))
    up = torch.einsum("bnywd,ykd->bnywk", at, rows)
    across = torch.einsum("bnywd,wkd->bnywk", at, columns)
    return up.flatten(2, 3), across.flatten(2, 3)


def _by_distance(table: Tensor, n: int) -> Tensor:
    """Embeddings (n, n, d) of query and key of an axis."""
    if table.shape[0] != 2 * n - 1:
        table = F.interpolate(table.float().T[None], size=2 * n - 1, mode="linear")[0].T.to(table.dtype)
    at = torch.arange(n, device=table.device)
    return table[at[:, None] - at[None, :] + n - 1]


def resample_positions(
    pos: Tensor,
    old: Sequence[int],
    new: Sequence[int],
    antialias: bool = True,
    offset: float = 0.0,
    mode: str = "bicubic",
) -> Tensor:
    """Learned positions (N, D) of a grid of ``old`` (rows, columns), resampled to ``new``, in float32 or float64; dtype
    is kept. ``mode``: "bicubic" or "bilinear".

    ``offset`` 0.1 reproduces the scale factor (new + 0.1) / old of DINO and of the first DINOv2 models.
    """
    if tuple(old) == tuple(new):
        return pos
    wide = pos if pos.dtype == torch.float64 else pos.float()
    image = wide.unflatten(0, tuple(old)).permute(2, 0, 1)[None]
    if offset:
        scale = [(n + offset) / o for n, o in zip(new, old, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode=mode, antialias=antialias)
        if image.shape[2:] != tuple(new):
            raise ValueError(
                f"resample_positions: offset {offset} turns a grid of {tuple(old)} into {tuple(image.shape[2:])}, "
                f"not {tuple(new)}"
            )
    else:
        image = F.interpolate(image, size=tuple(new), mode=mode, antialias=antialias)
    return image[0].permute(1, 2, 0).flatten(0, 1).to(pos.dtype)


class RotaryEmbedding(Constants):
    """2-D rotary positions over coordinates in [-1, 1], as described in the DINOv3 paper (Simeoni et al., 2025, section
    3.2).

    Half of each head's angles follow the row, half the column, at periods base ** (4 i / d). In training ``jitter`` s
    draws one log-uniform scale in [1/s, s] for all coordinates.

    Args:
        head_dim: d, divisible by 4.
        base: the longest period.
        jitter: 1.0 turns it off.
    """

    periods: Tensor

    def __init__(self, head_dim: int, base: float = 100.0, jitter: float = 1.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"RotaryEmbedding: head_dim must be divisible by 4, got {head_dim}")
        self.head_dim, self.base, self.jitter = head_dim, base, jitter
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        steps = torch.arange(self.head_dim // 4, dtype=torch.float32, device="cpu")
        return {"periods": self.base ** (steps * (4.0 / self.head_dim))}

    def forward(self, grid: Sequence[int], prefix: int = 0) -> Tensor:
        """(prefix + rows * columns, 2, d), sines and cosines, float32; prefix tokens are not rotated."""
        device = self.periods.device
        y, x = (2.0 * (torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n - 1.0 for n in grid)
        if self.training and self.jitter != 1.0:
            reach = math.log(self.jitter)
            scale = torch.empty((), dtype=torch.float32, device=device).uniform_(-reach, reach).exp()
            y, x = y * scale, x * scale
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # (N, 2)
        angles = (2 * math.pi * coords[:, :, None] / self.periods).flatten(1)  # (N, d/2)
        angles = torch.cat((angles.new_zeros(prefix, angles.shape[1]), angles)).repeat(1, 2)
        return torch.stack((angles.sin(), angles.cos()), 1)


class AxialRotaryEmbedding(Constants):
    """2-D rotary positions over rows and columns of patches, for pairs (2i, 2i + 1) of channels
    (``rotate(..., interleaved=True)``). Fang et al., "EVA-02" (2023), section 2.1.

    Half of each head's pairs follow one axis, half the other, at frequencies base ** (-4 i / d).

    Args:
        head_dim: d, divisible by 4.
        base: the longest period over 2 pi.
        reference: (rows, columns) of the grid in pre-training, to which the coordinates of other grids are scaled.
            None: not scaled.
        offset: coordinate of the first row and column.
        column_first: the first half follows the column (Perception Encoder), not the row.
    """

    frequencies: Tensor

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        reference: Sequence[int] | None = None,
        offset: float = 0.0,
        column_first: bool = False,
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"AxialRotaryEmbedding: head_dim must be divisible by 4, got {head_dim}")
        self.head_dim, self.base, self.offset, self.column_first = head_dim, base, offset, column_first
        self.reference = None if reference is None else tuple(reference)
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        steps = torch.arange(self.head_dim // 4, dtype=torch.float32, device="cpu")
        return {"frequencies": 1.0 / self.base ** (steps * (4.0 / self.head_dim))}

    def forward(self, grid: Sequence[int], prefix: int = 0) -> Tensor:
        """(prefix + rows * columns, 2, d), sines and cosines, float32; prefix tokens are not rotated."""
        axes = [torch.arange(n, dtype=torch.float32, device=self.frequencies.device) + self.offset for n in grid]
        if self.reference is not None:
            axes = [axis / n * wanted for axis, n, wanted in zip(axes, grid, self.reference, strict=True)]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # (N, 2)
        if self.column_first:
            coords = coords.flip(-1)
        angles = (coords[:, :, None] * self.frequencies).flatten(1)  # (N, d/2)
        angles = torch.cat((angles.new_zeros(prefix, angles.shape[1]), angles)).repeat_interleave(2, 1)
        return torch.stack((angles.sin(), angles.cos()), 1)
