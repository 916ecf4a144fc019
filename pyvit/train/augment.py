"""The augmentations of the papers. The crops are cut by the data loader; the rest runs on whole batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.data.crops import Crop
from pyvit.train import transforms
from pyvit.train.transforms import apply_to, chance, uniform


class Augment(nn.Sequential):
    """Images (B, 3, H, W), uint8 or floats in [0, 1], to augmented floats in [0, 1].

    ``crop`` is the crop that the data loader cuts first, or None for whole images. Layers change the batch in place.
    Their random numbers are drawn on the CPU, for all images of the batch.
    """

    def __init__(self, *layers: nn.Module, crop: Crop | None = None) -> None:
        super().__init__(*layers)
        self.crop = crop

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images.clone()
        return super().forward(x).clamp_(0, 1)


class RandomHorizontalFlip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        apply_to(x, chance(len(x), 0.5), transforms.flip)
        return x


class RandomAffine(nn.Module):
    """A random rotation by up to ``degrees``, shift of up to a tenth of the side, scale in [0.9, 1.1] and horizontal
    shear by up to ``shear`` degrees. Black appears at the borders."""

    def __init__(self, degrees: float, shear: float = 0.0, p: float = 1.0) -> None:
        super().__init__()
        self.degrees, self.shear, self.p = degrees, shear, p

    def forward(self, x: Tensor) -> Tensor:
        n, (h, w) = len(x), x.shape[2:]
        chosen = chance(n, self.p)
        turn = transforms.rotation(uniform(n, -self.degrees, self.degrees), (h, w))
        size, slope = uniform(n, 0.9, 1.1).double(), uniform(n, -self.shear, self.shear).double().deg2rad().tan()
        zero, one = torch.zeros_like(size), torch.ones_like(size)
        # Relative to the centre: scale, shear and shift, and then the rotation about the centre.
        dx, dy = uniform(n, -0.1, 0.1).double() * w, uniform(n, -0.1, 0.1).double() * h
        rows = [
            torch.stack([1 / size, slope / size, w / 2 - (w / 2 + slope * h / 2) / size + dx], 1),
            torch.stack([zero, 1 / size, h / 2 - h / 2 / size + dy], 1),
            torch.stack([zero, zero, one], 1),
        ]
        apply_to(x, chosen, partial(transforms.affine, mode="bilinear"), turn @ torch.stack(rows, 1))
        return x


class ColorJitter(nn.Module):
    """Brightness, contrast, saturation and hue in random order, with probability ``p``, as torchvision's.

    Factors are uniform in [max(0, 1 - amount), 1 + amount]; the hue shifts by up to ``hue`` turns of the colour circle.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float = 0.0, p: float = 1.0) -> None:
        super().__init__()
        self.p = p
        amounts = (brightness, contrast, saturation)
        self.ranges = [*((max(0.0, 1 - amount), 1 + amount) for amount in amounts), (-hue, hue)]

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        chosen = chance(n, self.p)
        order = torch.rand(n, 4, dtype=torch.float32, device="cpu").argsort(1)
        functions = (transforms.brightness, transforms.contrast, transforms.saturation, transforms.hue)
        factors = [uniform(n, low, high) for low, high in self.ranges]
        for place in range(4):
            for at, function in enumerate(functions):
                if self.ranges[at][0] < self.ranges[at][1]:
                    apply_to(x, chosen & (order[:, place] == at), function, factors[at])
        return x


class RandomGrayscale(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        apply_to(x, chance(len(x), self.p), lambda images: transforms.grey(images).expand_as(images))
        return x


class RandomGaussianBlur(nn.Module):
    """A Gaussian blur of 0.1 to 2 pixels with probability ``p``. The kernel's side is a tenth of the image's."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        chosen, sigma = chance(len(x), self.p), uniform(len(x), 0.1, 2.0)
        kernel = max(int(0.1 * min(x.shape[2:])) // 2 * 2 + 1, 3)
        apply_to(x, chosen, partial(transforms.gaussian_blur, size=kernel), sigma)
        return x


class RandomSolarize(nn.Module):
    """Invert values from 128 / 255 on, with probability ``p``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        apply_to(x, chance(len(x), self.p), transforms.solarize, torch.full((len(x),), 128 / 255, device="cpu"))
        return x


class RandAugment(nn.Module):
    """Two random operations, each applied with probability 0.5: timm's "rand-m9-mstd0.5-inc1", which DeiT, Swin and MAE
    use.

    The magnitude of each is drawn from a normal distribution (9, 0.5) and cut to [0, 10]. Pixels from outside the image
    are ``fill``. Cubuk et al., "RandAugment" (2020).
    """

    def __init__(self, fill: tuple[float, ...]) -> None:
        super().__init__()
        self.fill = fill

    def operations(self) -> dict[str, tuple[Callable[..., Tensor] | None, Callable[..., Tensor]]]:
        """Name -> (parameter, function). The parameter is computed from the magnitudes in [0, 1], signs, and the
        images' (height, width)."""
        move = partial(transforms.affine, fill=self.fill)

        def factor(m: Tensor, sign: Tensor, size: Any) -> Tensor:
            return (1 + 0.9 * m * sign).clamp(min=0.1)

        def matrix(row: int, column: int, scale: Callable[..., float]) -> Callable[..., Tensor]:
            def of(m: Tensor, sign: Tensor, size: Any) -> Tensor:
                found = torch.eye(2, 3, dtype=torch.float64, device="cpu").repeat(len(m), 1, 1)
                found[:, row, column] = m.double() * sign * scale(size)
                return found

            return of

        return {
            "autocontrast": (None, transforms.autocontrast),
            "equalize": (None, transforms.equalize),
            "invert": (None, transforms.invert),
            "rotate": (lambda m, sign, size: transforms.rotation(30 * m * sign, size), move),
            "posterize": (lambda m, sign, size: 4 - (4 * m).floor(), transforms.posterize),
            "solarize": (lambda m, sign, size: (256 - (256 * m).floor()) / 255, transforms.solarize),
            "solarize_add": (lambda m, sign, size: (110 * m).floor() / 255, transforms.solarize_add),
            "color": (factor, transforms.saturation),
            "contrast": (factor, transforms.contrast),
            "brightness": (factor, transforms.brightness),
            "sharpness": (factor, transforms.sharpness),
            "shear_x": (matrix(0, 1, lambda size: 0.3), move),
            "shear_y": (matrix(1, 0, lambda size: 0.3), move),
            "translate_x": (matrix(0, 2, lambda size: 0.45 * size[1]), move),
            "translate_y": (matrix(1, 2, lambda size: 0.45 * size[0]), move),
        }

    def forward(self, x: Tensor) -> Tensor:
        n, size, table = len(x), x.shape[2:], self.operations()
        for _ in range(2):
            choice = torch.randint(len(table), (n,), device="cpu")
            chosen = chance(n, 0.5)
            magnitude = torch.randn(n, dtype=torch.float32, device="cpu").mul_(0.5).add_(9).clamp_(0, 10) / 10
            sign = 1 - 2 * chance(n, 0.5).float()
            for at, (parameter, function) in enumerate(table.values()):
                given = () if parameter is None else (parameter(magnitude, sign, size),)
                apply_to(x, chosen & (choice == at), function, *given)
        return x


def mild(flip: bool) -> Augment:
    """Small rotations, shifts and scalings, for small data sets whose classes a strong crop would confuse."""
    return Augment(RandomAffine(10.0, p=0.9), *_flip(flip))


def flips(flip: bool) -> Augment:
    """Random horizontal flips, if the data may be flipped."""
    return Augment(*_flip(flip))


def supervised(size: tuple[int, int], flip: bool, fill: tuple[float, ...]) -> Augment:
    """Random resized crop, flip and RandAugment, as DeiT, Swin and MAE's fine-tuning. :func:`erase` follows the
    normalisation."""
    return Augment(*_flip(flip), RandAugment(fill), crop=Crop(size, (0.08, 1.0)))


def mae(
    size: tuple[int, int],
    flip: bool,
    scale: tuple[float, float] = (0.2, 1.0),
    slant: float = 0.0,
    views: int | None = None,
) -> Augment:
    """Random resized crop and flip (He et al., 2022, appendix A.1)."""
    return Augment(*_turn_and_flip(flip, slant), crop=Crop(size, scale, count=views))


def simclr(
    size: tuple[int, int],
    flip: bool,
    scale: tuple[float, float] = (0.08, 1.0),
    strength: float = 1.0,
    slant: float = 0.0,
) -> Augment:
    """Two crops, flip, colour distortion, grey, blur (Chen et al., 2020, appendix A)."""
    s = strength
    layers = [
        *_turn_and_flip(flip, slant),
        ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        RandomGrayscale(0.2),
        RandomGaussianBlur(0.5),
    ]
    return Augment(*layers, crop=Crop(size, scale, count=2))


def dino(
    size: tuple[int, int],
    flip: bool,
    scale: tuple[float, float],
    blur: float,
    solarize: float,
    slant: float = 0.0,
    views: int | None = None,
) -> Augment:
    """Crop, flip, colour, grey, blur, solarisation (BYOL's, as DINO uses it)."""
    layers = [
        *_turn_and_flip(flip, slant),
        ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        RandomGrayscale(0.2),
        RandomGaussianBlur(blur),
        *([RandomSolarize(solarize)] if solarize else []),
    ]
    return Augment(*layers, crop=Crop(size, scale, count=views))


def _flip(flip: bool) -> list[nn.Module]:
    return [RandomHorizontalFlip()] if flip else []


def _turn_and_flip(flip: bool, slant: float = 0.0) -> list[nn.Module]:
    """Random rotation and shear by up to ``slant`` degrees with small shifts (none if 0), then a random horizontal
    flip."""
    return [*([RandomAffine(slant, slant)] if slant else []), *_flip(flip)]


class Spectrogram(Augment):
    """AST's augmentation: a shift by up to 10 frames, then a band of up to 3/8 of the frequencies and a band of up to
    3/16 of the time are set to ``fill``.

    Gong et al. (2021), section 3.1, after Park et al., "SpecAugment" (2019).
    """

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = super().forward(images)
        b, at = len(x), torch.arange(x.shape[3], device=x.device)
        moved = (at + torch.randint(-10, 11, (b, 1), device=x.device)) % len(at)
        x = x.gather(3, moved[:, None, None, :].expand_as(x))
        for dim, share in ((2, 3 / 8), (3, 3 / 16)):
            n = x.shape[dim]
            width = torch.rand(b, 1, device=x.device) * share * n
            start = torch.rand(b, 1, device=x.device) * (n - width)
            at = torch.arange(n, device=x.device)
            hidden = (at >= start) & (at < start + width)
            x = x.masked_fill(hidden[:, None, :, None] if dim == 2 else hidden[:, None, None, :], self.fill)
        return x


def erase(images: Tensor, p: float) -> Tensor:
    """With probability ``p``, replace a box of a normalised image by normal noise (Zhong et al., 2020, as timm's mode
    "pixel").

    The box has 2 to 33 % of the area and an aspect ratio in [0.3, 1 / 0.3]. After ten attempts to draw one that fits,
    the image is left as it is.
    """
    (b, _, h, w), tries = images.shape, 10
    area = uniform(b * tries, 0.02, 1 / 3).view(b, tries) * h * w
    ratio = uniform(b * tries, math.log(0.3), -math.log(0.3)).view(b, tries).exp()
    height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (height < h) & (width < w)
    first = fits.int().argmax(1, keepdim=True)
    height, width = height.gather(1, first)[:, 0], width.gather(1, first)[:, 0]
    top = (uniform(b, 0, 1) * (h - height + 1)).floor()
    left = (uniform(b, 0, 1) * (w - width + 1)).floor()
    boxes = torch.stack([top, top + height, left, left + width], 1)
    images = images.clone()
    apply_to(images, chance(b, p) & fits.any(1), _noise, boxes)
    return images


def _noise(images: Tensor, boxes: Tensor) -> Tensor:
    """Standard normal noise in ``boxes`` (B, 4), each (top, bottom, left, right)."""
    top, bottom, left, right = boxes.to(images)[:, :, None].unbind(1)  # (B, 1) each
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[2:])
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    return torch.where(inside[:, None], torch.randn_like(images), images)


def mixup(images: Tensor, targets: Tensor, mixup_alpha: float, cutmix_alpha: float) -> tuple[Tensor, Tensor]:
    """Mix each image with another one of the batch, by pixel (mixup) or by a box (CutMix); each half of the time if
    both are enabled. The other image is that of the reversed batch, and all images have the same weights.

    targets (B, classes) are mixed with these weights, for a box with its share of the pixels. Zhang et al., "mixup"
    (2018); Yun et al., "CutMix" (2019).
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    box = cutmix_alpha > 0 and (not mixup_alpha or bool(chance(1, 0.5)))
    alpha = torch.tensor(cutmix_alpha if box else mixup_alpha, dtype=torch.float64, device="cpu")
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = images.flip(0)
    if not box:
        return images.mul(share).add(other, alpha=1 - share), targets.mul(share).add(targets.flip(0), alpha=1 - share)
    (top, bottom), (left, right) = (_span(n, (1 - share) ** 0.5) for n in images.shape[2:])
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    return mixed, targets.mul(kept).add(targets.flip(0), alpha=1 - kept)


def _span(n: int, share: float) -> tuple[int, int]:
    """A part of ``share`` of n pixels around a random pixel, cut at the border."""
    length, centre = int(n * share), int(torch.randint(n, (), device="cpu"))
    return max(centre - length // 2, 0), min(centre + (length + 1) // 2, n)
