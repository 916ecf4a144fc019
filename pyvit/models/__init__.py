"""Vision transformers by name: ``create_model("vit_base_patch16_224")``."""

from pyvit.models import audio, clip, deit, mae, swin, vit
from pyvit.models.registry import create_model, list_models, register

__all__ = ["audio", "clip", "create_model", "deit", "list_models", "mae", "register", "swin", "vit"]
