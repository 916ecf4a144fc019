"""pyvit's benchmark suite: ``python -m benchmarks``, ``pytest benchmarks``, ``python -m benchmarks.gpu``. See
docs/benchmarks.md."""

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


sys.meta_path.append(_Checkout())  # the last to be asked
