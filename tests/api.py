"""The public API as text, one name a line: ``python -m tests.api`` writes tests/api.txt, which a test compares.

Public is what ``__all__`` of the packages below lists and what the API reference (docs/reference) describes. A line has
the stability (docs/stability.md), the name and the signature, without annotations, whose text differs between versions
of Python; a class has its constructor and the methods and properties that pyvit defines.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "api.txt"

PACKAGES = (
    "pyvit",
    "ops",
    "nn",
    "models",
    "losses",
    "quantization",
    "dispatch",
    "train",
    "data",
    "embed",
    "integrations",
)

#: Names, and packages or classes with all that is in them, that may still change in a minor version.
PROVISIONAL = (
    "pyvit.data",
    "pyvit.dequantize",
    "pyvit.dispatch",
    "pyvit.embed",
    "pyvit.eval",
    "pyvit.models.audio",
    "pyvit.models.detection",
    "pyvit.models.export",
    "pyvit.models.finetune",
    "pyvit.models.infer",
    "pyvit.models.naflex",
    "pyvit.models.sam",
    "pyvit.nn.Packing",
    "pyvit.nn.QuantizedLinear",
    "pyvit.nn.TokenMerging",
    "pyvit.ops.decomposed_attention",
    "pyvit.ops.rope_attention",
    "pyvit.quantization",
    "pyvit.quantize",
    "pyvit.train",
)


def stability(name: str) -> str:
    """Of a public name: "provisional" or "stable"."""
    return "provisional" if any(name == p or name.startswith(p + ".") for p in PROVISIONAL) else "stable"


def names() -> Iterator[str]:
    """Every public name, with its package, as users import it."""
    for package in PACKAGES:
        module = "pyvit" if package == "pyvit" else f"pyvit.{package}"
        yield from (f"{module}.{name}" for name in importlib.import_module(module).__all__)
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        yield from re.findall(r"^::: (\S+)$", page.read_text(), re.M)


def _signature(thing: Any) -> str:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):  # of classes in C
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<class '([^']+)'>|<function (\S+) at 0x[0-9a-f]+>", r"\1\2", text)


def _members(name: str, cls: type) -> Iterator[str]:
    """The methods and properties of a class, those of its bases in pyvit too."""
    for key in sorted({k for base in cls.__mro__ if base.__module__.startswith("pyvit") for k in vars(base)}):
        found = inspect.getattr_static(cls, key)
        if key.startswith("_"):
            continue
        if isinstance(found, (property, staticmethod, classmethod)) or inspect.isfunction(found):
            kind = " property" if isinstance(found, property) else _signature(getattr(cls, key))
            yield f"{name}.{key}{kind}"


def lines() -> list[str]:
    """The content of tests/api.txt."""
    found = []
    for name in sorted(set(names())):
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        if isinstance(thing, ModuleType):
            entries = [f"{name} module"]
        elif inspect.isclass(thing):
            entries = [name + _signature(thing), *_members(name, thing)]
        else:
            entries = [name + _signature(thing) if callable(thing) else f"{name} value"]
        found += [f"{stability(name):<12}{entry}" for entry in entries]
    return found


def differences(old: list[str], new: list[str]) -> list[str]:
    """What changed, by name: "added", "removed" and "changed" lines; the last with both signatures."""

    def by_name(entries: list[str]) -> dict[str, str]:
        return {re.split(r"[ (]", entry[12:], maxsplit=1)[0]: entry for entry in entries}

    before, after = by_name(old), by_name(new)
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            found.append(f"added: {after[name]}")
        elif name not in after:
            found.append(f"removed: {before[name]}")
        elif before[name] != after[name]:
            found.append(f"changed: {before[name]}\n     to: {after[name]}")
    return found


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
