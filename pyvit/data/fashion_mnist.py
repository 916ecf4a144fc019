"""Fashion-MNIST: 28 x 28 grey photographs of ten kinds of clothes, 60,000 for training and 10,000 held out (Xiao et
al., 2017)."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.data.dataset import Data, TensorImages

CLASSES = [
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
]  # fmt: skip

#: Mean and standard deviation of the training pixels.
MEAN, STD = 0.2860, 0.3530

_DATASETS = "PYVIT_DATASETS"
_NAME = "fashion-mnist"
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def fashion_mnist(size: int = 28) -> Data:
    """Fashion-MNIST, with three equal channels, enlarged if ``size`` is not 28.

    The four files are read from the first of these folders that exists: ``fashion-mnist`` in the folder that the
    environment variable PYVIT_DATASETS names, Debian's package dataset-fashion-mnist, and the places where torchvision
    and Keras keep them. Raises FileNotFoundError, which says how to get them, if there is none.
    """
    folder = _find()
    train, test = (_read(folder, split, size) for split in ("train", "test"))
    return Data(_NAME, train, test, (size, size), CLASSES, mean=(MEAN,) * 3, std=(STD,) * 3)


def _find() -> Path:
    own = os.environ.get(_DATASETS)
    places = [
        *([Path(own).expanduser() / _NAME] if own else []),
        Path("/usr/share/datasets") / _NAME,
        Path("data/FashionMNIST/raw"),
        Path("~/.keras/datasets").expanduser() / _NAME,
    ]
    for place in places:
        if place.is_dir() and _path(place, _FILES["train"][0]) is not None:
            return place
    raise FileNotFoundError(
        f"data: the files of {_NAME} are in none of {', '.join(map(str, places))}. Install Debian's or Ubuntu's "
        f"package dataset-fashion-mnist, or download the four files of github.com/zalandoresearch/fashion-mnist into a "
        f"folder {_NAME} and set {_DATASETS} to the folder that holds it"
    )


def _path(folder: Path, name: str) -> Path | None:
    """The file ``name``, compressed or not."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _read(folder: Path, split: str, size: int) -> TensorImages:
    images, labels = (read_idx(folder, name) for name in _FILES[split])
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or int(labels.max()) > 9:
        raise ValueError(
            f"data: {folder} must hold images (N, 28, 28) with labels 0..9 (N,), got {tuple(images.shape)} and "
            f"{tuple(labels.shape)} up to {int(labels.max())}"
        )
    pixels = images[:, None]
    if size != 28:
        resized = F.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
        pixels = resized.round().clamp(0, 255).to(torch.uint8)
    return TensorImages(pixels.expand(-1, 3, -1, -1), labels.long())


def read_idx(folder: Path, name: str) -> Tensor:
    """An array of bytes in LeCun's IDX format: two zeros, the type (8), the number of dimensions, the sizes
    (big-endian), the values.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or of another type.
    """
    path = _path(folder, name)
    if path is None:
        raise FileNotFoundError(f"data: {folder / name} does not exist, compressed (.gz) or not")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"data: {path} is damaged: {error}") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"data: {path} is no array of bytes in IDX format")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:]
    if values.numel() != torch.Size(shape).numel():
        raise ValueError(f"data: {path} must hold {shape} values, got {values.numel()}")
    return values.view(shape)
