"""Base classes of data sets: Images, TensorImages and Data."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyvit.data.crops import Crop, crop_images, generator

Batch = dict[str, Any]


class Images(Dataset[Batch]):
    """Images that are read in batches: whole for evaluation (:meth:`fetch`), or as a recipe's crops (:meth:`draw`).

    Both return {"index": int64 (B,), "label": int64 (B,), "caption": list of B strings} and the pixels. Labels and
    captions are there if known.
    """

    labels: Any = None
    captions: Sequence[str] | None = None
    #: Equal numbers for items that show the same image (several captions of one photograph); None if all differ.
    groups: Sequence[int] | None = None
    #: Equal numbers for items that must be on one side of a split; None for those of :attr:`groups`.
    concepts: Sequence[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(self, indices: Sequence[int]) -> Batch:
        """With "image": uint8 (B, C, H, W). Unreadable images are left out: "index" lists those that are there."""
        raise NotImplementedError

    def draw(
        self,
        indices: Sequence[int],
        crops: Mapping[str, Crop],
        seed: int,
        step: int,
        repetitions: Sequence[int] | None = None,
    ) -> Batch:
        """With one uint8 entry for each of ``crops``; without crops, with "image" as in :meth:`fetch`.

        An unreadable image is replaced by another, with the other's label. Crops depend only on the seed, the step, the
        index and the number of the repetition, 0 by default, for images that are in a batch more than once.
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

    def held_out(self) -> Images:
        """These images as the held-out side of a split."""
        return self

    def relabelled(self, order: Tensor) -> Images:
        """A copy with ``order[label]`` for each label."""
        found = copy.copy(self)
        if self.labels is not None:
            labels = order[torch.as_tensor(self.labels)]
            found.labels = labels if isinstance(self.labels, Tensor) else labels.tolist()
        return found

    def rearranged(self, columns: Tensor, classes: int) -> Images:
        """A copy with rows of ``classes`` labels, whose columns ``columns`` are the present ones."""
        found = copy.copy(self)
        if self.labels is not None:
            labels = torch.zeros(len(self), classes, dtype=torch.int64, device="cpu")
            labels[:, columns] = torch.as_tensor(self.labels)
            found.labels = labels.tolist()
        return found

    def centred(self, centre: float | None) -> Images:
        """A copy that evaluates with the centre crop ``centre``: see :class:`pyvit.data.decode.ImageDecoder`. None
        changes nothing."""
        found = copy.copy(self)
        if centre is not None and hasattr(decoder := getattr(self, "decoder", None), "centred"):
            found.decoder = decoder.centred(centre)  # type: ignore[union-attr]
        return found

    def counted(self) -> str:
        """The number of images as text, if known."""
        return str(len(self))

    #: Whether images can only be read in order; whether they are decoded when read.
    streamed = decodes = False

    def sample(self) -> Images:
        """Images for nearest neighbours and probes: these, or the first ones of a stream."""
        return self

    @property
    def bad(self) -> dict[int, str]:
        """Unreadable images so far: index to reason."""
        return {}

    @property
    def problems(self) -> list[str]:
        """Reasons of unreadable images so far."""
        return list(self.bad.values())

    def note(self, problems: Mapping[int, str]) -> None:
        """Record unreadable images, for example those found by a worker process."""

    def readable(self) -> list[int]:
        """Indices of the images that are not known to be unreadable."""
        bad = self.bad
        return [i for i in range(len(self)) if i not in bad]


class TensorImages(Images):
    """Images in memory: uint8 (N, C, H, W), with int64 labels (N,), captions, or both."""

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
        self.images = images
        self.labels = labels
        self.captions = list(captions) if captions is not None else None

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int]) -> Batch:
        at = torch.as_tensor(indices, device="cpu")
        return {"image": self.images[at], **self._known(at)}

    def part(self, indices: Sequence[int]) -> Images:
        at = torch.as_tensor(indices, device="cpu")
        known = self._known(at)
        return TensorImages(self.images[at], known.get("label"), known.get("caption"))

    def draw(
        self,
        indices: Sequence[int],
        crops: Mapping[str, Crop],
        seed: int,
        step: int,
        repetitions: Sequence[int] | None = None,
    ) -> Batch:
        if not crops:
            return self.fetch(indices)
        at = torch.as_tensor(indices, device="cpu")
        draws = [
            generator(seed, step, int(i), n) for i, n in zip(indices, repetitions or [0] * len(indices), strict=True)
        ]
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

    ``multilabel``: images have any number of labels, in rows of 0 and 1 of one column per class.
    ``classes`` names the labels. ``flip``: whether images may be flipped horizontally (not digits, spectrograms or
    images with captions). ``mean`` and ``std`` normalise pixels in [0, 1]. ``size`` is (height, width). ``sound``:
    spectrograms with one channel, low bands first. ``notes``: how the source was interpreted and what was left out, one
    sentence each.
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
    multilabel: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return 1 if self.sound else 3

    def summary(self) -> str:
        """The first lines of a run: images of each split, classes, what is left out and why. Control characters are
        escaped."""
        kind = "spectrograms" if self.sound else "images"
        lines = [
            (
                f"data {self.name}: {self.train.counted()} training {kind}, {self.test.counted()} held out; "
                f"{self._of_classes()}"
            )
        ]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)

    def _of_classes(self) -> str:
        if self.classes is None:
            return "no classes" if self.train.captions is None else "captions"
        shown = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        several = ", any number of them in an image" if self.multilabel else ""
        return f"{len(self.classes)} class{'es' if len(self.classes) != 1 else ''}{several}: {shown}"

    def damage(self) -> list[str]:
        """How many images of each split were unreadable so far."""
        sides = (
            ("training images were replaced by others", self.train),
            ("held-out images are not evaluated", self.test),
        )
        return [f"{len(s.bad)} of {len(s)} {what}: they are unreadable" for what, s in sides if s.bad]

    def validation(self, share: float) -> Data:
        """A copy for choosing settings: ``share`` of the training images, always the same ones, replaces the held-out
        images.

        Items of one concept, or that show the same image, stay together. ``extra`` is dropped, because it describes the
        held-out images. Raises ValueError if a split would have no image, or no image of a class, and for streams,
        whose images are not known in advance.
        """
        if self.train.streamed:
            raise ValueError(
                f"validation: must be 0 for a stream, whose images are not known in advance, got {share} for "
                f"{self.name}"
            )
        n = len(self.train)
        held = round(share * n) if 0 < share < 1 else 0  # 0 for NaN too
        if not 0 < held < n:
            raise ValueError(
                f"validation: must leave some of the {n} training images on both sides, in (0, 1), got {share}"
            )
        together: dict[int, list[int]] = {}
        for i, group in enumerate(self.train.concepts or self.train.groups or range(n)):
            together.setdefault(group, []).append(i)
        drawn = torch.randperm(len(together), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
        groups = [*together.values()]
        order = [i for at in drawn for i in groups[at]]
        held = next(k for k in itertools.accumulate(len(groups[at]) for at in drawn) if k >= held)
        test, train = (self.train.part(sorted(at)) for at in (order[:held], order[held:]))
        test = test.held_out()
        if self.train.labels is not None and not self.multilabel:
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

    def limited(self, count: int) -> Data:
        """A copy with ``count`` of the training images, always the same ones, for learning from few labels.

        With labels each class has equally many (the first classes one more, if ``count`` does not divide). Raises
        ValueError if there are not enough images, and for streams, whose images are not known in advance.
        """
        if self.train.streamed:
            raise ValueError(f"train_images: must not be given for a stream, got {count} for {self.name}")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1), device="cpu")
        if not 1 <= count <= len(order):
            raise ValueError(f"train_images: must be in 1..{len(order)}, the training images, got {count}")
        if self.train.labels is not None:
            labels = torch.as_tensor(self.train.labels)[order]
            known = labels.unique().tolist()
            kept = []
            for rank, label in enumerate(known):
                at = order[labels == label]
                wanted = count // len(known) + (rank < count % len(known))
                if not 1 <= wanted <= len(at):
                    name = self.classes[label] if self.classes else str(label)
                    raise ValueError(
                        f"train_images: {count} images need {wanted} of each of {len(known)} classes, and at least 1, "
                        f"{name} has {len(at)}"
                    )
                kept.append(at[:wanted])
            order = torch.cat(kept)
        at = sorted(order[:count].tolist())
        note = f"{count} of the {len(self.train)} training images are used"
        return dataclasses.replace(self, train=self.train.part(at), notes=[*self.notes, note])

    def with_classes(self, classes: Sequence[str] | None) -> Data:
        """A copy whose labels are those of a trained network: ``classes`` in its order, matched by name.

        Raises ValueError if a class is not among ``classes``.
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
        train, test = (
            part.rearranged(order, len(classes)) if self.multilabel else part.relabelled(order)
            for part in (self.train, self.test)
        )
        return dataclasses.replace(self, train=train, test=test, classes=list(classes), notes=notes)
