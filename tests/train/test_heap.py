"""Memory that a run has freed is given back."""

import sys

import pytest
import torch

from pyvit.train import heap

pytestmark = pytest.mark.skipif(heap._malloc() is None, reason="the C library is not glibc 2.33 or newer")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back():
    trim = heap.Trimmer(slack=50 * 2**20)
    assert not trim()
    pairs = [(torch.ones(2**14), torch.ones(2**8)) for _ in range(1600)]
    held = [kept for _, kept in pairs]  # between freed tensors, so that the heap cannot shrink from its end
    del pairs
    before = heap.resident()
    assert trim()
    assert heap.resident() < before - 50 * 2**20
    assert all(kept.sum() == 2**8 for kept in held)
    assert not trim()  # until it has grown again
