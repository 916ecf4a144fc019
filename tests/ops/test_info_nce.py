"""info_nce against the naive form: values, gradients, memory, the compiler, errors."""

from __future__ import annotations

import pytest
import torch

import pyvit
from pyvit import library
from pyvit.ops import info_nce
from pyvit.testing import GRADIENT_FACTOR, compare, run
from tests.ops.pairwise_losses import PairwiseLossTests


class TestInfoNCE(PairwiseLossTests):
    op = staticmethod(info_nce)
    embeddings = ("a", "b")
    scalars = {"scale": 5.0}  # noqa: RUF012

    def test_single_pair(self) -> None:
        self.check_single_pair()

    def test_the_numerics_rule_notices_a_wrong_gradient(self) -> None:
        """Half of the right gradient fails."""
        tensors = self.inputs(20, 4)
        cotangent = [torch.ones(())]
        _, right = run(info_nce, tensors, ["a"], cotangent, backend="reference")
        _, exact = run(info_nce, {k: v.double() for k, v in tensors.items()}, ["a"], cotangent, backend="reference")
        with pytest.raises(AssertionError):
            compare("half", [right[0] / 2], right, exact, GRADIENT_FACTOR)


@pytest.mark.skipif(library.problem() is not None, reason="the library is not in use")
def test_the_kernels_refuse_wrong_shapes() -> None:
    a, b, sums = torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(5)
    with pytest.raises(RuntimeError, match="top_b must be 6 contiguous float32 numbers"):
        torch.ops.pyvit.pair_softmax(a, b, False, 1.0, sums, sums.clone(), sums.clone(), torch.zeros(6))


def test_explain_names_the_backend() -> None:
    assert pyvit.explain(info_nce, torch.randn(4, 2), torch.randn(4, 2), 1.0).chosen == "cpu"


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(X, X[:3], 1.0), r"b must be of the shape of a, \(4, 3\), got shape \(3, 3\)"),
        (lambda: info_nce(X[0], X, 1.0), r"a must be of shape \(N, D\)"),
        (lambda: info_nce(X[:0], X[:0], 1.0), "a must be of at least one row"),
        (lambda: info_nce(X, X, torch.ones(2)), "scale must be a number or a tensor of one element"),
        (lambda: info_nce(X, X.double(), 1.0), "b must have the dtype of a"),
        (lambda: info_nce(X.long(), X.long(), 1.0), "a must be float32"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
