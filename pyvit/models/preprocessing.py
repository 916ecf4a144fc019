"""How a checkpoint's configuration says that images are prepared, and what its classes are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

#: ImageNet's mean and standard deviation, which most checkpoints were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Preprocessing(NamedTuple):
    """Mean and standard deviation per channel, of pixels in [0, 1]; side (height, width) or None for the model's own;
    the share of an image's largest centred square that is used; names of the classes; what was assumed."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    centre: float
    classes: list[str] | None
    notes: list[str]


def preprocessing_of(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing in a ``config.json`` of timm (``pretrained_cfg``) or transformers (with the content of
    ``preprocessor_config.json``, if there is one, under that name). What it does not say is ImageNet's, and noted."""
    notes: list[str] = []
    processor = config.get("preprocessor_config.json", {})
    timm = config.get("pretrained_cfg", config if "architecture" in config else {})
    mean, std = (timm.get(name) or processor.get(f"image_{name}") for name in ("mean", "std"))
    if not mean or not std:
        notes.append("the checkpoint does not say how images are normalised: ImageNet's mean and standard deviation")
    size = None
    if timm.get("input_size"):
        size = (int(timm["input_size"][1]), int(timm["input_size"][2]))
    elif isinstance(config.get("image_size"), int):
        size = (config["image_size"], config["image_size"])
    names = config.get("label_names") or timm.get("label_names")
    described = config.get("label_descriptions") or timm.get("label_descriptions") or {}
    classes = [str(described.get(name, name)) for name in names] if names else None
    if classes is None and isinstance(numbered := config.get("id2label"), Mapping):
        classes = [str(numbered[key]) for key in sorted(numbered, key=int)]
    return Preprocessing(tuple(mean or MEAN), tuple(std or STD), size, timm.get("crop_pct") or 0.875, classes, notes)
