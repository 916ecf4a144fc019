"""Measures of classification: balanced accuracy, a table of classes, mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvit.eval.features import right

#: Classes are imbalanced if the largest has more than this many times the items of the smallest.
IMBALANCE = 1.5


def counts(labels: Tensor, classes: int) -> Tensor:
    """Items of each class, (classes,) int64. labels (N,), or for several labels per item (N, classes) of 0 and 1."""
    return torch.bincount(labels, minlength=classes) if labels.dim() == 1 else labels.long().sum(0)


def imbalanced(count: Tensor) -> bool:
    """Whether classes with ``count`` items differ much in size."""
    return bool(count.max() > IMBALANCE * count.min())


def balanced_weights(count: Tensor) -> Tensor:
    """Weights (classes,) with which all classes with ``count`` items count the same: N / (classes x count). The mean
    over the items is 1. A class without items has weight 0."""
    present = count > 0
    return torch.where(present, count.sum() / (present.sum() * count.clamp(min=1)), 0.0)


def balanced_accuracy(scores: Tensor, labels: Tensor) -> float:
    """The mean over the classes that occur of the share of correct predictions. scores (N, classes), labels (N,)."""
    return sum(right(scores[labels == c], labels[labels == c]) for c in labels.unique()) / len(labels.unique())


def class_table(scores: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each class its number of items, and precision and recall of the highest score in per cent, None if there is
    nothing to divide by."""
    predicted = scores.argmax(1)
    table = {}
    for c, name in enumerate(classes):
        of_class, chosen = labels == c, predicted == c
        both = int((of_class & chosen).sum())
        of = lambda n: 100 * both / int(n) if n else None  # noqa: B023, E731
        table[name] = {"images": int(of_class.sum()), "precision": of(chosen.sum()), "recall": of(of_class.sum())}
    return table


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """The average precision (classes,) of scores (N, classes) for targets (N, classes) of 0 and 1; NaN for a class
    without items.

    It is the mean precision at the rank of each item of the class. Items with equal scores have the same rank, the
    last of theirs.
    """
    found = scores.new_full((scores.shape[1],), torch.nan, dtype=torch.float64)
    for c in range(scores.shape[1]):
        values, order = scores[:, c].sort(descending=True)
        hit = targets[order, c].double()
        if hit.sum() == 0:
            continue
        precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1, dtype=torch.float64, device=hit.device)
        last = torch.searchsorted(-values, -values, right=True) - 1  # the last position of an equal score
        found[c] = (precision[last] * hit).sum() / hit.sum()
    return found


def show(table: dict[str, dict[str, Any]], most: int = 20) -> str:
    """A table of classes as text, those with the lowest recall or average precision first."""
    measure = next(key for key in ("recall", "average_precision") if key in next(iter(table.values())))
    ranked = sorted(table.items(), key=lambda item: (item[1][measure] is None, item[1][measure] or 0))
    columns = list(next(iter(table.values())))
    width = max(len(name) for name, _ in ranked[:most])
    rows = ["  ".join([" " * width, *columns])]
    for name, row in ranked[:most]:
        cells = ["-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()]
        rows.append("  ".join([name.ljust(width), *(v.rjust(len(c)) for v, c in zip(cells, columns, strict=True))]))
    return "\n".join([*rows, *([f"and {len(ranked) - most} classes more"] if len(ranked) > most else [])])
