"""Hybrid ViTs: patches of a convolutional network's feature map. Dosovitskiy et al. (2021), section 3.1, "Hybrid
Architecture".

The plain convolutional stem is that of Xiao et al., "Early Convolutions Help Transformers See Better" (2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.models.registry import register
from pyvit.models.vit import SIZES, VisionTransformer
from pyvit.nn import PatchEmbed


def same_pad(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's "same" padding: ceil(n / stride) outputs, an odd pixel of padding at the end."""
    need = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
    return F.pad(x, (need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2), value=value)


class StdConv2d(nn.Conv2d):
    """Convolution with standardised weights (Qiao et al., 2019) and TensorFlow's padding."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, eps: float = 1e-8) -> None:
        super().__init__(cin, cout, kernel, stride, bias=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(var + self.eps)
        return F.conv2d(same_pad(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each followed by group norm."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        mid = cout // 4
        self.downsample = None
        if stride > 1 or cin != cout:
            self.downsample = nn.Module()
            self.downsample.conv, self.downsample.norm = StdConv2d(cin, cout, 1, stride), nn.GroupNorm(32, cout)
        self.conv1, self.norm1 = StdConv2d(cin, mid, 1), nn.GroupNorm(32, mid)
        self.conv2, self.norm2 = StdConv2d(mid, mid, 3, stride), nn.GroupNorm(32, mid)
        self.conv3, self.norm3 = StdConv2d(mid, cout, 1), nn.GroupNorm(32, cout)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample.norm(self.downsample.conv(x))
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + shortcut)


class ResNetV2Stem(nn.Module):
    """(B, C, H, W) to a map at stride 2^(stages + 1), with timm's names. Without stages: one convolution and the
    pooling, at stride 4."""

    def __init__(self, layers: Sequence[int], in_chans: int = 3) -> None:
        super().__init__()
        root = nn.Module() if layers else self
        root.conv, root.norm = StdConv2d(in_chans, 64, 7, 2), nn.GroupNorm(32, 64)
        if layers:
            self.stem = root
        made, cin = [], 64
        for s, depth in enumerate(layers):
            stage = nn.Module()
            stage.blocks = nn.Sequential(
                *(Bottleneck(cin if i == 0 else 256 * 2**s, 256 * 2**s, 2 if s and not i else 1) for i in range(depth))
            )
            made.append(stage)
            cin = 256 * 2**s
        self.stages = nn.ModuleList(made)
        self.channels = cin
        self.stride = 2 ** (max(len(layers), 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        root = self.stem if len(self.stages) else self
        x = F.relu(root.norm(root.conv(x)))
        x = F.max_pool2d(same_pad(x, 3, 2, -float("inf")), 3, 2)
        for stage in self.stages:
            x = stage.blocks(x)
        return x


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 with batch norm and ReLU, to stride 2^len(channels)."""

    def __init__(self, channels: Sequence[int], in_chans: int = 3) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for cin, cout in zip((in_chans, *channels), channels, strict=False):
            steps += [nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
        self.convs = nn.Sequential(*steps)
        self.channels, self.stride = channels[-1], 2 ** len(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class HybridEmbed(PatchEmbed):
    """A stem, then patches of its map. The image size must divide by stride times patch size."""

    def __init__(
        self, backbone: ResNetV2Stem | ConvStem, patch_size: int | Sequence[int], embed_dim: int, bias: bool
    ) -> None:
        super().__init__(patch_size, backbone.channels, embed_dim, bias=bias)
        self.backbone = backbone

    @property
    def multiple(self) -> int:
        return self.backbone.stride * self.patch_size[0]

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        step = self.backbone.stride
        if any(n % (step * p) for n, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(
                f"HybridEmbed: images must have sides that divide by {step} x patch {self.patch_size}, got "
                f"{tuple(size)}"
            )
        return super().grid([n // step for n in size])

    def forward(self, images: Tensor, **tokens: Any) -> Tensor:
        return super().forward(self.backbone(images), **tokens)


class HybridVisionTransformer(VisionTransformer):
    """A ViT on a convolutional stem.

    Args:
        layers: blocks per stage of the ResNetV2 stem: (3, 4, 9) for R50, (2, 2, 2, 2) for R26, () for only the first
            convolution.
        conv_channels: use a plain convolutional stem of these channels instead.
        vit: settings of VisionTransformer; ``patch_size`` is in positions of the stem's map.
    """

    def __init__(
        self, layers: Sequence[int] = (3, 4, 9), conv_channels: Sequence[int] | None = None, **vit: Any
    ) -> None:
        self._stem = (tuple(layers), conv_channels)
        self._in_chans = vit.get("in_chans", 3)
        super().__init__(**{"patch_size": 1, **vit})

    def make_patch_embed(
        self, patch_size: int | Sequence[int], in_chans: int, embed_dim: int, **options: Any
    ) -> PatchEmbed:
        if any(options.get(k) is not None for k in ("stride", "mean", "std")):
            raise ValueError("HybridVisionTransformer: patch_stride, mean and std do not apply to a stem")
        layers, channels = self._stem
        backbone = ResNetV2Stem(layers, in_chans) if channels is None else ConvStem(channels, in_chans)
        return HybridEmbed(backbone, patch_size, embed_dim, options["bias"])

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        return (self.patch_embed.proj.weight.new_zeros(batch, self._in_chans, *self.img_size),)


register("vit_base_r50_s16_224", HybridVisionTransformer, **SIZES["base"])
register("vit_base_r50_s16_384", HybridVisionTransformer, img_size=384, **SIZES["base"])
register("vit_large_r50_s32_224", HybridVisionTransformer, layers=(3, 4, 6, 3), **SIZES["large"])
register("vit_small_r26_s32_224", HybridVisionTransformer, layers=(2, 2, 2, 2), **SIZES["small"])
register("vit_tiny_r_s16_p8_224", HybridVisionTransformer, layers=(), patch_size=8, **SIZES["tiny"])
register(
    "vit_base_conv_s16_224",
    HybridVisionTransformer,
    conv_channels=(64, 128, 256, 512),
    **{**SIZES["base"], "depth": 11},
)
# Narrower ones, with the stem in the place of one block (Xiao et al., 2021, section 5).
register(
    "vit_small_conv_s16_224",
    HybridVisionTransformer,
    conv_channels=(48, 96, 192, 384),
    **{**SIZES["small"], "depth": 11},
)
register(
    "vit_tiny_conv_s16_224",
    HybridVisionTransformer,
    conv_channels=(24, 48, 96, 192),
    **{**SIZES["tiny"], "depth": 11},
)
