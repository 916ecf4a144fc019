"""pyvit: fast vision transformers. Fused kernels as PyTorch operators, and the models that use them."""

from typing import Any

from pyvit import ops
from pyvit.dispatch import BackendError, explain, use_backend
from pyvit.info import info
from pyvit.memory import keep_memory
from pyvit.models.checkpoints import load_checkpoint
from pyvit.models.registry import create_model, list_models
from pyvit.nn.packed_weights import pack_weights, unpack_weights
from pyvit.version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "accelerate",
    "create_model",
    "explain",
    "info",
    "keep_memory",
    "list_models",
    "load_checkpoint",
    "ops",
    "pack_weights",
    "restore",
    "unpack_weights",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in ("accelerate", "restore"):  # only for those who have another library's model
        from pyvit import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
