"""What a data set is here, and how a name or a path becomes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = dict[str, Any]


class Images(Dataset[Batch]):
    """Images of one size, read a batch at a time.

    ``images.fetch(indices)`` is {"image": uint8 (B, C, H, W), "label": int64 (B,), "caption": list of B strings}, the last two where known.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(self, indices: Sequence[int]) -> Batch:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.fetch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.fetch(indices)

    def sample(self) -> Images:
        """What nearest neighbours and probes read: these images, or the first ones of a stream."""
        return self

    @property
    def problems(self) -> list[str]:
        """What could not be read so far in this process."""
        return []


class TensorImages(Images):
    """Images held in memory: uint8 (N, C, H, W), with int64 labels (N,), captions, or both."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, captions: Sequence[str] | None = None) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"TensorImages: images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        for name, given in (("labels", labels), ("captions", captions)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"TensorImages: {name} must have one entry for each of the {len(images)} images, got {len(given)}")
        self.images, self.labels, self.captions = images, labels, list(captions) if captions is not None else None

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int]) -> Batch:
        at = torch.as_tensor(indices, device="cpu")
        batch: Batch = {"image": self.images[at]}
        if self.labels is not None:
            batch["label"] = self.labels[at]
        if self.captions is not None:
            batch["caption"] = [self.captions[int(i)] for i in at]
        return batch


class Part(Images):
    """The images of ``whole`` at ``indices``, in that order."""

    def __init__(self, whole: Images, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)
        labels, captions = getattr(whole, "labels", None), getattr(whole, "captions", None)
        self.labels = None if labels is None else torch.as_tensor(labels, device="cpu")[self.indices]
        self.captions = None if captions is None else [captions[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Sequence[int]) -> Batch:
        return self.whole.fetch([self.indices[int(i)] for i in indices])

    @property
    def problems(self) -> list[str]:
        return self.whole.problems


@dataclass
class Data:
    """A training set and a held-out set.

    ``classes`` names the labels. ``flip``: whether a mirrored image means the same (it does not for digits or spectrograms).
    ``mean`` and ``std`` normalise pixels in [0, 1]. ``size`` is (height, width). ``sound``: spectrograms, of one channel, low bands first.
    """

    name: str
    train: Images
    test: Images
    size: tuple[int, int]
    classes: list[str] | None = None
    flip: bool = True
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    sound: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return 1 if self.sound else 3

    def validation(self, share: float) -> Data:
        """These data for choosing settings: ``share`` of the training images, the same ones every time, in the place of the held-out ones.

        ``extra`` describes the held-out images and is left behind. Raises ValueError for a share that leaves no image on one side, and
        for a stream, whose images are not known in advance.
        """
        from pyvit.data.stream import Stream

        if isinstance(self.train, Stream):
            raise ValueError(f"validation: must be 0 for a stream, whose images are not known in advance, got {share} for {self.name}")
        n, held = len(self.train), round(share * len(self.train))
        if not 0 < held < n:
            raise ValueError(f"validation: must leave some of the {n} training images on both sides, in (0, 1), got {share}")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")
        test, train = (Part(self.train, at.sort().values.tolist()) for at in (order[:held], order[held:]))
        return dataclasses.replace(self, train=train, test=test, extra={})


def _builtin() -> dict[str, Callable[..., Data]]:
    from pyvit.data.digits import digits
    from pyvit.data.scenes import scenes
    from pyvit.data.synthetic import synthetic
    from pyvit.data.words import words

    return {"digits": digits, "scenes": scenes, "synthetic": synthetic, "words": words}


def load_data(spec: str, size: int | None = None, validation: float = 0.0, **options: Any) -> Data:
    """The data set ``spec`` names.

    Args:
        spec: "digits", "scenes", "words" or "synthetic" (built in); a folder of images or of .wav files, one subfolder per class or none;
            a CSV file of image paths and captions; or "hf:NAME[:SPLIT]" for Hugging Face ``datasets`` (a hub name or a folder),
            "hf-stream:NAME[:SPLIT]" to read them as they arrive.
        size: side of the square images to return, default the set's own, or 224; frames of a sound's spectrogram, default 1024 (10 s).
        validation: share of the training images that takes the place of the held-out ones, see :meth:`Data.validation`.

    Raises ValueError for a name that is neither, FileNotFoundError for a path that is not there.
    """
    if validation:
        return load_data(spec, size, **options).validation(validation)
    builtin = _builtin()
    if spec in builtin:
        return builtin[spec](**({} if size is None else {"size": size}), **options)
    from pyvit.data import files

    if spec.startswith("hf-stream:"):
        from pyvit.data.stream import hugging_face_stream

        return hugging_face_stream(spec[10:], size or 224, **options)
    if spec.startswith("hf:"):
        return files.hugging_face(spec[3:], size or 224, **options)
    path = Path(spec).expanduser()
    if path.suffix == ".csv" and path.exists():
        return files.captioned_csv(path, size or 224, **options)
    if path.is_dir():
        return files.folder(path, size, **options)
    if "/" in spec or path.suffix:
        raise FileNotFoundError(f"data: {spec!r} does not exist")
    raise ValueError(f"data: must be a folder, a CSV file, hf:NAME or one of {', '.join(builtin)}, got {spec!r}")
