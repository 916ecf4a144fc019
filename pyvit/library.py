"""The compiled library: finds and loads ``pyvit/lib/libpyvit_ops.so``, or says why it could not."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from pyvit.schemas import PYTHON_SCHEMAS, SCHEMAS

PATH = Path(__file__).parent / "lib" / "libpyvit_ops.so"

#: Operators are defined by the library when it loads, else by this fragment; Python-side kernels are registered through
#: it either way.
FRAGMENT = torch.library.Library("pyvit", "FRAGMENT")


@functools.cache
def problem() -> str | None:
    """Why the compiled library is not in use, or None when it is. The first call loads it."""
    if os.environ.get("PYVIT_NO_LIBRARY") == "1":
        return "PYVIT_NO_LIBRARY=1 is set"
    if not PATH.exists():
        return f"the compiled library is missing ({PATH.name}); build it with 'pip install .' or 'make build'"
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {error}"
    return None


def has_cuda() -> bool:
    """Whether the loaded library carries CUDA kernels."""
    return problem() is None and bool(torch.ops.pyvit.cuda_archs())


@functools.cache
def cuda_digests() -> dict[str, str]:
    """Operator -> digest of the sources of the CUDA kernels that the library carries (csrc/cuda/digests.py)."""
    if not has_cuda() or not hasattr(torch.ops.pyvit, "cuda_digests"):
        return {}
    return dict(entry.split("=") for entry in torch.ops.pyvit.cuda_digests().split(";"))


def define_operators() -> None:
    """Make every ``torch.ops.pyvit`` operator exist, with or without the library."""
    if problem() is not None:
        for name, schema in SCHEMAS.items():
            FRAGMENT.define(name + schema)
    for name, schema in PYTHON_SCHEMAS.items():
        FRAGMENT.define(name + schema)
