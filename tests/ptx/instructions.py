"""What each instruction does. :func:`decode` turns a statement into a function of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx import fragments
from tests.ptx.memory import Fault
from tests.ptx.program import Statement

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Execute = Callable[["Machine"], None]
_TYPES = {
    **{f"b{8 * n}": f"u{n}" for n in (1, 2, 4, 8)},
    **{f"u{8 * n}": f"u{n}" for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": f"i{n}" for n in (1, 2, 4, 8)},
    "f16": "f2",
    "f32": "f4",
    "f64": "f8",
    "pred": "?",
}


def type_of(name: str) -> np.dtype:
    return np.dtype(_TYPES[name])


def wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


# bfloat16, which numpy does not have


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def to_tf32(value: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, ties away from zero (``cvt.rna``)."""
    bits = value.view(np.uint32)
    return np.where(np.isfinite(value), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(quotient.dtype) if a.dtype.kind == "i" else quotient


def _shift(op: Callable[..., np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Shifts by the width or more give what shifting one bit at a time would."""

    def shifted(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        bits = 8 * a.itemsize
        b = np.asarray(b).astype(np.int64)
        if op is np.left_shift or a.dtype.kind == "u":
            return np.where(b >= bits, a.dtype.type(0), op(a, np.minimum(b, bits - 1).astype(a.dtype)))
        return op(a, np.minimum(b, bits - 1).astype(a.dtype))

    return shifted


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.itemsize == 8:
        product = a.astype(object) * b.astype(object)
        return np.asarray(product >> 64).astype(a.dtype)
    return (a.astype(wide(a.dtype)) * b.astype(wide(a.dtype)) >> wide(a.dtype).type(8 * a.itemsize)).astype(a.dtype)


_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "max": np.maximum,
    "min": np.minimum,
}
_UNARY: dict[str, Callable[..., np.ndarray]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _compare(name: str, dtype: np.dtype) -> Callable[..., np.ndarray]:
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name.endswith("u") and dtype.kind == "f":  # true where either is NaN
        base = _COMPARE[name[:-1]]
        return lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)
    base = _COMPARE[name]
    if name == "ne" and dtype.kind == "f":
        return lambda a, b: base(a, b) & ~(np.isnan(a) | np.isnan(b))
    return base


def _arithmetic(
    s: Statement, name: str, dtype: np.dtype, op: Callable[..., np.ndarray], reads: int, result: np.dtype | None = None
) -> Execute:
    """``d = op(a, ...)`` on operands of one type."""
    target, sources = s.operands[0], s.operands[1 : 1 + reads]
    flush = "ftz" in s.parts and dtype == np.float32

    def execute(m: Machine) -> None:
        values = [m.read(source, dtype) for source in sources]
        out = op(*values)
        if flush:
            out = np.where(np.abs(out) < np.float32(2.0**-126), np.copysign(np.float32(0), out), out)
        m.write(target, np.asarray(out, result or dtype), m.mask_of(s))

    return execute


def _in_halves(s: Statement, dtype: np.dtype, op: Callable[..., np.ndarray]) -> Execute:
    """``d = op(a, b)`` on both 16-bit halves of each register."""

    def execute(m: Machine) -> None:
        values = [np.ascontiguousarray(np.broadcast_to(m.read(o, np.uint32), (m.lanes,))).view(dtype) for o in s.operands[1:]]
        m.write(s.operands[0], op(*values).astype(dtype).view(np.uint32), m.mask_of(s))

    return execute


def _move(s: Statement, dtype: np.dtype) -> Execute:
    """``mov``. A copy is no access of its own: ptxas names the register anew, on whichever side of a fence the text has it."""
    target, source = s.operands[0], s.operands[1]
    copies = isinstance(target, str) and isinstance(source, str)

    def execute(m: Machine) -> None:
        m.write(target, m.read(source, dtype), m.mask_of(s))
        if copies and source not in m.unfenced:
            m.unfenced.discard(target)

    return execute


def _parameter(s: Statement, dtype: np.dtype) -> Execute:
    """``ld.param``: the parameter's own type says how it is laid out."""
    name = str(s.operands[1]).strip("[] ")
    at = int(name.rpartition("_")[2])

    def execute(m: Machine) -> None:
        kind = type_of(m.program.parameters[at])
        value = (
            np.asarray(m.arguments[at]).astype(kind)
            if kind.kind == "f"
            else np.uint64(m.arguments[at] % (1 << 64)).astype(f"u{kind.itemsize}")
        )
        value = value.view(f"{dtype.kind if dtype.kind in 'iu' else 'u'}{kind.itemsize}")
        m.write(s.operands[0], np.full(m.lanes, value), m.mask_of(s))

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
    rounding: dict[str, Callable[[np.ndarray], np.ndarray]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
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


def _shuffle(s: Statement) -> Execute:
    mode = s.parts[2]
    target = str(s.operands[0]).partition("|")[0]

    def execute(m: Machine) -> None:
        value = m.read(s.operands[1], np.uint32)
        by = np.broadcast_to(m.read(s.operands[2], np.int32), (m.lanes,)).astype(np.int64)
        lane = np.arange(m.lanes) % 32
        source = {"bfly": lane ^ by, "idx": by & 31, "up": lane - by, "down": lane + by}[mode]
        source = np.where((source < 0) | (source > 31), lane, source)
        m.write(target, value[np.arange(m.lanes) // 32 * 32 + source], m.mask_of(s))

    return execute


def _place(s: str) -> tuple[str, int]:
    """``[%r1 + 16]`` as register (or symbol) and offset."""
    base, _, offset = s.strip("[] ").partition("+")
    return base.strip(), int(offset.strip() or "0", 0)


def address(m: Machine, place: tuple[str, int], dtype: type) -> np.ndarray:
    base = m.read(place[0], dtype)
    return np.broadcast_to(base + dtype(place[1] % (1 << 8 * dtype().itemsize)), (m.lanes,))


def _memory(s: Statement) -> Execute:
    loads, shared = s.parts[0] == "ld", "shared" in s.op
    dtype = type_of(s.parts[-1])
    count = next((int(p[1:]) for p in s.parts if p in ("v2", "v4", "v8")), 1)
    operand, place = (s.operands[0], s.operands[1]) if loads else (s.operands[1], s.operands[0])
    registers = operand if isinstance(operand, list) else [operand]
    if len(registers) != count:
        raise ValueError(f"{s.op}: {len(registers)} registers")
    where, size = _place(str(place)), count * dtype.itemsize

    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        lanes = np.arange(m.lanes) if mask is None else np.flatnonzero(mask)
        if not len(lanes):
            return
        at = address(m, where, np.uint32 if shared else np.uint64)[lanes]
        block, warp = m.block[lanes], m.warp[lanes]
        if not loads:
            parts = [np.broadcast_to(m.read(r, dtype), (m.lanes,))[lanes] for r in registers]
            data = np.ascontiguousarray(np.stack(parts, 1)).view(np.uint8).reshape(len(lanes), size)
            if shared:
                m.shared.write(m.shared.places(at, size, block, "store"), data, warp, block)
            else:
                m.memory.store(at, data, m.who(lanes))
            return
        if shared:
            data = m.shared.read(m.shared.places(at, size, block, "load"), warp, block)
        else:
            data = m.memory.load(at, size, m.who(lanes))
        values = np.ascontiguousarray(data).view(dtype).reshape(len(lanes), count)
        for i, register in enumerate(registers):
            full = np.zeros(m.lanes, dtype)
            full[lanes] = values[:, i]
            m.write(register, full, mask)

    return execute


def _copy(s: Statement) -> Execute:
    """``cp.async``: bytes land when their group is waited for; beyond the given number of source bytes they are zero."""
    into, source = _place(str(s.operands[0])), _place(str(s.operands[1]))
    size = int(str(s.operands[2]), 0)

    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        lanes = np.arange(m.lanes) if mask is None else np.flatnonzero(mask)
        if not len(lanes):
            return
        given = m.read(s.operands[3], np.uint32) if len(s.operands) > 3 else np.uint32(size)
        given = np.broadcast_to(given, (m.lanes,))[lanes]
        if not np.isin(given, (0, size)).all():
            raise Fault(f"cp.async of part of {size} bytes")
        places = m.shared.places(address(m, into, np.uint32)[lanes], size, m.block[lanes], "cp.async")
        data = np.zeros((len(lanes), size), np.uint8)
        reads = given > 0
        if reads.any():
            data[reads] = m.memory.load(address(m, source, np.uint64)[lanes][reads], size, m.who(lanes[reads]))
        m.shared.expect(places, m.warp[lanes], m.block[lanes])
        m.flying["cp.async"].append((lanes, m.groups["cp.async"][lanes], places, data))

    return execute


def _copies_wait(m: Machine, active: np.ndarray, newest: int) -> None:
    limit = m.groups["cp.async"] - newest
    left = []
    for lanes, group, places, data in m.flying["cp.async"]:
        done = active[lanes] & (group < limit[lanes])
        if done.any():
            m.shared.arrive(places[done], data[done], m.warp[lanes[done]], m.block[lanes[done]])
        if not done.all():
            left.append((lanes[~done], group[~done], places[~done], data[~done]))
    m.flying["cp.async"] = left


def _products_wait(m: Machine, active: np.ndarray, newest: int) -> None:
    limit = m.groups["wgmma"] - newest
    flying, m.flying["wgmma"] = m.flying["wgmma"], []
    m.accumulating, m.multiplying = {}, {}
    for flight in flying:
        done = active[flight.lanes] & (flight.group < limit[flight.lanes])
        ready, waits = flight.split(done)
        for places, block, _ in ready.held:
            m.shared.release(places, block)
        if len(waits.lanes):
            fragments.take_off(m, waits)


def _group(s: Statement, kind: str) -> Execute:
    newest = int(str(s.operands[0])) if s.operands else 0
    wait = _copies_wait if kind == "cp.async" else _products_wait

    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        active = np.ones(m.lanes, bool) if mask is None else mask
        if "commit_group" in s.op:
            m.groups[kind] = m.groups[kind] + active
        else:
            wait(m, active, newest)

    return execute


def _fence(s: Statement) -> Execute:
    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        m.shared.fence(np.unique(m.warp if mask is None else m.warp[mask]))

    return execute


_NOTHING = ("bar.warp.sync", "membar", "fence.acq_rel", "fence.sc", "griddepcontrol", "prefetch")


def decode(s: Statement) -> Execute:
    """The statement as a function of the machine. Raises NotImplementedError where this machine does not know the instruction."""
    name, last = s.parts[0], s.parts[-1]
    if s.op.startswith(_NOTHING):
        return lambda m: None
    if s.op.startswith("wgmma.fence"):
        return lambda m: m.unfenced.clear()
    if s.op.startswith("fence.proxy.async"):
        return _fence(s)
    for kind in ("cp.async", "wgmma"):
        if s.op.startswith((f"{kind}.commit_group", f"{kind}.wait_group", f"{kind}.wait_all")):
            return _group(s, kind)
    if s.op.startswith("cp.async.c"):
        return _copy(s)
    if name in ("ldmatrix", "stmatrix"):
        return fragments.matrices(s, _place(str(s.operands[name == "ldmatrix"])))
    if name == "mma":
        return fragments.mma(s)
    if name == "wgmma":
        return fragments.wgmma(s)
    if s.op.startswith("ld.param"):
        return _parameter(s, type_of(last))
    if s.op.startswith(("ld.global", "st.global", "ld.shared", "st.shared")):
        return _memory(s)
    if name == "cvt":
        return _convert(s)
    if name == "prmt":
        return _permute(s)
    if name == "shfl":
        return _shuffle(s)
    if last in ("u16x2", "s16x2", "f16x2") and name in _BINARY:
        return _in_halves(s, type_of(last[:-2]), _BINARY[name])
    if last not in _TYPES:
        raise NotImplementedError(f"PTX line {s.line}: {s.op}")
    dtype = type_of(last)
    if name == "mov":
        return _move(s, dtype)
    if name == "bfe":
        return _field(s, dtype)
    if name == "bfi":
        return _insert(s, dtype)
    if name == "setp" and len(s.parts) == 3:
        return _arithmetic(s, name, dtype, _compare(s.parts[1], dtype), 2, np.dtype(bool))
    if name == "selp":
        return lambda m: m.write(
            s.operands[0], np.where(m.read(s.operands[3], bool), m.read(s.operands[1], dtype), m.read(s.operands[2], dtype)), m.mask_of(s)
        )
    if name in ("shl", "shr"):
        op = _shift(np.left_shift if name == "shl" else np.right_shift)
        return lambda m: m.write(s.operands[0], op(m.read(s.operands[1], dtype), m.read(s.operands[2], np.uint32)), m.mask_of(s))
    if name == "mul" and "hi" in s.parts:
        return _arithmetic(s, name, dtype, _high, 2)
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
    if name in _BINARY and (name != "mul" or dtype.kind == "f" or "lo" in s.parts):
        return _arithmetic(s, name, dtype, _BINARY[name], 2)
    if name in _UNARY:
        return _arithmetic(s, name, dtype, _UNARY[name], 1)
    raise NotImplementedError(f"PTX line {s.line}: {s.op}")
