"""Tables of image files and their captions."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from pyvit.data.dataset import Data, Images
from pyvit.data.decode import ImageDecoder
from pyvit.data.files import TOLERATED, TOLERATED_FILES, DecodedImages
from pyvit.data.split import group_files, hold_out

ENDINGS = (".csv", ".tsv", ".txt")


def captioned(path: Path, size: int) -> Data:
    """A table with a header and the columns ``image`` (paths, relative to the file) and ``caption``; ``label`` is
    optional.

    Fields are separated by commas, semicolons, tabs or vertical bars; the text is UTF-8, or UTF-16 with a byte order
    mark. One image in ten is held out, with all of its captions. Evaluation uses the largest centred square of an
    image. Images are not flipped, because that would swap "left" and "right".
    """
    rows, notes = read_table(path, ("image", "caption"))
    images = image_paths(path, rows)
    classes = None
    if "label" in rows[0]:
        if without := [row["line"] for row in rows if not row["label"]]:
            raise ValueError(
                f"data: {path} must have a label in every row, line {without[0]} and {len(without) - 1} more have none"
            )
        classes = sorted({row["label"] for row in rows})
    labels = [classes.index(row["label"]) for row in rows] if classes else None
    groups = same_image(images, notes)
    files = list(map(os.path.realpath, images))
    train, test = hold_out(groups, labels, classes, files, notes)

    def part(at: list[int]) -> Images:
        chosen = [images[i] for i in at], ImageDecoder(size, 1.0), labels and [labels[i] for i in at]
        return DecodedImages(*chosen, [rows[i]["caption"] for i in at], [groups[i] for i in at])

    notes.insert(0, f"one image in ten is held out, of {len(set(groups))}")
    return Data(path.stem, part(train), part(test), (size, size), classes, flip=False, notes=notes)


def image_paths(path: Path, rows: list[dict[str, str]]) -> list[Path]:
    """The files that the rows of the table ``path`` name. Raises FileNotFoundError if many do not exist."""
    images = [path.parent / row["image"] for row in rows]
    missing = [image for image in dict.fromkeys(images) if not os.path.exists(image)]
    if len(missing) > max(TOLERATED * len(set(images)), TOLERATED_FILES):
        raise FileNotFoundError(
            f"data: {len(missing)} of {len(set(images))} images that {path} names do not exist, the first: {missing[0]}"
        )
    return images


def same_image(images: list[Path], notes: list[str]) -> list[int]:
    """A number for each row, equal for rows of the same file or of files with the same content."""
    files = list(dict.fromkeys(map(os.path.realpath, images)))
    equal = group_files([Path(f) for f in files])
    if equal is None:
        notes.append(f"not searched for repeated images: {len(files)} files are too many")
    number = dict(zip(files, equal or range(len(files)), strict=True))
    return [number[os.path.realpath(image)] for image in images]


def _text(path: Path) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"data: {path} must be UTF-8, or UTF-16 with its mark; line {line} is not: save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"data: {path} must be text; line {text.count(chr(10), 0, text.index(chr(0))) + 1} has NUL bytes"
        )
    return text


def _reader(path: Path) -> tuple[Any, str]:
    """A reader of the table's rows, and what separates their fields."""
    text = _text(path)
    parting = max(",;\t|", key=text.lstrip().partition("\n")[0].count)
    return csv.reader(io.StringIO(text, newline=""), delimiter=parting, skipinitialspace=True, strict=True), parting


def header_of(path: Path) -> list[str]:
    """The names of the table's columns, in lower case."""
    try:
        return [name.strip().lower() for name in next((row for row in _reader(path)[0] if row), [])]
    except csv.Error as error:
        raise ValueError(f"data: {path}: {error}") from error


def read_table(
    path: Path, columns: tuple[str, ...], may_be_empty: tuple[str, ...] = ()
) -> tuple[list[dict[str, str]], list[str]]:
    """Rows with their line numbers under "line", and notes about rows that were left out: those with an empty field in
    ``columns``."""
    table, parting = _reader(path)
    wanted, filled = " and ".join(columns), [c for c in columns if c not in may_be_empty]
    rows: list[dict[str, str]] = []
    empty = 0
    try:
        header = [name.strip().lower() for name in next((row for row in table if row), [])]
        if not set(columns) <= set(header):
            raise ValueError(
                f"data: {path} must have a header with the columns {wanted}, got {', '.join(header) or 'no row'}"
            )
        if len(set(header)) < len(header):
            raise ValueError(f"data: {path} must name each column once, got {', '.join(header)}")
        for row in table:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"data: {path}, line {table.line_num}: {len(row)} fields under a header of {len(header)}; "
                    f"quote fields that contain {parting!r}"
                )
            named = {**dict(zip(header, map(str.strip, row), strict=True)), "line": str(table.line_num)}
            if all(named[c] for c in filled):
                rows.append(named)
            else:
                empty += 1
    except csv.Error as error:
        raise ValueError(f"data: {path}, line {table.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"data: {path} must have rows with {_with(filled, 'and')} under its header, got none")
    return rows, [f"left out: {empty} rows without {_with(filled, 'or')}"] if empty else []


def _with(columns: list[str], word: str) -> str:
    return f" {word} ".join(f"a{'n' if c[0] in 'aeiou' else ''} {c}" for c in columns)
