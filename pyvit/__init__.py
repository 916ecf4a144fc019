"""pyvit: fast vision transformers. Fused kernels as PyTorch operators, and the models that use them."""

from pyvit import ops
from pyvit.dispatch import BackendError, explain, use_backend
from pyvit.info import info
from pyvit.models.checkpoints import load_checkpoint
from pyvit.models.registry import create_model, list_models
from pyvit.version import __version__

__all__ = ["BackendError", "__version__", "create_model", "explain", "info", "list_models", "load_checkpoint", "ops", "use_backend"]
