"""Tensors that end, or begin, at a page that may not be read: ``python tests/fuzz/guard_pages.py CASES OP ...``.

Random calls of an operator on the CPU run with every input and every gradient there, so that a kernel that reads past
the memory of a tensor faults. The number of the call is printed before it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import random
import sys
import weakref

import torch
from torch import Tensor

from pyvit import testing
from tests.fuzz import draws

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NO_ACCESS = 0


def guarded(t: Tensor, at_end: bool = True) -> Tensor:
    """The values and strides of ``t`` in memory whose last element (or first) is the last (first) before a page without
    access."""
    if not t.numel():
        return t
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    page, size = mmap.PAGESIZE, span * t.element_size()
    whole = (-(-size // page) + 2) * page
    start = _LIBC.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    for edge in (start, start + whole - page):
        if _LIBC.mprotect(edge, page, _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    first = start + whole - page - size if at_end else start + page
    memory = (ctypes.c_char * size).from_address(first)
    weakref.finalize(memory, _LIBC.munmap, start, whole)
    storage = torch.frombuffer(memory, dtype=t.dtype, count=span)
    if t.is_floating_point():
        storage.fill_(torch.nan)  # between rows
    once = tuple(slice(0, 1 if s == 0 else None) for s in t.stride())  # an expanded dimension is written once
    view = storage.as_strided(t.shape, t.stride())
    view[once].copy_(t[once])
    return view


def run(op: str, cases: int) -> None:
    """Random calls of the operator, in each dtype."""
    plain = testing.layout
    for on in testing.served(op.partition(",")[0]):
        if on.backend != "cpu" or on.dtype == torch.float64:
            continue
        for case in range(cases):
            print(f"{op}, {on}, {case}", flush=True)
            at_end = case % 4 != 0
            testing.layout = lambda t, how, at_end=at_end: guarded(plain(t, how), at_end)
            try:
                draws.call(op, on, random.Random(case), lambda t, at_end=at_end: guarded(t, at_end))
            except AssertionError as wrong:  # numbers are test_fuzz.py's
                print(wrong, file=sys.stderr)
    testing.layout = plain
    print(f"{op}: {cases} calls in each dtype")


if __name__ == "__main__":
    faulthandler.enable()
    for name in sys.argv[2:]:
        run(name, int(sys.argv[1]))
