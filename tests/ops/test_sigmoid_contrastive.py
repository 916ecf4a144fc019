"""sigmoid_contrastive against the naive form: values, gradients, memory, the compiler, errors."""

from __future__ import annotations

import pytest
import torch

from pyvit import library
from pyvit.ops import sigmoid_contrastive
from tests.ops.pairwise_losses import PairwiseLossTests


class TestSigmoidContrastive(PairwiseLossTests):
    op = staticmethod(sigmoid_contrastive)
    embeddings = ("a", "b")
    scalars = {"scale": 5.0, "bias": -3.0}  # noqa: RUF012


@pytest.mark.skipif(library.problem() is not None, reason="the library is not in use")
def test_the_kernels_refuse_wrong_shapes() -> None:
    a, b, sums = torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"pairs: b must be of shape \(\*, 4\), got \(6, 3\)"):
        torch.ops.pyvit.pair_sigmoid(a, b[:, :3], -1, 1.0, 0.0, sums)
    with pytest.raises(RuntimeError, match="rows padded to 16"):
        torch.ops.pyvit.pair_sigmoid_backward(a, b, -1, 1.0, 0.0, sums, torch.zeros(5, 4), torch.zeros(6, 16))
