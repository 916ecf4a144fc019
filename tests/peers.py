"""Libraries that some tests compare with or accelerate, and that not every machine has: the tests are skipped with a reason."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import ModuleType

import pytest
import torch

from benchmarks.peers import import_peer

_LIBRARIES = []


def peer(name: str) -> ModuleType:
    """A library of others, imported after torchvision where that is there, which all of them look for; or a skipped file."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    if importlib.util.find_spec("torchvision") is not None:
        torchvision()
    elif importlib.util.find_spec("transformers") is not None:  # it remembers that torchvision is not there: ask before a stand-in is
        importlib.import_module("transformers.image_utils")
    return import_peer(name)


def torchvision() -> ModuleType:
    """torchvision's Python part, which is all that its classification models are of; or a skipped file.

    One that was built for another torch lacks compiled operators (of detection), whose names it asks for at import.
    """
    while True:
        try:
            import torchvision
        except ImportError:
            pytest.skip("torchvision is not installed", allow_module_level=True)
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))  # gone with its definitions when collected
            _LIBRARIES[-1].define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return torchvision
