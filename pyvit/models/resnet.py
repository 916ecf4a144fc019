"""Residual networks: the encoders of SimCLR, and CLIP's convolutional image tower.

He et al., "Deep Residual Learning for Image Recognition" (2016); Radford et al., CLIP (2021), section 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.models.registry import register
from pyvit.nn import Linear
from pyvit.nn.patch_embed import pair
from pyvit.ops import flash_attention


def conv(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)


class Residual(nn.Module):
    """Two 3x3 convolutions (``bottleneck`` False), or 1x1, 3x3 and 1x1 with four times the width at the end, with
    torchvision's names.

    ``antialias``: CLIP's form, which downsamples by average pooling after the 3x3 convolution and in the shortcut.
    """

    def __init__(self, cin: int, width: int, stride: int, bottleneck: bool, antialias: bool = False) -> None:
        super().__init__()
        cout = 4 * width if bottleneck else width
        self.bottleneck = bottleneck
        step = 1 if antialias else stride
        self.conv1 = conv(cin, width, 1) if bottleneck else conv(cin, width, 3, step)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, step if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3, self.bn3 = conv(width, cout, 1), nn.BatchNorm2d(cout)
        self.pool = nn.AvgPool2d(stride) if antialias and stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or cin != cout:
            self.downsample = nn.Sequential(conv(cin, cout, 1, step), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.pool(F.relu(y))))
        shortcut = x if isinstance(self.downsample, nn.Identity) else self.downsample(self.pool(x))
        return F.relu(y + shortcut)


def stages(width: int, layers: Sequence[int], bottleneck: bool, antialias: bool) -> tuple[list[nn.Sequential], int]:
    """The four stages, and the channels of the last."""
    made, cin = [], width
    for s, depth in enumerate(layers):
        blocks = []
        for i in range(depth):
            blocks.append(Residual(cin, width * 2**s, 2 if s and not i else 1, bottleneck, antialias))
            cin = width * 2**s * (4 if bottleneck else 1)
        made.append(nn.Sequential(*blocks))
    return made, cin


class ResNet(nn.Module):
    """Images (B, C, H, W) to logits (B, num_classes), or features if ``num_classes`` is 0.

    ``small``: SimCLR's form for 32-pixel images (appendix B.9): a 3x3 first convolution without stride or pooling.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        small: bool = False,
        img_size: int | Sequence[int] = 224,
    ) -> None:
        super().__init__()
        self.img_size = pair(img_size)
        self.in_chans = in_chans
        self.small = small
        self.conv1 = conv(in_chans, width, 3) if small else conv(in_chans, width, 7, 2)
        self.bn1 = nn.BatchNorm2d(width)
        (self.layer1, self.layer2, self.layer3, self.layer4), self.num_features = stages(
            width, layers, bottleneck, False
        )
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head; ``num_classes`` 0 removes it."""
        self.num_classes = num_classes
        self.fc = Linear(self.num_features, num_classes).to(self.bn1.weight) if num_classes else nn.Identity()

    def forward_pyramid(self, images: Tensor) -> list[Tensor]:
        """The maps after each stage, at strides 4, 8, 16, 32."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = x if self.small else F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, images: Tensor) -> Tensor:
        """The last map (B, C, H/32, W/32)."""
        return self.forward_pyramid(images)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map to logits (B, num_classes), or to its mean (B, C), the classifier's input."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass."""
        return (self.bn1.weight.new_zeros(batch, self.in_chans, *self.img_size),)


class AttentionPool2d(nn.Module):
    """Attention from the mean token to all positions of the map: (B, C, H, W) to (B, out_dim). CLIP, section 2.4."""

    def __init__(self, side: int, dim: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.side, self.num_heads = side, num_heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, dim) / dim**0.5)
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim) for _ in range(3))
        self.c_proj = Linear(dim, out_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.side, self.side):
            raise ValueError(
                f"AttentionPool2d: the map must be {self.side} x {self.side} (img_size / 32), got {tuple(x.shape[2:])}"
            )
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat((x.mean(1, keepdim=True), x), 1) + self.positional_embedding
        split = lambda t: t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731
        out = flash_attention(split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x)))
        return self.c_proj(out.transpose(1, 2).flatten(2))[:, 0]  # type: ignore[union-attr]


class CLIPResNet(nn.Module):
    """CLIP's ResNet image towers: three stem convolutions, antialiased strides, attention pooling; OpenAI's names."""

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        embed_dim: int = 1024,
        num_heads: int = 32,
        img_size: int | Sequence[int] = 224,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.img_size = pair(img_size)
        if self.img_size[0] != self.img_size[1] or self.img_size[0] % 32:
            raise ValueError(f"CLIPResNet: img_size must be square and a multiple of 32, got {self.img_size}")
        self.conv1, self.bn1 = conv(3, width // 2, 3, 2), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = conv(width // 2, width // 2, 3), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = conv(width // 2, width, 3), nn.BatchNorm2d(width)
        (self.layer1, self.layer2, self.layer3, self.layer4), channels = stages(width, layers, True, True)
        self.attnpool = AttentionPool2d(self.img_size[0] // 32, channels, num_heads, embed_dim)
        for module in self.modules():
            if isinstance(module, Residual):
                nn.init.zeros_(module.bn3.weight)  # each block begins as its shortcut

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {"attnpool.positional_embedding"}

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass."""
        return (self.bn1.weight.new_zeros(batch, 3, *self.img_size),)


register("resnet18", ResNet, layers=(2, 2, 2, 2), bottleneck=False)
register("resnet50", ResNet)
register("resnet101", ResNet, layers=(3, 4, 23, 3))
