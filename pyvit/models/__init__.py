"""Vision transformers by name: ``create_model("vit_base_patch16_224")``."""

from pyvit.models import swin, vit
from pyvit.models.registry import create_model, list_models, register

__all__ = ["create_model", "list_models", "register", "swin", "vit"]
