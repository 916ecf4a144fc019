"""Held-out images: every class has some, and none is a copy of a training image."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

#: The names of each split in files and folders, in any case. The first existing held-out split is used.
TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")

#: Larger data sets are not searched for copies, because that reads a part of every file.
COMPARED = 100_000


def hold_out(
    groups: Sequence[Hashable],
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    files: Sequence[Hashable] | None = None,
    notes: list[str] | None = None,
) -> tuple[list[int], list[int]]:
    """Positions of (training, held-out) items: of each class every tenth group by position, or the last if there are
    fewer than ten.

    Items of equal ``groups`` show the same image and stay together. A class that consists mostly of copies is split by
    ``files`` instead, and ``notes`` says so. Raises ValueError if a class has too few images for both splits.
    """
    label = labels if labels is not None else [0] * len(groups)
    sides = _tenths(groups, label)
    lacking = _one_sided(sides, label, 0.5)
    if lacking and files is not None:
        sides = _tenths([(c, files[i]) if c in lacking else groups[i] for i, c in enumerate(label)], label)
        copies, lacking = lacking, _one_sided(sides, label, 1.0)
        parted = copies - lacking
        if parted and notes is not None and len(set(groups)) < len(set(files)):
            notes.append(
                "copies of one image are on both sides"
                + ("" if labels is None else f", in {_named(sorted(parted), names)}")
            )
    else:
        lacking = _one_sided(sides, label, 1.0)
    if lacking and labels is None:
        raise ValueError(
            f"data: there must be at least two images, one to train on and one to hold out, got {len(groups)}"
        )
    if lacking:
        raise ValueError(
            "data: every class must have at least two images, one to train on and one to hold out, and "
            f"{_named(sorted(lacking), names)} "
            "has not; add images, or make train and val folders"
        )
    return sides


def _named(labels: Sequence[int], names: Sequence[str] | None) -> str:
    shown = [names[label] if names else str(label) for label in labels[:5]]
    return "class " + ", ".join(map(repr, shown)) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")


def _tenths(groups: Sequence[Hashable], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    last = dict(zip(groups, labels, strict=True))  # group -> the label of its last item, in the order of those
    for group, label in zip(groups, labels, strict=True):
        del last[group]
        last[group] = label
    of_class: dict[int, list[Hashable]] = defaultdict(list)
    for group, label in last.items():
        of_class[label].append(group)
    held = {g for found in of_class.values() for g in (found[9::10] or found[-1:])}
    return [i for i, g in enumerate(groups) if g not in held], [i for i, g in enumerate(groups) if g in held]


def _one_sided(sides: tuple[list[int], list[int]], labels: Sequence[int], share: float) -> set[int]:
    """The classes without a training image, without a held-out image, or with more than ``share`` of their images held
    out."""
    train, held = (Counter(labels[i] for i in side) for side in sides)
    return {c for c in {*train, *held} if not train[c] or not held[c] or held[c] > share * (train[c] + held[c])}


def on_both_sides(train: Sequence[int], held: Sequence[int], notes: list[str]) -> None:
    """A note with the number of images that are in both given splits."""
    known = set(held)
    if both := sum(group in known for group in train):
        notes.append(f"{both} of the training images are also held out: results are too optimistic")


def group_equal(sizes: Sequence[int], read: Callable[[int], bytes]) -> list[int]:
    """A number for each item, equal for equal bytes. Only items of equal size are read."""
    shared = {size for size, n in Counter(sizes).items() if n > 1}
    known: dict[Hashable, int] = {}
    return [known.setdefault((size, read(i)) if size in shared else (i, None), i) for i, size in enumerate(sizes)]


def group_files(paths: Sequence[Path]) -> list[int] | None:
    """:func:`group_equal` of files, or None for more than :data:`COMPARED` files. An unreadable file gets its own
    number."""
    if len(paths) > COMPARED:
        return None

    def size(at: int) -> int:
        try:
            return os.stat(paths[at]).st_size or -at - 1
        except OSError:
            return -at - 1

    def read(at: int) -> bytes:
        try:
            return digest(paths[at].read_bytes())
        except OSError:
            return str(at).encode()

    return group_equal([size(i) for i in range(len(paths))], read)


def digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
