"""Models by name: ``create_model("vit_base_patch16_224")``."""

from pyvit.models import (
    aimv2,
    audio,
    clip,
    deit,
    detection,
    dino,
    eva,
    finetune,
    hybrid,
    mae,
    naflex,
    pico,
    resnet,
    simclr,
    swin,
    vit,
)
from pyvit.models.registry import create_model, list_models, register

__all__ = [
    "aimv2",
    "audio",
    "clip",
    "create_model",
    "deit",
    "detection",
    "dino",
    "eva",
    "finetune",
    "hybrid",
    "list_models",
    "mae",
    "naflex",
    "pico",
    "register",
    "resnet",
    "simclr",
    "swin",
    "vit",
]
