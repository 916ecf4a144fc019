"""Operators' schemas by the names of their arguments and outputs."""

from __future__ import annotations

from typing import NamedTuple

from pyvit.schemas import PYTHON_SCHEMAS, SCHEMAS


class Schema(NamedTuple):
    """The names of an operator's arguments and outputs; ``tensors`` and ``optional`` are arguments."""

    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: frozenset[str]
    optional: frozenset[str]

    def position(self, argument: str) -> int:
        if argument not in self.arguments:
            raise ValueError(f"an operator's arguments are {', '.join(self.arguments)}; there is no {argument!r}")
        return self.arguments.index(argument)


def schema_of(name: str) -> Schema:
    """The schema of the operator ``name``. An output without a name is called "out"."""
    text = SCHEMAS[name] if name in SCHEMAS else PYTHON_SCHEMAS[name]
    given, returned = (part.strip("()").split(", ") for part in text.split(" -> "))
    typed = [argument.split() for argument in given]
    return Schema(
        tuple(name for _, name in typed),
        tuple([*output.split(), "out"][1] for output in returned),
        frozenset(name for kind, name in typed if kind.startswith("Tensor")),
        frozenset(name for kind, name in typed if kind.endswith("?")),
    )
