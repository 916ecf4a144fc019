"""Random resized crops: their boxes, and cutting them out of tensors. :mod:`pyvit.data.decode` cuts them out of
files."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: (left, top, right, bottom) in pixels.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Crop:
    """A random part of the whole image, resized to ``size`` (Szegedy et al., 2015, section 6).

    Args:
        size: (height, width) of the crop.
        scale: smallest and largest share of the image's area; (1, 1) is the largest centred crop, without randomness.
        ratio: smallest and largest factor on the crop's own width / height.
        count: None for one crop of each image, (B, C, h, w); else the number of crops, (count, B, C, h, w).
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    count: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"crop: scale must be 0 < smallest <= largest <= 1, shares of the image's area, got {self.scale}"
            )

    def boxes(self, width: int, height: int, draw: random.Random) -> list[Box]:
        """One box for each crop of an image of ``width`` x ``height`` pixels."""
        return [self._box(width, height, draw) for _ in range(1 if self.count is None else self.count)]

    def _box(self, width: int, height: int, draw: random.Random) -> Box:
        if self.scale[0] >= 1:
            return centre_box(width, height, self.size)
        shape = self.size[1] / self.size[0]
        for _ in range(10):
            area = width * height * draw.uniform(*self.scale)
            ratio = shape * math.exp(draw.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = draw.randint(0, width - w), draw.randint(0, height - h)
                return left, top, left + w, top + h
        # No box of these ratios fits into a long image: use the largest centred one with the nearest ratio.
        nearest = min(max(width / height, shape * self.ratio[0]), shape * self.ratio[1])
        return centre_box(width, height, (1, nearest))


def centre_box(width: int, height: int, shape: tuple[float, float], ratio: float = 1.0) -> Box:
    """The largest centred box of the aspect ratio of ``shape`` (height, width), with its sides times ``ratio``."""
    w = min(width, height * shape[1] / shape[0]) * ratio
    h = w * shape[0] / shape[1]
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def generator(seed: int, *place: int) -> random.Random:
    """A random number generator for one image at one step, the same in every process."""
    return random.Random(",".join(map(str, (seed, *place))))


def crop_images(images: Tensor, crops: Mapping[str, Crop], draws: Sequence[random.Random]) -> dict[str, Tensor]:
    """Crops of whole images (B, C, H, W), in their dtype. Image i uses the generator ``draws[i]``."""
    height, width = images.shape[2:]
    views = {}
    boxes = [[crop.boxes(width, height, draw) for crop in crops.values()] for draw in draws]
    for at, (name, crop) in enumerate(crops.items()):
        drawn = [[each[at][n] for each in boxes] for n in range(1 if crop.count is None else crop.count)]
        cut = [
            crop_resize(images, torch.tensor(b, dtype=torch.float32, device=images.device), crop.size) for b in drawn
        ]
        empty = images.new_empty(0, len(images), images.shape[1], *crop.size)
        views[name] = cut[0] if crop.count is None else torch.stack(cut) if cut else empty
    return views


def crop_resize(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) of images (B, C, H, W), resized to (B, C, *size): bicubic and antialiased, as Pillow's
    ``resize(box=...)``."""
    rows = _weights(boxes[:, 1], boxes[:, 3], images.shape[2], size[0])[:, None]  # (B, 1, h, H)
    columns = _weights(boxes[:, 0], boxes[:, 2], images.shape[3], size[1])[:, None]  # (B, 1, w, W)
    found = rows @ images.float() @ columns.mT
    return found.round_().clamp_(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else found


def _weights(low: Tensor, high: Tensor, length: int, out: int) -> Tensor:
    """Bicubic weights (B, out, length) that resample [low, high] of an axis. The kernel is widened for downsampling."""
    step = ((high - low) / out)[:, None, None]
    centres = low[:, None, None] + (torch.arange(out, device=low.device)[:, None] + 0.5) * step
    x = ((torch.arange(length, device=low.device) + 0.5 - centres) / step.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys' kernel, a = -1/2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(2, keepdim=True)
