"""Digests of kernels, by which a measurement says what it measured.

They are computed from the sources alone: a function or constant and everything of this package that it names, without
comments and docstrings. Nothing is imported, so they are the same in Triton's interpreter and where Triton is missing.
(``JITFunction.cache_key`` also changes with line numbers, and interpreted functions have none.)
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_FOLDER = Path(__file__).parent
_PACKAGE = "pyvit.triton_kernels"
#: In absolute and in relative imports: packaging/hub.py writes a copy with the latter.
_FOLDER_NAME = "triton_kernels"
#: Kernels that :mod:`pyvit.triton_kernels.tiles` knows by another name than their function's.
_FUNCTIONS = {"bias_grad": "bias_gradient", "attention_map": "map_rows"}
#: (module, name)
Name = tuple[str, str]
#: Of tiles, only the table's entries of an operator's own kernels belong to it, not how an entry is found.
_LOOK_UP: Name = ("tiles", "choose")


@functools.cache
def kernel(name: str) -> str:
    """The digest of a kernel (by its name in ``tiles.TABLE``): its function and what it calls. Raises KeyError."""
    return _digest(_definition(_FUNCTIONS.get(name, name)))


@functools.cache
def operator(op: str) -> str:
    """The digest of an operator (by its schema's name): launchers, kernels and tile sizes, forward and backward. Raises
    KeyError."""
    found = dict(_reached([_definition(op), *_definitions(f"{op}_backward")]))
    strings = {node.value for part in found.values() for node in ast.walk(part) if isinstance(node, ast.Constant)}
    table = _module("tiles")[0]["TABLE"]
    entries = [
        call
        for call in ast.walk(table)
        if isinstance(call, ast.Call) and call.args and getattr(call.args[0], "value", None) in strings
    ]
    return _hash([*_texts(found), *map(ast.unparse, entries)])


def _digest(start: Name) -> str:
    return _hash(_texts(dict(_reached([start]))))


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _texts(found: dict[Name, ast.stmt]) -> list[str]:
    return [f"{module}.{name}: {ast.unparse(_bare(found[module, name]))}" for module, name in sorted(found)]


def _bare(node: ast.stmt) -> ast.stmt:
    """``node`` without docstrings."""
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    return node


@functools.cache
def _module(stem: str) -> tuple[dict[str, ast.stmt], dict[str, Name]]:
    """Top-level definitions of a module by name, and what it imports from this package ("" for a whole module)."""
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, Name] = {}
    for node in ast.parse((_FOLDER / f"{stem}.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        defined[part.id] = node
        elif isinstance(node, ast.ImportFrom) and _FOLDER_NAME in (node.module or "").split("."):
            origin = (node.module or "").partition(_FOLDER_NAME)[2].removeprefix(".")
            for alias in node.names:
                imported[alias.asname or alias.name] = (origin, alias.name) if origin else (alias.name, "")
    return defined, imported


def _definitions(name: str) -> list[Name]:
    return [(p.stem, name) for p in sorted(_FOLDER.glob("*.py")) if name in _module(p.stem)[0]]


def _definition(name: str) -> Name:
    found = _definitions(name)
    if len(found) != 1:
        raise KeyError(f"{name}: defined {len(found)} times in {_PACKAGE}")
    return found[0]


def _reached(start: Iterable[Name]) -> Iterator[tuple[Name, ast.stmt]]:
    """The definitions that those of ``start`` name, directly or not, and these themselves."""
    open_, seen = list(start), {_LOOK_UP}
    while open_:
        module, name = at = open_.pop()
        defined, imported = _module(module)
        if name in imported and name not in defined:
            open_.append(imported[name])
            continue
        if at in seen or name not in defined:
            continue
        seen.add(at)
        yield at, defined[name]
        for part in ast.walk(defined[name]):
            if isinstance(part, ast.Name):
                open_.append((module, part.id))
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                origin, whole = imported.get(part.value.id, ("", "?"))
                if whole == "":
                    open_.append((origin, part.attr))
