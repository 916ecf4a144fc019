"""Freed memory kept for the next tensor."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_MOST = 2**31 - 1


def keep_memory() -> bool:
    """Let this process keep the memory of freed CPU tensors for the next ones; returns whether that was possible (glibc on Linux).

    By default glibc gives the memory of large tensors back to the system as soon as they are freed, and each new one is paid for page by
    page: the kernel clears 4 kB at a time when it is first touched. In a training step, which frees and allocates gigabytes, that can take
    a fifth of the time. Afterwards the process holds on to its high-water mark. It holds for the whole process and every library in it, not
    only for pyvit, so it is for a program to decide: ``pyvit train`` and ``pyvit eval`` do it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST))
