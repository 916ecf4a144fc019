"""Declarations of settings: default, meaning and range. Checks, error messages and ``--help`` use them."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class SettingError(ValueError):
    """A setting that does not exist, or a value that it does not accept."""


@dataclass(frozen=True)
class Option:
    """A setting of a recipe.

    Args:
        default: the value if none is given. Values must have its type; a float also accepts an int.
        help: its meaning, for the command line.
        within: the interval of a number, such as "[0, 1)"; "inf" is no bound.
        choices: the accepted values, if they can be listed.
    """

    default: Any
    help: str
    within: str = ""
    choices: tuple[Any, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        """Return ``value``, or raise SettingError with ``name``, the accepted values and the given one."""
        return check(name, value, type(self.default), self.within, self.choices)

    def describe(self, name: str) -> str:
        """A line of the help text."""
        wanted = (
            f" ({', '.join(map(str, self.choices))})"
            if self.choices
            else f", {wording(self.within)}"
            if self.within
            else ""
        )
        return f"{name}={self.default}: {self.help}{wanted}"


def check(name: str, value: Any, kind: type, within: str = "", choices: tuple[Any, ...] = ()) -> Any:
    """``value`` if it is of type ``kind``, in the interval ``within`` and among ``choices``; see :class:`Option`."""
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, kind)):
        fits = not within or inside(value, within)
    else:
        fits = isinstance(value, kind) and not within
    if choices:
        fits = any(type(value) is type(choice) and value == choice for choice in choices)
    if not fits:
        what = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}.get(kind, kind.__name__)
        if choices:
            what = f"one of {', '.join(map(str, choices))}"
        elif within:
            what = (
                wording(within)
                if isinstance(value, (int, float)) and not isinstance(value, bool)
                else f"{what} {wording(within)}"
            )
            what = f"a whole number {wording(within)}" if kind is int and isinstance(value, float) else what
        raise SettingError(f"{name} must be {what}, got {value!r}")
    return value


def inside(value: float, within: str) -> bool:
    """Whether ``value`` is in the interval ``within``. NaN is in none."""
    low, high = map(float, within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    return above and below


def wording(within: str) -> str:
    """The interval as text: "[1, inf)" is "at least 1"."""
    low, high = (side.strip() for side in within[1:-1].split(","))
    if math.isinf(float(high)):
        return f"at least {low}" if within[0] == "[" else f"above {low}"
    return f"in {within}"


def parse(pairs: Iterable[str], what: str) -> dict[str, Any]:
    """["depth=4", "name=x"] to {"depth": 4, "name": "x"}. Values are Python literals or else strings."""
    found = {}
    for item in pairs:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise SettingError(f"{what} must be KEY=VALUE, got {item!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def choose(recipe: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all options: those ``given``, after a check, and the defaults of the others."""
    unknown = given.keys() - options.keys()
    if unknown:
        known = ", ".join(options) or "(none)"
        raise SettingError(f"{recipe}: option must be one of {known}, got {', '.join(sorted(unknown))}")
    for name, value in given.items():
        options[name].check(f"{recipe}: option {name}", value)
    return {name: given.get(name, option.default) for name, option in options.items()}
