"""Reuse of CPU memory."""

from __future__ import annotations

import ctypes
import math
import platform
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from pyvit.torch_private import storage_uses

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_MOST = 2**31 - 1

_kept = threading.local()
_KEPT_BYTES = 64 << 20
_RECYCLED_BYTES, _RECYCLED, _LEAST = 256 << 20, 64, 512 << 10


def keep_memory() -> bool:
    """Let this process keep the memory of freed CPU tensors for later ones. Returns whether this is supported (glibc on
    Linux).

    By default glibc returns the memory of large tensors to the operating system when they are freed, and new memory
    costs page faults: the kernel clears each page of 4 kB at its first use. A training step frees and allocates
    gigabytes, so this can take a fifth of its time. Afterwards the process keeps its peak memory.

    This affects the whole process and every library in it, so a program must ask for it. ``pyvit train`` and ``pyvit
    eval`` do.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST))


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised CPU memory for a temporary that is no longer used when this thread asks for ``name`` again. Returns
    the same memory each time.

    Allocating and freeing a temporary of some megabytes in every layer may cost more than the computation in it (see
    :func:`keep_memory`). More than 64 MiB are allocated as usual.
    """
    n = math.prod(shape)
    if n * dtype.itemsize > _KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    kept: Tensor | None = getattr(_kept, name, None)
    if kept is None or kept.numel() < n * dtype.itemsize:
        with torch.inference_mode(False):
            kept = torch.empty(n * dtype.itemsize, dtype=torch.uint8, device="cpu")
        setattr(_kept, name, kept)
    return kept[: n * dtype.itemsize].view(dtype).view(*shape)


def recycled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape, dtype=dtype)`` on the CPU, in the memory of an earlier such tensor of this thread that is no
    longer used.

    Tensors between layers often have the same sizes, and new memory can cost more than the operator that writes to it
    (see :func:`keep_memory`). A thread keeps up to 256 MiB in 64 pieces; the least recently used is dropped first.
    Tensors below 512 KiB or above 64 MiB are allocated as usual, because the search takes some microseconds.
    """
    n = math.prod(shape) * dtype.itemsize
    if storage_uses is None or not _LEAST <= n <= _RECYCLED_BYTES // 4:
        return torch.empty(shape, dtype=dtype, device="cpu")
    kept: list[torch.UntypedStorage] = _kept.__dict__.setdefault("_recycled", [])
    found = None
    for at in range(len(kept)):
        storage = kept[at]
        # Only our tensor uses the storage: the references are the list, this name and the call's argument.
        if storage.nbytes() == n and storage_uses(storage._cdata) == 1 and sys.getrefcount(storage) <= 3:
            del kept[at]
            found = None if storage.is_shared() else storage  # memory that another process may be reading
            break
    if found is None:
        with torch.inference_mode(False):
            found = torch.UntypedStorage(n)
        while kept and (len(kept) == _RECYCLED or sum(storage.nbytes() for storage in kept) + n > _RECYCLED_BYTES):
            del kept[0]
    kept.append(found)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype, device="cpu").set_(
        found, 0, tuple(shape), strides
    )  # not a view, which autograd would track
