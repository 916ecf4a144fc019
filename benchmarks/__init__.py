"""pyvit's benchmark suite: ``pyvit bench``; in a checkout also ``python -m benchmarks``, ``pytest benchmarks`` and
``python -m benchmarks.gpu``. See docs/benchmarks.md.

A wheel has it as ``pyvit.benchmarks``, since a top-level package of so common a name could be somebody else's. Its
modules import each other as ``benchmarks``, which this module makes a second name of the package.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


class _Checkout(importlib.abc.MetaPathFinder):
    """Where pyvit is not installed: the checkout's folder triton_kernels is the package ``pyvit.triton_kernels``."""

    folder = Path(__file__).parent.parent / "triton_kernels"

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "pyvit.triton_kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


if __name__ == "benchmarks":
    sys.meta_path.append(_Checkout())  # the last to be asked
else:
    sys.modules["benchmarks"] = sys.modules[__name__]
