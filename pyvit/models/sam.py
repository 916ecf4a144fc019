"""SAM's image encoder. Kirillov et al., "Segment Anything" (2023): a ViTDet with one neck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.models.detection import ChannelNorm, ViTDet
from pyvit.models.registry import register
from pyvit.models.vit import SIZES
from pyvit.nn import resample_positions


class SamEncoder(ViTDet):
    """Images (B, C, H, W) to one map (B, out_channels, H/16, W/16), with timm's parameter names.

    Args:
        img_size: for the absolute positions and for the relative positions of global blocks; both are resampled for
            other sizes.
        out_channels: of the neck, two convolutions with norms; 0 for none, and maps of the blocks' width.
        settings: of :class:`~pyvit.models.detection.ViTDet`.
    """

    def __init__(self, img_size: int | Sequence[int] = 1024, *, out_channels: int = 256, **settings: Any) -> None:
        super().__init__(img_size, img_size, **settings)
        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid, self.embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.neck: nn.Module = nn.Identity()
        if out_channels:
            self.neck = nn.Sequential(
                nn.Conv2d(self.embed_dim, out_channels, 1, bias=False),
                ChannelNorm(out_channels, 1e-6),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelNorm(out_channels, 1e-6),
            )

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Positions of the patches of a grid (N, D)."""
        return resample_positions(self.pos_embed[0].flatten(0, 1), self.grid, grid, antialias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(super().forward(images))  # type: ignore[no-any-return]


for _size in ("base", "large", "huge"):
    register(f"samvit_{_size}_patch16", SamEncoder, **SIZES[_size])
