"""SigLIP 2 for images of any size and aspect ratio (NaFlex).

Tschannen et al., "SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic Understanding, Localization,
and Dense Features" (2025), section 2.4.2; after Dehghani et al., "Patch n' Pack" (2023), and Beyer et al., "FlexiViT"
(2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit.models.clip import SO400M, siglip_vit
from pyvit.models.registry import register
from pyvit.models.vit import SIZES, VisionTransformer
from pyvit.nn import Packing
from pyvit.ops import linear


class PatchSequences(NamedTuple):
    """Images as padded sequences of patches, as transformers' and timm's processors give them.

    values: (B, L, ph * pw * C), pixels of a patch by row, column and channel; image b has its first rows * columns
    patches in row-major order, and the rest is ignored. sizes: (B, 2), rows and columns of each image.
    """

    values: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, images: Sequence[Tensor], patch_size: Sequence[int]) -> PatchSequences:
        """The patches of images (C, H, W), each a multiple of the patch size (ph, pw)."""
        ph, pw = patch_size
        grids = [(image.shape[1] // ph, image.shape[2] // pw) for image in images]
        for image, (rows, columns) in zip(images, grids, strict=True):
            if (rows * ph, columns * pw) != tuple(image.shape[1:]) or not rows * columns:
                raise ValueError(
                    f"PatchSequences: height and width of images must be multiples of {ph} and {pw}, got "
                    f"{tuple(image.shape)}"
                )
        values = images[0].new_zeros(len(images), max(r * c for r, c in grids), ph * pw * images[0].shape[0])
        for row, image, (rows, columns) in zip(values, images, grids, strict=True):
            patches = image.unflatten(2, (columns, pw)).unflatten(1, (rows, ph))  # (C, rows, ph, columns, pw)
            row[: rows * columns] = patches.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        return cls(values, torch.tensor(grids, device=values.device))


def naflex_size(size: Sequence[int], patch_size: int = 16, max_patches: int = 256) -> tuple[int, int]:
    """Height and width to which an image of ``size`` (H, W) is resized: multiples of the patch size with nearly its
    aspect ratio, and as many patches as possible up to ``max_patches``."""
    if max_patches < 1:
        raise ValueError(f"naflex_size: max_patches must be at least 1, got {max_patches}")

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (max(math.ceil(n * scale / patch_size), 1) for n in size)
        return rows, columns

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        low, high = (middle, high) if rows * columns <= max_patches else (low, middle)
    rows, columns = grid(low)
    return rows * patch_size, columns * patch_size


class NaFlexVisionTransformer(VisionTransformer):
    """A ViT on images of different sizes at once: to (B, D), or logits (B, num_classes).

    Images of one size (B, C, H, W) are computed as by :class:`VisionTransformer`. A list of images (C, H, W) and
    :class:`PatchSequences` are computed as packed sequences, so that padding costs nothing in any layer. Positions are
    resampled bilinearly with antialiasing to the grid of each image.

    ``img_size`` determines the grid of learned positions; the other arguments are those of
    :class:`~pyvit.models.vit.VisionTransformer`.
    """

    naflex = True  # metadata of its checkpoints

    def __init__(self, img_size: int | Sequence[int] = 256, **settings: Any) -> None:
        super().__init__(img_size, **settings)
        self.interpolation |= {"mode": "bilinear"}  # type: ignore[dict-item]
        if self.num_prefix_tokens or self.rope is not None or self.global_pool not in ("map", "avg"):
            raise ValueError(
                "NaFlexVisionTransformer: class_token=False, learned positions and global_pool 'map' or 'avg' are "
                "supported"
            )

    def embed_packed(self, patches: PatchSequences) -> tuple[Tensor, Packing]:
        """Tokens (T, D) of all images, one after another, and their packing."""
        values, sizes = patches
        ph, pw = self.patch_embed.patch_size
        if values.dim() != 3 or values.shape[2] != ph * pw * self.patch_embed.in_chans:
            raise ValueError(
                f"NaFlexVisionTransformer: values must be (B, L, {ph * pw * self.patch_embed.in_chans}), got "
                f"{tuple(values.shape)}"
            )
        if sizes.shape != (values.shape[0], 2):
            raise ValueError(f"NaFlexVisionTransformer: sizes must be ({values.shape[0]}, 2), got {tuple(sizes.shape)}")
        grids = [(int(rows), int(columns)) for rows, columns in sizes.tolist()]
        lengths = [rows * columns for rows, columns in grids]
        if min(lengths, default=1) < 1 or max(lengths, default=0) > values.shape[1]:
            raise ValueError(
                f"NaFlexVisionTransformer: sizes must have 1 to {values.shape[1]} patches per image, got {grids}"
            )
        x = torch.cat([row[:n] for row, n in zip(values, lengths, strict=True)])  # (T, ph * pw * C)
        weight, bias = self.patch_embed.proj.weight, self.patch_embed.proj.bias
        tokens = linear(x.to(weight.dtype), weight.permute(0, 2, 3, 1).flatten(1), bias)
        resampled = {grid: self.positions(grid)[0] for grid in dict.fromkeys(grids)}
        return tokens + torch.cat([resampled[grid] for grid in grids]), Packing.of(lengths, x.device)  # type: ignore[misc]

    def features_packed(self, patches: PatchSequences) -> tuple[Tensor, Packing]:
        """Normalised tokens (T, D) of all images, one after another, and their packing."""
        x, packing = self.embed_packed(patches)
        x = self.norm_pre(self.pos_drop(x))
        for block in self.blocks:
            x = self.run_block(block, x, packing=packing)
        return self.norm(x), packing

    def pool_packed(self, x: Tensor, packing: Packing) -> Tensor:
        """Tokens (T, D) to one vector per image (B, D)."""
        if self.attn_pool is not None:
            return self.attn_pool(x, packing)
        return torch.stack([tokens.mean(0) for tokens in x.split(packing.lengths)])

    def forward(self, images: Tensor | Sequence[Tensor] | PatchSequences) -> Tensor:
        if isinstance(images, Tensor):
            return super().forward(images)
        if not isinstance(images, PatchSequences):
            images = PatchSequences.of(images, self.patch_embed.patch_size)
        x = self.pool_packed(*self.features_packed(images))
        return self.head(self.head_drop(self.fc_norm(x)))


_SIGLIP2: dict[str, Any] = {"vocab_size": 256000, "img_size": 256, "patch_size": 16, "tower": NaFlexVisionTransformer}
register("siglip2_vit_base_patch16_naflex", siglip_vit, **_SIGLIP2)
register("siglip2_so400m_patch16_naflex", siglip_vit, **{**SO400M, **_SIGLIP2})

# The image towers, under timm's names.
_TOWER: dict[str, Any] = {"num_classes": 0, "class_token": False, "global_pool": "map", "activation": "gelu_tanh"}
_TOWERS: dict[str, dict[str, Any]] = {
    "base": SIZES["base"],
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": SO400M["mlp_ratio"]},
}
for _size, _settings in _TOWERS.items():
    register(f"naflexvit_{_size}_patch16_siglip", NaFlexVisionTransformer, **_TOWER, **_settings)
