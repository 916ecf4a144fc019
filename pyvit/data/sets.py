"""What a data set is here, and how a name or a path becomes one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyvit.data.crops import Crop, crop_images, generator

Batch = dict[str, Any]


class Images(Dataset[Batch]):
    """Images, read a batch at a time: whole for evaluation (:meth:`fetch`), or as the crops that a recipe learns from
    (:meth:`draw`).

    Both return {"index": int64 (B,), "label": int64 (B,), "caption": list of B strings}, the last two where known, and
    the pixels.
    """

    labels: Any = None
    captions: Sequence[str] | None = None
    #: Equal numbers for items that show the same image (several captions of one photograph), or None where all differ.
    groups: Sequence[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(self, indices: Sequence[int]) -> Batch:
        """With "image": uint8 (B, C, H, W), of one size. Images that cannot be read are left out: "index" says which
        are there."""
        raise NotImplementedError

    def draw(self, indices: Sequence[int], crops: Mapping[str, Crop], seed: int, step: int) -> Batch:
        """With one entry of uint8 views for each of ``crops``, or without any with "image" as in :meth:`fetch`.

        An image that cannot be read is replaced by another, with the other's label. Views depend on the seed, the step
        and the index alone.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> Batch:
        batch = self.fetch([index])
        if not len(batch["image"]):
            raise ValueError(f"data: image {index} cannot be read: {self.bad.get(index)}")
        return {key: value[0] for key, value in batch.items() if key != "problems"}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.fetch(indices)

    def part(self, indices: Sequence[int]) -> Images:
        """The images at ``indices``, in that order."""
        raise NotImplementedError

    def relabelled(self, order: Tensor) -> Images:
        """These images with ``order[label]`` in the place of each label."""
        found = copy.copy(self)
        if self.labels is not None:
            labels = order[torch.as_tensor(self.labels)]
            found.labels = labels if isinstance(self.labels, Tensor) else labels.tolist()
        return found

    def centred(self, centre: float | None) -> Images:
        """These images, evaluated in ``centre`` of their middle, see :class:`pyvit.data.decode.ImageDecoder`; None
        changes nothing."""
        found = copy.copy(self)
        if centre is not None and hasattr(decoder := getattr(self, "decoder", None), "centred"):
            found.decoder = decoder.centred(centre)  # type: ignore[union-attr]
        return found

    def counted(self) -> str:
        """How many there are, as far as that is known."""
        return str(len(self))

    #: Whether images come in the order of a stream, and not by index; whether they are decoded when asked for.
    streamed = decodes = False

    def sample(self) -> Images:
        """What nearest neighbours and probes read: these images, or the first ones of a stream."""
        return self

    @property
    def bad(self) -> dict[int, str]:
        """What could not be read so far, by index."""
        return {}

    @property
    def problems(self) -> list[str]:
        """What could not be read so far."""
        return list(self.bad.values())

    def note(self, problems: Mapping[int, str]) -> None:
        """Remember what could not be read, in another process perhaps."""

    def readable(self) -> list[int]:
        """Indices of the images that are not known to be bad."""
        bad = self.bad
        return [i for i in range(len(self)) if i not in bad]


class TensorImages(Images):
    """Images held in memory: uint8 (N, C, H, W), with int64 labels (N,), captions, or both."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, captions: Sequence[str] | None = None) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"TensorImages: images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        for name, given in (("labels", labels), ("captions", captions)):
            if given is not None and len(given) != len(images):
                raise ValueError(
                    f"TensorImages: {name} must have one entry for each of the {len(images)} images, got {len(given)}"
                )
        self.images, self.labels, self.captions = images, labels, list(captions) if captions is not None else None

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int]) -> Batch:
        at = torch.as_tensor(indices, device="cpu")
        return {"image": self.images[at], **self._known(at)}

    def part(self, indices: Sequence[int]) -> Images:
        at = torch.as_tensor(indices, device="cpu")
        known = self._known(at)
        return TensorImages(self.images[at], known.get("label"), known.get("caption"))

    def draw(self, indices: Sequence[int], crops: Mapping[str, Crop], seed: int, step: int) -> Batch:
        if not crops:
            return self.fetch(indices)
        at = torch.as_tensor(indices, device="cpu")
        draws = [generator(seed, step, int(i)) for i in indices]
        return {**crop_images(self.images[at], crops, draws), **self._known(at)}

    def _known(self, at: Tensor) -> Batch:
        batch: Batch = {"index": at}
        if self.labels is not None:
            batch["label"] = self.labels[at]
        if self.captions is not None:
            batch["caption"] = [self.captions[int(i)] for i in at]
        return batch


@dataclass
class Data:
    """A training set and a held-out set.

    ``classes`` names the labels. ``flip``: whether a mirrored image means the same (it does not for digits,
    spectrograms or images with captions). ``mean`` and ``std`` normalise pixels in [0, 1]. ``size`` is (height, width).
    ``sound``: spectrograms, of one channel, low bands first. ``notes``: how the source was read and what of it is not
    used, a sentence each.
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
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return 1 if self.sound else 3

    def summary(self) -> str:
        """What was found, for a run's first lines: images of each split, classes, what is left out and why. Control
        codes are escaped."""
        kind = "spectrograms" if self.sound else "images"
        lines = [
            (
                f"data {self.name}: {self.train.counted()} {kind} to train on, {self.test.counted()} held out; "
                f"{self._of_classes()}"
            )
        ]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)

    def _of_classes(self) -> str:
        if self.classes is None:
            return "no classes" if self.train.captions is None else "captions"
        shown = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        return f"{len(self.classes)} class{'es' if len(self.classes) != 1 else ''}: {shown}"

    def damage(self) -> list[str]:
        """How many images of each split could not be read so far."""
        sides = (
            ("training images were replaced by others", self.train),
            ("held-out images are left out of the figures", self.test),
        )
        return [f"{len(s.bad)} of {len(s)} {what}: they cannot be read" for what, s in sides if s.bad]

    def validation(self, share: float) -> Data:
        """These data for choosing settings: ``share`` of the training images, the same ones every time, in the place of
        the held-out ones.

        Items that show the same image stay together. ``extra`` describes the held-out images and is left behind. Raises
        ValueError for a share that leaves no image, or no image of a class, on one side, and for a stream, whose images
        are not known in advance.
        """
        if self.train.streamed:
            raise ValueError(
                f"validation: must be 0 for a stream, whose images are not known in advance, got {share} for "
                f"{self.name}"
            )
        n = len(self.train)
        held = round(share * n) if 0 < share < 1 else 0  # NaN included
        if not 0 < held < n:
            raise ValueError(
                f"validation: must leave some of the {n} training images on both sides, in (0, 1), got {share}"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu").tolist()
        if (groups := self.train.groups) is not None:
            together: dict[int, list[int]] = {}
            for i in order:
                together.setdefault(groups[i], []).append(i)
            order, wanted = [i for same in together.values() for i in same], held
            held = next(k for k in itertools.accumulate(map(len, together.values())) if k >= wanted)
        test, train = (self.train.part(sorted(at)) for at in (order[:held], order[held:]))
        if self.train.labels is not None:
            sides = [{int(c) for c in side.labels} for side in (train, test)]
            if missing := sorted({int(c) for c in self.train.labels} - (sides[0] & sides[1])):
                names = ", ".join((self.classes or [])[c] if self.classes else str(c) for c in missing[:8])
                raise ValueError(
                    f"validation: must leave images of every class on both sides, got {share}, which does not for "
                    f"{names}"
                )
        if not len(train):
            raise ValueError(f"validation: must leave some of the {n} training images on both sides, got {share}")
        return dataclasses.replace(
            self, train=train, test=test, extra={}, notes=[*self.notes, f"{share:g} of the training images held out"]
        )

    def with_classes(self, classes: Sequence[str] | None) -> Data:
        """These data with the labels of a trained network: ``classes`` in its order, matched by name.

        Raises ValueError where these data have a class that ``classes`` does not know.
        """
        if classes is None or self.classes is None or list(classes) == self.classes:
            return self
        number = {name: i for i, name in enumerate(classes)}
        if unknown := [name for name in self.classes if name not in number]:
            raise ValueError(
                f"data: the classes of {self.name} must be among those that the run was trained on, "
                f"{', '.join(classes[:20])}"
                f"{', ...' if len(classes) > 20 else ''}; it has {', '.join(unknown[:20])}"
            )
        order = torch.tensor([number[name] for name in self.classes], dtype=torch.int64, device="cpu")
        missing = [name for name in classes if name not in self.classes]
        notes = [
            *self.notes,
            *([f"no image of {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"] if missing else []),
        ]
        train, test = (part.relabelled(order) for part in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test, classes=list(classes), notes=notes)


def builtin() -> dict[str, Callable[..., Data]]:
    """The sets that need no path, by name."""
    from pyvit.data.digits import digits
    from pyvit.data.scenes import scenes
    from pyvit.data.spoken_words import words
    from pyvit.data.synthetic import synthetic

    return {"digits": digits, "scenes": scenes, "synthetic": synthetic, "words": words}


def load_data(spec: str, size: int | None = None, validation: float = 0.0, **options: Any) -> Data:
    """The data set ``spec`` names.

    Args:
        spec: "digits", "scenes", "words" or "synthetic" (built in); a folder of images or of .wav files, one subfolder
            per class or none; a .csv, .tsv or .txt table of image paths and captions; or "hf:NAME[:SPLIT]" for Hugging
            Face ``datasets`` (a hub name or a folder), "hf-stream:NAME[:SPLIT]" to read them as they arrive.
        size: side of the square images to return, default the set's own, or 224; frames of a sound's spectrogram,
            default 1024 (10 s).
        validation: share of the training images that takes the place of the held-out ones, see :meth:`Data.validation`.

    Raises ValueError for a name that is neither, FileNotFoundError for a path that is not there.
    """
    if not spec.strip() or spec in ("hf:", "hf-stream:"):
        raise ValueError(
            f"data: must name a folder, a table of captions, a Hugging Face set or one that is built in, got {spec!r}"
        )
    if size is not None and size < 1:
        raise ValueError(f"data: size must be at least 1, got {size}")
    if validation:
        return load_data(spec, size, **options).validation(validation)
    sets = builtin()
    if spec in sets:
        return sets[spec](**({} if size is None else {"size": size}), **options)
    if spec.startswith("hf-stream:"):
        from pyvit.data.stream import hugging_face_stream

        return hugging_face_stream(spec[10:], size or 224, **options)
    if spec.startswith("hf:"):
        from pyvit.data.hub import hugging_face

        return hugging_face(spec[3:], size or 224, **options)
    path = Path(spec).expanduser()
    if path.is_dir():
        from pyvit.data.files import folder

        return folder(path, size, **options)
    from pyvit.data.captions import ENDINGS, captioned

    if path.suffix.lower() in ENDINGS and path.exists():
        return captioned(path, size or 224, **options)
    if path.exists():
        raise ValueError(f"data: {spec!r} is a file; it must be a table of captions ({', '.join(ENDINGS)}) or a folder")
    if "/" in spec or path.suffix:
        raise FileNotFoundError(f"data: {spec!r} does not exist")
    raise ValueError(f"data: must be a folder, a CSV file, hf:NAME or one of {', '.join(sets)}, got {spec!r}")
