"""Hiera: stages of plain ViT blocks, the first two in windows. Ryali et al., "Hiera: A Hierarchical Vision Transformer
without the Bells-and-Whistles" (2023); positions within windows: Bolya et al., "Window Attention is Bugged" (2024)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvit.models.metadata import WithMetadata
from pyvit.models.registry import register
from pyvit.nn import DropPath, LayerNorm, Linear, Mlp, PatchEmbed, init_linears, resample_positions
from pyvit.nn.patch_embed import pair
from pyvit.nn.rates import check_rate
from pyvit.nn.residual import fusion_args
from pyvit.ops import flash_attention, flash_attention_qkvpacked, window_attention
from pyvit.ops.reference import window_partition, window_reverse


def pool(x: Tensor) -> Tensor:
    """Maximum over squares of 2 x 2: (B, H, W, C) to (B, H/2, W/2, C)."""
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).amax((2, 4))


class HieraAttention(nn.Module):
    """Attention on a map, (B, H, W, C) to (B, H, W, D); with ``pooled`` the queries are pooled, to (B, H/2, W/2, D).

    ``window_size``: attend within windows of this size (0: the whole map). Maps are padded with zero tokens, which take
    part in attention.
    """

    def __init__(self, dim: int, dim_out: int, num_heads: int, window_size: int = 0, pooled: bool = False) -> None:
        super().__init__()
        if pooled and window_size % 2:
            raise ValueError(f"HieraAttention: window_size must be even to pool queries, got {window_size}")
        self.num_heads, self.window_size, self.pooled = num_heads, window_size, pooled
        self.qkv, self.proj = Linear(dim, 3 * dim_out), Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        n = self.window_size
        padded = bool(n) and bool(h % n or w % n)
        if self.pooled:
            x = F.pad(x, (0, 0, 0, -w % n, 0, -h % n)) if padded else x
            return self.proj(self.attend_pooled(self.qkv(x))[:, : h // 2, : w // 2])  # type: ignore[no-any-return]
        qkv = self.qkv(x)
        if n:
            pad = self.qkv.bias if padded else None
            return self.proj(window_attention(qkv, n, num_heads=self.num_heads, pad_qkv=pad))  # type: ignore[no-any-return]
        out = flash_attention_qkvpacked(qkv.view(b, h * w, 3, self.num_heads, -1))
        return self.proj(out.view(b, h, w, -1))  # type: ignore[no-any-return, union-attr]

    def attend_pooled(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3D) to (B, H/2, W/2, D)."""
        b, h, w, channels = qkv.shape
        n = self.window_size
        if n:
            qkv = window_partition(qkv, (n, n)).view(-1, n, n, channels)
        size = qkv.shape[1:3]
        q, k, v = qkv.chunk(3, -1)
        q, k, v = (t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (pool(q), k, v))
        out = flash_attention(q, k, v).transpose(1, 2).flatten(2)  # type: ignore[union-attr]
        if not n:
            return out.unflatten(1, (size[0] // 2, size[1] // 2))
        return window_reverse(out.view(b, -1, n * n // 4, channels // 3), (n // 2, n // 2), (h // 2, w // 2))

    def score_shape(self, x: Tensor) -> tuple[int, int, int]:
        """(sequences x heads, queries, keys) of the scores of x (B, H, W, C)."""
        b, h, w, _ = x.shape
        n = self.window_size
        windows, keys = (-(-h // n) * -(-w // n), n * n) if n else (1, h * w)
        return b * windows * self.num_heads, keys // (4 if self.pooled else 1), keys


class HieraBlock(nn.Module):
    """A ViT block on a map. If ``pooled`` it begins a stage: (B, H, W, C) to (B, H/2, W/2, D), otherwise C = D."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        window_size: int = 0,
        pooled: bool = False,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, before_linear=True)
        self.proj = Linear(dim, dim_out) if pooled else None
        self.attn = HieraAttention(dim, dim_out, num_heads, window_size, pooled)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim_out, eps, before_linear=True)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.proj is not None:
            x = pool(self.proj(y))
        x = x + self.drop_path1(self.attn(y))
        if (fused := fusion_args(self.norm2, None, self.drop_path2, self.mlp)) is not None:
            return self.mlp(x, residual=x, **fused)  # type: ignore[no-any-return]
        return x + self.drop_path2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class HieraHead(nn.Module):
    """Mean of all tokens, norm, classifier: (B, H, W, C) to (B, num_classes), or (B, C) for 0 classes."""

    def __init__(self, dim: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps)
        self.fc = Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.mean((1, 2))))  # type: ignore[no-any-return]


class Hiera(WithMetadata):
    """Images (B, C, H, W) to logits (B, num_classes), with timm's parameter names. H and W: multiples of 32.

    Args:
        img_size: for the learned positions, which are resampled for other sizes.
        in_chans, num_classes: as in :class:`~pyvit.models.vit.VisionTransformer`.
        embed_dim, num_heads: of the first stage; both double with every stage.
        stages: number of blocks of each of the four stages.
        window_sizes: of the four stages, 0 for attention over the whole map. A block that begins a stage attends
            within the windows of the stage before. global_blocks: blocks that attend over the whole map in any stage.
        global_pos_size: rows and columns of positions that are resampled, to which positions repeated in each window
            are added. None: one learned position per patch.
        drop_path_rate: stochastic depth of the last block, increasing linearly from 0.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        num_heads: int = 1,
        stages: Sequence[int] = (2, 3, 16, 3),
        mlp_ratio: float = 4.0,
        window_sizes: Sequence[int] = (8, 4, 0, 0),
        global_blocks: Sequence[int] = (),
        global_pos_size: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_rate("Hiera: drop_path_rate", drop_path_rate)
        if len(stages) != 4 or len(window_sizes) != 4:
            raise ValueError(
                f"Hiera: stages and window_sizes must have four numbers, got {list(stages)} and {list(window_sizes)}"
            )
        self.img_size, self.num_classes, self.grad_checkpointing = pair(img_size), num_classes, False
        self.window_size, self.stages = window_sizes[0], tuple(stages)
        self.patch_embed = PatchEmbed(7, in_chans, embed_dim, stride=4)
        self.grid = self.grid_of(self.img_size)
        self.pos_embed_win: nn.Parameter | None = None
        if global_pos_size is None:
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], embed_dim))
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, embed_dim, *global_pos_size))
            self.pos_embed_win = nn.Parameter(torch.empty(1, embed_dim, self.window_size, self.window_size))
            nn.init.trunc_normal_(self.pos_embed_win, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        blocks: list[nn.Module] = []
        dim, depth = embed_dim, sum(stages)
        for stage, count in enumerate(stages):
            for first in [True] + [False] * (count - 1):
                pooled = first and stage > 0
                wide = embed_dim * 2**stage
                window = 0 if len(blocks) in global_blocks else window_sizes[stage - 1 if pooled else stage]
                rate = drop_path_rate * len(blocks) / max(depth - 1, 1)
                heads = num_heads * 2**stage
                blocks.append(HieraBlock(dim, wide, heads, mlp_ratio, window, pooled, rate, norm_eps))
                dim = wide
        self.blocks = nn.Sequential(*blocks)
        self.embed_dim = dim
        self.head = HieraHead(dim, num_classes, norm_eps)
        init_linears(self, "normal")

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of (H, W) pixels."""
        multiple = 4 * self.window_size
        if size[0] % multiple or size[1] % multiple or not min(size):
            raise ValueError(f"Hiera: height and width of images must be multiples of {multiple}, got {tuple(size)}")
        return size[0] // 4, size[1] // 4

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Positions of a grid (N, D)."""
        if self.pos_embed_win is None:
            return resample_positions(self.pos_embed[0], self.grid, grid)
        return self.resample(self.pos_embed_win, grid)

    def resample(self, within: Tensor, grid: Sequence[int], antialias: bool = True) -> Tensor:
        """Positions resampled to a grid, and those ``within`` each window, (N, D)."""
        wide = self.pos_embed if self.pos_embed.dtype == torch.float64 else self.pos_embed.float()
        coarse = F.interpolate(wide, size=tuple(grid), mode="bicubic", antialias=antialias).to(within.dtype)
        return (coarse + within.tile([n // self.window_size for n in grid])).flatten(2)[0].T

    def forward_pyramid(self, images: Tensor) -> list[Tensor]:
        """The maps of all stages (B, D, H/4, W/4) to (B, 8D, H/32, W/32)."""
        grid = self.grid_of(images.shape[2:])
        x = self.patch_embed(F.pad(images, (3, 3, 3, 3)), pos_embed=self.positions(grid)).unflatten(1, grid)
        maps = []
        blocks = iter(self.blocks)
        for count in self.stages:
            for block in itertools.islice(blocks, count):
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_features(self, images: Tensor) -> Tensor:
        """The last map (B, H/32, W/32, D), not normalised."""
        return self.forward_pyramid(images)[-1].permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images))  # type: ignore[no-any-return]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {"pos_embed", "pos_embed_win"}

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass, of the size given by ``img_size``."""
        return (self.patch_embed.proj.weight.new_zeros(batch, self.patch_embed.in_chans, *self.img_size),)


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"stages": (1, 2, 7, 2)},
    "small": {"stages": (1, 2, 11, 2)},
    "base": {"stages": (2, 3, 16, 3)},
    "base_plus": {"embed_dim": 112, "num_heads": 2, "stages": (2, 3, 16, 3)},
    "large": {"embed_dim": 144, "num_heads": 2, "stages": (2, 6, 36, 4)},
    "huge": {"embed_dim": 256, "num_heads": 4, "stages": (2, 6, 36, 4)},
}
for _size, _settings in _SIZES.items():
    register(f"hiera_{_size}_224", Hiera, **_settings)
