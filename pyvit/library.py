"""The compiled library in ``pyvit/lib``: finds and loads it, or says why it could not."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pyvit.schemas import PYTHON_SCHEMAS, SCHEMAS

#: As packaging/native.py names it.
_NAMES = {"darwin": "libpyvit_ops.dylib", "win32": "pyvit_ops.dll"}
PATH = Path(__file__).parent / "lib" / _NAMES.get(sys.platform, "libpyvit_ops.so")

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
    return bool(cuda_archs())


def cuda_archs() -> list[str]:
    """The architectures that the loaded library's CUDA kernels were built for, such as "9.0"; empty without any."""
    return [arch for arch in str(torch.ops.pyvit.cuda_archs()).split(";") if arch] if problem() is None else []


def code_for(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """What a GPU of this compute capability runs of a build for ``archs`` ("8.0", "9.0a", "12.0+PTX", ..., as in
    TORCH_CUDA_ARCH_LIST): machine code ("sm_80") or PTX ("compute_120"); None if nothing.

    Machine code runs on GPUs of its major version with at least its minor one, PTX on every later GPU too. Code for an
    architecture's own features ("a") runs on exactly that one, PTX for a family ("f") where the machine code does.

    Source: CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility" and "Feature Sets".
    """
    ptx = None
    for arch in archs:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            raise ValueError(f"{arch!r} is not an architecture such as '9.0', '9.0a' or '12.0+PTX'")
        built, features = (int(found[1]), int(found[2])), found[3]
        code = f"{found[1]}{found[2]}{features}"
        if built == capability or (features != "a" and built[0] == capability[0] and built[1] <= capability[1]):
            return f"sm_{code}"
        if found[4] and not features and built <= capability:
            ptx = f"compute_{code}"
    return ptx


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """None if a build for ``archs`` runs on a GPU of this compute capability (:func:`code_for`), else the reason."""
    if code_for(archs, capability) is not None:
        return None
    major, minor = capability
    return f"the library was built for {';'.join(archs)}: no code for compute capability {major}.{minor}"


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
