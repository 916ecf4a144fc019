"""A griffe extension for the API pages: the docstrings' Sphinx roles (``:func:`linear```) become links of the site, and
their examples code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

HERE = Path(__file__).resolve().parent

_DOCTEST = re.compile(r"^>>> .*(?:\n(?:>>>|\.\.\.).*)*", re.M)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


def documented() -> dict[str, str]:
    """Last part of a name -> the name, of what the API pages describe."""
    pages = (HERE / "reference").glob("*.md")
    names = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    return {name.rpartition(".")[2]: name for name in names}


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
        if obj.docstring is not None:
            value = _ROLE.sub(self._link, obj.docstring.value)
            obj.docstring.value = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", value)

    def _link(self, role: re.Match[str]) -> str:
        name = role[1]
        known = None if name.startswith("torch.") else self.names.get(name.rpartition(".")[2])
        return f"`{name}`" if known is None else f"[`{name}`][{known}]"
