"""Checks that a class of another library, and the code it calls, is unmodified.

A replacement computes what a class's forward is known to compute. Users may patch classes (``Attention.forward =
mine``), functions that a forward calls (``F.scaled_dot_product_attention = mine``) and helpers, before or after
:func:`pyvit.accelerate`. So everything that a class's forward reaches is recorded once, by name and object, and
compared at every call.
"""

from __future__ import annotations

import dis
import functools
import operator
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)
#: Packages whose functions a library may call, besides its own.
_TRUSTED = (
    "torch",
    "pyvit",
    "builtins",
    "math",
    "functools",
    "operator",
    "_operator",
    "typing",
    "contextlib",
    "collections",
    "warnings",
)


class Code:
    """Everything that the forward of a class, or a function, reaches: methods of the class and, by name, functions of
    its library and of torch.

    ``methods``: names of the methods, which an unmodified instance does not have in its own dictionary. ``reads``:
    every name that these methods use, with ``matmul`` for @. ``foreign``: the first function that is not the library's
    own, or None.
    """

    def __init__(self, kind: type | types.FunctionType) -> None:
        self.kind, self.library = kind, kind.__module__.partition(".")[0]
        self.foreign: str | None = None
        self.reads: set[str] = set()
        self._methods: dict[str, Any] = {}
        # id of a module's dictionary -> the dictionary, and the names that are used
        self._globals: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._seen: set[types.CodeType] = set()
        if isinstance(kind, type):
            for name in ("forward", "__call__"):
                self._method(name)
        elif _home(kind) == self.library:
            self._follow(kind)
        else:
            self.foreign = f"{kind.__qualname__} is {_home(kind)}'s"
        self.methods = frozenset(self._methods)
        names = tuple(self._methods)  # at least two, so that the getters return tuples
        self._get = operator.attrgetter(*names) if names else lambda _: ()
        self._functions = tuple(self._methods.values())
        self._named = [
            (operator.itemgetter(*used, next(iter(used))), dictionary, (*used.values(), next(iter(used.values()))))
            for dictionary, used in self._globals.values()
            if used
        ]

    def holds(self) -> bool:
        """Whether all recorded objects are the library's own and unchanged."""
        try:
            if self.foreign is not None or self._get(self.kind) != self._functions:
                return False
            for get, dictionary, objects in self._named:
                if get(dictionary) != objects:
                    return False
        except (AttributeError, KeyError):
            return False
        return True

    def _method(self, name: str) -> None:
        function = getattr(self.kind, name, None)
        if not callable(function) or isinstance(function, type) or name in self._methods:
            return
        definer = next((c for c in self.kind.__mro__ if name in vars(c)), None)
        if definer is None or definer is object:
            return
        self._methods[name] = function
        if definer is nn.Module:
            own = getattr(function, "__globals__", {}).get("__name__") == nn.Module.__module__
        else:
            own = _is_own(function, definer, name)
        if not own:
            self.foreign = self.foreign or f"its class's {name} is not {definer.__module__.partition('.')[0]}'s own"
        if definer is not nn.Module:
            self._follow(function)

    def _follow(self, function: Any) -> None:
        """Record the names that a function, and the functions it wraps, use."""
        while isinstance(function, types.FunctionType):
            for code in _nested(function.__code__):
                if code in self._seen:
                    continue
                self._seen.add(code)
                self.reads.update(code.co_names)
                if any(
                    step.argrepr == "@" or step.opname == "BINARY_MATRIX_MULTIPLY"
                    for step in dis.get_instructions(code)
                ):
                    self.reads.add("matmul")
                for name in code.co_names:
                    if name in function.__globals__:
                        self._global(function.__globals__, name, code.co_names)
                    elif isinstance(getattr(self.kind, name, None), types.FunctionType) and not hasattr(
                        nn.Module, name
                    ):
                        self._method(name)
            function = vars(function).get("__wrapped__")

    def _global(self, dictionary: dict[str, Any], name: str, names: tuple[str, ...]) -> None:
        value = dictionary[name]
        _, used = self._globals.setdefault(id(dictionary), (dictionary, {}))
        if name in used or isinstance(value, type):
            return
        if isinstance(value, types.ModuleType):
            used[name] = value
            if value.__name__.partition(".")[0] in (self.library, "torch"):
                for inner in names:
                    if inner in vars(value):
                        self._global(vars(value), inner, names)
        elif type(value).__module__.partition(".")[0] == self.library:  # a table of functions, for example
            used[name] = value
        elif callable(value):
            used[name] = value
            home = _home(value)
            if home not in (self.library, *_TRUSTED):
                self.foreign = self.foreign or f"{dictionary.get('__name__')}.{name}, which it calls, is {home}'s"
            if home == self.library and (home != "torch" or name == "multi_head_attention_forward"):
                self._follow(value)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _home(function: Any) -> str:
    """The package that defines a callable."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, types.FunctionType):
        names = function.__globals__.get("__name__", "?")
    elif isinstance(function, types.MethodType):
        return _home(function.__func__)
    elif isinstance(function, _FUNCTIONS):
        names = "builtins"
    else:
        names = type(function).__module__
    return str(names).partition(".")[0]


def _is_own(function: Any, definer: type, name: str) -> bool:
    """Whether ``name`` of class ``definer`` is defined in the class's module, possibly with decorators of its library
    or of torch."""
    while isinstance(function, types.FunctionType):
        if _home(function) not in (definer.__module__.partition(".")[0], *_TRUSTED):
            return False
        inner = vars(function).get("__wrapped__")
        if inner is None:
            return (
                function.__globals__.get("__name__") == definer.__module__
                and function.__qualname__ == f"{definer.__qualname__}.{name}"
            )
        function = inner
    return False


numbers: dict[Any, int] = {}
_table: list[Code] = []


def record(kind: Any) -> Code:
    """The recorded code of a class or a function; recorded at the first call, and again if it has changed."""
    number = numbers.get(kind)
    if number is not None and not (code := _table[number]).holds():
        _table[number] = code = Code(kind)
    elif number is None:
        numbers[kind] = len(_table)
        _table.append(code := Code(kind))
    return code


def number(kind: Any) -> int:
    """The number by which :func:`unchanged` identifies a class or a function."""
    record(kind)
    return numbers[kind]


def renew() -> None:
    """Record again what has changed: patches may have been removed."""
    for code in _table:
        record(code.kind)


def unchanged(number: int) -> bool:
    """:meth:`Code.holds` of a recorded class. A constant for torch.compile."""
    return number >= 0 and _table[number].holds()


unchanged._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result, without importing it
