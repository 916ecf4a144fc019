"""Weighted k-nearest neighbours on frozen features (Wu et al., 2018; DINO, appendix F)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.data import Data
from pyvit.eval.features import check_finite, check_labelled, features, right


def knn_predict(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class scores (M, classes): the k most similar rows of ``bank`` (N, D) vote with weights exp(cosine /
    temperature).

    queries (M, D), labels (N,). Queries are processed in blocks, so that not all similarities are stored at once.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"knn: k must be in 1..{len(bank)}, the size of the bank, got {k}")
    if not temperature > 0:
        raise ValueError(f"knn: temperature must be above 0, got {temperature}")
    check_finite("knn", queries, bank)
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    votes = []
    for block in queries.split(1024):
        similar = block @ bank.t()
        values, nearest = similar.topk(min(k + 1, len(bank)), 1)
        weights = ((values[:, :k] - 1) / temperature).exp()
        vote = weights.new_zeros(len(block), classes).scatter_add_(1, labels[nearest[:, :k]], weights)
        if len(bank) > k:
            for row in (values[:, k] == values[:, k - 1]).nonzero()[:, 0]:
                vote[row] = _shared_votes(similar[row], labels, classes, k, temperature)
        votes.append(vote)
    return torch.cat(votes)


def _shared_votes(similar: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Votes (classes,) of a query if several neighbours are as similar as the k-th: they share the remaining votes."""
    last = similar.topk(k).values[-1]
    nearer, tied = similar > last, similar == last
    weights = ((similar - 1) / temperature).exp() * (nearer + tied * ((k - nearer.sum()) / tied.sum()))
    return weights.new_zeros(classes).scatter_add_(0, labels, weights)


def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy in per cent; both arguments are (features, labels)."""
    check_labelled("knn", train, test)
    classes = int(max(train[1].max(), test[1].max())) + 1
    return 100 * right(knn_predict(test[0], *train, classes, k, temperature), test[1])


def knn_accuracy_of(recipe: Any, data: Data, k: int = 20) -> dict[str, float]:
    """{"knn": accuracy} of a recipe's exported network, or {} for data without labels or with several per image."""
    if data.classes is None or len(data.classes) < 2 or data.multilabel:
        return {}
    train, test = (
        features(recipe.encoder(), part, recipe.normalize, group=recipe.group)
        for part in (data.train.sample(), data.test)
    )
    return {"knn": knn_accuracy(train, test, min(k, len(train[0])))}
