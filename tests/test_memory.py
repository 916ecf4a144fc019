"""keep_memory, in separate processes because it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyvit.memory import scratch

PROGRAM = """
import resource, torch, pyvit
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(12 << 20).fill_(1)  # 48 MB: above what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before, kept, after = faults(), pyvit.keep_memory(), [faults() for _ in range(8)]
print(before, kept, after[-1])  # at first the heap grows, as often as its layout wants
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone can be told")
def test_memory_is_kept() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, kept, after = ran.stdout.split()
    assert kept == "True"
    assert int(after) * 10 < int(before)


def test_keep_memory_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyvit

    monkeypatch.setattr(platform, "libc_ver", lambda *_: ("musl", "1.2"))
    assert pyvit.keep_memory() is False


def test_scratch_memory_is_per_thread() -> None:
    first = scratch("test", (4, 6), torch.float32).fill_(7)
    again = scratch("test", (3, 5), torch.bfloat16)
    assert (again.shape, again.dtype, again.data_ptr()) == ((3, 5), torch.bfloat16, first.data_ptr())
    assert scratch("other", (4, 6), torch.float32).data_ptr() != first.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(lambda: scratch("test", (4, 6), torch.float32)).result()
    assert elsewhere.data_ptr() != first.data_ptr()
    with torch.inference_mode():
        larger = scratch("test", (100, 100), torch.float32)
    after = scratch("test", (10, 10), torch.float32).fill_(1)
    assert not after.is_inference()
    assert after.data_ptr() == larger.data_ptr()
    assert scratch("test", (0, 3), torch.float32).shape == (0, 3)
    huge = [scratch("test", (17 << 20,), torch.float32) for _ in range(2)]
    assert huge[0].data_ptr() != huge[1].data_ptr()
