"""Tables of image files and their labels, one or several for each image."""

from __future__ import annotations

import os
from pathlib import Path

from pyvit.data.captions import header_of, image_paths, read_table, same_image
from pyvit.data.dataset import Data, Images
from pyvit.data.decode import ImageDecoder
from pyvit.data.files import DecodedImages
from pyvit.data.split import hold_out


def has_labels(path: Path) -> bool:
    """Whether a table has labels and no captions."""
    return bool({"label", "labels"} & (header := set(header_of(path)))) and "caption" not in header


def labelled(path: Path, size: int) -> Data:
    """A table with a header and the columns ``image`` (paths, relative to the file) and ``label``, one class, or
    ``labels``, any number of classes separated by vertical bars.

    One image in ten is held out, of each class if images have one. Files are read as
    :func:`pyvit.data.captions.captioned` reads them.
    """
    several = "labels" in header_of(path)
    column = "labels" if several else "label"
    rows, notes = read_table(path, ("image", column), (column,) if several else ())
    images = image_paths(path, rows)
    named = [[part.strip() for part in row[column].split("|")] if several else [row[column]] for row in rows]
    named = [[name for name in names if name] for names in named]
    classes = sorted({name for names in named for name in names})
    if not classes:
        raise ValueError(f"data: {path} must have labels, all fields of the column {column} are empty")
    number = {name: i for i, name in enumerate(classes)}
    groups, files = same_image(images, notes), list(map(os.path.realpath, images))
    labels = [_row(names, number) if several else number[names[0]] for names in named]
    train, test = hold_out(groups, None if several else labels, classes, files, notes)  # type: ignore[arg-type]

    def part(at: list[int]) -> Images:
        return DecodedImages(
            [images[i] for i in at],
            ImageDecoder(size),
            [labels[i] for i in at],
            groups=[groups[i] for i in at],  # type: ignore[arg-type]
        )

    notes.insert(0, f"one image in ten is held out, of {len(set(groups))}")
    return Data(path.stem, part(train), part(test), (size, size), classes, multilabel=several, notes=notes)


def _row(names: list[str], number: dict[str, int]) -> list[int]:
    row = [0] * len(number)
    for name in names:
        row[number[name]] = 1
    return row
