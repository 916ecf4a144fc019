"""Image transforms with parameters of their own for each image of a batch.

Images are (B, 3, H, W) floats in [0, 1], on any device; parameters are (B,) on the CPU. The formulas are those of
Pillow, as the papers' code calls them, without rounding to 8 bits in between. Libraries of transforms use one set of
parameters for a batch, or a loop over its images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: The luma of red, green and blue (ITU-R 601), as Pillow converts to "L".
LUMA = (0.299, 0.587, 0.114)

#: Images are transformed this many values at a time on a CPU, so that they stay in its cache.
_CHUNK = 2**18


def uniform(n: int, low: float, high: float) -> Tensor:
    """(n,) random numbers in [low, high), on the CPU: the same for every device of the images."""
    return torch.rand(n, dtype=torch.float32, device="cpu") * (high - low) + low


def chance(n: int, p: float) -> Tensor:
    """(n,) booleans that are true with probability ``p``."""
    return torch.rand(n, dtype=torch.float32, device="cpu") < p


def apply_to(images: Tensor, chosen: Tensor, transform: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Replace the images that are ``chosen`` (B,) by ``transform(images, *parameters)``, with their parameters."""
    rows = chosen.nonzero()[:, 0]
    size = max(_CHUNK // max(images[0].numel(), 1), 1) if images.device.type == "cpu" else max(len(rows), 1)
    for part in rows.split(size) if len(rows) else ():
        at = part.to(images.device)
        images[at] = transform(images[at], *(p[part] for p in parameters))


def _wide(parameter: Tensor, images: Tensor) -> Tensor:
    """(B,) parameters as (B, 1, 1, 1), with the images' dtype and device."""
    return parameter.to(images)[:, None, None, None]


def flip(images: Tensor) -> Tensor:
    return images.flip(3)


def grey(images: Tensor) -> Tensor:
    """The luma, (B, 1, H, W)."""
    red, green, blue = images.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _wide(factor, images)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from the mean luma times ``factor``."""
    mean = images.mean((2, 3)) @ images.new_tensor(LUMA)
    return torch.lerp(mean[:, None, None, None], images, _wide(factor, images)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from the grey image times ``factor``."""
    return torch.lerp(grey(images), images, _wide(factor, images)).clamp_(0, 1)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from a smoothed image times ``factor``; the outermost pixels are not smoothed."""
    c = images.shape[1]
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).div_(13).expand(c, 1, 3, 3)
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=c)
    return torch.lerp(smooth, images, _wide(factor, images)).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """The hue plus ``shift`` turns of the colour circle."""
    high, low = images.amax(1), images.amin(1)
    red, green, blue = images.unbind(1)
    chroma = high - low
    safe = chroma.clamp(min=1e-8)
    of_green = (blue - red).div_(safe).add_(2)
    sixth = torch.where(high == green, of_green, (red - green).div_(safe).add_(4))
    sixth = torch.where(high == red, (green - blue).div_(safe), sixth)  # the hue in sixths of a turn
    sixth += 6 * shift.to(images)[:, None, None]
    found = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        k = (sixth + offset).remainder_(6)
        found[:, channel] = high - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma)
    return found


def invert(images: Tensor) -> Tensor:
    return 1 - images


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values from ``threshold`` on."""
    return torch.where(images >= _wide(threshold, images), 1 - images, images)


def levels(images: Tensor) -> Tensor:
    """Values in [0, 1] as whole numbers of [0, 255]."""
    return (images * 255).round_()


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` of the 8 bits of each value."""
    step = 2 ** (8 - _wide(bits, images))
    return (levels(images) / step).floor_().mul_(step).div_(255)


def solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Add ``amount`` to values below 128 / 255."""
    return torch.where(images < 128 / 255, (images + _wide(amount, images)).clamp_(max=1), images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to [0, 1]."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-8), images)


def equalize(images: Tensor) -> Tensor:
    """Spread the levels of each channel so that all are about as frequent (Pillow's ``ImageOps.equalize``)."""
    b, c, h, w = images.shape
    level = levels(images).long().view(b * c, h * w)
    count = torch.zeros(b * c, 256, dtype=torch.int64, device=images.device).scatter_add_(
        1, level, torch.ones_like(level)
    )
    top = count.gather(1, (count > 0).long().mul_(torch.arange(256, device=images.device)).amax(1, keepdim=True))
    step = (h * w - top) // 255  # pixels per level, without those of the highest level
    below = count.cumsum(1) - count
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    same = torch.arange(256, device=images.device).expand_as(table)
    return torch.where(step > 0, table, same).gather(1, level).view_as(images).to(images.dtype) / 255


def gaussian_blur(images: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Blur with kernels of ``size`` pixels, an odd number; images are reflected at their borders."""
    b, c, h, w = images.shape
    at = torch.arange(size, device=images.device) - size // 2
    weights = torch.softmax(-at.square() / (2 * sigma.to(images).square()[:, None]), 1)  # (B, size)
    weights = weights.repeat_interleave(c, 0)[:, None, None]  # (B * C, 1, 1, size)
    found = F.pad(images.reshape(1, b * c, h, w), (size // 2,) * 4, mode="reflect")
    found = F.conv2d(F.conv2d(found, weights, groups=b * c), weights.mT, groups=b * c)
    return found.view_as(images)


def affine(images: Tensor, matrix: Tensor, fill: Sequence[float] | float = 0.0, mode: str = "bicubic") -> Tensor:
    """The pixel at (x, y) is that of the input at ``matrix @ (x, y, 1)``, in pixels from the upper left corner.

    matrix (B, 2, 3) on the CPU. Pixels from outside the image are ``fill``, one value or one per channel. ``mode``:
    "bicubic" or "bilinear".
    """
    b, _, h, w = images.shape
    (a, s, x), (d, e, y) = (row.unbind(1) for row in matrix.double().unbind(1))
    theta = [
        torch.stack([a, s * h / w, a + s * h / w + 2 * x / w - 1], 1),
        torch.stack([d * w / h, e, d * w / h + e + 2 * y / h - 1], 1),
    ]
    grid = F.affine_grid(torch.stack(theta, 1).to(images), [b, 1, h, w], align_corners=False)
    found = F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False).clamp_(0, 1)
    outside = grid.abs().amax(3) > 1
    colour = images.new_tensor(fill).view(1, -1, 1, 1)
    return torch.where(outside[:, None], colour, found)


def rotation(degrees: Tensor, size: Sequence[int]) -> Tensor:
    """Matrices (B, 2, 3) for :func:`affine` that turn images of ``size`` (height, width) counter-clockwise."""
    angle = degrees.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    h, w = size
    return torch.stack(
        [
            torch.stack([cos, -sin, w / 2 - cos * w / 2 + sin * h / 2], 1),
            torch.stack([sin, cos, h / 2 - sin * w / 2 - cos * h / 2], 1),
        ],
        1,
    )
