"""koleo against its definition and the naive form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import pyvit
from pyvit.ops import koleo, loss_tiles
from pyvit.testing import run


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few dozen rows make several tiles, of which the last is not full."""
    monkeypatch.setattr(loss_tiles, "TILE", 16)


@pytest.mark.parametrize("n", [2, 17, 50])
def test_against_definition(n):
    x = F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1)
    (got,), (grad,) = run(koleo, {"x": x}, ["x"], [torch.ones((), dtype=torch.float64)], backend="cpu")
    distances = torch.cdist(x, x).fill_diagonal_(math.inf)
    torch.testing.assert_close(got, -distances.amin(1).log().mean(), rtol=1e-6, atol=1e-6)
    (_, (want,)) = run(koleo, {"x": x}, ["x"], [torch.ones((), dtype=torch.float64)], backend="reference")
    torch.testing.assert_close(grad, want)


def test_gradients_of_equal_rows_are_finite():
    x = torch.ones(4, 3).requires_grad_()
    koleo(x).backward()
    assert x.grad.isfinite().all()


def test_explain_names_the_backend():
    assert pyvit.explain("koleo", torch.randn(4, 2)).chosen == "cpu"


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: koleo(X[:0]), "x must be of at least one row"),
        (lambda: koleo(X, eps=-1.0), "eps must be at least 0"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
