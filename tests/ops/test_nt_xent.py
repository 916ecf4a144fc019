"""nt_xent against the naive form: values, gradients, memory, the compiler, errors."""

from __future__ import annotations

import pytest
import torch

from pyvit.ops import nt_xent
from tests.ops.pairwise_losses import PairwiseLossTests


class TestNTXent(PairwiseLossTests):
    op = staticmethod(nt_xent)
    embeddings = ("z1", "z2")
    scalars = {"temperature": 0.3}  # noqa: RUF012

    def test_single_pair(self) -> None:
        self.check_single_pair()


def test_an_unknown_backend_is_an_error() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="backend must be one of"):
        nt_xent(x, x, 0.1, backend="gpu")
