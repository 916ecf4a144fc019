"""Hugging Face data sets: hub names, and folders of parquet files, WebDataset shards, saved data sets or images with
metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyvit.data.dataset import Data, Images
from pyvit.data.decode import CENTRE, ImageDecoder
from pyvit.data.files import DecodedImages, Picked
from pyvit.data.split import COMPARED, HELD_OUT, TRAIN, digest, group_equal, hold_out, on_both_sides

#: Held-out splits: the first of these that exists is used.
_HELD = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


def split_spec(spec: str) -> tuple[str, str]:
    """ "NAME[:SPLIT]" to (name, split); the split is "" if there is none."""
    name, colon, split = spec.rpartition(":")
    if not colon or Path(spec).is_dir():
        return spec, ""
    return name, split


def open_hugging_face(name: str, streaming: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The splits of a hub name or a folder, and notes about what was left out. Raises ValueError with the reason if it
    cannot be read."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data 'hf:' needs the package datasets: pip install datasets") from error
    notes: list[str] = []
    try:
        return _open(datasets, name, streaming, notes), notes
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise kind(f"data: hf:{name} cannot be read: {reason}") from error


def _open(datasets: Any, name: str, streaming: bool, notes: list[str]) -> dict[str, Any]:
    root = Path(name).expanduser()
    if not root.is_dir():
        return dict(datasets.load_dataset(name, streaming=streaming))
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():  # written by save_to_disk
        loaded = datasets.load_from_disk(str(root))
        splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        return {k: v.to_iterable_dataset() for k, v in splits.items()} if streaming else splits
    for kind, ending in (("webdataset", ".tar"), ("parquet", ".parquet")):
        files = sorted(
            p
            for p in root.rglob("*")
            if p.suffix.lower() == ending and not any(x.startswith(".") for x in p.relative_to(root).parts)
        )
        if files:
            return dict(datasets.load_dataset(kind, data_files=_by_split(files, root, notes), streaming=streaming))
    odd = [
        p.name
        for p in root.iterdir()
        if p.is_dir() and p.name.lower() in (*TRAIN, *HELD_OUT) and p.name != p.name.lower()
    ]
    if odd:  # datasets would read all of it as one split, including the held-out images
        raise ValueError(
            f"the folders of splits must be in lower case, got {', '.join(sorted(odd))}; or give the folder without hf:"
        )
    return dict(datasets.load_dataset("imagefolder", data_dir=str(root), streaming=streaming))


def _by_split(files: Sequence[Path], root: Path, notes: list[str]) -> dict[str, list[str]]:
    """Files grouped by the split in their names, or else in their folders' names: train-00000-of-00004.parquet,
    val/0.tar."""
    found: dict[str, list[str]] = {}
    silent = []
    for path in files:
        split = next((s for part in (path.stem, *path.relative_to(root).parts[-2::-1]) if (s := _split_in(part))), None)
        if split is None:
            silent.append(str(path))
        else:
            found.setdefault(split, []).append(str(path))
    if not found:
        return {"train": silent}
    if silent:
        if "train" in found:
            notes.append(f"left out: {len(silent)} files whose names say no split, such as {Path(silent[0]).name}")
        else:
            found["train"] = silent
    return found


def _split_in(name: str) -> str | None:
    words = re.findall(r"[a-z]+", name.lower())
    if any(word in TRAIN for word in words):
        return "train"
    return next((word for word in words if word in HELD_OUT), None)


def choose_splits(loaded: dict[str, Any], name: str, split: str, notes: list[str]) -> tuple[Any, Any]:
    """(training, held-out) tables; the second is None if there is only one split."""
    train = split or "train"
    if train not in loaded:
        raise ValueError(
            f"data: hf:{name} must have the split {train!r}, got {', '.join(loaded)}; name one as hf:{name}:SPLIT"
        )
    held = next((s for s in _HELD if s in loaded and s != train and _has_labels(loaded[train], loaded[s])), None)
    others = [s for s in loaded if s not in (train, held)]
    notes.append(f"trained on the split {train}, " + (f"held out: {held}" if held else "a part of it is held out"))
    if others:
        notes.append(f"not used: the split{'s' if len(others) > 1 else ''} {', '.join(others)}")
    return loaded[train], None if held is None else loaded[held]


def _has_labels(train: Any, held: Any) -> bool:
    """Whether a held-out split has labels. Test splits of competitions do not: theirs are -1 or missing."""
    label = columns_of("", train.column_names)[1] if train.column_names else None
    if label is None or not held.column_names:
        return True
    if label not in held.column_names:
        return False
    first = held.select_columns([label])
    rows = first.take(512) if hasattr(first, "take") else first
    return any(row[label] not in (None, -1) for row in rows)


def columns_of(spec: str, columns: Sequence[str]) -> tuple[str, str | None, str | None]:
    """The columns of images, labels and captions."""
    find = lambda *names: next((c for c in names if c in columns), None)  # noqa: E731
    image = find("image", "jpg", "jpeg", "png", "webp", "img")
    if image is None:
        raise ValueError(f"data: hf:{spec} must have a column image, jpg, png or img, got {', '.join(columns)}")
    return image, find("label", "labels", "cls", "fine_label"), find("caption", "text", "txt")


class Column(Sequence[Any]):
    """A column of undecoded images, read item by item."""

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table[index][self.name]


def undecoded(table: Any, image: str) -> Any:
    """The table with undecoded images: :mod:`pyvit.data.decode` decodes all sources."""
    import datasets

    return (
        table.cast_column(image, datasets.Image(decode=False))
        if isinstance((table.features or {}).get(image), datasets.Image)
        else table
    )


def _groups(tables: Sequence[Any], image: str, notes: list[str]) -> list[int] | None:
    """A number for each row of the concatenated ``tables``, equal for images of the same bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if sum(map(len, tables)) > COMPARED:
        notes.append(f"not searched for repeated images: {sum(map(len, tables))} are too many")
        return None
    content: list[Any] = []
    for table in tables:
        plain = table.with_format("arrow")[:][image]
        chunks = plain.chunks if isinstance(plain, pa.ChunkedArray) else [plain]
        for chunk in chunks:
            if not pa.types.is_struct(chunk.type):
                return None
            files, paths = (pc.struct_field(chunk, part) for part in ("bytes", "path"))
            content += [(files, i) if files[i].is_valid else (paths, i) for i in range(len(chunk))]
    sizes = [len(column[i].as_buffer()) if column[i].is_valid else -at - 1 for at, (column, i) in enumerate(content)]
    return group_equal(sizes, lambda at: digest(memoryview(content[at][0][content[at][1]].as_buffer())))


def _labels(tables: Sequence[Any], column: str, name: str) -> tuple[list[list[int]], list[str]]:
    """Labels numbered from 0, and the names of the classes."""
    values = [list(table.with_format(None)[column]) for table in tables]
    names = getattr(tables[0].features.get(column), "names", None)
    every = [v for part in values for v in part]
    if unfit := [
        v for v in every if v is None or isinstance(v, (list, dict)) or (isinstance(v, float) and not math.isfinite(v))
    ]:
        raise ValueError(
            f"data: the column {column} of hf:{name} must have one label in each row, {len(unfit)} have {unfit[0]!r}"
        )
    if names is not None:
        if outside := sorted({v for v in every if not 0 <= v < len(names)}):
            raise ValueError(
                f"data: labels of hf:{name} must be in 0..{len(names) - 1}, got {', '.join(map(str, outside[:5]))}; "
                "a split without labels cannot be held out: name another as hf:NAME:SPLIT"
            )
        return values, list(names)
    known = sorted(set(values[0]))
    if extra := set(every) - set(known):
        raise ValueError(
            f"data: the held-out labels of hf:{name} must be among the training labels, got "
            f"{', '.join(map(str, sorted(extra)[:5]))}"
        )
    number = {v: i for i, v in enumerate(known)}
    return [[number[v] for v in part] for part in values], [str(v) for v in known]


def caption_texts(value: Any) -> list[str]:
    """The captions of an example, which may be a list. Empty captions are dropped."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if unfit := [v for v in values if not (v is None or isinstance(v, str))]:
        raise ValueError(f"data: captions must be text or lists of texts, got {type(unfit[0]).__name__}")
    return [text for text in values if text and text.strip()]


def _rows(
    tables: Sequence[Any], caption: str | None, notes: list[str]
) -> tuple[list[list[int]], list[list[str]] | None]:
    """For each table, the rows of its items and their captions. A row with several captions becomes several items; a
    row without captions is dropped."""
    if caption is None:
        return [list(range(len(table))) for table in tables], None
    texts = [[caption_texts(value) for value in table[caption]] for table in tables]
    if without := sum(not each for part in texts for each in part):
        notes.append(f"left out: {without} rows without a caption")
    return [[i for i, each in enumerate(part) for _ in each] for part in texts], [
        [t for each in part for t in each] for part in texts
    ]


def hugging_face(spec: str, size: int) -> Data:
    """ "NAME[:SPLIT]": a hub name, or a folder of parquet files, WebDataset shards, a saved data set or images with
    metadata.

    Splits are taken from the names of files and folders. If there is only one, one image in ten is held out.
    """
    name, split = split_spec(spec)
    loaded, notes = open_hugging_face(name)
    train, held = choose_splits(loaded, name, split, notes)
    image, label, caption = columns_of(spec, train.column_names)
    tables = [undecoded(table, image) for table in (train, held) if table is not None]
    for table in tables[1:]:
        if lacking := [c for c in (image, caption) if c and c not in table.column_names]:
            raise ValueError(
                f"data: the held-out split of hf:{name} must have the columns of the other, {', '.join(lacking)} "
                "is missing"
            )
    rows, texts = _rows(tables, caption, notes)
    if not all(rows):
        raise ValueError(
            f"data: hf:{name} must have {'captions' if caption else 'examples'} in every split, one has none"
        )
    labels, names = _labels(tables, label, name) if label else (None, None)
    groups = _groups(tables, image, notes)
    if groups is not None:
        groups = [groups[i + (len(tables[0]) if which else 0)] for which, part in enumerate(rows) for i in part]
    n = len(rows[0])
    if held is None:
        known = [labels[0][i] for i in rows[0]] if labels else None
        train_at, test_at = hold_out(groups or rows[0], known, names, rows[0], notes)
        sides = [(0, train_at), (0, test_at)]
    else:
        sides = [(which, list(range(len(part)))) for which, part in enumerate(rows)]
        if groups is not None:
            on_both_sides(groups[:n], groups[n:], notes)
    decoder = ImageDecoder(size, CENTRE if caption is None else 1.0)

    def part(which: int, at: list[int]) -> Images:
        chosen = [rows[which][i] for i in at]
        items = Picked(Column(tables[which].select_columns([image]), image), chosen)
        found = labels and [labels[which][i] for i in chosen]
        same = groups and [groups[i + which * n] for i in at]
        return DecodedImages(items, decoder, found, texts and [texts[which][i] for i in at], same)

    title = name.rstrip("/").rpartition("/")[2]
    return Data(title, part(*sides[0]), part(*sides[1]), (size, size), names, flip=caption is None, notes=notes)
