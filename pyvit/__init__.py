"""pyvit: fast vision transformers. Fused kernels as PyTorch operators, and the models that use them."""

import gc
import importlib
from typing import TYPE_CHECKING, Any

# What an import creates stays. Looking for garbage among it, and among all that torch's import created, takes longer
# than the import.
_collects = gc.isenabled()
gc.disable()
try:
    from pyvit import ops
    from pyvit.dispatch import BackendError, explain, use_backend
    from pyvit.info import info
    from pyvit.memory import keep_memory
    from pyvit.version import __version__
finally:
    if _collects:
        gc.enable()

if TYPE_CHECKING:
    from pyvit.integrations import accelerate, restore
    from pyvit.integrations.sdpa_override import activate_sdpa, restore_sdpa
    from pyvit.models.checkpoints import load_checkpoint
    from pyvit.models.registry import create_model, list_models
    from pyvit.nn.packed_weights import pack_weights, unpack_weights
    from pyvit.quantization import dequantize, quantize

__all__ = [
    "BackendError",
    "__version__",
    "accelerate",
    "activate_sdpa",
    "create_model",
    "dequantize",
    "explain",
    "info",
    "keep_memory",
    "list_models",
    "load_checkpoint",
    "ops",
    "pack_weights",
    "quantize",
    "restore",
    "restore_sdpa",
    "unpack_weights",
    "use_backend",
]

#: Names that are imported when they are first used, and their modules: most programs need few of them.
_MODULES = {
    "accelerate": "integrations",
    "activate_sdpa": "integrations.sdpa_override",
    "create_model": "models.registry",
    "list_models": "models.registry",
    "dequantize": "quantization",
    "load_checkpoint": "models.checkpoints",
    "pack_weights": "nn.packed_weights",
    "quantize": "quantization",
    "restore": "integrations",
    "restore_sdpa": "integrations.sdpa_override",
    "unpack_weights": "nn.packed_weights",
}
_PACKAGES = ("integrations", "losses", "models", "nn")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
