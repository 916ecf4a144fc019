"""sinkhorn_knopp and sinkhorn_center against the naive form."""

from __future__ import annotations

import pytest
import torch

from pyvit.ops import loss_tiles, reference_losses, sinkhorn_center, sinkhorn_knopp
from pyvit.testing import FORWARD_FACTOR, compare


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few dozen rows make several tiles, of which the last is not full."""
    monkeypatch.setattr(loss_tiles, "TILE", 16)


@pytest.mark.parametrize(("b", "k"), [(1, 1), (5, 3), (37, 50), (64, 4)])
def test_against_reference(b, k):
    scores = torch.randn(b, k)
    want = reference_losses.sinkhorn_knopp(scores.double(), 0.3, 3)
    naive = reference_losses.sinkhorn_knopp(scores, 0.3, 3)
    compare("sinkhorn", sinkhorn_knopp(scores, 0.3, 3), naive, want, FORWARD_FACTOR, dtype=torch.float32)
    torch.testing.assert_close(want.sum(1), torch.ones(b, dtype=torch.float64))
    features, prototypes = torch.randn(b, 6), torch.randn(k, 6)
    center = sinkhorn_center(features, 0.3, 3, prototypes=prototypes)
    products = features @ prototypes.t()
    torch.testing.assert_close(((products - center) / 0.3).softmax(-1), sinkhorn_knopp(products, 0.3, 3))


def test_no_iterations_normalise_the_batch_as_a_whole():
    scores = torch.randn(37, 50)
    found = sinkhorn_knopp(scores, 0.3, 0)
    torch.testing.assert_close(found, (scores.flatten() / 0.3).softmax(0).view(37, 50) * 37)


def test_prototypes_get_equal_shares():
    """After many iterations every prototype has the same total."""
    share = sinkhorn_knopp(torch.randn(64, 8).double(), 0.5, 200).sum(0)
    torch.testing.assert_close(share, torch.full((8,), 8.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn_knopp(X, -1.0), "temperature must be positive"),
        (lambda: sinkhorn_knopp(X, 1.0, -1), "iterations must be at least 0"),
        (lambda: sinkhorn_knopp(X, 1.0, 2.5), "iterations must be an int"),
        (lambda: sinkhorn_center(X, 1.0, 0), "iterations must be at least 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
