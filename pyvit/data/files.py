"""Images, spectrograms and captions that are read from files when they are needed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pyvit.data.audio import BANDS, MEAN, STD
from pyvit.data.crops import Crop, generator
from pyvit.data.dataset import Batch, Data, Images
from pyvit.data.decode import ImageDecoder, SoundDecoder, decode_image
from pyvit.data.layout import read_layout
from pyvit.data.split import group_files, hold_out, on_both_sides

__all__ = ["DecodedImages", "Decoder", "decode_image", "folder"]

#: More than this share and more than this number of unreadable files is an error.
TOLERATED, TOLERATED_FILES = 0.05, 3

#: At most this many unreadable files are reported by name.
NAMED = 20


class Decoder(Protocol):
    """Converts an item to pixels: see :class:`pyvit.data.decode.ImageDecoder`."""

    shape: tuple[int, int, int]

    def whole(self, source: Any) -> Tensor: ...

    def views(self, source: Any, crops: Mapping[str, Crop], draw: Any) -> dict[str, list[Tensor]]: ...


class Picked(Sequence[Any]):
    """The items of ``items`` at ``at``, read when needed."""

    def __init__(self, items: Sequence[Any], at: Sequence[int]) -> None:
        self.items, self.at = items, at

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.at[index]]


class DecodedImages(Images):
    """Items that are decoded when needed.

    An unreadable item is reported once, by name. In training it is replaced by another item, so that batches keep their
    size; in evaluation it is left out. Too many unreadable items raise ValueError.
    """

    decodes = True

    def __init__(
        self,
        items: Sequence[Any],
        decoder: Decoder,
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        groups: Sequence[int] | None = None,
        concepts: Sequence[int] | None = None,
    ) -> None:
        self.items = items
        self.labels = labels
        self.captions = captions
        self.groups = groups
        self.concepts = concepts
        self.decoder = decoder
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.items)

    def part(self, indices: Sequence[int]) -> Images:
        at = list(indices)
        pick = lambda values: None if values is None else [values[i] for i in at]  # noqa: E731
        items = pick(self.items) if isinstance(self.items, list) else Picked(self.items, at)
        known = map(pick, (self.labels, self.captions, self.groups, self.concepts))
        return DecodedImages(items, self.decoder, *known)

    @property
    def bad(self) -> dict[int, str]:
        return self._bad

    def note(self, problems: Mapping[int, str]) -> None:
        for at, problem in problems.items():
            if at in self._bad:
                continue
            self._bad[at] = problem
            warn_skipped(problem, len(self._bad))
            if len(self._bad) > max(TOLERATED * len(self), TOLERATED_FILES):
                raise ValueError(f"data: {len(self._bad)} of {len(self)} files cannot be read, the last: {problem}")

    def _try(self, at: int, read: Any, problems: dict[int, str]) -> Any:
        """``read`` of item ``at``, or None if it fails. Decoders raise many kinds of exceptions for damaged files."""
        if at in self._bad or at in problems:
            return None
        try:
            return read(self.items[at])
        except ImportError:
            raise  # Pillow is missing
        except Exception as error:
            item = self.items[at] if isinstance(self.items, list) else None
            row = self.items.at[at] if isinstance(self.items, Picked) else at
            where = str(item) if isinstance(item, (str, Path)) else f"row {row}"
            problems[at] = f"{where}: {type(error).__name__}: {error}"
            if get_worker_info() is None:
                self.note({at: problems.pop(at)})
            return None

    def _batch(self, at: Sequence[int], problems: dict[int, str]) -> Batch:
        batch: Batch = {"index": torch.tensor(at, dtype=torch.int64), "problems": problems}
        if self.labels is not None:
            batch["label"] = torch.tensor([self.labels[i] for i in at], dtype=torch.int64)
        if self.captions is not None:
            batch["caption"] = [self.captions[i] for i in at]
        return batch

    def fetch(self, indices: Sequence[int]) -> Batch:
        problems: dict[int, str] = {}
        read = {int(i): self._try(int(i), self.decoder.whole, problems) for i in indices}
        at = [int(i) for i in indices if read[int(i)] is not None]
        images = torch.stack([read[i] for i in at]) if at else torch.empty(0, *self.decoder.shape, dtype=torch.uint8)
        return {"image": images, **self._batch(at, problems)}

    def draw(
        self,
        indices: Sequence[int],
        crops: Mapping[str, Crop],
        seed: int,
        step: int,
        repetitions: Sequence[int] | None = None,
    ) -> Batch:
        problems: dict[int, str] = {}
        read = [
            self._readable(int(i), crops, (seed, step, int(i), n), problems)
            for i, n in zip(indices, repetitions or [0] * len(indices), strict=True)
        ]
        views = stack_views([found for _, found in read], crops, self.decoder)
        return {**views, **self._batch([at for at, _ in read], problems)}

    def _readable(
        self, index: int, crops: Mapping[str, Crop], place: tuple[int, ...], problems: dict[int, str]
    ) -> tuple[int, dict[str, list[Tensor]]]:
        """Views of item ``index``, or of the next readable one, with the random numbers of ``place``."""

        def views(item: Any) -> dict[str, list[Tensor]]:
            return (
                self.decoder.views(item, crops, generator(*place)) if crops else {"image": [self.decoder.whole(item)]}
            )

        for at in (*range(index, len(self)), *range(index)):
            if (found := self._try(at, views, problems)) is not None:
                return at, found
        raise ValueError("data: no file could be read" + "".join(f"; the last: {p}" for p in [*problems.values()][-1:]))


def warn_skipped(problem: str, number: int) -> None:
    """Report an unreadable file, unless many have been reported. A run prints their number at its end."""
    if number <= NAMED:
        warnings.warn(f"skipped {problem}".encode(errors="backslashreplace").decode(), stacklevel=3)
    elif number == NAMED + 1:
        warnings.warn(f"skipped {NAMED} files; further ones are counted, not named", stacklevel=3)


def stack_views(
    read: Sequence[Mapping[str, list[Tensor]]], crops: Mapping[str, Crop], decoder: Decoder
) -> dict[str, Tensor]:
    """The crops of all images, as one tensor per name: see :class:`Crop`."""
    found = {}
    for name in read[0] if read else ():
        views = [torch.stack(same) for same in zip(*(each[name] for each in read), strict=True)]
        if name not in crops or crops[name].count is None:
            found[name] = views[0]
        else:
            empty = torch.empty(0, len(read), decoder.shape[0], *crops[name].size, dtype=torch.uint8)
            found[name] = torch.stack(views) if views else empty
    return found


def folder(root: Path, size: int | None = None) -> Data:
    """A folder of images or of .wav files.

    Subfolders are classes. Top-level folders ``train`` and ``val`` (or ``valid``, ``validation``, ``dev``, ``test``,
    ``eval``, in any case) are the splits; without them one image in ten of each class is held out. Symbolic links are
    followed; hidden files and folders are ignored. ``Data.notes`` says what is left out and why.
    """
    layout = read_layout(root)
    found = layout.train + (layout.held_out or [])
    paths, groups = [path for path, _ in found], group_files([path for path, _ in found])
    notes = layout.notes
    if groups is None:
        notes.append(f"not searched for repeated images: {len(paths)} are too many")
    classes = sorted({name for _, name in layout.train} - {""})
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[name] for _, name in found] if classes else None
    if layout.held_out is None:
        train, test = hold_out(groups or range(len(found)), labels, classes, range(len(found)), notes)
        notes.insert(0, "one image in ten is held out")
    else:
        train, test = list(range(len(layout.train))), list(range(len(layout.train), len(found)))
        if groups is not None:
            on_both_sides(groups[: len(train)], groups[len(train) :], notes)
    size = size or (1024 if layout.sounds else 224)
    decoder = SoundDecoder(size) if layout.sounds else ImageDecoder(size)

    def part(at: list[int]) -> Images:
        return DecodedImages(
            [paths[i] for i in at],
            decoder,
            labels and [labels[i] for i in at],
            groups=groups and [groups[i] for i in at],
        )

    known, name = classes or None, os.path.basename(os.path.abspath(root))
    if layout.sounds:
        return Data(
            name, part(train), part(test), (BANDS, size), known, flip=False, mean=MEAN, std=STD, sound=True, notes=notes
        )
    return Data(name, part(train), part(test), (size, size), known, notes=notes)
