"""Shared parts of the Triton kernels: rows split into blocks, matrix products, masks, dropout, launching.

A width that is not a power of two is split into a tuple of power-of-two parts (197 keys: 128 + 64 + 16; 72 channels: 64
+ 16), see :mod:`pyvit.triton_kernels.tiles`. A tile is then a tuple of blocks, and the compiler unrolls loops over
parts.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyvit.dispatch.devices import PARTS

#: The interpreter multiplies bfloat16 operands wrongly, so there they are converted to float32 after rounding.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_BIAS, FLOAT_BIAS, BOOL_BIAS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: Rows with a log-sum-exp of this magnitude or more are summed again, because its rounding would affect gradients.
LARGE = tl.constexpr(128.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_parts(a, b, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T for rows a (M, D) and b (N, D), each a tuple of blocks over D."""
    acc = tl.zeros((M, N), tl.float32)
    for i in tl.static_range(len(a)):
        acc = dot(a[i], tl.trans(b[i]), acc, PRECISION)
    return acc


@triton.jit
def span(start, N: tl.constexpr):
    return start + tl.arange(0, N)


@triton.jit
def zeros_of(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros((M, N), tl.float32)


@triton.jit
def zero_parts(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Zero tiles for each of ROWS and PARTS: entry r * len(PARTS) + i is (ROWS[r], PARTS[i])."""
    out = ()
    for r in tl.static_range(len(ROWS)):
        for i in tl.static_range(len(PARTS)):
            out = out + (zeros_of(ROWS[r], PARTS[i]),)
    return out


@triton.jit
def add_products(acc, a, b, first: tl.constexpr, PRECISION: tl.constexpr):
    """``acc[first:first + len(b)]`` plus a b, where b is a tuple of blocks over columns."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (dot(a, b[i], acc[first + i], PRECISION),)
    return out


@triton.jit
def head_rows(base, strides, b, h, first, UNIT: tl.constexpr):
    """Row ``first`` of head ``h`` of image or sequence ``b``; strides in multiples of UNIT (:func:`in_units`)."""
    return base + (b * strides[0] + h * strides[1] + first * strides[2]) * UNIT


@triton.jit
def load_rows(base, rows, valid, stride, D: tl.constexpr, PARTS: tl.constexpr):
    """Rows of ``base`` (rows, D) as a tuple of blocks over D. Rows that are not ``valid`` (None: all are) and channels
    past D are zero."""
    at = base + rows.to(tl.int64)[:, None] * stride
    out = ()
    start: tl.constexpr = 0
    for i in tl.static_range(len(PARTS)):
        cols = start + tl.arange(0, PARTS[i])
        if valid is not None:
            out = out + (tl.load(at + cols[None, :], mask=valid[:, None] & (cols[None, :] < D), other=0.0),)
        elif D % 16 != 0:  # the parts add up to the next multiple of 16
            out = out + (tl.load(at + cols[None, :], mask=cols[None, :] < D, other=0.0),)
        else:
            out = out + (tl.load(at + cols[None, :]),)
        start = start + PARTS[i]
    return out


@triton.jit
def store_rows(base, values, first: tl.constexpr, factor, rows, valid, stride, D: tl.constexpr, PARTS: tl.constexpr):
    """Write ``values[first:first + len(PARTS)]`` times ``factor`` (a scalar or a column) to rows of ``base`` (rows,
    D)."""
    at = base + rows.to(tl.int64)[:, None] * stride
    start: tl.constexpr = 0
    for i in tl.static_range(len(PARTS)):
        cols = start + tl.arange(0, PARTS[i])
        value = (values[first + i] * factor).to(base.dtype.element_ty)
        tl.store(at + cols[None, :], value, mask=valid[:, None] & (cols[None, :] < D))
        start = start + PARTS[i]


@triton.jit
def dot_rows(a, b):
    """Row sums of a * b in float32, both tuples of blocks over the columns."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def sequence(cu_seqlens, b, n, VARLEN: tl.constexpr):
    """First row (int64) and length of sequence ``b``; 0 and ``n`` for batched input."""
    if VARLEN:
        first = tl.load(cu_seqlens + b).to(tl.int64)
        length = (tl.load(cu_seqlens + b + 1) - first).to(tl.int32)
    else:
        first = b * 0
        length = n
    return first, length


@triton.jit
def add_bias_and_mask(
    s, bias, rows, cols, n_q, n_k, strides, BIAS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr
):
    """Scores with bias and masks; rows and cols are index tensors that broadcast to the shape of ``s``.

    Scores are scaled to base 2 only after their maximum is subtracted: a finite bias times log2(e) may be infinite, and
    large different values may round to the same one.
    """
    if BIAS != NO_BIAS:
        at = bias + rows.to(tl.int64) * strides[2] + cols.to(tl.int64) * strides[3]
        loaded = tl.load(at, mask=(rows < n_q) & (cols < n_k), other=0)
        if BIAS == BOOL_BIAS:
            s = tl.where(loaded != 0, s, float("-inf"))
        else:
            s += loaded.to(tl.float32)
    if CAUSAL and MASK:
        s = tl.where(rows >= cols, s, float("-inf"))
    if MASK:
        s = tl.where(cols < n_k, s, float("-inf"))
    return s


@triton.jit
def exp2_factor(scale, RAW: tl.constexpr):
    """The factor of differences of scores in exp2. RAW scores, without bias, are products before ``scale``: their
    maximum is subtracted first, because a fused multiply-add would subtract a rounded maximum from the unrounded
    product."""
    unit = LOG2E
    if RAW:
        unit = scale * LOG2E
    return unit


@triton.jit
def exp2_scores(s, top, unit):
    """exp2 of the scores minus the maximum of their row."""
    return tl.exp2((s - top) * unit)


@triton.jit
def dropout_seed(seed, DROPOUT: tl.constexpr):
    """The seed of dropout; not loaded without dropout."""
    rng_seed = 0
    if DROPOUT:
        rng_seed = tl.load(seed)
    return rng_seed


@triton.jit
def dropout_mask(seed, head, rows, cols, threshold):
    """Which probabilities dropout keeps: see :func:`pyvit.ops.reference.dropout_keep`."""
    zero = rows * 0 + cols * 0
    c0 = (cols + zero).to(tl.uint32)
    draws, _, _, _ = tl.philox(seed, c0, (rows + zero).to(tl.uint32), (head + zero).to(tl.uint32), zero.to(tl.uint32))
    return draws.to(tl.int64) >= threshold


@dataclass
class Launch:
    """A recorded kernel launch (see :func:`recording`), which the compile report compiles."""

    kernel: Any
    grid: int
    args: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return getattr(self.kernel, "fn", self.kernel).__name__


@dataclass
class _Recorder:
    arch: str
    launches: list[Launch] = field(default_factory=list)


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Run launchers on meta tensors as on ``arch``; launches are recorded, not run."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(arch)
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


_archs: dict[torch.device, str] = {}


def arch_of(tensor: Tensor) -> str:
    """ "sm_90", "gfx942", ... for the device of ``tensor``; "interpreter" for a CPU."""
    if _recorder is not None:
        return _recorder.arch
    found = _archs.get(tensor.device)
    if found is None:
        if tensor.device.type != "cuda":
            found = "interpreter"
        elif torch.version.hip:
            found = torch.cuda.get_device_properties(tensor.device).gcnArchName.split(":")[0]
        else:
            found = "sm_{}{}".format(*torch.cuda.get_device_capability(tensor.device))
        _archs[tensor.device] = found
    return found


def processors(tensor: Tensor) -> int:
    """Number of streaming multiprocessors (compute units)."""
    if _recorder is None and tensor.device.type == "cuda":
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    part = PARTS.get(arch_of(tensor))
    return 2 if part is None else part.processors


def precision(tensor: Tensor) -> str:
    """How float32 operands are multiplied: as three TF32 products on NVIDIA's tensor cores, in float32 on AMD's. Never
    in plain TF32."""
    return "ieee" if tensor.dtype != torch.float32 or not arch_of(tensor).startswith("sm_") else "tf32x3"


def launch(kernel: Any, grid: int, args: dict[str, Any], warps: int, stages: int) -> None:
    """Run ``grid`` programs of ``kernel`` on the device of its first tensor, if there are any."""
    # Fused multiply-adds are enabled explicitly: Triton's default differs between versions.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if (_recorder is not None or INTERPRETED.value) and (wrong := args.keys() ^ set(kernel.arg_names)):
        raise TypeError(
            f"{kernel.__name__}: {', '.join(sorted(wrong))} passed and not taken, or the reverse"
        )  # as a GPU's launch would
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, args, options))
        return
    if grid == 0:
        return
    tensor = next(a for a in args.values() if isinstance(a, Tensor))
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[(grid,)](**args, **options)
    elif tensor.device.type == "cuda":
        kernel[(grid,)](**args, **options)
    else:
        kernel[(grid,)](**args)  # the interpreter takes no options


def rows_unit(t: Tensor) -> Tensor:
    """``t`` with unit stride in the last dimension; copied if necessary."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def in_units(args: dict[str, Any], *names: str) -> dict[str, Any]:
    """``args`` with the strides ``names`` as multiples of UNIT.

    Triton only knows of an integer argument whether 16 divides it. Rows of 72 or 88 channels start at multiples of 8:
    multiplied in the kernel, they are read 16 bytes at a time and asynchronously, as rows of 64 or 80 are.
    """
    unit = 8 if math.gcd(*(s for name in names for s in args[name])) % 16 == 8 else 1
    return args | {name: tuple(s // unit for s in args[name]) for name in names} | {"UNIT": unit}


def dropout_args(dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
    return {
        "seed": seed,
        "threshold": int(dropout_p * 2**32),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "DROPOUT": dropout_p > 0.0,
    }
