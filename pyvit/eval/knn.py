"""Weighted k-nearest neighbours on frozen features (Wu et al., 2018; DINO, appendix F)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.data import Data
from pyvit.eval.features import features


def knn_predict(queries: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Class scores (M, classes): the k most similar of ``bank`` (N, D) vote with exp(cosine / temperature).

    queries (M, D), labels (N,). Queries are taken in blocks, so that the similarities of all to all are never held.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"knn: k must be in 1..{len(bank)}, the size of the bank, got {k}")
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    votes = []
    for block in queries.split(1024):
        similar, nearest = (block @ bank.t()).topk(k, 1)
        weights = ((similar - 1) / temperature).exp()
        votes.append(weights.new_zeros(len(block), classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


def knn_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], k: int = 20, temperature: float = 0.07) -> float:
    """Percentage of test features whose neighbours' vote is right; both are (features, labels)."""
    classes = int(max(train[1].max(), test[1].max())) + 1
    return 100 * (knn_predict(test[0], *train, classes, k, temperature).argmax(1) == test[1]).float().mean().item()


def knn_accuracy_of(recipe: Any, data: Data, k: int = 20) -> dict[str, float]:
    """{"knn": accuracy} of a recipe's exported network, or {} for data without labels."""
    if data.classes is None:
        return {}
    model = recipe.exported()
    train, test = (features(model, part, recipe.normalize) for part in (data.train.sample(), data.test))
    return {"knn": knn_accuracy(train, test, min(k, len(train[0])))}
