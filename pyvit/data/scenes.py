"""Drawn scenes with captions: coloured shapes at named positions, for testing retrieval and localisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyvit.data.dataset import Data, TensorImages

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 210, 40),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")


def scenes(size: int = 64, count: int = 4000, seed: int = 0) -> Data:
    """Two different objects in two of four quadrants, such as "a red circle in the top left and a blue square in the
    bottom right".

    One in ten scenes is held out. ``data.extra["parts"]`` lists, for each held-out scene, (phrase, quadrant) of both
    objects.
    """
    generator = torch.Generator().manual_seed(seed)
    held = max(count // 10, 1)
    images, captions, parts = [], [], []
    for _ in range(count + held):
        image, caption, objects = _draw(size, generator)
        images.append(image)
        captions.append(caption)
        parts.append(objects)
    stack = torch.stack(images)
    train, test = (
        TensorImages(stack[held:], captions=captions[held:]),
        TensorImages(stack[:held], captions=captions[:held]),
    )
    return Data(
        "scenes", train, test, (size, size), flip=False, mean=(0.3,) * 3, std=(0.25,) * 3, extra={"parts": parts[:held]}
    )


def _draw(size: int, generator: torch.Generator) -> tuple[Tensor, str, list[tuple[str, int]]]:
    def pick(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator, device="cpu"))

    canvas = torch.rand(3, 1, 1, generator=generator, dtype=torch.float32, device="cpu") * 60 + 10
    image = (
        canvas.expand(3, size, size)
        + torch.randn(3, size, size, generator=generator, dtype=torch.float32, device="cpu") * 8
    )
    quarters = torch.randperm(4, generator=generator, device="cpu")[:2].sort().values.tolist()
    kinds = torch.randperm(len(COLORS) * len(SHAPES), generator=generator, device="cpu")[:2].tolist()
    phrases, objects = [], []
    for quarter, kind in zip(quarters, kinds, strict=True):
        color, shape = list(COLORS)[kind % len(COLORS)], SHAPES[kind // len(COLORS)]
        half = size / 2
        radius = half * (0.28 + 0.12 * pick(100) / 100)
        center = [half * (0.5 + (pick(100) / 100 - 0.5) * 0.2) + half * q for q in (quarter // 2, quarter % 2)]
        inside = _inside(shape, size, center, radius)
        image = torch.where(inside, torch.tensor(COLORS[color], dtype=image.dtype, device="cpu")[:, None, None], image)
        phrases.append(f"a {color} {shape} in the {PLACES[quarter]}")
        objects.append((f"a {color} {shape}", quarter))
    if pick(2):
        phrases.reverse()
    return image.round().clamp(0, 255).to(torch.uint8), " and ".join(phrases), objects


def _inside(shape: str, size: int, center: list[float], radius: float) -> Tensor:
    y = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5 - center[0])[:, None] / radius
    x = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5 - center[1])[None, :] / radius
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) <= 0.85
    if shape == "triangle":
        return (y <= 0.7) & (y >= -1 + math.sqrt(3) * x.abs())
    return (torch.minimum(x.abs(), y.abs()) <= 0.3) & (torch.maximum(x.abs(), y.abs()) <= 1)
