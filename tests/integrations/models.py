"""Small models of every library, each with a call that returns a tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests import peers
from tests.models.parity import randomise

Model = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def like(model: nn.Module, x: Tensor) -> Tensor:
    parameter = next(model.parameters())
    return x.to(parameter.device, parameter.dtype)


def on(*size: int) -> Callable[[nn.Module], Tensor]:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))

    def call(model: nn.Module) -> Tensor:
        out = model(like(model, images))
        return out if isinstance(out, Tensor) else out.last_hidden_state

    return call


def timm(name: str, **config: object) -> nn.Module:
    return randomise(peers.peer("timm").create_model(name, num_classes=7, **config)).eval()


_VIT = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 16, "patch_size": 8}
_SWIN = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32}


def timm_vit(fused: bool = True) -> Model:
    model = timm("vit_tiny_patch16_224", **_VIT)
    model.blocks[0].attn.fused_attn = fused
    return model, on(16, 16)


def transformers(kind: str, **config: object) -> Model:
    library = peers.peer("transformers")
    return randomise(getattr(library, f"{kind}Model")(getattr(library, f"{kind}Config")(**config))).eval(), on(
        config["image_size"], 32
    )


def _hf_vit(kind: str = "ViT", **extra: object) -> Model:
    config = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
    }
    return transformers(kind, **config, **extra)


def _hf_swin(kind: str) -> Model:
    config = {
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 4,
        "patch_size": 4,
        "image_size": 32,
    }
    return transformers(kind, **config)


def _torchvision_vit() -> Model:
    vit = peers.torchvision().models.VisionTransformer
    return randomise(vit(16, 8, num_layers=1, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7)).eval(), on(16, 16)


def _torchvision_swin() -> Model:
    swin = peers.torchvision().models.swin_transformer.SwinTransformer
    return randomise(swin([4, 4], 16, [2, 1], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=7)).eval(), on(
        32, 32
    )


def _open_clip() -> Model:
    vision = {"image_size": 16, "layers": 1, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 10, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model = randomise(peers.peer("open_clip").CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)).eval()
    images = torch.randn(2, 3, 16, 16)
    return model, lambda m: m.encode_image(like(m, images))


def _open_clip_custom() -> Model:
    block = peers.peer("open_clip").transformer.CustomResidualAttentionBlock
    x = torch.randn(2, 9, 32)
    return randomise(block(32, 2, norm_layer=nn.LayerNorm, qk_norm=True)).eval(), lambda m: m(like(m, x))


MODELS: dict[str, Callable[[], Model]] = {
    "timm vit": timm_vit,
    "timm vit unfused": lambda: timm_vit(False),
    "timm swin": lambda: (timm("swin_tiny_patch4_window7_224", **_SWIN), on(32, 32)),
    "timm swin v2": lambda: (timm("swinv2_tiny_window8_256", **_SWIN), on(32, 32)),
    "timm eva": lambda: (timm("eva02_tiny_patch14_224", **_VIT), on(16, 16)),
    "transformers vit": _hf_vit,
    "transformers vit eager": lambda: _hf_vit(attn_implementation="eager"),
    "transformers mlcd": lambda: _hf_vit("MLCDVision"),
    "transformers mlcd eager": lambda: _hf_vit("MLCDVision", attn_implementation="eager"),
    "transformers swin": lambda: _hf_swin("Swin"),
    "transformers swin v2": lambda: _hf_swin("Swinv2"),
    "torchvision vit": _torchvision_vit,
    "torchvision swin": _torchvision_swin,
    "open_clip": _open_clip,
    "open_clip custom": _open_clip_custom,
}
