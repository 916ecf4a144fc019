"""ViT and Swin in plain PyTorch, and their attention as it is usually written: the baselines of the benchmarks.

Written from the papers with timm's parameter names, so that weights can be exchanged with timm and pyvit. Tests compare
them with timm. ``attention`` is "sdpa" or "naive".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.ops.reference import relative_position_index

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Two matrix products and a softmax, with the score matrix in memory. q is scaled first because it is smaller than
    the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


ATTENTION: dict[str, Attend] = {"sdpa": sdpa, "naive": naive_attention}


def partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window * window, C)."""
    b, h, w, c = x.shape
    return x.view(b, h // window, window, w // window, window, c).transpose(2, 3).reshape(-1, window * window, c)


def reverse(windows: Tensor, window: int, h: int, w: int) -> Tensor:
    """The inverse of :func:`partition`."""
    c = windows.shape[-1]
    return windows.view(-1, h // window, w // window, window, window, c).transpose(2, 3).reshape(-1, h, w, c)


def shift_mask(h: int, w: int, window: int, shift: int) -> Tensor:
    """(windows, area, area): -100 between tokens of different regions, 0 within one."""
    regions = torch.zeros(1, h, w, 1)
    bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(bands):
        for j, cols in enumerate(bands):
            regions[:, rows, cols] = 3 * i + j
    ids = partition(regions, window).squeeze(-1)
    return torch.where(ids[:, None, :] == ids[:, :, None], 0.0, -100.0)


def window_core(
    qkv: Tensor,
    heads: int,
    table: Tensor,
    index: Tensor,
    mask: Tensor | None,
    attend: Attend,
    logit_scale: Tensor | None = None,
) -> Tensor:
    """Attention within windows, as Swin's authors and timm compute it: qkv (B * windows, area, 3C) -> (B * windows,
    area, C).

    table: relative-position bias ((2w - 1)**2, heads). index (area, area) into it and mask (windows, area, area) are
    built once per model. logit_scale: Swin V2's cosine attention instead of the scaled product; only with naive
    attention.
    """
    bw, n, c3 = qkv.shape
    q, k, v = qkv.view(bw, n, 3, heads, c3 // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    bias = table[index.view(-1)].view(n, n, heads).permute(2, 0, 1).unsqueeze(0)
    if attend is naive_attention:
        if logit_scale is None:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * logit_scale.clamp(max=4.6052).exp()[:, None, None]
        scores = scores + bias
        if mask is not None:
            scores = (scores.view(-1, mask.shape[0], heads, n, n) + mask[None, :, None]).view(-1, heads, n, n)
        out = scores.softmax(-1) @ v
    else:
        if mask is not None:
            both = bias[:, None] + mask[None, :, None]  # (1, windows, heads, area, area)
            bias = both.expand(bw // mask.shape[0], -1, -1, -1, -1).reshape(bw, heads, n, n)
        out = attend(q, k, v, bias.to(q.dtype))
    return out.transpose(1, 2).reshape(bw, n, -1)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v, None).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads, attend)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width, eps=1e-5) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.norm(x.permute(0, 2, 3, 1))


class ViT(nn.Module):
    """Dosovitskiy et al. (2021): (B, 3, size, size) -> (B, classes)."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch: int = 16,
        size: int = 224,
        classes: int = 1000,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.patch_embed = PatchEmbed(width, patch, norm=False)
        self.blocks = nn.Sequential(*(Block(width, heads, ATTENTION[attention]) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, side: int, window: int, shift: int, attend: Attend) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.shift = shift
        self.attend = attend
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        self.register_buffer("index", relative_position_index((window, window)), persistent=False)
        self.register_buffer("mask", shift_mask(side, side, window, shift) if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        s = self.shift
        windows = partition(x.roll((-s, -s), (1, 2)) if s else x, self.window)
        out = window_core(
            self.qkv(windows), self.heads, self.relative_position_bias_table, self.index, self.mask, self.attend
        )
        x = reverse(self.proj(out), self.window, h, w)
        return x.roll((s, s), (1, 2)) if s else x


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, side: int, window: int, shift: int, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), WindowAttention(width, heads, side, window, shift, attend)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        return self.reduction(self.norm(x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Stage(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, side: int, window: int, merge: bool, attend: Attend) -> None:
        super().__init__()
        self.downsample = PatchMerging(width // 2) if merge else nn.Identity()
        window = min(window, side)
        shifts = (window // 2 if i % 2 and side > window else 0 for i in range(depth))
        self.blocks = nn.Sequential(*(SwinBlock(width, heads, side, window, shift, attend) for shift in shifts))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((1, 2)))


class Swin(nn.Module):
    """Liu et al. (2021): (B, 3, size, size) -> (B, classes); size must divide by 32 * window."""

    def __init__(
        self,
        width: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        size: int = 224,
        classes: int = 1000,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width, 4, norm=True)
        self.layers = nn.Sequential(
            *(
                Stage(width << i, depths[i], heads[i], size // (4 << i), window, i > 0, ATTENTION[attention])
                for i in range(len(depths))
            )
        )
        self.norm, self.head = nn.LayerNorm(width << (len(depths) - 1)), Head(width << (len(depths) - 1), classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patch_embed(images))))


CONFIGS = {
    "vit_tiny_patch16_224": (ViT, {"width": 192, "depth": 12, "heads": 3}),
    "vit_small_patch16_224": (ViT, {"width": 384, "depth": 12, "heads": 6}),
    "vit_base_patch16_224": (ViT, {"width": 768, "depth": 12, "heads": 12}),
    "vit_large_patch16_224": (ViT, {"width": 1024, "depth": 24, "heads": 16}),
    "swin_tiny_patch4_window7_224": (Swin, {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}),
    "swin_small_patch4_window7_224": (Swin, {"width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)}),
    "swin_base_patch4_window7_224": (Swin, {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}),
}


def create(name: str, **overrides: object) -> nn.Module:
    """A model of :data:`CONFIGS` with random weights."""
    kind, config = CONFIGS[name]
    return kind(**{**config, **overrides})
