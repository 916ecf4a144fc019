"""The image encoders of SAM, a ViTDet with a neck, and of SAM 2, a Hiera with a feature pyramid.

Kirillov et al., "Segment Anything" (2023); Ravi et al., "SAM 2: Segment Anything in Images and Videos" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.models.detection import ChannelNorm, ViTDet
from pyvit.models.hiera import Hiera
from pyvit.models.metadata import WithMetadata
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


class HieraDet(Hiera):
    """Hiera with windows in all stages but for a few global blocks: images (B, C, H, W) to logits, with timm's names.

    Maps that do not divide by the window are padded. Arguments as of :class:`~pyvit.models.hiera.Hiera`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 1024,
        *,
        window_sizes: Sequence[int] = (8, 4, 14, 7),
        global_pos_size: Sequence[int] = (7, 7),
        **settings: Any,
    ) -> None:
        super().__init__(img_size, window_sizes=window_sizes, global_pos_size=global_pos_size, **settings)
        self.pos_embed_window = self.pos_embed_win
        self.pos_embed_win = None

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Positions of a grid (N, D)."""
        return self.resample(self.pos_embed_window, grid, antialias=False)  # type: ignore[arg-type]

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {"pos_embed", "pos_embed_window"}


class Sam2Neck(nn.Module):
    """The maps of four stages to three of ``out_channels`` channels; the coarsest is added to the one before it."""

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in reversed(channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        coarsest, third, *finer = (conv(x) for conv, x in zip(self.convs, reversed(maps), strict=True))
        third = third + F.interpolate(coarsest, size=third.shape[2:], mode="nearest")
        return [*reversed(finer), third]


class Sam2Encoder(WithMetadata):
    """Images (B, C, H, W) to three maps (B, out_channels, ...) at strides 4, 8 and 16. H and W: multiples of 32.

    Args:
        out_channels: of the maps.
        settings: of :class:`HieraDet`.
    """

    def __init__(self, *, out_channels: int = 256, **settings: Any) -> None:
        super().__init__()
        self.trunk = HieraDet(**settings, num_classes=0)
        self.trunk.head = nn.Identity()  # type: ignore[assignment]
        width = self.trunk.embed_dim
        self.neck = Sam2Neck([width // 8, width // 4, width // 2, width], out_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.trunk.forward_pyramid(images))  # type: ignore[no-any-return]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass."""
        return self.trunk.example_inputs(batch)


_SAM2: dict[str, dict[str, Any]] = {
    "tiny": {"stages": (1, 2, 7, 2), "global_blocks": (5, 7, 9)},
    "small": {"stages": (1, 2, 11, 2), "global_blocks": (7, 10, 13)},
    "base_plus": {
        "embed_dim": 112,
        "num_heads": 2,
        "stages": (2, 3, 16, 3),
        "global_blocks": (12, 16, 20),
        "global_pos_size": (14, 14),
    },
    "large": {
        "embed_dim": 144,
        "num_heads": 2,
        "stages": (2, 6, 36, 4),
        "global_blocks": (23, 33, 43),
        "window_sizes": (8, 4, 16, 8),
    },
}
for _size, _settings in _SAM2.items():
    register(f"sam2_hiera_{_size}", HieraDet, **_settings, num_classes=0)
    register(f"sam2_encoder_hiera_{_size}", Sam2Encoder, **_settings)
