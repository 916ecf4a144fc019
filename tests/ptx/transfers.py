"""Instructions that move bytes between registers, shared and global memory, and those that wait for bytes under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import fragments
from tests.ptx.arithmetic import type_of
from tests.ptx.memory import Fault
from tests.ptx.program import Execute, Statement

if TYPE_CHECKING:
    from tests.ptx.machine import Machine


def place_of(s: str) -> tuple[str, int]:
    """``[%r1 + 16]`` as register (or symbol) and offset."""
    base, _, offset = s.strip("[] ").partition("+")
    return base.strip(), int(offset.strip() or "0", 0)


def address(m: Machine, place: tuple[str, int], dtype: type) -> np.ndarray:
    base = m.read(place[0], dtype)
    return np.broadcast_to(base + dtype(place[1] % (1 << 8 * dtype().itemsize)), (m.lanes,))


def parameter(s: Statement, dtype: np.dtype) -> Execute:
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


def memory(s: Statement) -> Execute:
    loads, shared = s.parts[0] == "ld", "shared" in s.op
    dtype = type_of(s.parts[-1])
    count = next((int(p[1:]) for p in s.parts if p in ("v2", "v4", "v8")), 1)
    operand, place = (s.operands[0], s.operands[1]) if loads else (s.operands[1], s.operands[0])
    registers = operand if isinstance(operand, list) else [operand]
    if len(registers) != count:
        raise ValueError(f"{s.op}: {len(registers)} registers")
    where, size = place_of(str(place)), count * dtype.itemsize

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
        data = (
            m.shared.read(m.shared.places(at, size, block, "load"), warp, block)
            if shared
            else m.memory.load(at, size, m.who(lanes))
        )
        values = np.ascontiguousarray(data).view(dtype).reshape(len(lanes), count)
        for i, register in enumerate(registers):
            full = np.empty(m.lanes, dtype)
            full[lanes] = values[:, i]
            m.write(register, full, mask)

    return execute


def copy(s: Statement) -> Execute:
    """``cp.async``: bytes land when their group is waited for; beyond the given number of source bytes they are
    zero."""
    into, source = place_of(str(s.operands[0])), place_of(str(s.operands[1]))
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
            m.shared.arrive(places.only(done), data[done], m.warp[lanes[done]], m.block[lanes[done]])
        if not done.all():
            left.append((lanes[~done], group[~done], places.only(~done), data[~done]))
    m.flying["cp.async"] = left


def _products_wait(m: Machine, active: np.ndarray, newest: int) -> None:
    limit = m.groups["wgmma"] - newest
    flying, m.flying["wgmma"] = m.flying["wgmma"], []
    m.accumulating = {}
    for flight in flying:
        done = active[flight.lanes] & (flight.group < limit[flight.lanes])
        ready, waits = flight.split(done)
        ready.land(m)
        if len(waits.lanes):
            fragments.take_off(m, waits)


def group(s: Statement, kind: str) -> Execute:
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


def fence(s: Statement) -> Execute:
    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        m.shared.fence(np.unique(m.warp if mask is None else m.warp[mask]))

    return execute
