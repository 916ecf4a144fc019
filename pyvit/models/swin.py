"""Swin Transformer V1 and V2. Liu et al., "Swin Transformer" (2021) and "Swin Transformer V2" (2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvit.models.metadata import WithMetadata
from pyvit.models.registry import register
from pyvit.nn import DropPath, LayerNorm, Linear, Mlp, PatchEmbed, WindowAttention, WindowAttentionV2, init_linears
from pyvit.nn.linear import apply, plain
from pyvit.nn.patch_embed import pair
from pyvit.nn.rates import check_rate
from pyvit.nn.residual import fusion_args


class SwinBlock(nn.Module):
    """Window attention and MLP on the map, (B, H, W, C) -> (B, H, W, C).

    V1 normalises before each branch (section 3.1); V2 after it (``post_norm``; V2, section 3.2), with norms that start
    at zero.
    """

    def __init__(
        self,
        dim: int,
        attn: WindowAttention,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        post_norm: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = LayerNorm(dim, eps, before_linear=not post_norm)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps, before_linear=not post_norm)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.drop_path1(self.norm1(self.attn(x).to(x.dtype)))
            return x + self.drop_path2(self.norm2(self.mlp(x).to(x.dtype)))
        parts: dict[str, Any] = self._modules  # attributes of a module take half a microsecond each
        norm, attn, drop = parts["norm1"], parts["attn"], parts["drop_path1"]
        if (fused := fusion_args(norm, None, drop, attn)) is not None:
            x = attn(x, residual=x, **fused)
        else:
            x = x + drop(attn(norm(x)))
        norm, mlp, drop = parts["norm2"], parts["mlp"], parts["drop_path2"]
        if (fused := fusion_args(norm, None, drop, mlp)) is not None:
            return mlp(x, residual=x, **fused)  # type: ignore[no-any-return]
        return x + drop(mlp(norm(x)))  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """2 x 2 neighbouring tokens to one token of twice the width: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C).

    V1 normalises before the reduction, V2 after it.
    """

    def __init__(self, dim: int, post_norm: bool, eps: float) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(2 * dim if post_norm else 4 * dim, eps, before_linear=not post_norm)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        # Neighbours in the order (0, 0), (1, 0), (0, 1), (1, 1): row offset runs fastest.
        x = x.view(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C)
        if not self.post_norm and not torch.is_grad_enabled() and plain(self.norm, LayerNorm):
            x = apply(self.reduction, x, norm=(self.norm.weight, self.norm.bias, self.norm.eps))
        else:
            x = self.reduction(x if self.post_norm else self.norm(x))
        x = x.to(self.reduction.weight.dtype)  # under autocast too: see PatchEmbed
        return self.norm(x) if self.post_norm else x


class SwinStage(nn.Module):
    """Patch merging (except in the first stage), then blocks; every second block has shifted windows."""

    def __init__(self, downsample: PatchMerging | None, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if grad_checkpointing and torch.is_grad_enabled()
                else block(x)
            )
        return x


class ClassifierHead(nn.Module):
    """Mean over the map, dropout, linear: (B, H, W, C) -> (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop: float) -> None:
        super().__init__()
        self.global_pool = global_pool
        self.drop = nn.Dropout(drop)
        self.fc = Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(x.mean((1, 2)) if self.global_pool == "avg" else x)
        return x if pre_logits else self.fc(x)


class SwinTransformer(WithMetadata):
    """Images (B, C, H, W) of any size to logits (B, num_classes), with timm's parameter names.

    Args:
        img_size: the image size that window sizes are chosen for: a stage whose map is smaller than the window uses a
            window of the map's size. Other image sizes work: images are padded to whole patches, maps to whole windows,
            and an axis with a single window is not shifted.
        patch_size, in_chans, num_classes (0 for features), global_pool ("avg" or ""): as in
            :class:`pyvit.models.vit.VisionTransformer`.
        embed_dim: of the first stage, doubled at each. depths, num_heads: per stage.
        window_size, mlp_ratio, qkv_bias, norm_eps: of the blocks.
        version: 1 or 2. pretrained_window_sizes: V2's pre-training windows per stage; 0 for this model's.
        mask_padding: mask padding tokens, see :class:`pyvit.nn.WindowAttention`.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in VisionTransformer; drop_path increases over all
            blocks.
        mean, std: see :class:`pyvit.nn.PatchEmbed`. weight_init: as in VisionTransformer.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-5,
        version: int = 1,
        pretrained_window_sizes: Sequence[int] | None = None,
        mask_padding: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        weight_init: str = "normal",
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"SwinTransformer: version must be 1 or 2, got {version}")
        if len(depths) != len(num_heads):
            raise ValueError(
                f"SwinTransformer: num_heads must have one entry per stage, {len(depths)} as depths, got "
                f"{len(num_heads)}"
            )
        if global_pool not in ("avg", ""):
            raise ValueError(f"SwinTransformer: global_pool must be 'avg' or '', got {global_pool!r}")
        if pretrained_window_sizes is not None and (version == 1 or len(pretrained_window_sizes) != len(depths)):
            raise ValueError(
                f"SwinTransformer: pretrained_window_sizes is for version 2, one per stage ({len(depths)}), got "
                f"{pretrained_window_sizes}"
            )
        self.version = version
        self.grad_checkpointing = False
        self.global_pool = global_pool
        self.img_size = pair(img_size)
        self.num_features = [embed_dim * 2**s for s in range(len(depths))]
        self.patch_embed = PatchEmbed(
            patch_size, in_chans, embed_dim, norm_layer=LayerNorm, pad=True, mean=mean, std=std
        )
        grid = self.patch_embed.grid(pair(img_size))
        check_rate("SwinTransformer: drop_path_rate", drop_path_rate)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        stages = []
        for s, (dim, depth, heads) in enumerate(zip(self.num_features, depths, num_heads, strict=True)):
            resolution = tuple(-(-n // 2**s) for n in grid)
            window = tuple(min(w, n) for w, n in zip(pair(window_size), resolution, strict=True))
            options: dict[str, Any] = {
                "qkv_bias": qkv_bias,
                "attn_drop": attn_drop_rate,
                "proj_drop": proj_drop_rate,
                "mask_padding": mask_padding,
            }
            if version == 2:
                options["pretrained_window_size"] = pretrained_window_sizes[s] if pretrained_window_sizes else 0
            make = WindowAttentionV2 if version == 2 else WindowAttention
            blocks = [
                SwinBlock(
                    dim,
                    make(dim, heads, window, [w // 2 if i % 2 else 0 for w in window], **options),
                    mlp_ratio,
                    proj_drop_rate,
                    next(rates),
                    version == 2,
                    norm_eps,
                )
                for i in range(depth)
            ]
            stages.append(SwinStage(PatchMerging(dim // 2, version == 2, norm_eps) if s else None, blocks))
        self.layers = nn.Sequential(*stages)
        self.norm = LayerNorm(self.num_features[-1], norm_eps)
        self.num_classes = num_classes
        self.head = ClassifierHead(self.num_features[-1], num_classes, global_pool, drop_rate)
        self.init_weights(weight_init)

    def init_weights(self, linear: str = "normal") -> None:
        """Linear layers as ``linear`` says (:func:`pyvit.nn.init_linears`). V2's norms are zero, so that every block
        starts as the identity."""
        init_linears(self, linear)
        for module in self.modules():
            if isinstance(module, SwinBlock) and module.post_norm:
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, for fine-tuning; ``num_classes`` 0 removes it."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = ClassifierHead(self.num_features[-1], num_classes, self.global_pool, self.head.drop.p)
        if num_classes:
            nn.init.trunc_normal_(head.fc.weight, std=0.02)
            nn.init.zeros_(head.fc.bias)
        self.head = head.to(self.norm.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        kinds = ("relative_position_bias_table", "logit_scale", "cpb_mlp")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to the first map (B, rows, columns, embed_dim)."""
        return self.patch_embed(images).unflatten(1, self.patch_embed.grid(images.shape[2:]))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last map, normalised: (B, H/32, W/32, 8 embed_dim)."""
        x = self.embed(images)
        for stage in self.layers:
            x = stage(x, self.grad_checkpointing)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map to logits (B, num_classes), or to the input of the classifier."""
        return self.head(x, pre_logits)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass, of the size given by ``img_size``."""
        return (self.patch_embed.proj.weight.new_zeros(batch, self.patch_embed.in_chans, *self.img_size),)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_pyramid(self, images: Tensor) -> list[Tensor]:
        """The map after each stage, (B, C_s, H / (4 2^s), W / (4 2^s)), for dense prediction; not normalised."""
        x, maps = self.embed(images), []
        for stage in self.layers:
            x = stage(x, self.grad_checkpointing)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}

for _size in SIZES:
    register(f"swin_{_size}_patch4_window7_224", SwinTransformer, **SIZES[_size])
for _size in ("base", "large"):
    register(f"swin_{_size}_patch4_window12_384", SwinTransformer, img_size=384, window_size=12, **SIZES[_size])
for _size in ("tiny", "small", "base"):
    for _window in (8, 16):
        register(
            f"swinv2_{_size}_window{_window}_256",
            SwinTransformer,
            img_size=256,
            window_size=_window,
            version=2,
            **SIZES[_size],
        )
for _size in ("base", "large"):
    register(f"swinv2_{_size}_window12_192", SwinTransformer, img_size=192, window_size=12, version=2, **SIZES[_size])
    for _window, _image in ((16, 256), (24, 384)):
        _v2 = {"img_size": _image, "window_size": _window, "version": 2, "pretrained_window_sizes": (12, 12, 12, 6)}
        register(f"swinv2_{_size}_window12to{_window}_192to{_image}", SwinTransformer, **_v2, **SIZES[_size])
