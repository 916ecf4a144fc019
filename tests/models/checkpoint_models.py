"""Small models for the tests of checkpoints."""

from __future__ import annotations

import pyvit

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "window_size": 2,
    "num_classes": 5,
}
CLIP = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "vocab_size": 20,
    "context_length": 8,
}
CLIP |= {"text_width": 24, "text_depth": 1, "text_heads": 2}
SIGLIP = {
    "img_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "vocab_size": 20,
    "context_length": 8,
}


def vit(**more):
    return pyvit.create_model("vit_tiny_patch16_224", **{**VIT, **more})


def swin(version=1, **more):
    return pyvit.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "version": version, **more})


def dinov2(**more):
    return vit(num_classes=0, mask_token=True, init_values=0.1, **more)


def dinov3(**more):
    return pyvit.create_model("vit_small_patch16_dinov3_qkvb", **{**VIT, "num_classes": 0, **more})


def small(name, **more):
    return pyvit.create_model(name, **{**VIT, **more})


def sam(**more):
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 3}
    return pyvit.create_model("samvit_base_patch16", **{**settings, "global_blocks": [1], **more})


def hiera(**more):
    settings = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "stages": (1, 2, 2, 1), "num_classes": 5}
    return pyvit.create_model("hiera_tiny_224", **{**settings, **more})


SAM2 = {"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 3, 2), "global_blocks": (4,), "window_sizes": (8, 4, 6, 5)}
SAM2 |= {"global_pos_size": (5, 5), "img_size": 64}


def sam2(**more):
    return pyvit.create_model("sam2_encoder_hiera_tiny", **{**SAM2, "out_channels": 24, **more})


MODELS = {
    "transformers ViT": vit,
    "transformers<5 ViT": vit,
    "transformers DINOv2": dinov2,
    "transformers<5 DINOv2": lambda: dinov2(activation="swiglu", reg_tokens=4),
    "transformers DINOv3": lambda: dinov3(activation="swiglu", mlp_ratio=3.0),
    "timm DINOv3": dinov3,
    "transformers Swin": swin,
    "transformers<5 Swin": swin,
    "transformers SwinV2": lambda: swin(2),
    "transformers CLIP": lambda: pyvit.create_model("clip_vit_base_patch32_224", **CLIP),
    "transformers SigLIP": lambda: pyvit.create_model("siglip_vit_base_patch16_224", **SIGLIP),
    "transformers SigLIP 2 NaFlex": lambda: pyvit.create_model("siglip2_vit_base_patch16_naflex", **SIGLIP),
    "timm NaFlex": lambda: pyvit.create_model("naflexvit_base_patch16_siglip", **{**VIT, "num_classes": 0}),
    "timm EVA-02": lambda: small("eva02_base_patch14_224"),
    "timm EVA": lambda: small("eva02_tiny_patch14_224"),
    "timm PE": lambda: small("vit_pe_lang_large_patch14_448"),
    "transformers AIMv2": lambda: small("aimv2_large_patch14_224", num_classes=0),
    "timm AIMv2": lambda: small("aimv2_large_patch14_224"),
    "transformers SAM": sam,
    "facebookresearch SAM": sam,
    "transformers Hiera": hiera,
    "transformers SAM 2": sam2,
    "transformers SAM 2 encoder": sam2,
    "facebookresearch SAM 2": sam2,
    "open_clip with timm's tower": lambda: pyvit.create_model("siglip2_vit_base_patch16_224", **SIGLIP),
    "OpenAI CLIP": lambda: pyvit.create_model("clip_vit_base_patch32_224", **CLIP),
    "open_clip": lambda: pyvit.create_model("clip_vit_base_patch32_224", **CLIP),
    "torchvision ViT": vit,
    "torchvision<0.12 ViT": vit,
    "torchvision Swin": swin,
    "torchvision SwinV2": lambda: swin(2),
    "Microsoft Swin": swin,
    "facebookresearch DINOv2": lambda: dinov2(reg_tokens=4),
    "timm": vit,
}
