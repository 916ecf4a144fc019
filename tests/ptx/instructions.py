"""What each instruction does. :func:`decode` turns a statement into a function of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import fragments, transfers
from tests.ptx.arithmetic import BINARY, TYPES, UNARY, compare, from_bf16, high, shift, to_bf16, to_tf32, type_of, wide
from tests.ptx.program import Execute, Statement

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

_LEAST = np.float32(2.0**-126)  # of the numbers that ``ftz`` keeps


def _arithmetic(
    s: Statement, name: str, dtype: np.dtype, op: Callable[..., np.ndarray], reads: int, result: np.dtype | None = None
) -> Execute:
    """``d = op(a, ...)`` on operands of one type."""
    target, sources = s.operands[0], s.operands[1 : 1 + reads]
    flush = "ftz" in s.parts and dtype == np.float32

    def execute(m: Machine) -> None:
        values = [m.read(source, dtype) for source in sources]
        out = op(*values)
        if flush and (tiny := np.abs(out) < _LEAST).any():
            out = np.where(tiny, np.copysign(np.float32(0), out), out)
        m.write(target, np.asarray(out, result or dtype), m.mask_of(s))

    return execute


def _in_halves(s: Statement, dtype: np.dtype, op: Callable[..., np.ndarray]) -> Execute:
    """``d = op(a, b)`` on both 16-bit halves of each register."""

    def execute(m: Machine) -> None:
        values = [
            np.ascontiguousarray(np.broadcast_to(m.read(o, np.uint32), (m.lanes,))).view(dtype) for o in s.operands[1:]
        ]
        m.write(s.operands[0], op(*values).astype(dtype).view(np.uint32), m.mask_of(s))

    return execute


def _move(s: Statement, dtype: np.dtype) -> Execute:
    """``mov``. A copy is no access of its own: ptxas gives both names one register, on whichever side of a wait the
    text has it."""
    target, source = s.operands[0], s.operands[1]

    def execute(m: Machine) -> None:
        if not isinstance(target, str) or not isinstance(source, str):
            m.write(target, m.read(source, dtype), m.mask_of(s))
            return
        under_way = m.accumulating.pop(source, None)
        m.write(target, m.read(source, dtype), m.mask_of(s))
        if under_way is not None:
            m.accumulating[source] = m.accumulating[target] = under_way
            for flight in m.flying["wgmma"]:
                if source in flight.accumulators:
                    flight.accumulators.append(target)

    return execute


def _convert(s: Statement) -> Execute:
    into, source = s.parts[-2:]
    target, operands = s.operands[0], s.operands[1:]
    if into in ("bf16x2", "f16x2"):

        def pack(m: Machine) -> None:
            high, low = (m.read(o, np.float32) for o in operands)
            half = to_bf16 if into == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)
            m.write(target, np.asarray(half(high).astype(np.uint32) << np.uint32(16) | half(low)), m.mask_of(s))

        return pack
    if source == "bf16":
        return lambda m: m.write(target, from_bf16(m.read(operands[0], np.uint16)), m.mask_of(s))
    if into == "bf16":
        return lambda m: m.write(target, to_bf16(m.read(operands[0], np.float32)), m.mask_of(s))
    if into == "tf32":
        return lambda m: m.write(target, to_tf32(m.read(operands[0], np.float32)), m.mask_of(s))
    left, right = type_of(source), type_of(into)
    rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "rzi": np.trunc,
        "rni": np.rint,
        "rmi": np.floor,
        "rpi": np.ceil,
    }
    whole = next((rounding[p] for p in s.parts if p in rounding), None)

    def convert(m: Machine) -> None:
        value = m.read(operands[0], left)
        if whole is not None:
            value = whole(value)
        m.write(target, value.astype(right), m.mask_of(s))

    return convert


def _permute(s: Statement) -> Execute:
    def execute(m: Machine) -> None:
        a, b, chosen = (m.read(o, np.uint32) for o in s.operands[1:4])
        both = b.astype(np.uint64) << np.uint64(32) | a
        out = np.zeros(m.lanes, np.uint32)
        for i in range(4):
            pick = (chosen >> np.uint32(4 * i)).astype(np.uint64) & np.uint64(15)
            byte = (both >> (pick & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            byte = np.where(pick >= 8, np.where(byte >= 128, np.uint64(255), np.uint64(0)), byte)
            out |= byte.astype(np.uint32) << np.uint32(8 * i)
        m.write(s.operands[0], out, m.mask_of(s))

    return execute


def _field(s: Statement, dtype: np.dtype) -> Execute:
    """``bfe``: bits [b, b + c) of a, sign-extended for signed types. Fields within the register only."""
    bits = 8 * dtype.itemsize

    def execute(m: Machine) -> None:
        a = m.read(s.operands[1], dtype)
        start, length = (m.read(o, np.uint32).astype(np.int64) & 255 for o in s.operands[2:4])
        left = (bits - start - length).astype(dtype)
        m.write(s.operands[0], np.asarray((a << left) >> (bits - length).astype(dtype), dtype), m.mask_of(s))

    return execute


def _insert(s: Statement, dtype: np.dtype) -> Execute:
    """``bfi``: the low d bits of a in place of bits [c, c + d) of b."""

    def execute(m: Machine) -> None:
        a, b = (m.read(o, dtype) for o in s.operands[1:3])
        start, length = (m.read(o, np.uint32).astype(dtype) & dtype.type(255) for o in s.operands[3:5])
        mask = ((dtype.type(1) << length) - dtype.type(1)) << start
        m.write(s.operands[0], np.asarray((b & ~mask) | ((a << start) & mask), dtype), m.mask_of(s))

    return execute


_LANE = np.arange(32)
_SHUFFLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bfly": lambda by: _LANE ^ by,
    "idx": lambda by: by & 31,
    "up": lambda by: _LANE - by,
    "down": lambda by: _LANE + by,
}


def _shuffle(s: Statement) -> Execute:
    source_of = _SHUFFLES[s.parts[2]]
    target = str(s.operands[0])
    if s.operands[3:] != ["31", "-1"] or "|" in str(s.operands[0]):
        raise NotImplementedError(f"PTX line {s.line}: a shuffle within part of a warp, or with a predicate")

    def execute(m: Machine) -> None:
        value = m.read(s.operands[1], np.uint32).reshape(-1, 32)
        by = np.broadcast_to(m.read(s.operands[2], np.int32), (m.lanes,)).reshape(-1, 32)
        if (by == by[0]).all():
            by = by[:1]
        source = source_of(by)
        source = np.where((source < 0) | (source > 31), _LANE, source)
        out = value[:, source[0]] if len(source) == 1 else np.take_along_axis(value, source, 1)
        m.write(target, out.reshape(-1), m.mask_of(s))

    return execute


#: Modifiers that change a result and that no instruction here takes account of.
_UNKNOWN = frozenset({"sat", "satfinite", "relu", "rz", "rm", "rp", "cc"})
_NOTHING = ("wgmma.fence", "bar.warp.sync", "membar", "fence.acq_rel", "fence.sc", "griddepcontrol", "prefetch")


def decode(s: Statement) -> Execute:
    """The statement as a function of the machine. Raises NotImplementedError where this machine does not know the
    instruction."""
    name, last = s.parts[0], s.parts[-1]
    if _UNKNOWN.intersection(s.parts):
        raise NotImplementedError(f"PTX line {s.line}: {s.op}")
    if s.op.startswith(_NOTHING):
        return lambda m: None
    if s.op.startswith("fence.proxy.async"):
        return transfers.fence(s)
    for kind in ("cp.async", "wgmma"):
        if s.op.startswith((f"{kind}.commit_group", f"{kind}.wait_group", f"{kind}.wait_all")):
            return transfers.group(s, kind)
    if s.op.startswith("cp.async.c"):
        return transfers.copy(s)
    if name in ("ldmatrix", "stmatrix"):
        return fragments.matrices(s, transfers.place_of(str(s.operands[name == "ldmatrix"])))
    if name == "mma":
        return fragments.mma(s)
    if name == "wgmma":
        return fragments.wgmma(s)
    if s.op.startswith("ld.param"):
        return transfers.parameter(s, type_of(last))
    if s.op.startswith(("ld.global", "st.global", "ld.shared", "st.shared")):
        return transfers.memory(s)
    if name == "cvt":
        return _convert(s)
    if name == "prmt":
        return _permute(s)
    if name == "shfl":
        return _shuffle(s)
    if last in ("u16x2", "s16x2", "f16x2") and name in BINARY:
        return _in_halves(s, type_of(last[:-2]), BINARY[name])
    if last not in TYPES:
        raise NotImplementedError(f"PTX line {s.line}: {s.op}")
    dtype = type_of(last)
    if name == "mov":
        return _move(s, dtype)
    if name == "bfe":
        return _field(s, dtype)
    if name == "bfi":
        return _insert(s, dtype)
    if name == "setp" and len(s.parts) == 3:
        return _arithmetic(s, name, dtype, compare(s.parts[1], dtype), 2, np.dtype(bool))
    if name == "selp":
        return lambda m: m.write(
            s.operands[0],
            np.where(m.read(s.operands[3], bool), m.read(s.operands[1], dtype), m.read(s.operands[2], dtype)),
            m.mask_of(s),
        )
    if name in ("shl", "shr"):
        op = shift(np.left_shift if name == "shl" else np.right_shift)
        return lambda m: m.write(
            s.operands[0], op(m.read(s.operands[1], dtype), m.read(s.operands[2], np.uint32)), m.mask_of(s)
        )
    if name == "mul" and "hi" in s.parts:
        return _arithmetic(s, name, dtype, high, 2)
    if name == "mul" and "wide" in s.parts:
        return _arithmetic(s, name, dtype, lambda a, b: a.astype(wide(dtype)) * b.astype(wide(dtype)), 2, wide(dtype))
    if name == "mad" and "wide" in s.parts:
        return lambda m: m.write(
            s.operands[0],
            m.read(s.operands[1], dtype).astype(wide(dtype)) * m.read(s.operands[2], dtype).astype(wide(dtype))
            + m.read(s.operands[3], wide(dtype)),
            m.mask_of(s),
        )
    if name == "mad" and "lo" in s.parts:
        return _arithmetic(s, name, dtype, lambda a, b, c: a * b + c, 3)
    if name == "fma":
        return _arithmetic(s, name, dtype, lambda a, b, c: (a.astype(np.float64) * b + c).astype(dtype), 3)
    if name in ("max", "min") and dtype.kind == "f" and "NaN" not in s.parts:
        return _arithmetic(s, name, dtype, np.fmax if name == "max" else np.fmin, 2)
    if name in BINARY and (name != "mul" or dtype.kind == "f" or "lo" in s.parts):
        return _arithmetic(s, name, dtype, BINARY[name], 2)
    if name in UNARY:
        return _arithmetic(s, name, dtype, UNARY[name], 1)
    raise NotImplementedError(f"PTX line {s.line}: {s.op}")
