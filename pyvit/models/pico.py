"""Small models for small images, which train in minutes on a CPU."""

from __future__ import annotations

from pyvit.models.audio import AudioSpectrogramTransformer
from pyvit.models.clip import clip_resnet, clip_vit, siglip_vit
from pyvit.models.hybrid import HybridVisionTransformer
from pyvit.models.registry import register
from pyvit.models.swin import SwinTransformer
from pyvit.models.vit import VisionTransformer

_XAVIER = {"weight_init": "xavier"}
_VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3, **_XAVIER}
_TOWERS = {"width": 96, "depth": 4, "num_heads": 3}
_TEXT = {"embed_dim": 64, "text_width": 96, "text_depth": 2, "text_heads": 3}
_SWIN = {"embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0, **_XAVIER}

register("vit_pico_patch4_28", VisionTransformer, img_size=28, patch_size=4, **_VIT)
register("vit_pico_conv_s4_28", HybridVisionTransformer, img_size=28, conv_channels=(24, 48), patch_size=1, **_VIT)
register(
    "vit_pico_conv_s8_32", HybridVisionTransformer, img_size=32, conv_channels=(24, 48, 96), global_pool="avg", **_VIT
)
register("vit_pico_patch4_32", VisionTransformer, img_size=32, patch_size=4, **_VIT)
register("vit_pico_patch8_32", VisionTransformer, img_size=32, patch_size=8, **_VIT)
register("vit_pico_patch8_64", VisionTransformer, img_size=64, patch_size=8, **_VIT)
register("ast_pico_patch16_128x64", AudioSpectrogramTransformer, img_size=(128, 64), patch_size=16, **_VIT)
register("swin_pico_patch2_window7_28", SwinTransformer, img_size=28, patch_size=2, window_size=7, **_SWIN)
register("swin_pico_patch4_window4_32", SwinTransformer, img_size=32, patch_size=4, window_size=4, **_SWIN)
register("clip_pico_patch8_32", clip_vit, img_size=32, patch_size=8, **_TOWERS, **_TEXT)
register("clip_pico_patch8_64", clip_vit, img_size=64, patch_size=8, **_TOWERS, **_TEXT)
register("clip_resnet_pico_64", clip_resnet, layers=(1, 1, 1, 1), width=32, num_heads=8, img_size=64, **_TEXT)
register("siglip_pico_patch8_32", siglip_vit, img_size=32, patch_size=8, **_TOWERS)
register("siglip_pico_patch8_64", siglip_vit, img_size=64, patch_size=8, **_TOWERS)
