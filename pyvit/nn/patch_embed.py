"""Images to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.nn.constants import Constants
from pyvit.ops import patch_embed
from pyvit.ops.patch_embed import grid_size


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """An int or a pair of ints as (height, width)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class PatchEmbed(Constants):
    """Images (B, C, H, W), floating or uint8, to tokens (B, P + N, D), on :func:`pyvit.ops.patch_embed`.

    Args:
        patch_size, in_chans, embed_dim, bias: of the projection, held as the convolution ``proj`` (whose forward is not
            used).
        stride: smaller than the patch for overlapping patches (AST).
        norm_layer: applied to the patch tokens (Swin).
        pad: zero-pad the bottom and right of images that do not divide by the patch, instead of refusing them.
        mean, std: per channel, of pixels in 0..1: normalise inside the projection, so that uint8 images can be given as
            they are.
    """

    def __init__(
        self,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        stride: int | Sequence[int] | None = None,
        bias: bool = True,
        norm_layer: type[nn.Module] | None = None,
        pad: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = pair(patch_size)
        self.stride = self.patch_size if stride is None else pair(stride)
        self.pad, self.in_chans = pad, in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)
        self.pixels = {name: tuple(values) for name, values in (("mean", mean), ("std", std)) if values is not None}
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        return {name: torch.tensor(values, dtype=torch.float32, device="cpu") for name, values in self.pixels.items()}

    @property
    def multiple(self) -> int:
        """Pixels that the height of images must be a multiple of."""
        return self.patch_size[0]

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of (H, W) pixels."""
        h, w = (-(-n // p) * p if self.pad else n for n, p in zip(size, self.patch_size, strict=True))
        return grid_size((h, w), self.patch_size, self.stride)

    def forward(
        self,
        images: Tensor,
        *,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """pos_embed (N, D), prefix (P, D), keep (B, K): as in :func:`pyvit.ops.patch_embed`."""
        if self.pad:
            (ph, pw), (h, w) = self.patch_size, images.shape[2:]
            if h % ph or w % pw:
                images = F.pad(images, (0, -w % pw, 0, -h % ph))
        x = patch_embed(
            images,
            self.proj.weight,
            self.proj.bias,
            stride=self.stride,
            pos_embed=pos_embed,
            prefix=prefix,
            keep=keep,
            mean=None if self.mean is None else self.mean.float(),
            std=None if self.std is None else self.std.float(),
        )
        # Under autocast the product is in its dtype; the residual stream stays in the parameters', or sums over tokens
        # lose their bits.
        x = x.to(self.proj.weight.dtype)
        return x if self.norm is None else self.norm(x)
