"""The interpreter: lanes, registers and control flow."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from tests.ptx import instructions
from tests.ptx.memory import Fault, Global, Shared
from tests.ptx.program import Execute, Program, Statement, ends_block

WARP = 32
#: Lanes that run side by side; longer rows of blocks are run in pieces.
_LANES = 4096
_WIDTHS = {
    "r": np.uint32,
    "rd": np.uint64,
    "rs": np.uint16,
    "p": np.bool_,
    "f": np.uint32,
    "fd": np.uint64,
    "b": np.uint8,
    "rc": np.uint8,
}


class Machine:
    """A row of blocks that run ``program`` in step. Where lanes diverge, those furthest behind run first."""

    def __init__(
        self, program: Program, arguments: list[Any], memory: Global, shared: int, blocks: np.ndarray, grid: int
    ) -> None:
        self.program, self.arguments, self.memory, self.grid = program, arguments, memory, grid
        self.lanes = len(blocks) * program.threads
        self.blocks = blocks
        lane = np.arange(self.lanes)
        self.block = lane // program.threads  # in this row
        self.ctaid = blocks[self.block].astype(np.uint32)
        self.tid = (lane % program.threads).astype(np.uint32)
        self.warp = (lane // WARP).astype(np.int32)
        self.shared = Shared(len(blocks), shared)
        self.registers: dict[str, np.ndarray] = {}
        self.active: np.ndarray | None = None  # None: every lane
        self.groups = {"cp.async": np.zeros(self.lanes, np.int64), "wgmma": np.zeros(self.lanes, np.int64)}
        self.flying: dict[str, list[Any]] = {"cp.async": [], "wgmma": []}
        self.accumulating: dict[str, np.ndarray] = {}  # accumulators of wgmma under way, and in which lanes
        self.visits = np.zeros(len(program.blocks), np.int64)  # of each basic block, by a warp with an active lane

    # Operands

    def read(self, operand: Any, dtype: Any) -> np.ndarray:
        """The value of ``operand`` as ``dtype``: registers wider than it are cut, narrower ones extended."""
        dtype = np.dtype(dtype)
        if isinstance(operand, list):
            return self._packed(operand, dtype)
        if operand[0] != "%":
            return _immediate(operand, dtype)
        if operand in self.accumulating:
            self._refuse(operand, "read")
        found = self.registers.get(operand)
        if found is None:
            found = self._unset(operand)
        if found.dtype == dtype:
            return found
        if found.itemsize == dtype.itemsize:
            return found.view(dtype)
        if found.itemsize > dtype.itemsize:
            return found.astype(f"u{dtype.itemsize}").view(dtype)
        return found.view(f"i{found.itemsize}" if dtype.kind == "i" else found.dtype).astype(dtype)

    def _packed(self, operand: list[str], dtype: np.dtype) -> np.ndarray:
        size = dtype.itemsize // len(operand)
        out = np.zeros(self.lanes, f"u{dtype.itemsize}")
        for i, part in enumerate(operand):
            out |= self.read(part, f"u{size}").astype(out.dtype) << out.dtype.type(8 * size * i)
        return out.view(dtype)

    def _unset(self, name: str) -> np.ndarray:
        special: dict[str, Callable[[], np.ndarray]] = {
            "%tid.x": lambda: self.tid,
            "%ctaid.x": lambda: self.ctaid,
            "%ntid.x": lambda: np.full(self.lanes, self.program.threads, np.uint32),
            "%nctaid.x": lambda: np.full(self.lanes, self.grid, np.uint32),
            "%laneid": lambda: self.tid % WARP,
        }
        if name in special:
            return special[name]()
        if name[:5] in ("%tid.", "%ctai"):
            return np.zeros(self.lanes, np.uint32)
        return self._poison(name)

    def _poison(self, name: str) -> np.ndarray:
        width = _WIDTHS[name[1:].rstrip("0123456789")]
        return np.ones(self.lanes, bool) if width is np.bool_ else np.full(self.lanes, np.iinfo(width).max, width)

    def write(self, operand: str | list[str], value: np.ndarray, mask: np.ndarray | None) -> None:
        """``value`` into a register (narrower values are zero-extended or, if signed, sign-extended), in the lanes of
        ``mask``."""
        if isinstance(operand, list):
            size = value.itemsize // len(operand)
            parts = np.ascontiguousarray(value).view(f"u{size}").reshape(self.lanes, len(operand))
            for i, part in enumerate(operand):
                if part != "_":
                    self.write(part, np.ascontiguousarray(parts[:, i]), mask)
            return
        if operand in self.accumulating:
            self._refuse(operand, "written")
        width = np.dtype(_WIDTHS[operand[1:].rstrip("0123456789")])
        if value.ndim == 0:
            value = np.full(self.lanes, value)
        if value.itemsize == width.itemsize:
            value = value.view(width)
        elif value.itemsize < width.itemsize and value.dtype.kind in "iu":
            value = value.astype(f"{value.dtype.kind}{width.itemsize}").view(width)
        else:
            value = value.view(f"u{value.itemsize}").astype(width)
        if mask is not None:
            before = self.registers.get(operand)
            value = np.where(mask, value, self._poison(operand) if before is None else before)
        self.registers[operand] = value

    def _refuse(self, register: str, what: str) -> None:
        lanes = self.accumulating[register]
        if (lanes if self.active is None else lanes & self.active).any():
            raise Fault(f"{register} is {what} while a wgmma under way has it")

    def who(self, lanes: np.ndarray) -> np.ndarray:
        """The stamps of these lanes' accesses of global memory."""
        return self.memory.stamps(self.ctaid[lanes], self.warp[lanes], self.shared.epoch[self.block[lanes]])

    def mask_of(self, statement: Statement) -> np.ndarray | None:
        """The lanes that execute ``statement``; None for all."""
        if statement.guard is None:
            return self.active
        chosen = self.read(statement.guard, np.bool_)
        if statement.negated:
            chosen = ~chosen
        return chosen if self.active is None else chosen & self.active

    # Control flow

    def run(self) -> None:
        """Until every lane has returned. Raises Fault with the line of the PTX."""
        end = len(self.program.blocks)
        at = np.zeros(self.lanes, np.int64)
        waiting = np.zeros(self.lanes, bool)
        decoded = _decoded(self.program)
        with np.errstate(all="ignore"):
            while True:
                runnable = ~waiting & (at < end)
                if not runnable.any():
                    if not waiting.any():
                        break
                    self._release(at, waiting, end)
                    continue
                here = int(at[runnable].min())
                active = runnable & (at == here)
                self.active = None if active.all() else active
                self.visits[here] += active.reshape(-1, WARP).any(1).sum()
                for statement, execute in decoded[here]:
                    try:
                        execute(self)
                    except Fault as fault:
                        raise Fault(f"{self.program.name}, line {statement.line}, {statement.op}: {fault}") from None
                at[active] = here + 1
                statements = self.program.blocks[here]
                if statements and ends_block(statements[-1].op):
                    self._leave(statements[-1], at, waiting, end)
        if any(self.flying.values()):
            raise Fault(f"{self.program.name}: ended with copies or products under way")

    def _leave(self, last: Statement, at: np.ndarray, waiting: np.ndarray, end: int) -> None:
        mask = self.mask_of(last)
        lanes = slice(None) if mask is None else mask
        if last.op.startswith("bra"):
            assert isinstance(last.operands[0], str)
            at[lanes] = self.program.labels[last.operands[0]]
        elif last.op.startswith("ret"):
            at[lanes] = end
        elif last.operands != ["0"]:
            raise NotImplementedError(f"PTX line {last.line}: a barrier of some of the block's threads")
        else:
            waiting[lanes] = True
            self._release(at, waiting, end)

    def _release(self, at: np.ndarray, waiting: np.ndarray, end: int) -> None:
        """Blocks all of whose lanes wait, or have returned, pass their barrier."""
        shape = (len(self.blocks), -1)
        ready = (waiting | (at >= end)).reshape(shape).all(1) & waiting.reshape(shape).any(1)
        self.shared.epoch[ready] += 1
        waiting.reshape(shape)[ready] = False


def _decoded(program: Program) -> list[list[tuple[Statement, Execute]]]:
    """The statements of each basic block, without the one that ends it; decoded once."""
    if not program.decoded:
        program.decoded = [
            [(s, instructions.decode(s)) for s in block if not ends_block(s.op)] for block in program.blocks
        ]
    return program.decoded


def _immediate(text: str, dtype: np.dtype) -> np.ndarray:
    if text[:2] in ("0f", "0F"):
        return (
            np.uint32(int(text[2:], 16)).view(dtype)
            if dtype.itemsize == 4
            else np.uint32(int(text[2:], 16)).view(np.float32).astype(dtype)
        )
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view(dtype)
    if text == "global_smem":  # the start of shared memory
        return np.zeros((), dtype)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.bool_(value != 0)
    return np.uint64(value % (1 << 8 * dtype.itemsize)).astype(f"u{dtype.itemsize}").view(dtype)


def run(
    program: Program, arguments: list[Any], tensors: list[Tensor], shared: int, grid: int
) -> collections.Counter[str]:
    """Run ``grid`` blocks; ``arguments`` are the entry's parameters, tensors standing for their addresses. Results are
    in the tensors afterwards. Returns the instructions issued, counted once per warp."""
    memory = Global(tensors)
    values = [memory.address(a) if isinstance(a, Tensor) else a for a in arguments]
    if len(values) != len(program.parameters):
        raise ValueError(f"{program.name}: {len(program.parameters)} parameters, {len(values)} arguments")
    issued: collections.Counter[str] = collections.Counter()
    step = max(1, _LANES // program.threads)
    for first in range(0, grid, step):
        machine = Machine(program, values, memory, shared, np.arange(first, min(first + step, grid)), grid)
        machine.run()
        for statements, visits in zip(program.blocks, machine.visits.tolist(), strict=True):
            for statement in statements:
                issued[statement.op] += visits
    memory.write_back()
    return issued
