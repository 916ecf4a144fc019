"""Predictions of a classifier on files, in their order, one batch in memory at a time."""

from __future__ import annotations

import csv
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from pyvit.data.decode import ImageDecoder
from pyvit.data.files import DecodedImages, warn_skipped
from pyvit.data.layout import IMAGES, scan
from pyvit.data.loading import evaluation_batches
from pyvit.eval.features import Progress


class Files(DecodedImages):
    """Image files. Any number of them may be unreadable: they are left out and listed in ``bad``."""

    def note(self, problems: Mapping[int, str]) -> None:
        for at, problem in problems.items():
            if at not in self._bad:
                self._bad[at] = problem
                warn_skipped(problem, len(self._bad))


def image_files(source: Path) -> tuple[list[str], str]:
    """The images in a folder and all folders below, or the one file, in a fixed order; and what was left out, as text.

    Raises FileNotFoundError if there are none.
    """
    if source.is_file():
        return [str(source)], ""
    if not source.exists():
        raise FileNotFoundError(f"data: {str(source)!r} does not exist")
    tree = scan(source).pruned(IMAGES)
    if not (found := [str(path) for path in tree.every()]):
        raise FileNotFoundError(f"data: no image ({', '.join(IMAGES)}) under {source}")
    return found, ", ".join(f"{n} {what}" for what, n in tree.passed_over().most_common(8))


class Prediction(NamedTuple):
    """An image's path, its class probabilities (classes,) float32, and its pixels as the network saw them,
    uint8 (3, H, W)."""

    path: str
    probabilities: Tensor
    image: Tensor


@torch.inference_mode()
def predictions(
    model: nn.Module,
    files: Files,
    normalize: Callable[[Tensor], Tensor],
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    multi_label: bool = False,
) -> Iterator[Prediction]:
    """The readable files with their class probabilities: softmax, or with ``multi_label`` a sigmoid per class.

    ``model`` maps normalised images (B, 3, H, W) of ``dtype``, on its device, to scores (B, classes). Results do not
    depend on ``workers``, the number of processes that decode.
    """
    device = next(model.parameters()).device
    progress = Progress(len(files), "predicting")
    for part in evaluation_batches(files, range(len(files)), batch, workers):
        if len(part["image"]):
            scores = model(normalize(part["image"].to(device)).to(dtype)).float()
            found = (scores.sigmoid() if multi_label else scores.softmax(1)).cpu()
            for at, row, image in zip(part["index"].tolist(), found, part["image"], strict=True):
                yield Prediction(files.items[at], row, image)
        progress.update(len(part["image"]))
    progress.close()


class Extremes:
    """The ``count`` predictions with the largest and the smallest probability of their likeliest class."""

    def __init__(self, count: int) -> None:
        self.count, self._seen = count, 0
        self._most: list[tuple[float, int, Prediction]] = []
        self._least: list[tuple[float, int, Prediction]] = []

    def add(self, found: Prediction) -> None:
        self._seen += 1
        sure = float(found.probabilities.max())
        kept = found._replace(probabilities=found.probabilities.clone(), image=found.image.clone())
        for heap, key in ((self._most, sure), (self._least, -sure)):
            if len(heap) < self.count:
                heapq.heappush(heap, (key, -self._seen, kept))
            elif heap and key > heap[0][0]:
                heapq.heapreplace(heap, (key, -self._seen, kept))

    def most(self) -> list[Prediction]:
        """The most certain, in descending order."""
        return [found for *_, found in sorted(self._most, reverse=True)]

    def least(self) -> list[Prediction]:
        """The least certain that are not among the most certain, in ascending order of certainty."""
        shown = {number for _, number, _ in self._most}
        return [found for _, number, found in sorted(self._least, reverse=True) if number not in shown]


class Table:
    """A CSV file of predictions: ``path``, ``class``, ``probability``, then the next likeliest as ``class_2``,
    ``probability_2``, ... up to ``top``.

    With ``threshold`` an image may have several classes or none: ``class`` holds those that reach it, separated by
    ``|``, and ``class_1``, ``probability_1``, ... follow.
    """

    def __init__(self, file: TextIO, classes: Sequence[str], top: int, threshold: float | None = None) -> None:
        self.classes, self.top, self.threshold = classes, min(top, len(classes)), threshold
        self._rows: Any = csv.writer(file, lineterminator="\n")
        first = 1 if threshold is not None else 2
        names = ["path", "class"] if threshold is not None else ["path", "class", "probability"]
        self._rows.writerow(
            names + [f"{what}_{k}" for k in range(first, self.top + 1) for what in ("class", "probability")]
        )

    def add(self, found: Prediction) -> None:
        ranked = [(self.classes[c], f"{p:.6f}") for p, c in zip(*best(found.probabilities, self.top), strict=True)]
        row = [found.path]
        if self.threshold is not None:
            above = (found.probabilities >= self.threshold).nonzero()[:, 0].tolist()
            row.append("|".join(self.classes[c] for c in above))
        self._rows.writerow(row + [cell for pair in ranked for cell in pair])


def best(probabilities: Tensor, count: int) -> tuple[list[float], list[int]]:
    """The ``count`` largest probabilities in descending order, and their classes; of equals the first class first."""
    values, at = probabilities.sort(descending=True, stable=True)
    return values[:count].tolist(), at[:count].tolist()


def files_of(names: list[str], size: tuple[int, int], centre: float) -> Files:
    """``names`` decoded as in evaluation: the centre crop ``centre``, resized to ``size``."""
    if size[0] != size[1]:
        raise ValueError(f"predict: images must be square, the network takes {size[0]} x {size[1]}")
    return Files(names, ImageDecoder(size[1], centre))
