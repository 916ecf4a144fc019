"""Backbones for detection: ViTDet and Swin.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet, 2022). They return an ordered
dictionary of feature maps and have ``out_channels``, as torchvision's ``MaskRCNN`` and ``FasterRCNN`` require.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvit.models.metadata import WithMetadata
from pyvit.models.registry import create_model, register
from pyvit.models.swin import SwinTransformer
from pyvit.models.vit import SIZES
from pyvit.nn import DropPath, LayerNorm, Linear, Mlp, PatchEmbed, resample_positions
from pyvit.nn.patch_embed import pair
from pyvit.nn.position import relative_biases
from pyvit.nn.rates import check_rate
from pyvit.nn.residual import fusion_args
from pyvit.ops import decomposed_attention, flash_attention, window_attention
from pyvit.ops.reference import window_partition, window_reverse


class DecomposedAttention(nn.Module):
    """Attention on a map with decomposed relative positions, (B, H, W, C) -> (B, H, W, C). Li et al., "MViTv2" (2022),
    equation 4.

    The score of query i and key j gets the bias q_i . Rh[y_i - y_j] + q_i . Rw[x_i - x_j], which
    :func:`pyvit.ops.decomposed_attention` adds from the queries' products with Rh and Rw: no N x N matrix is stored.

    Args:
        size: (rows, columns) of the tables rel_pos_h and rel_pos_w; they are resampled linearly for other sizes. None:
            no positions.
        window_size: attend within windows of this size (0: the whole map). Maps are padded with zero tokens, which take
            part in attention.
    """

    def __init__(
        self, dim: int, num_heads: int, size: Sequence[int] | None, window_size: int = 0, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv, self.proj = Linear(dim, 3 * dim, qkv_bias), Linear(dim, dim)
        self.relative = size is not None
        if size is not None:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * size[0] - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * size[1] - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n = self.window_size
        if not n:
            return self.proj(self.attend(self.qkv(x)))
        if not self.relative:  # plain windows: the fused operator, straight on the map
            bias = self.qkv.bias if self.qkv.bias is not None else x.new_zeros(3 * c)
            pad = bias if h % n or w % n else None
            return self.proj(window_attention(self.qkv(x), n, num_heads=self.num_heads, pad_qkv=pad))
        padded = F.pad(x, (0, 0, 0, -w % n, 0, -h % n))
        size = (padded.shape[1], padded.shape[2])
        windows = window_partition(padded, (n, n)).reshape(-1, n, n, c)
        out = self.attend(self.qkv(windows)).view(b, -1, n * n, c)
        return self.proj(window_reverse(out, (n, n), size)[:, :h, :w])

    def score_shape(self, x: Tensor) -> tuple[int, int, int]:
        """(sequences x heads, queries, keys) of the scores of x (B, H, W, C)."""
        b, h, w, _ = x.shape
        n = self.window_size
        tokens = n * n if n else h * w
        return b * (-(-h // n) * -(-w // n) if n else 1) * self.num_heads, tokens, tokens

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C) to (B, H, W, C)."""
        b, h, w, c3 = qkv.shape
        q, k, v = qkv.view(b, h * w, 3, self.num_heads, -1).transpose(1, 3).unbind(2)  # (B, heads, N, d)
        if self.relative:
            biases = relative_biases(q, self.rel_pos_h, self.rel_pos_w, (h, w))
            out = decomposed_attention(q, k, v, *biases)
        else:
            out = flash_attention(q, k, v)
        return out.transpose(1, 2).reshape(b, h, w, c3 // 3)  # type: ignore[union-attr]


class ViTDetBlock(nn.Module):
    """A ViT block on a map, (B, H, W, C) -> (B, H, W, C), with windowed or global attention."""

    def __init__(self, dim: int, attn: DecomposedAttention, mlp_ratio: float, drop_path: float, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, before_linear=True)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps, before_linear=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        if (fused := fusion_args(self.norm2, None, self.drop_path2, self.mlp)) is not None:
            return self.mlp(x, residual=x, **fused)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ViTDet(WithMetadata):
    """Images (B, C, H, W) to one map (B, D, H/16, W/16): a ViT with windowed attention in most blocks (section 3).

    Parameters have a ViT's names: MAE's weights load with ``allow=("cls_token", "norm.*", ".*rel_pos.*")``.

    Args:
        img_size: for the relative positions of global blocks. pretrain_img_size: for the learned absolute positions,
            which are resampled.
        window_size, global_blocks: 14, and the blocks with global attention, by default four at equal distances.
        rel_pos: decomposed relative positions. The others as in :class:`pyvit.models.vit.VisionTransformer`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 1024,
        pretrain_img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        window_size: int = 14,
        global_blocks: Sequence[int] | None = None,
        rel_pos: bool = True,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_rate("ViTDet: drop_path_rate", drop_path_rate)
        self.img_size = pair(img_size)
        self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, pad=True)
        self.grid = self.patch_embed.grid(pair(pretrain_img_size))
        whole = self.patch_embed.grid(self.img_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1] + 1, embed_dim))
        everywhere = set(range(depth // 4 - 1, depth, max(depth // 4, 1)) if global_blocks is None else global_blocks)
        blocks = []
        for i in range(depth):
            window = 0 if i in everywhere else window_size
            size = ((window, window) if window else whole) if rel_pos else None
            attn = DecomposedAttention(embed_dim, num_heads, size, window, qkv_bias)
            blocks.append(ViTDetBlock(embed_dim, attn, mlp_ratio, drop_path_rate * i / max(depth - 1, 1), norm_eps))
        self.blocks = nn.Sequential(*blocks)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Positions of the patches of a grid (N, D)."""
        return resample_positions(self.pos_embed[0, 1:], self.grid, grid, antialias=False)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.patch_embed.grid(images.shape[2:])
        x = self.patch_embed(images, pos_embed=self.positions(grid)).unflatten(1, grid)
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.grad_checkpointing and torch.is_grad_enabled()
                else block(x)
            )
        return x.permute(0, 3, 1, 2)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {n for n, _ in self.named_parameters() if "pos_embed" in n or "rel_pos" in n}

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass."""
        return (self.pos_embed.new_zeros(batch, self.patch_embed.in_chans, *self.img_size),)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """A map at stride 16 to maps "0" to "3" at strides 4, 8, 16, 32, and "pool" at 64, each (B, out_channels, ...)
    (section 3)."""

    def __init__(self, dim: int, out_channels: int = 256) -> None:
        super().__init__()
        up = lambda cin, cout: nn.ConvTranspose2d(cin, cout, 2, 2)  # noqa: E731
        scales: list[tuple[list[nn.Module], int]] = [
            ([up(dim, dim // 2), ChannelNorm(dim // 2), nn.GELU(), up(dim // 2, dim // 4)], dim // 4),
            ([up(dim, dim // 2)], dim // 2),
            ([], dim),
            ([nn.MaxPool2d(2, 2)], dim),
        ]
        ends = [
            [
                nn.Conv2d(c, out_channels, 1, bias=False),
                ChannelNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            ]
            for _, c in scales
        ]
        self.stages = nn.ModuleList(
            nn.Sequential(*steps, *end, ChannelNorm(out_channels)) for (steps, _), end in zip(scales, ends, strict=True)
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = OrderedDict((str(i), stage(x)) for i, stage in enumerate(self.stages))
        maps["pool"] = F.max_pool2d(maps["3"], 1, 2)
        return maps


class FeaturePyramid(nn.Module):
    """Maps of several strides to maps of ``out_channels`` channels with top-down connections, and "pool". Lin et al.,
    "FPN" (2017)."""

    def __init__(self, channels: Sequence[int], out_channels: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, 1, 1) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[2:], mode="nearest")
        found = OrderedDict((str(i), out(x)) for i, (out, x) in enumerate(zip(self.output, merged, strict=True)))
        found["pool"] = F.max_pool2d(found[str(len(merged) - 1)], 1, 2)
        return found


class DetectionBackbone(nn.Module):
    """A backbone and a pyramid: images to an ordered dictionary of maps with ``out_channels`` channels each."""

    def __init__(self, body: ViTDet | SwinTransformer, out_channels: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        if isinstance(
            body, SwinTransformer
        ):  # each stage's map is normalised before the pyramid, as in Swin's detection code
            self.norms = nn.ModuleList(ChannelNorm(c) for c in body.num_features)
            self.pyramid: nn.Module = FeaturePyramid(body.num_features, out_channels)
        else:
            self.pyramid = SimpleFeaturePyramid(body.embed_dim, out_channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        if isinstance(self.body, SwinTransformer):
            return self.pyramid(
                [norm(x) for norm, x in zip(self.norms, self.body.forward_pyramid(images), strict=True)]
            )
        return self.pyramid(self.body(images))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {f"body.{name}" for name in self.body.no_weight_decay()}

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass."""
        return self.body.example_inputs(batch)


def detection_backbone(body: str, out_channels: int = 256, **settings: Any) -> DetectionBackbone:
    """A registered ``vitdet_*`` or ``swin*`` model with a pyramid; ``settings`` override those of the backbone."""
    made = create_model(body, **settings)
    if not isinstance(made, ViTDet | SwinTransformer):
        raise ValueError(f"detection_backbone: body must name a ViTDet or Swin model, got {body!r}")
    if isinstance(made, SwinTransformer):
        made.norm, made.head = nn.Identity(), nn.Identity()  # type: ignore[assignment]  # every stage has a norm of its own
    return DetectionBackbone(made, out_channels)


for _size in ("base", "large", "huge"):
    register(f"vitdet_{_size}_patch16_1024", ViTDet, **SIZES[_size])
    register(f"fpn_vitdet_{_size}_patch16_1024", detection_backbone, body=f"vitdet_{_size}_patch16_1024")
for _size in ("tiny", "small", "base"):
    register(f"fpn_swin_{_size}_patch4_window7", detection_backbone, body=f"swin_{_size}_patch4_window7_224")
