"""keep_memory, in a process of its own, for it cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch, pyvit
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(12 << 20).fill_(1)  # 48 MB: above what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), pyvit.keep_memory(), faults() and faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone can be told")
def test_memory_is_kept() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, kept, after = ran.stdout.split()
    assert kept == "True"
    assert int(after) * 10 < int(before)


def test_without_glibc_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyvit

    monkeypatch.setattr(platform, "libc_ver", lambda *_: ("musl", "1.2"))
    assert pyvit.keep_memory() is False
