"""Other libraries that some tests use.

``make test`` installs them (tests/peers.txt) and sets PYVIT_TEST_PEERS=required; otherwise their tests are skipped with
a reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

import pytest

from benchmarks.peers import import_peer


def _absent(name: str) -> None:
    if os.environ.get("PYVIT_TEST_PEERS") == "required":
        raise ModuleNotFoundError(f"{name} is not installed, and PYVIT_TEST_PEERS=required")
    pytest.skip(f"{name} is not installed", allow_module_level=True)


def peer(name: str) -> ModuleType:
    """Import a library, after torchvision if that is installed, or skip the file."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        _absent(name)
    if (
        importlib.util.find_spec("transformers") is not None
    ):  # it remembers whether torchvision is there: ask before a stand-in is
        importlib.import_module("transformers.image_utils")
    return import_peer(name)


def torchvision() -> ModuleType:
    """torchvision, whose classification models do not need its compiled operators; or skip the file."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        _absent("torchvision")
        raise
