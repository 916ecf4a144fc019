"""The augmentations of the papers, with kornia. The crops are cut by the data loader; the rest runs on whole
batches."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.data.crops import Crop


def _kornia() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import kornia.augmentation as augmentation
    except ImportError as error:
        raise ImportError("augmentation needs kornia: pip install 'pyvit-kernels[train]'") from error
    return augmentation


class Augment(nn.Sequential):
    """Images (B, 3, H, W), uint8 or floats in [0, 1], to augmented floats in [0, 1].

    ``crop`` is the crop that the data loader cuts first, or None for whole images.
    """

    def __init__(self, *layers: nn.Module, crop: Crop | None = None) -> None:
        super().__init__(*layers)
        self.crop = crop

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        return super().forward(x).clamp(0, 1)


def _turn_and_flip(flip: bool, slant: float = 0.0) -> list[nn.Module]:
    """Random rotation and shear by up to ``slant`` degrees with small shifts (none if 0), then a random horizontal
    flip."""
    k = _kornia()
    turn = [k.RandomAffine(degrees=slant, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=slant)] if slant else []
    return [*turn, *([k.RandomHorizontalFlip()] if flip else [])]


def mild(flip: bool) -> Augment:
    """Small rotations, shifts and scalings, for small data sets whose classes a strong crop would confuse."""
    k = _kornia()
    layers: list[nn.Module] = [k.RandomAffine(degrees=10.0, translate=(0.1, 0.1), scale=(0.9, 1.1), p=0.9)]
    return Augment(*layers, *([k.RandomHorizontalFlip()] if flip else []))


def supervised(size: tuple[int, int], flip: bool) -> Augment:
    """Random resized crop, flip, colour jitter and erasing, as Swin and DeiT; colour jitter replaces RandAugment."""
    k = _kornia()
    layers = [*_turn_and_flip(flip), k.ColorJitter(0.4, 0.4, 0.4, p=0.8), k.RandomErasing(p=0.25)]
    return Augment(*layers, crop=Crop(size, (0.08, 1.0)))


def mae(
    size: tuple[int, int],
    flip: bool,
    scale: tuple[float, float] = (0.2, 1.0),
    slant: float = 0.0,
    views: int | None = None,
) -> Augment:
    """Random resized crop and flip (He et al., 2022, appendix A.1)."""
    return Augment(*_turn_and_flip(flip, slant), crop=Crop(size, scale, count=views))


def _blur(size: tuple[int, int], p: float) -> nn.Module:
    kernel = max(int(0.1 * min(size)) // 2 * 2 + 1, 3)
    return _kornia().RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=p)


def simclr(
    size: tuple[int, int],
    flip: bool,
    scale: tuple[float, float] = (0.08, 1.0),
    strength: float = 1.0,
    slant: float = 0.0,
) -> Augment:
    """Two crops, flip, colour distortion, grey, blur (Chen et al., 2020, appendix A)."""
    k, s = _kornia(), strength
    jitter = k.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
    layers = [*_turn_and_flip(flip, slant), jitter, k.RandomGrayscale(p=0.2), _blur(size, 0.5)]
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
    k = _kornia()
    layers = [
        *_turn_and_flip(flip, slant),
        k.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        k.RandomGrayscale(p=0.2),
        _blur(size, blur),
    ]
    return Augment(
        *layers, *([k.RandomSolarize(0.0, 0.0, p=solarize)] if solarize else []), crop=Crop(size, scale, count=views)
    )


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


def mixup(images: Tensor, targets: Tensor, mixup_alpha: float, cutmix_alpha: float) -> tuple[Tensor, Tensor]:
    """Mix each image with another one of the batch, by pixel (mixup) or by a box (CutMix); each half of the time if
    both are enabled. The other image is that of the reversed batch.

    targets (B, classes) are mixed with the same weights. Zhang et al., "mixup" (2018); Yun et al., "CutMix" (2019).
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    box = cutmix_alpha > 0 and (not mixup_alpha or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(cutmix_alpha if box else mixup_alpha)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = images.flip(0)
    if not box:
        return images.mul(share).add(other, alpha=1 - share), targets.mul(share).add(targets.flip(0), alpha=1 - share)
    h, w = images.shape[2:]
    bh, bw = int(h * (1 - share) ** 0.5), int(w * (1 - share) ** 0.5)
    top, left = int(torch.randint(0, h - bh + 1, ())), int(torch.randint(0, w - bw + 1, ()))
    mixed = images.clone()
    mixed[:, :, top : top + bh, left : left + bw] = other[:, :, top : top + bh, left : left + bw]
    kept = 1 - bh * bw / (h * w)
    return mixed, targets.mul(kept).add(targets.flip(0), alpha=1 - kept)
