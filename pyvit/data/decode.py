"""Decoding of images and audio: a file gives the same pixels from a folder, a table and a stream."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyvit.data.audio import BANDS, read_wave, spectrogram
from pyvit.data.crops import Box, Crop, centre_box, crop_images

#: Evaluation uses this share of the side of an image's largest centred square (He et al., 2016: 224 of 256).
CENTRE = 0.875

#: A JPEG is decoded at a half, a quarter or an eighth of its size if at least this many source pixels per output pixel
#: are left along each side. The result then agrees with a full decoding to 43 dB (PSNR) and better, on photographs at
#: quality 88: to 35 to 39 dB with 1, while 2 would decode photographs of one megapixel in full for 224 pixels.
_SPARE = 1.5


def open_image(source: Any) -> AbstractContextManager[Any]:
    """Open a path, bytes, a ``datasets`` record {"bytes": ..., "path": ...} or a PIL image. Files opened here are
    closed afterwards."""
    from PIL import Image

    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise ValueError("there is no image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(source))
    return Image.open(source) if isinstance(source, (str, Path)) else nullcontext(source)


def _orientation(image: Any) -> int:
    """EXIF's orientation, 1 for upright. Damaged EXIF data is ignored, because the pixels may be intact."""
    if image.format not in ("JPEG", "MPO"):
        # Only these are decoded at a fraction of their size, later. Pillow turns a TIFF itself when it loads it, and
        # forgets the number; and it loads a PNG for its EXIF, after which one that could not be decoded looks as if it
        # had been.
        image.load()
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1


def upright_rgb(image: Any, turn: int) -> Any:
    """Three 8-bit channels, rotated as EXIF says, with transparent parts on white.

    16-bit values are scaled by the range of the format, floats by [0, 1]. Other ranges raise ValueError, because their
    black and white levels are unknown.
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    flip = Image.Transpose
    turned = {
        2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM, 5: flip.TRANSPOSE,
        6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90,
    }.get(turn)  # fmt: skip
    return rgb if turned is None else rgb.transpose(turned)


def _eight_bits(image: Any) -> Any:
    import numpy as np
    from PIL import Image

    if image.mode == "I" and image.format == "TIFF":
        raise ValueError("32-bit integers have no known white; convert the image to 8 or 16 bits")
    values = np.asarray(image).astype(np.float64)
    most = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= most:  # also refuses NaN
        raise ValueError(
            f"values of mode {image.mode} must be in 0..{most:g}, got {low:g}..{high:g}; convert the image to 8 bits"
        )
    shown = (
        most - values if image.format == "TIFF" and image.tag_v2.get(262) == 0 else values
    )  # a TIFF in which 0 is white
    grey = Image.fromarray(np.rint(shown * (255 / most)).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def cut(image: Any, wanted: Sequence[tuple[Box, tuple[int, int]]], size: tuple[int, int], turn: int) -> list[Tensor]:
    """uint8 (3, h, w) of each (box, (h, w)). Boxes are in pixels of the upright image, whose ``size`` is (width,
    height)."""
    from PIL import Image

    needed = min((min((r - l) / w, (b - t) / h) for (l, t, r, b), (h, w) in wanted), default=1.0)
    shrink = next((s for s in (8, 4, 2) if needed >= s * _SPARE), 1)
    if shrink > 1 and hasattr(image, "draft"):
        image.draft("RGB", (image.width // shrink, image.height // shrink))
    rgb = upright_rgb(image, turn)
    across, down = rgb.width / size[0], rgb.height / size[1]
    found = []
    for (l, t, r, b), (h, w) in wanted:
        box = (l * across, t * down, min(r * across, rgb.width), min(b * down, rgb.height))
        view = rgb.resize((w, h), Image.Resampling.BICUBIC, box=box)
        found.append(torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(h, w, 3).permute(2, 0, 1))
    return found


def decode_image(source: Any, size: int, centre: float = 1.0) -> Tensor:
    """A path, bytes or a PIL image to uint8 (3, size, size): the largest centred square (bicubic, antialiased).

    ``centre`` below 1 uses only that share of the square's side, but at least ``size`` pixels.
    """
    with open_image(source) as image:
        turn = _orientation(image)
        width, height = image.size if turn < 5 else image.size[::-1]
        side = min(width, height)
        share = min(max(size / side, centre), 1.0)
        return cut(image, [(centre_box(width, height, (1, 1), share), (size, size))], (width, height), turn)[
            0
        ].contiguous()


def decode_native(source: Any, patch: Sequence[int], patches: int) -> Tensor:
    """A path, bytes or a PIL image to uint8 (3, H, W): the whole image in its aspect ratio, H and W multiples of
    ``patch`` (height, width).

    It is made smaller to have at most ``patches`` patches, and never larger (Dehghani et al., "Patch n' Pack", 2023),
    except to a multiple of ``patch``.
    """
    with open_image(source) as image:
        turn = _orientation(image)
        width, height = image.size if turn < 5 else image.size[::-1]
        scale = min(math.sqrt(patches * patch[0] * patch[1] / (width * height)), 1.0)
        rows = min(max(round(height * scale / patch[0]), 1), patches)
        columns = min(max(round(width * scale / patch[1]), 1), patches)
        while rows * columns > patches:  # rounded up on both sides
            rows, columns = (rows - 1, columns) if rows * patch[0] > columns * patch[1] else (rows, columns - 1)
        size = (rows * patch[0], columns * patch[1])
        return cut(image, [((0.0, 0.0, width, height), size)], (width, height), turn)[0].contiguous()


class ImageDecoder:
    """Decodes image files to whole images for evaluation and to the crops of a recipe. Picklable."""

    def __init__(self, size: int, centre: float = CENTRE) -> None:
        self.shape, self.centre = (3, size, size), centre

    def centred(self, centre: float) -> ImageDecoder:
        return ImageDecoder(self.shape[1], centre)

    def whole(self, source: Any) -> Tensor:
        return decode_image(source, self.shape[1], self.centre)

    def views(self, source: Any, crops: Mapping[str, Crop], draw: random.Random) -> dict[str, list[Tensor]]:
        """All crops of an image. A JPEG is decoded at a reduced size if all crops allow it."""
        with open_image(source) as image:
            turn = _orientation(image)
            width, height = image.size if turn < 5 else image.size[::-1]
            boxes = {name: crop.boxes(width, height, draw) for name, crop in crops.items()}
            wanted = [(box, crops[name].size) for name, found in boxes.items() for box in found]
            views = iter(cut(image, wanted, (width, height), turn))
        return {name: [next(views) for _ in found] for name, found in boxes.items()}


class SoundDecoder:
    """Decodes .wav files to spectrograms (1, 128 bands, frames), low bands first. Picklable."""

    def __init__(self, frames: int) -> None:
        self.shape = (1, BANDS, frames)

    def whole(self, source: Any) -> Tensor:
        return spectrogram(*read_wave(source), self.shape[2])

    def views(self, source: Any, crops: Mapping[str, Crop], draw: random.Random) -> dict[str, list[Tensor]]:
        found = crop_images(self.whole(source)[None], crops, [draw])
        return {name: [view[0]] if crops[name].count is None else list(view[:, 0]) for name, view in found.items()}
