"""Inputs of the benchmarks: tokens of photographs, and random tensors.

The photographs are scikit-learn's ``china.jpg`` and ``flower.jpg``. Tokens are made as in a model: patches, a linear
embedding, LayerNorm and the qkv projection. Queries, keys and values are strided views of that projection.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SOURCES = ("photos", "random")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """scikit-learn's two sample photographs, uint8 (3, 427, 640)."""
    from sklearn.datasets import load_sample_images

    return tuple(
        torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in load_sample_images().images
    )


def pixels(source: str, batch: int, size: int, seed: int = 0) -> Tensor:
    """uint8 images (batch, 3, size, size): random crops of the photographs, flipped half of the time, or
    uniform noise."""
    rng = torch.Generator().manual_seed(seed)
    if source == "random":
        return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=rng)
    crops = []
    for i in range(batch):
        photo = photographs()[i % 2]
        side = min(photo.shape[1:])
        crop = side if size >= side else int(torch.randint(size, side + 1, (), generator=rng))
        top, left = (int(torch.randint(0, n - crop + 1, (), generator=rng)) for n in photo.shape[1:])
        image = photo[:, top : top + crop, left : left + crop]
        if torch.rand((), generator=rng) < 0.5:
            image = image.flip(-1)
        resized = F.interpolate(image[None].float(), size=(size, size), mode="bilinear", antialias=True)
        crops.append(resized.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(crops)


def normalised(images: Tensor) -> Tensor:
    """uint8 images to float32, normalised with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(c, device=images.device)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255.0 - mean) / std


def tokens(source: str, batch: int, grid: int, width: int, seed: int = 0, patch: int = 16) -> Tensor:
    """Normalised tokens (batch, grid * grid, width), the input of a transformer's first projection."""
    rng = torch.Generator().manual_seed(seed + 1)
    if source == "random":
        return torch.randn(batch, grid * grid, width, generator=rng)
    images = normalised(pixels(source, batch, grid * patch, seed))
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2)  # (B, N, 3 * patch * patch)
    embed = torch.randn(width, patches.shape[-1], generator=rng) / math.sqrt(patches.shape[-1])
    position = torch.randn(grid * grid, width, generator=rng) * 0.2
    return F.layer_norm(patches @ embed.T + position, (width,))


def projected_qkv(source: str, batch: int, length: int, width: int, seed: int = 0) -> Tensor:
    """qkv projection (batch, length, 3 * width) of the largest square grid of patches and as many prefix tokens as
    remain of ``length``."""
    rng = torch.Generator().manual_seed(seed + 2)
    grid = math.isqrt(length)
    x = tokens(source, batch, grid, width, seed)
    prefix = torch.randn(length - grid * grid, width, generator=rng).expand(batch, -1, -1)
    weight = torch.randn(3 * width, width, generator=rng) / math.sqrt(width)
    return torch.cat([prefix, x], 1) @ weight.T


def window_qkv(source: str, batch: int, side: int, width: int, seed: int = 0) -> Tensor:
    """qkv projection (batch, side, side, 3 * width) of a feature map whose tokens cover 224 / side pixels."""
    rng = torch.Generator().manual_seed(seed + 3)
    x = tokens(source, batch, side, width, seed, patch=max(224 // side, 1)).view(batch, side, side, width)
    weight = torch.randn(3 * width, width, generator=rng) / math.sqrt(width)
    return x @ weight.T
