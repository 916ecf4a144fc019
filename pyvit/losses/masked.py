"""MAE's reconstruction loss (He et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to (B, N, patch * patch * C), pixels of a patch in row-major order, channels last."""
    b, c, h, w = images.shape
    if h % patch or w % patch:
        raise ValueError(f"patchify: images must have sides that divide by {patch}, got {h} x {w}")
    x = images.view(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`: (B, N, patch * patch * C) to (B, C, H, W)."""
    b, _, width = patches.shape
    x = patches.view(b, *grid, patch, patch, width // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, grid[0] * patch, grid[1] * patch)


def masked_pixel_loss(predicted: Tensor, images: Tensor, mask: Tensor, patch: int, norm_pix: bool = True) -> Tensor:
    """Mean squared error of the masked patches.

    Args:
        predicted: (B, N, patch * patch * C). images: (B, C, H, W), normalised as the network's input.
        mask: (B, N), nonzero where masked. norm_pix: normalise each target patch (unbiased variance + 1e-6).
    """
    target = patchify(images, patch)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (predicted.to(torch.promote_types(predicted.dtype, torch.float32)) - target).square().mean(-1)
    weight = mask.to(error.dtype)
    return (error * weight).sum() / weight.sum()
