"""PTX text into basic blocks of decoded statements."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

#: A decoded statement: what it does to the machine.
Execute = Callable[["Machine"], None]


@dataclass
class Statement:
    """``@guard op operands``; operands are strings, or lists of them where the text has braces."""

    op: str
    operands: list[str | list[str]]
    guard: str | None = None
    negated: bool = False
    line: int = 0

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Program:
    """One entry: types of its parameters, and statements cut where control may come in or leave."""

    name: str
    parameters: list[str]
    threads: int
    blocks: list[list[Statement]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    decoded: list[list[tuple[Statement, Execute]]] = field(default_factory=list)


_OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*)")
_ENDS = ("bra", "ret", "bar.sync", "barrier.sync")


def ends_block(op: str) -> bool:
    return op.startswith(_ENDS)


def parse(text: str) -> Program:
    """The single entry of a module. Raises ValueError where there is none, or more."""
    entries = re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", text, re.DOTALL)
    if len(entries) != 1:
        raise ValueError(f"PTX: one entry wanted, found {[e[0] for e in entries]}")
    name, parameters, directives = entries[0]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    if threads is None:
        raise ValueError(f"PTX: {name} does not say its number of threads")
    types = [m.group(1) for m in re.finditer(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", parameters)]
    program = Program(name, types, int(threads.group(1)))
    body_at = text.index("{", text.index(directives, text.index(f".entry {name}")))
    current: list[Statement] = []
    first_line = text.count("\n", 0, body_at) + 1
    for number, raw in enumerate(text[body_at + 1 :].split("\n"), first_line):
        line = raw.partition("//")[0].strip()
        if line == "}" and not raw.startswith((" ", "\t")):
            break
        label = re.match(r"(\$?\w+):", line)
        if label and not line.startswith("."):
            if current:
                program.blocks.append(current)
                current = []
            program.labels[label.group(1)] = len(program.blocks)
            line = line[label.end() :].strip()
        if line.startswith("."):
            continue
        for piece in line.strip("{} \t" if line in "{}" else " \t").split(";"):
            statement = _statement(piece.strip(), number)
            if statement is None:
                continue
            current.append(statement)
            if ends_block(statement.op):
                program.blocks.append(current)
                current = []
    program.blocks.append(current)
    return program


def _statement(text: str, line: int) -> Statement | None:
    if not text or text in "{}":
        return None
    guard, negated = None, False
    if text.startswith("@"):
        head, _, text = text.partition(" ")
        negated, guard = head[1] == "!", head.lstrip("@!")
        text = text.strip()
    op, _, rest = re.sub(r"\s+", " ", text).partition(" ")
    operands: list[str | list[str]] = []
    for found in _OPERAND.findall(rest):
        item = found.strip()
        if item.startswith("{"):
            operands.append([part.strip() for part in item[1:-1].split(",")])
        elif item:
            operands.append(item)
    return Statement(op, operands, guard, negated, line)
