"""Memory that a run has freed is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyvit import heap

#: In a new process, whose heap has no freed memory yet. Kept tensors lie between the freed ones, so that the heap
#: cannot shrink from its end.
PROGRAM = """
import torch
from pyvit import heap

trim = heap.Trimmer(slack=50 * 2**20)
assert not trim()
pairs = [(torch.ones(2**14), torch.ones(2**8)) for _ in range(1600)]
held = [kept for _, kept in pairs]
del pairs
before = heap.resident()
assert trim()
assert heap.resident() < before - 50 * 2**20, (heap.resident(), before)
assert all(kept.sum() == 2**8 for kept in held)
assert not trim()  # until it has grown again
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(heap._malloc() is None, reason="the C library is not glibc 2.33 or newer")
def test_freed_memory_is_given_back():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
