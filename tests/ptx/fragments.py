"""Matrix instructions: ``ldmatrix``, ``stmatrix``, ``mma.sync``, ``wgmma``. All lanes of a warp take part."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.arithmetic import from_bf16
from tests.ptx.memory import Fault, Places
from tests.ptx.program import Execute, Statement

if TYPE_CHECKING:
    from tests.ptx.machine import Machine


@dataclass
class Flight:
    """A ``wgmma`` in flight: its lanes and the number of their group, its accumulators, and the shared bytes it reads
    (with the lane of each). Operands in registers need no check: ptxas inserts the fence they need."""

    lanes: np.ndarray
    group: np.ndarray
    accumulators: list[str]
    held: list[tuple[Places, np.ndarray]] = field(default_factory=list)

    def split(self, done: np.ndarray) -> tuple[Flight, Flight]:
        """The part of the operation for the lanes ``done``, and the part for the others."""

        def part(chosen: np.ndarray) -> Flight:
            if chosen.all():
                return self
            held = []
            for places, lane in self.held if chosen.any() else ():
                mine = np.isin(lane, self.lanes[chosen])
                held.append((places.only(mine), lane[mine]))
            return Flight(self.lanes[chosen], self.group[chosen], self.accumulators, held)

        return part(done), part(~done)

    def land(self, m: Machine) -> None:
        """Its operands may be written again."""
        for places, lane in self.held:
            m.shared.release(places, m.block[lane])


def take_off(m: Machine, flight: Flight) -> None:
    """Start ``flight``: its accumulators must not be accessed until it is waited for."""
    m.flying["wgmma"].append(flight)
    lanes = np.zeros(m.lanes, bool)
    lanes[flight.lanes] = True
    for register in flight.accumulators:
        m.accumulating[register] = m.accumulating[register] | lanes if register in m.accumulating else lanes


_LANE = np.arange(32)
_ROW, _PAIR = _LANE // 4, _LANE % 4  # of an 8 x 8 matrix of 16-bit numbers: row, and pair of columns


@functools.cache
def _left(n: int, each: int) -> np.ndarray:
    """Elements of A (16, K) in its registers (n, 32, each): rows 0 to 7, then 8 to 15, of one half of K, then of the
    other."""
    row, k = np.arange(16)[:, None], np.arange(n // 2 * 4 * each)
    register, lane = row // 8 + 2 * (k // (4 * each)), row % 8 * 4 + k % (4 * each) // each
    return (register * 32 + lane) * each + k % each


@functools.cache
def _right(n: int, each: int) -> np.ndarray:
    """Elements of B (K, 8) in its registers (n, 32, each)."""
    k, column = np.arange(n * 4 * each)[:, None], np.arange(8)
    return (k // (4 * each) * 32 + column * 4 + k % (4 * each) // each) * each + k % each


@functools.cache
def _accumulators(n: int) -> np.ndarray:
    """Elements of a product (16, n), in its registers (n // 2, 32)."""
    i = np.arange(n // 2)[:, None]
    return (_ROW + 8 * (i // 2 % 2)) * n + i // 4 * 8 + 2 * _PAIR + i % 2


def _whole(mask: np.ndarray | None, lanes: int, size: int) -> np.ndarray:
    """Which warps (or groups of ``size`` lanes) take part."""
    if mask is None:
        return np.arange(lanes // size)
    groups = mask.reshape(-1, size)
    if (groups.any(1) != groups.all(1)).any():
        raise Fault("a warp takes part in a matrix instruction with some of its lanes")
    return np.flatnonzero(groups.all(1))


def _registers(operand: str | list[str]) -> list[str]:
    return operand if isinstance(operand, list) else [operand]


def matrices(s: Statement, place: tuple[str, int]) -> Execute:
    """``ldmatrix``, ``stmatrix``: matrix i of 8 rows of 16 bytes, whose addresses lanes 8 i to 8 i + 7 hold."""
    loads, transposed = s.parts[0] == "ldmatrix", "trans" in s.parts
    operand = s.operands[0 if loads else 1]
    registers = operand if isinstance(operand, list) else [operand]
    count = len(registers)

    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        warps = _whole(mask, m.lanes, 32)
        if not len(warps):
            return
        base = np.broadcast_to(m.read(place[0], np.uint32), (m.lanes,)).reshape(-1, 32)[warps, : 8 * count]
        at = (base + np.uint32(place[1])).ravel()
        warp = np.repeat(warps, 8 * count)
        block = m.block[warp * 32]
        places = m.shared.places(at, 16, block, s.parts[0])
        if loads:
            data = m.shared.read(places, warp, block)
            tile = np.ascontiguousarray(data).view(np.uint16).reshape(len(warps), count, 8, 8)
            if transposed:
                tile = tile.swapaxes(2, 3)
            pairs = np.ascontiguousarray(tile).view(np.uint32)[:, :, _ROW, _PAIR]  # (warps, count, lane)
            for i, register in enumerate(registers):
                full = np.zeros((m.lanes // 32, 32), np.uint32)
                full[warps] = pairs[:, i]
                m.write(register, full.ravel(), mask)
            return
        held = np.stack([m.read(r, np.uint32).reshape(-1, 32)[warps] for r in registers], 1)
        rows = np.empty((len(warps), count, 8, 4), np.uint32)
        rows[:, :, _ROW, _PAIR] = held
        tile = rows.view(np.uint16)
        if transposed:
            tile = np.ascontiguousarray(tile.swapaxes(2, 3))
        m.shared.write(places, tile.view(np.uint8).reshape(len(at), 16), warp, block)

    return execute


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Registers (..., ) as the numbers they hold: (..., 2) for 16-bit types, (..., 1) for tf32, whose low 13 bits are
    not looked at."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = np.ascontiguousarray(bits)[..., None].view(np.uint16)
    if kind == "f16":
        return halves.view(np.float16).astype(np.float32)
    return from_bf16(halves)


def left_fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """A (..., 16, K) from its registers (..., n, 32)."""
    numbers = _numbers(registers, kind)  # (..., n, 32, e)
    *warps, n, _, each = numbers.shape
    return numbers.reshape(*warps, -1).take(_left(n, each), -1)


def right_fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """B (..., K, 8) from its registers (..., n, 32)."""
    numbers = _numbers(registers, kind)
    *warps, n, _, each = numbers.shape
    return numbers.reshape(*warps, -1).take(_right(n, each), -1)


def mma(s: Statement) -> Execute:
    """``mma.sync`` with float32 accumulators: 16 x 8 x K."""
    if s.parts[-1] != "f32" or s.parts[-4] != "f32":
        raise NotImplementedError(f"PTX line {s.line}: {s.op}")
    kind = s.parts[-3]
    d, a, b, c = s.operands

    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        _whole(mask, m.lanes, 32)

        def stack(operand: str | list[str], dtype: type) -> np.ndarray:
            return np.stack(
                [np.broadcast_to(m.read(r, dtype), (m.lanes,)).reshape(-1, 32) for r in _registers(operand)], 1
            )

        left, right = left_fragment(stack(a, np.uint32), kind), right_fragment(stack(b, np.uint32), kind)
        product = left @ right  # (warps, 16, 8)
        out = stack(c, np.float32) + product.reshape(-1, 128).take(_accumulators(8), 1)
        for i, register in enumerate(_registers(d)):
            m.write(register, out[:, i].ravel(), mask)

    return execute


def _swizzle(at: np.ndarray, mode: int) -> np.ndarray:
    """Bits 4 to 6 (5, 4) of an address xor bits 7 to 9 (8, 7)."""
    bits = {0: 0, 1: 7, 2: 3, 3: 1}[mode]  # none, 128, 64 and 32 bytes
    return at ^ ((at >> 7 & bits) << 4)


@functools.lru_cache(1024)
def descriptor_places(descriptor: int, rows: int, depth: int, size: int, across: bool) -> np.ndarray:
    """Addresses (rows, depth) of the elements that a matrix descriptor names; ``across``: neighbours lie along the
    rows, not along K."""
    start, leading, stride = (
        (descriptor & 0x3FFF) << 4,
        (descriptor >> 16 & 0x3FFF) << 4,
        (descriptor >> 32 & 0x3FFF) << 4,
    )
    mode = descriptor >> 62
    if descriptor >> 49 & 7:
        raise NotImplementedError("wgmma: a descriptor with a base offset")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes of a row of the repeating pattern
    r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if across:
        each = width // size
        at = start + r // each * leading + k // 8 * stride + k % 8 * width + r % each * size
    elif mode == 0:
        each = width // size
        at = start + r // 8 * stride + k // each * leading + r % 8 * width + k % each * size
    else:
        at = start + r // 8 * stride + r % 8 * width + k * size
    return _swizzle(at, mode)


def wgmma(s: Statement) -> Execute:
    """``wgmma.mma_async`` with float32 accumulators: 64 x N x K by four warps."""
    shape = re.search(r"m64n(\d+)k(\d+)", s.op)
    if shape is None or s.parts[-3] != "f32":
        raise NotImplementedError(f"PTX line {s.line}: {s.op}")
    n, depth, kind = int(shape.group(1)), int(shape.group(2)), s.parts[-1]
    size = 4 if kind == "tf32" else 2
    d, a, b, keep, *rest = s.operands
    signs, across = rest[:2], [int(str(t)) for t in rest[2:]]
    if signs != ["1", "1"]:
        raise NotImplementedError(f"PTX line {s.line}: wgmma with negated operands")
    across = [0] * (2 - len(across)) + across if isinstance(a, list) or not across else across

    def shared(m: Machine, operand: str, rows: int, turned: int, groups: np.ndarray, flight: Flight) -> np.ndarray:
        """The matrix (groups, rows, depth) that each warpgroup's descriptor names."""
        values = np.broadcast_to(m.read(operand, np.uint64), (m.lanes,)).reshape(-1, 128)[groups]
        if (values != values[:, :1]).any():
            raise Fault("wgmma: lanes of a warpgroup hold different descriptors")
        at = np.stack([descriptor_places(int(v), rows, depth, size, bool(turned)) for v in values[:, 0]])
        lane = np.repeat(groups * 128, rows * depth)
        places = m.shared.places(at.ravel(), size, m.block[lane], "wgmma")
        data = m.shared.hold(places, m.block[lane]).reshape((*at.shape, size))
        flight.held.append((places, lane))
        if kind == "tf32":
            return _numbers(data.view(np.uint32)[..., 0], kind)[..., 0]
        halves = data.view(np.uint16)[..., 0]
        return halves.view(np.float16).astype(np.float32) if kind == "f16" else from_bf16(halves)

    def execute(m: Machine) -> None:
        mask = m.mask_of(s)
        groups = _whole(mask, m.lanes, 128)
        if not len(groups):
            return
        product = np.zeros((m.lanes // 128, 64, n), np.float32)
        lanes = np.flatnonzero(mask) if mask is not None else np.arange(m.lanes)
        flight = Flight(lanes, m.groups["wgmma"][lanes], list(_registers(d)))
        if isinstance(a, list):
            held = np.stack([m.read(r, np.uint32).reshape(-1, 4, 32) for r in a], 2)  # (groups, warp, register, lane)
            left = left_fragment(held, kind).reshape(-1, 64, depth)[groups]
        else:
            left = shared(m, str(a), 64, across[0], groups, flight)
        product[groups] = left @ shared(m, str(b), n, across[1], groups, flight).swapaxes(1, 2)
        kept = np.broadcast_to(m.read(keep, bool), (m.lanes,))
        tile = product.reshape(-1, 16 * n).take(_accumulators(n), 1).swapaxes(0, 1).reshape(n // 2, m.lanes)
        # Products accumulate in order: an earlier one under way may have the same accumulators.
        before = {r: m.accumulating.pop(r) for r in flight.accumulators if r in m.accumulating}
        for i, register in enumerate(_registers(d)):
            acc = m.read(register, np.float32)
            m.write(register, np.where(kept, acc + tile[i], tile[i]), mask)
        m.accumulating.update(before)
        take_off(m, flight)

    return execute
