"""Accuracy of classifiers on the frozen features of a vision transformer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pyvit.data import Data
from pyvit.eval.features import LastBlocks, features
from pyvit.eval.knn import knn_accuracy
from pyvit.eval.linear import linear_probe


def frozen(encoder: nn.Module, data: Data, normalize: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """k-NN accuracy of the features, and linear accuracy of those of the last four blocks."""
    found = {}
    for name, network in (("knn", encoder), ("linear", LastBlocks(encoder, 4))):
        pair = [features(network.eval(), part, normalize) for part in (data.train, data.test)]
        found[name] = knn_accuracy(*pair) if name == "knn" else linear_probe(*pair)["linear"]
    return found
