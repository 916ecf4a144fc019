"""A griffe extension: the docstrings' Sphinx roles (``:func:`pyvit.ops.linear```) as links of the site's API pages, and
doctest lines as code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

HERE = Path(__file__).resolve().parent

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


def documented() -> set[str]:
    """The names that the API pages describe."""
    pages = (HERE / "reference").glob("*.md")
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}


class Docstrings(griffe.Extension):
    """Changes docstrings before they are parsed."""

    def __init__(self) -> None:
        self.names = documented()

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """``pyvit.ops.linear`` is the function, as Python has it, not the module that it shares its name with."""
        ops = pkg["ops"]
        for name, module in list(ops.modules.items()):
            if name in module.functions:
                ops.set_member(name, module[name])

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            name = match[1]
            for full in (name, f"{obj.module.path.rpartition('.')[0]}.{name}", f"{obj.module.path}.{name}"):
                if full in self.names:
                    return f"[`{name}`][{full}]"
            return f"`{name}`"

        obj.docstring.value = _ROLE.sub(link, obj.docstring.value)
