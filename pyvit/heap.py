"""Giving freed memory back to the system.

glibc's malloc fragments under the aligned allocations of tensors of many sizes: the freed memory of a run grows by
several MB a step and stays resident. PyTorch's own kernels are affected as well.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

#: Freed memory is given back whenever the resident memory has grown by this many bytes.
SLACK = 512 * 2**20


class _Statistics(ctypes.Structure):
    """glibc's ``struct mallinfo2``: ``uordblks`` bytes are in use, ``fordblks`` bytes are free but kept."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@functools.cache
def _malloc() -> Any:
    """The C library, or None if it is not glibc 2.33 or newer."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Statistics
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, TypeError, AttributeError):
        return None
    return library


class Trimmer:
    """Gives freed memory back whenever the resident memory has grown by ``slack`` bytes. Does nothing without glibc or
    /proc."""

    def __init__(self, slack: int = SLACK) -> None:
        self.slack = slack
        self.level = resident()

    def __call__(self) -> bool:
        """Returns whether memory was given back."""
        malloc, now = _malloc(), resident()
        if malloc is None or now < self.level + self.slack:
            return False
        trimmed = malloc.mallinfo2().fordblks > self.slack // 2
        if trimmed:
            malloc.malloc_trim(0)
        self.level = resident()
        return trimmed


def resident() -> int:
    """Resident memory of this process in bytes; 0 where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
