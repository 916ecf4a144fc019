"""The images to embed, in a fixed order: of a folder, of tar files (WebDataset) or of parquet files (Hugging Face)."""

from __future__ import annotations

import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pyvit.data.layout import IMAGES, scan
from pyvit.data.split import HELD_OUT, TRAIN

#: Columns of images and of labels in parquet files; the first that exists is used.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label", "class")

#: Rows of a parquet file that are read at a time.
_ROWS = 64


class Slice(NamedTuple):
    """A file's bytes within an archive."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.path.name} ends within the image")
        return content


class Item(NamedTuple):
    """An image: its name, relative to the source and the same in every run, its class or the file that holds it, and
    its own file or bytes."""

    name: str
    marked: str | Slice | None
    place: Path | Slice | bytes | None

    @property
    def label(self) -> str | None:
        """The class, or None if it is unknown."""
        if isinstance(self.marked, Slice):
            return self.marked.read().decode("utf-8", "replace").strip()
        return self.marked

    def source(self) -> Path | bytes | None:
        """What :func:`pyvit.data.decode.open_image` opens."""
        return self.place.read() if isinstance(self.place, Slice) else self.place


class Images:
    """Base of the sources. ``files`` are the (name, size) of the files on disk, which say whether a source has
    changed; ``notes`` says what is left out."""

    kind = ""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]], notes: Sequence[str] = ()) -> None:
        self.root, self.files, self.notes = root, list(files), list(notes)

    def __len__(self) -> int:
        raise NotImplementedError

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """The images at positions ``start`` to ``stop``."""
        raise NotImplementedError

    def open(self, name: str) -> Path | bytes | None:
        """The image called ``name``, for :func:`pyvit.data.decode.open_image`."""
        raise NotImplementedError


class Folder(Images):
    """Image files of a folder and its subfolders, sorted by name. The class is the first subfolder, below that of a
    split."""

    kind = "folder"

    def __init__(self, root: Path, paths: Sequence[Path], notes: Sequence[str]) -> None:
        self.names = [path.relative_to(root).as_posix() for path in paths]
        super().__init__(root, [(n, os.stat(p).st_size) for n, p in zip(self.names, paths, strict=True)], notes)

    def __len__(self) -> int:
        return len(self.names)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for name in self.names[start:stop]:
            yield Item(name, self._label(name), self.root / name)

    @staticmethod
    def _label(name: str) -> str | None:
        folders = name.split("/")[:-1]
        if len(folders) > 1 and folders[0].lower() in (*TRAIN, *HELD_OUT):
            folders = folders[1:]
        return folders[0] if folders else None

    def open(self, name: str) -> Path | bytes | None:
        return self.root / name


class Tar(Images):
    """Image files in uncompressed tar files, in their order. The class is the content of the ``.cls`` file with the
    same key."""

    kind = "tar"

    def __init__(self, root: Path, paths: Sequence[Path], notes: Sequence[str] = ()) -> None:
        super().__init__(root, _named(root, paths), notes)
        self._items = [item for path in paths for item in self._index(path)]

    def __len__(self) -> int:
        return len(self._items)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        yield from self._items[start:stop]

    def _index(self, path: Path) -> Iterator[Item]:
        images: list[tuple[str, Slice]] = []
        labels: dict[str, Slice] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # which it would keep of every member
                    key, _, ending = _key(member.name)
                    place = Slice(path, member.offset_data, member.size)
                    if member.isreg() and ending == "cls":
                        labels[key] = place
                    elif member.isreg() and Path(member.name).suffix.lower() in IMAGES:
                        images.append((member.name, place))
        except tarfile.TarError as error:
            reason = "compressed, unpack it first" if _compressed(path) else f"no tar file, or damaged: {error}"
            raise ValueError(f"embed: {path} is {reason}") from error
        archive_name = path.relative_to(self.root).as_posix()
        for name, place in images:
            yield Item(f"{archive_name}#{name}", labels.get(_key(name)[0]), place)

    def open(self, name: str) -> Path | bytes | None:
        found = next((item for item in self._items if item.name == name), None)
        if found is None:
            raise FileNotFoundError(f"{self.root} has no image {name}")
        return found.source()


def _key(name: str) -> tuple[str, str, str]:
    """WebDataset's key and ending: the base name is split at its first dot."""
    folder, slash, base = name.rpartition("/")
    key, dot, ending = base.partition(".")
    return folder + slash + key, dot, ending


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


class Parquet(Images):
    """A column of encoded images in parquet files, as Hugging Face stores them ({"bytes", "path"}) or as bytes. An
    image is called FILE#ROW."""

    kind = "parquet"

    def __init__(self, root: Path, paths: Sequence[Path], notes: Sequence[str] = ()) -> None:
        super().__init__(root, _named(root, paths), notes)
        self.paths = list(paths)
        pq = _pyarrow("read")
        counts: list[int] = []
        for path in paths:
            try:
                held = pq.ParquetFile(path)
            except Exception as error:  # pyarrow raises exceptions of its own for damaged files
                raise ValueError(f"embed: {path} is no parquet file, or damaged: {error}") from error
            if not counts:
                self._choose(path, held.schema_arrow)
            elif self.image not in held.schema_arrow.names:
                raise ValueError(f"embed: {path} has no column {self.image}, which {paths[0].name} has")
            counts.append(held.metadata.num_rows)
        self.starts = [0, *accumulate(counts)]

    def _choose(self, path: Path, schema: Any) -> None:
        image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        if image is None:
            raise ValueError(
                f"embed: {path} must have a column of images, {', '.join(IMAGE_COLUMNS)}; it has "
                f"{', '.join(schema.names)}"
            )
        self.image = image
        self.label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        self.classes = (features.get(self.label) or {}).get("names") if self.label else None

    def __len__(self) -> int:
        return self.starts[-1]

    def items(self, start: int, stop: int) -> Iterator[Item]:
        at = bisect_right(self.starts, start) - 1
        while start < stop and at < len(self.paths):
            last = min(stop, self.starts[at + 1])
            yield from self._rows(self.paths[at], start - self.starts[at], last - self.starts[at])
            start, at = last, at + 1

    def _rows(self, path: Path, start: int, stop: int) -> Iterator[Item]:
        file = _pyarrow("read").ParquetFile(path)
        name = path.relative_to(self.root).as_posix()
        columns = [self.image, *([self.label] if self.label and self.label in file.schema_arrow.names else [])]
        first, row = 0, 0
        groups: list[int] = []
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            if row < stop and row + n > start:
                first = row if not groups else first
                groups.append(group)
            row += n
        row = first
        for batch in self._read(path, file.iter_batches(_ROWS, row_groups=groups, columns=columns)):
            low, high = max(start - row, 0), min(stop - row, len(batch))
            for i, value in enumerate(batch.slice(low, max(high - low, 0)).to_pylist(), row + low):
                yield Item(f"{name}#{i}", self._label(value.get(self.label)), self._place(path, value[self.image]))
            row += len(batch)
            if row >= stop:
                return

    @staticmethod
    def _read(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except Exception as error:  # pyarrow raises exceptions of its own for damaged files
            raise ValueError(f"embed: {path} is damaged: {error}") from error

    @staticmethod
    def _place(path: Path, value: Any) -> Path | bytes | None:
        if not isinstance(value, Mapping):
            return value
        if value.get("bytes") is not None or not value.get("path"):
            return value.get("bytes")
        return path.parent / value["path"]

    def _label(self, value: Any) -> str | None:
        known = self.classes is not None and isinstance(value, int) and 0 <= value < len(self.classes)
        return None if value is None else str(self.classes[value] if known else value)

    def open(self, name: str) -> Path | bytes | None:
        file, _, row = name.rpartition("#")
        at = next((i for i, path in enumerate(self.paths) if path.relative_to(self.root).as_posix() == file), None)
        if at is None:
            raise FileNotFoundError(f"{self.root} has no file {file}")
        place = self.starts[at] + int(row)
        return next(self.items(place, place + 1)).source()


def _named(root: Path, paths: Sequence[Path]) -> list[tuple[str, int]]:
    return [(path.relative_to(root).as_posix(), os.stat(path).st_size) for path in paths]


def _pyarrow(purpose: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"embed: to {purpose} parquet files needs pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def open_images(source: str | Path) -> Images:
    """The images of a folder, of a .tar or .parquet file, or of a folder of these.

    Hidden files are ignored and symbolic links followed, as in training. Raises FileNotFoundError if there is nothing
    to embed, ValueError for a damaged archive.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"embed: {path} does not exist")
    if path.is_file():
        kinds = {".tar": Tar, ".parquet": Parquet}
        if (kind := kinds.get(path.suffix.lower())) is None:
            raise ValueError(f"embed: must be a folder, a .tar or a .parquet file, got {path}")
        return kind(path.parent, [path])
    tree = scan(path)
    for ending, archives in ((IMAGES, None), ((".tar",), Tar), ((".parquet",), Parquet)):
        found = tree.pruned(ending)
        paths = found.every()
        if paths:
            passed = [f"{n} {what}" for what, n in found.passed_over().most_common(6) if not what.startswith("folder")]
            notes = [f"left out: {', '.join(passed)}"] if passed else []
            return Folder(path, paths, notes) if archives is None else archives(path, paths, notes)
    raise FileNotFoundError(f"embed: no image ({', '.join(IMAGES)}), .tar or .parquet file under {path}")
