"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels (Alpaydin and Kaynak, 1998), in 10 classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyvit.data.dataset import Data, TensorImages

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

_CAPTIONS = ("a handwritten {}", "the digit {}", "a photo of the number {}", "{}")


def digits(size: int = 32) -> Data:
    """Digits enlarged to ``size`` pixels, with three equal channels. Every fifth image of each class is held out: 1442
    for training, 355 held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data 'digits' comes with scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    labels = torch.from_numpy(source.target).long()
    images = torch.from_numpy(source.images).float()[:, None] * (255 / 16)
    images = (
        F.interpolate(images, (size, size), mode="bilinear", align_corners=False).round().clamp(0, 255).to(torch.uint8)
    )
    images = images.expand(-1, 3, -1, -1).contiguous()
    held = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for c in range(10):
        held[(labels == c).nonzero()[4::5, 0]] = True
    captions = [_CAPTIONS[i % len(_CAPTIONS)].format(NAMES[c]) for i, c in enumerate(labels.tolist())]

    def part(mask: torch.Tensor) -> TensorImages:
        return TensorImages(images[mask], labels[mask], [c for c, m in zip(captions, mask.tolist(), strict=True) if m])

    return Data("digits", part(~held), part(held), (size, size), NAMES, flip=False, mean=(0.3,) * 3, std=(0.35,) * 3)
