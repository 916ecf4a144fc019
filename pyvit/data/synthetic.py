"""Random images, for timing and for trying out commands."""

from __future__ import annotations

import torch

from pyvit.data.dataset import Data, TensorImages


def synthetic(size: int = 224, count: int = 512, classes: int = 10, seed: int = 0) -> Data:
    """``count`` images of uniform noise with random labels and captions, and a quarter as many held out."""
    generator = torch.Generator().manual_seed(seed)

    def part(n: int) -> TensorImages:
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator, device="cpu")
        labels = torch.randint(0, classes, (n,), generator=generator, device="cpu")
        return TensorImages(images, labels, [f"noise of kind {c}" for c in labels.tolist()])

    return Data("synthetic", part(count), part(max(count // 4, 1)), (size, size), [f"kind {c}" for c in range(classes)])
