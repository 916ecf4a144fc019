"""Interpretation of a folder of images or sounds: its splits, its classes, and what is ignored and why."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvit.data.split import HELD_OUT, TRAIN

IMAGES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".avif",
)  # fmt: skip
SOUNDS = (".wav",)

#: Folders that operating systems and programs create beside images.
_NOT_DATA = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@dataclass
class Tree:
    """A folder: its subfolders by name, and its files. Symbolic links are followed.

    ``left_out`` counts ignored items by reason. ``empty`` names the subfolders without a file of the wanted kind.
    """

    path: Path
    folders: dict[str, Tree] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def every(self) -> list[Path]:
        """Files of this folder and of all folders below, sorted by name."""
        return self.files + [p for name in sorted(self.folders) for p in self.folders[name].every()]

    def passed_over(self) -> Counter[str]:
        return sum((f.passed_over() for f in self.folders.values()), self.left_out.copy())

    def pruned(self, endings: Sequence[str]) -> Tree:
        """This tree with only the files of ``endings``. Other files are counted; folders without such files are dropped
        and named."""
        found = Tree(self.path, left_out=self.left_out.copy())
        for path in self.files:
            if path.suffix.lower() in endings:
                found.files.append(path)
            else:
                found.left_out[f"{path.suffix.lower() or 'unnamed kind of'} files"] += 1
        for name, folder in self.folders.items():
            below = folder.pruned(endings)
            if below.files or below.folders:
                found.folders[name] = below
            else:
                found.left_out.update(below.left_out)
                found.left_out[f"folder {name} without images"] += 1
                found.empty.append(name)
        return found


def scan(path: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Tree:
    """The tree under ``path``. Symbolic links are followed unless they lead to a parent folder. Hidden items are
    ignored."""
    tree = Tree(path)
    here = os.stat(path)
    above |= {(here.st_dev, here.st_ino)}
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = entry.name
            if name.startswith(".") or name in _NOT_DATA:
                tree.left_out[f"hidden {name}" if entry.is_dir(follow_symlinks=False) else "hidden files"] += 1
                continue
            try:
                if entry.is_dir():
                    seen = entry.stat()
                    if (seen.st_dev, seen.st_ino) in above:
                        tree.left_out[f"link {name} to a folder above it"] += 1
                    elif (known := unicodedata.normalize("NFC", name)) in tree.folders:
                        raise ValueError(f"data: {path} has two folders {known!r}, written in different ways")
                    else:  # normalise accents, which file systems encode differently
                        tree.folders[known] = scan(path / name, above)
                elif entry.is_file():
                    tree.files.append(path / name)
                else:
                    tree.left_out["broken links" if entry.is_symlink() else "devices and pipes"] += 1
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise type(error)(f"data: {path / name} cannot be read: {error.strerror}") from error
                tree.left_out["broken links"] += 1
    return tree


@dataclass
class Layout:
    """Files of the training and of the held-out split (None if there is no split), each with its class, or "" without
    classes."""

    train: list[tuple[Path, str]]
    held_out: list[tuple[Path, str]] | None
    sounds: bool
    notes: list[str]


def read_layout(root: Path) -> Layout:
    """The splits and classes of a folder. Raises ValueError if it is ambiguous, FileNotFoundError if it has no
    files."""
    whole = scan(root)
    tree, sounds = whole.pruned(IMAGES), False
    if not tree.files and not tree.folders:
        tree, sounds = whole.pruned(SOUNDS), True
    if not tree.files and not tree.folders:
        others = ", ".join(f"{n} {what}" for what, n in _kinds(whole).most_common(5))
        raise FileNotFoundError(
            f"data: no image ({', '.join(IMAGES)}) and no .wav file under {root}"
            + (f"; there are {others}" if others else "")
        )
    notes: list[str] = []
    train, held = _splits(tree, notes)
    sides = _classes(train, held, notes)
    passed = tree.passed_over()
    if passed:
        once = ("folder", "hidden .", "hidden _", "link")
        listed = [what if n == 1 and what.startswith(once) else f"{n} {what}" for what, n in passed.most_common()]
        notes.append(
            "left out: " + ", ".join(listed[:8]) + (f" and {len(listed) - 8} kinds more" if len(listed) > 8 else "")
        )
    return Layout(sides[0], sides[1] if len(sides) == 2 else None, sounds, notes)


def _kinds(tree: Tree) -> Counter[str]:
    return Counter(f"{p.suffix.lower() or 'unnamed kind of'} files" for p in tree.every())


def _splits(tree: Tree, notes: list[str]) -> tuple[Tree, Tree | None]:
    """(training, held-out) folders by their names, in any case; the folder itself and None if there are none."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in tree.folders:
        if name.lower() in (*TRAIN, *HELD_OUT):
            found[name.lower()].append(name)
    train = [name for kind in TRAIN for name in found[kind]]
    held = [name for kind in HELD_OUT for name in found[kind]]
    empty = [name for name in tree.empty if name.lower() in (*TRAIN, *HELD_OUT)]
    if bool(train) != bool(held) and empty:
        raise FileNotFoundError(f"data: no image and no .wav file under {tree.path / empty[0]}")
    others = [name for name in tree.folders if name not in (*train, *held)]
    for names in (train, *(found[kind] for kind in HELD_OUT)):
        if len(names) > 1:
            raise ValueError(
                f"data: {tree.path} must have one folder to train on and one to hold out, got {', '.join(names)}"
            )
    if train and held and len(tree.folders[train[0]].folders) > 1:
        # A held-out folder without classes, such as a competition's test images, has no labels to evaluate with.
        flat = [name for name in held if not tree.folders[name].folders]
        held = [name for name in held if name not in flat]
        notes += [f"left out: {name}, {_count(tree.folders[name])} images without class folders" for name in flat]
        if not held:
            return tree.folders[train[0]], None
    if train and held:
        for name in (*held[1:], *others):
            notes.append(f"left out: {name}, {_count(tree.folders[name])} images beside {train[0]} and {held[0]}")
        if tree.files:
            notes.append(f"left out: {len(tree.files)} images beside {train[0]} and {held[0]}")
        return tree.folders[train[0]], tree.folders[held[0]]
    if held:
        raise ValueError(
            f"data: {tree.path} has the folder {held[0]}, which names a held-out split, and none of "
            f"{', '.join(TRAIN)}; "
            "give the folder whose subfolders are the classes, or rename it if it is a class"
        )
    if train and not others and not tree.files:
        return _splits(tree.folders[train[0]], notes)
    if train and tree.folders[train[0]].folders:
        raise ValueError(
            f"data: {tree.path} has the folder {train[0]} with folders of its own beside "
            f"{', '.join(others[:5]) or 'images'}"
        )
    if len(tree.folders) == 1 and not tree.files:
        ((name, only),) = tree.folders.items()
        if only.folders and not only.files:  # left by unpacking an archive
            notes.append(f"read from the folder {name}")
            return _splits(only, notes)
    return tree, None


def _count(tree: Tree) -> int:
    return len(tree.every())


def _classes(train: Tree, held: Tree | None, notes: list[str]) -> list[list[tuple[Path, str]]]:
    """The files of each split with the name of their top-level folder; "" if folders are not classes."""
    sides = [train] if held is None else [train, held]
    if (
        held is not None
        and train.folders
        and held.folders.keys() - train.folders.keys()
        and len(train.folders) + len(held.folders) > 2
    ):
        extra = held.folders.keys() - train.folders.keys()
        raise ValueError(
            f"data: the classes of {held.path} must be among those of {train.path}: it has {_some(extra)}, which "
            "the other has not; "
            f"there are {_some(train.folders.keys())}"
        )
    if len(train.folders) < 2 or not all(side.folders for side in sides):
        if any(len(side.folders) > 1 for side in sides):
            notes.append(
                "no classes: "
                + " and ".join(f"{s.path.name} has {'' if s.folders else 'no '}class folders" for s in sides)
            )
        return [[(p, "") for p in side.every()] for side in sides]
    for side in sides:
        if side.files:
            notes.append(f"left out: {len(side.files)} images directly in {side.path.name}, beside its class folders")
        deep = sum(bool(f.folders) and sum(map(_count, f.folders.values())) for f in side.folders.values())
        if deep:
            notes.append(f"{deep} images of {side.path.name} lie deeper than their class folder")
    if held is not None and (missing := train.folders.keys() - held.folders.keys()):
        notes.append(f"no held-out image of {_some(missing)}")
    return [[(p, name) for name in sorted(side.folders) for p in side.folders[name].every()] for side in sides]


def _some(names: Iterable[str], most: int = 8) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
