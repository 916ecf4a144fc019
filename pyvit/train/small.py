"""Small models for small images, and the settings under which the built-in sets train in minutes on a laptop."""

from __future__ import annotations

from typing import Any

from pyvit.models.clip import clip_vit, siglip_vit
from pyvit.models.registry import REGISTRY, register
from pyvit.models.swin import SwinTransformer
from pyvit.models.vit import VisionTransformer

if "vit_pico_patch4_32" not in REGISTRY:
    _TEXT = {"embed_dim": 64, "text_width": 96, "text_depth": 2, "text_heads": 3}
    _VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3}
    register("vit_pico_patch4_32", VisionTransformer, img_size=32, patch_size=4, **_VIT)
    register("vit_pico_patch8_64", VisionTransformer, img_size=64, patch_size=8, **_VIT)
    register(
        "swin_pico_patch2_window4_32",
        SwinTransformer,
        img_size=32,
        patch_size=2,
        embed_dim=32,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        window_size=4,
        drop_path_rate=0.0,
    )
    register("clip_pico_patch4_32", clip_vit, img_size=32, patch_size=4, width=96, depth=4, num_heads=3, **_TEXT)
    register("clip_pico_patch8_64", clip_vit, img_size=64, patch_size=8, width=96, depth=4, num_heads=3, **_TEXT)
    register("siglip_pico_patch8_64", siglip_vit, img_size=64, patch_size=8, width=96, depth=4, num_heads=3)

#: The model that a built-in set trains when none is named.
MODELS = {"digits": "vit_pico_patch4_32", "scenes": "vit_pico_patch8_64", "words": "vit_pico_patch8_64"}

_MILD = {"augment": "mild", "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
#: PRESETS[recipe, data]: Config fields, and recipe options under "option", that replace the recipe's canonical ones.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("supervised", "digits"): {"epochs": 30, "batch_size": 128, "lr": 2e-3, "warmup": 0.1, "option": _MILD},
    ("supervised", "words"): {"epochs": 25, "batch_size": 64, "lr": 1e-3, "warmup": 0.1, "option": _MILD},
}
