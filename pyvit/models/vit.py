"""Vision Transformer. Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), and variants up to DINOv2 and
DINOv3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvit.models.metadata import WithMetadata
from pyvit.models.registry import register
from pyvit.nn import (
    AttentionPool,
    Block,
    LayerNorm,
    Linear,
    Packing,
    PatchEmbed,
    QueryValueLinear,
    RMSNorm,
    RotaryEmbedding,
    init_linears,
    resample_positions,
    sincos_2d,
)
from pyvit.nn.patch_embed import pair
from pyvit.nn.rates import check_rate


def vit_block(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool | str = True,
    *,
    kind: type[Block] = Block,
    **options: Any,
) -> Block:
    """A block of class ``kind`` whose ``qkv_bias`` may be "qv"; options as of :class:`pyvit.nn.Block`."""
    block = kind(dim, num_heads, mlp_ratio, qkv_bias=qkv_bias is True, **options)
    if qkv_bias == "qv":
        block.attn.qkv = QueryValueLinear(dim)
    return block


class VisionTransformer(WithMetadata):
    """Images (B, C, H, W) to logits (B, num_classes), with timm's parameter names. H and W: any multiple of the patch
    size.

    Args:
        img_size, patch_size, in_chans: of the images. ``img_size`` determines the grid of learned positions, which are
            resampled for other sizes.
        num_classes: 0 for features. global_pool: "token", "avg", "token_avg" (both, concatenated), "map" or "" (all
            tokens).
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, qk_norm, activation, norm_eps: of the blocks
            (:class:`pyvit.nn.Block`). qkv_bias "qv": biases of queries and values alone
            (:class:`pyvit.nn.QueryValueLinear`).
        init_values: initial value of LayerScale; None for no LayerScale.
        class_token, dist_token, reg_tokens: prefix tokens (distillation: Touvron et al., 2021; registers: Darcet et
            al., 2024).
        no_embed_class: positions for patches only.
        pos_embed: "learn", "sincos" (fixed), "rope" (2-D rotary) or "none". rope_base: longest period of "rope".
            rope_layer: makes other rotary positions from the size of a head, in addition to ``pos_embed``.
        pre_norm: a norm before the blocks (CLIP). final_norm: a norm after them; with "avg" pooling it follows the
            pooling (``fc_norm``).
        patch_stride: for overlapping patches. patch_bias: of the projection. mask_token: for masked image modelling.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout of pooled features, tokens, residual branches
            and attention weights.
        drop_path_rate: stochastic depth of the last block, increasing linearly from 0; with ``drop_path_uniform`` of
            all blocks.
        drop_path_form: "sample" or "batch", see :class:`pyvit.nn.DropPath`.
        interpolate_antialias, interpolate_offset: see :func:`pyvit.nn.resample_positions`.
        mean, std: see :class:`pyvit.nn.PatchEmbed`.
        weight_init: of linear layers: "normal" (truncated, 0.02, as timm) or "xavier", which suits widths below 384.
        norm_layer: :class:`pyvit.nn.LayerNorm` or :class:`pyvit.nn.RMSNorm`. block_layer: makes each block.
        pool_heads, pool_mlp_ratio: of "map" pooling; None for those of the blocks.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool | str = True,
        qk_norm: bool = False,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        init_values: float | None = None,
        class_token: bool = True,
        dist_token: bool = False,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        pos_embed: str = "learn",
        rope_base: float = 100.0,
        rope_layer: Callable[[int], nn.Module] | None = None,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        patch_stride: int | Sequence[int] | None = None,
        patch_bias: bool = True,
        mask_token: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        drop_path_form: str = "sample",
        interpolate_antialias: bool = True,
        interpolate_offset: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        weight_init: str = "normal",
        norm_layer: type[LayerNorm] | type[RMSNorm] = LayerNorm,
        block_layer: Callable[..., nn.Module] = vit_block,
        pool_heads: int | None = None,
        pool_mlp_ratio: float | None = None,
    ) -> None:
        super().__init__()
        if global_pool not in ("token", "avg", "token_avg", "map", ""):
            raise ValueError(
                f"VisionTransformer: global_pool must be 'token', 'avg', 'token_avg', 'map' or '', got {global_pool!r}"
            )
        if "token" in global_pool and not class_token:
            raise ValueError(f"VisionTransformer: global_pool={global_pool!r} needs class_token=True")
        if not isinstance(qkv_bias, bool) and qkv_bias != "qv":
            raise ValueError(f"VisionTransformer: qkv_bias must be True, False or 'qv', got {qkv_bias!r}")
        if pos_embed not in ("learn", "sincos", "rope", "none"):
            raise ValueError(
                f"VisionTransformer: pos_embed must be 'learn', 'sincos', 'rope' or 'none', got {pos_embed!r}"
            )
        self.img_size = pair(img_size)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.global_pool = global_pool
        self.norm_eps, self.grad_checkpointing = norm_eps, False
        self.interpolation = {"antialias": interpolate_antialias, "offset": interpolate_offset}
        self.num_prefix_tokens = int(class_token) + int(dist_token) + reg_tokens
        self.no_embed_class = no_embed_class or not class_token

        stride = patch_stride
        self.patch_embed = self.make_patch_embed(
            patch_size, in_chans, embed_dim, stride=stride, bias=patch_bias, mean=mean, std=std
        )
        self.grid = self.patch_embed.grid(self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if dist_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        self.pos_embed: nn.Parameter | None = None
        self.rope: nn.Module | None = None
        if pos_embed in ("learn", "sincos"):
            positions = self.grid[0] * self.grid[1] + (0 if self.no_embed_class else 1 + int(dist_token))
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim), requires_grad=pos_embed == "learn")
        elif pos_embed == "rope":
            self.rope = RotaryEmbedding(embed_dim // num_heads, rope_base)
        if rope_layer is not None:
            self.rope = rope_layer(embed_dim // num_heads)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = norm_layer(embed_dim, norm_eps) if pre_norm else nn.Identity()
        check_rate("VisionTransformer: drop_path_rate", drop_path_rate)
        rates = [drop_path_rate if drop_path_uniform else drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                block_layer(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    activation=activation,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    drop_path_form=drop_path_form,
                    init_values=init_values,
                    eps=norm_eps,
                    norm_layer=norm_layer,
                )
                for rate in rates
            )
        )
        after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        self.norm = norm_layer(embed_dim, norm_eps) if final_norm and not after_pool else nn.Identity()
        self.attn_pool = None
        if global_pool == "map":
            ratio = mlp_ratio if pool_mlp_ratio is None else pool_mlp_ratio
            self.attn_pool = AttentionPool(embed_dim, pool_heads or num_heads, ratio, activation, norm_eps)
        self.fc_norm = norm_layer(embed_dim, norm_eps) if final_norm and after_pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights(weight_init)
        self.reset_classifier(num_classes)

    def make_patch_embed(
        self, patch_size: int | Sequence[int], in_chans: int, embed_dim: int, **options: Any
    ) -> PatchEmbed:
        """Create the patch embedding; hybrids override it."""
        return PatchEmbed(patch_size, in_chans, embed_dim, **options)

    def init_weights(self, linear: str = "normal") -> None:
        """Linear layers as ``linear`` says (:func:`pyvit.nn.init_linears`), a normal distribution of 0.02 for positions
        and 1e-6 for prefix tokens; sines and cosines for fixed positions."""
        init_linears(self, linear)
        if self.pos_embed is not None and self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        elif self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed[0, self.pos_embed.shape[1] - self.grid[0] * self.grid[1] :] = sincos_2d(
                    self.embed_dim, self.grid
                )
        for token in (self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with zero weights, for fine-tuning; ``num_classes`` 0 removes it.

        ``global_pool`` changes the pooling among "token", "token_avg", "avg" and ""; the norms stay the same.
        """
        if global_pool is not None:
            if "map" in (global_pool, self.global_pool) and global_pool != self.global_pool:
                raise ValueError(
                    "reset_classifier: global_pool cannot change to or from 'map', which has parameters; create "
                    "the model with it"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        width = self.embed_dim * (2 if self.global_pool == "token_avg" else 1)
        like = self.patch_embed.proj.weight
        self.head = Linear(width, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        if num_classes:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {"pos_embed", "cls_token", "dist_token", "reg_token", "mask_token", "attn_pool.latent"}

    def positions(self, grid: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Learned or fixed positions for a grid: of the patches (N, D), resampled, and of the class and distillation
        tokens (1 or 2, D)."""
        if self.pos_embed is None:
            return None, None
        first = self.pos_embed.shape[1] - self.grid[0] * self.grid[1]
        of_class, of_patches = self.pos_embed[0, :first], self.pos_embed[0, first:]
        return resample_positions(of_patches, self.grid, grid, **self.interpolation), of_class if first else None  # type: ignore[arg-type]

    def prefix(self, of_class: Tensor | None) -> Tensor | None:
        """Class and distillation tokens with their positions, and registers, which have none: (P, D)."""
        tokens = [t[0] for t in (self.cls_token, self.dist_token) if t is not None]
        if of_class is not None:
            tokens = [torch.cat(tokens) + of_class]
        if self.reg_token is not None:
            tokens.append(self.reg_token[0])
        return torch.cat(tokens) if tokens else None

    def embed(self, images: Tensor, masks: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, P + N, D), the input of the first block.

        masks (B, N) bool: patches that are replaced by the mask token. keep (B, K) int64: the patches to compute; the
        others are left out.
        """
        pos, of_class = self.positions(self.patch_embed.grid(images.shape[2:]))
        prefix = self.prefix(of_class)
        if masks is None:
            x = self.patch_embed(images, pos_embed=pos, prefix=prefix, keep=keep)
        else:
            if self.mask_token is None or keep is not None:
                raise ValueError("VisionTransformer: masks needs mask_token=True at creation, and no keep")
            x = self.patch_embed(images)
            x = torch.where(masks.flatten(1)[:, :, None], self.mask_token.to(x.dtype), x)
            x = x if pos is None else x + pos.to(x.dtype)
            x = x if prefix is None else torch.cat((prefix.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)
        return self.norm_pre(self.pos_drop(x))

    def rotations(self, images: Tensor) -> Tensor | None:
        """Sines and cosines (P + N, 2, d) of rotary positions, or None."""
        return None if self.rope is None else self.rope(self.patch_embed.grid(images.shape[2:]), self.num_prefix_tokens)

    def run_block(self, block: nn.Module, x: Tensor, **kw: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **kw)
        return block(x, **kw)

    def forward_features(self, images: Tensor, masks: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Normalised tokens (B, P + N, D): prefix tokens, then patches. ``masks`` and ``keep`` as in :meth:`embed`."""
        if keep is not None and self.rope is not None:
            raise ValueError("VisionTransformer: keep does not go with pos_embed='rope'")
        rope, x = self.rotations(images), self.embed(images, masks, keep)
        for block in self.blocks:
            x = self.run_block(block, x, rope=rope)
        return self.norm(x)

    def forward_packed(self, batches: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Features of batches of different image sizes in one pass of packed sequences: [(B_i, C, H_i, W_i)] -> [(B_i,
        P + N_i, D)].

        Every linear layer runs once on all tokens, and attention is one variable-length call (multi-crop training,
        mixed image sizes).

        ``masks``: for each batch, as in :meth:`embed`, or None.
        """
        tokens = [
            self.embed(images, mask) for images, mask in zip(batches, masks or [None] * len(batches), strict=True)
        ]
        packing = Packing.of([n for t in tokens for n in [t.shape[1]] * t.shape[0]], tokens[0].device)
        rope = None
        if self.rope is not None:
            rope = torch.cat([self.rotations(images).repeat(images.shape[0], 1, 1) for images in batches])  # type: ignore[union-attr]
        x = torch.cat([t.flatten(0, 1) for t in tokens])  # (T, D)
        for block in self.blocks:
            x = self.run_block(block, x, packing=packing, rope=rope)
        parts = self.norm(x).split([t.shape[0] * t.shape[1] for t in tokens])
        return [part.view(t.shape) for part, t in zip(parts, tokens, strict=True)]

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) to (B, D), (B, 2D) for "token_avg", or unchanged for ""."""
        if self.attn_pool is not None:
            return self.attn_pool(x)
        patches = x[:, self.num_prefix_tokens :]
        if self.global_pool == "avg":
            return patches.mean(1)
        if self.global_pool == "token_avg":
            return torch.cat((x[:, 0], patches.mean(1)), -1)
        return x[:, 0] if self.global_pool == "token" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, P + N, D) to logits (B, num_classes), or to the input of the head."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass, of the size given by ``img_size``."""
        return (self.patch_embed.proj.weight.new_zeros(batch, self.patch_embed.in_chans, *self.img_size),)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens (B, N, D) after the last ``n`` blocks, or after the listed blocks.

        With ``reshape`` they are maps (B, D, rows, columns); with ``return_prefix_tokens``, pairs (patches, prefix (B,
        P, D)).
        """
        depth = len(self.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else [i % depth for i in n]
        rope = self.rotations(images)
        x = self.embed(images)
        found = {}
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, rope=rope)
            if i in wanted:
                y = self.norm(x) if norm else x
                prefix, patches = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
                if reshape:
                    patches = patches.unflatten(1, self.patch_embed.grid(images.shape[2:])).permute(0, 3, 1, 2)
                found[i] = (patches, prefix) if return_prefix_tokens else patches
        return tuple(found[i] for i in wanted)

    def attention_map(self, images: Tensor, block: int = -1, rows: int | list[int] | Tensor = 0) -> Tensor:
        """Attention probabilities (B, heads, R, P + N) of the tokens ``rows`` in one block; row 0 is the class token.

        Costs O(N) per row in addition to the forward pass up to that block.
        """
        rope, x = self.rotations(images), self.embed(images)
        last = block % len(self.blocks)
        for i in range(last):
            x = self.blocks[i](x, rope=rope)
        chosen = self.blocks[last]
        return chosen.attn.attention_map(chosen.norm1(x), rows, rope)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
}

for _size in ("tiny", "small", "base", "large"):
    for _patch in (8, 14, 16, 32):
        for _image in (224, 384) if _patch != 14 else (224,):
            register(
                f"vit_{_size}_patch{_patch}_{_image}",
                VisionTransformer,
                img_size=_image,
                patch_size=_patch,
                **SIZES[_size],
            )
register("vit_huge_patch14_224", VisionTransformer, patch_size=14, **SIZES["huge"])

_DINOV2 = {"img_size": 518, "patch_size": 14, "num_classes": 0, "init_values": 1.0, "mask_token": True}
for _size in ("small", "base", "large", "giant"):
    _ffn = {"activation": "swiglu"} if _size == "giant" else {}
    register(
        f"vit_{_size}_patch14_dinov2",
        VisionTransformer,
        **_DINOV2,
        **SIZES[_size],
        **_ffn,
        interpolate_antialias=False,
        interpolate_offset=0.1,
    )
    register(f"vit_{_size}_patch14_reg4_dinov2", VisionTransformer, **_DINOV2, **SIZES[_size], **_ffn, reg_tokens=4)

# DINOv3: the released configurations. The released files have biases of queries and values
# (except the 7B model's), which are zero; timm's names without "_qkvb" leave them out.
_DINOV3: dict[str, Any] = {"patch_size": 16, "num_classes": 0, "init_values": 1e-5, "mask_token": True, "reg_tokens": 4}
_DINOV3 |= {"pos_embed": "rope", "norm_eps": 1e-5}
# A gated MLP whose hidden width is four times embed_dim: "swiglu" takes two thirds of mlp_ratio.
_PLUS = {"activation": "swiglu", "mlp_ratio": 6.0}
_DINOV3_SIZES: dict[str, dict[str, Any]] = {
    "small": SIZES["small"],
    "small_plus": {**SIZES["small"], **_PLUS},
    "base": SIZES["base"],
    "large": SIZES["large"],
    "huge_plus": {**SIZES["huge"], **_PLUS, "num_heads": 20},
    "7b": {"embed_dim": 4096, "depth": 40, "num_heads": 32, "activation": "swiglu", "mlp_ratio": 3.0},
}
for _size, _settings in _DINOV3_SIZES.items():
    register(f"vit_{_size}_patch16_dinov3", VisionTransformer, **_DINOV3, **_settings, qkv_bias=False)
    if _size != "7b":
        register(f"vit_{_size}_patch16_dinov3_qkvb", VisionTransformer, **_DINOV3, **_settings, qkv_bias="qv")

# The image towers of CLIP models and of SigLIP, under timm's names and with its settings: a classifier instead of the
# projection; gelu for SigLIP's first models, whose own activation is gelu_tanh.
_CLIP_TOWER: dict[str, Any] = {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}
_CLIP_SIZES: dict[str, dict[str, Any]] = {
    "base": SIZES["base"],
    "large": SIZES["large"],
    "huge": SIZES["huge"],
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
}
for _name, _quick in {
    "base_patch32_224": True, "base_patch32_256": False, "base_patch32_384": False, "base_patch32_448": False,
    "base_patch16_224": True, "base_patch16_384": False, "large_patch14_224": True, "large_patch14_336": True,
    "huge_patch14_224": True, "huge_patch14_336": False, "huge_patch14_378": True, "giant_patch14_224": False,
    "gigantic_patch14_224": True, "gigantic_patch14_378": False,
}.items():  # fmt: skip
    _size, _patch, _image = _name.split("_")
    _tower = {**_CLIP_TOWER, **_CLIP_SIZES[_size], "patch_size": int(_patch[5:]), "img_size": int(_image)}
    register(f"vit_{_size}_{_patch}_clip_{_image}", VisionTransformer, **_tower)
    if _quick:
        register(f"vit_{_size}_{_patch}_clip_quickgelu_{_image}", VisionTransformer, **_tower, activation="quick_gelu")

_SO400M = {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 4304.5 / 1152}
_SIGLIP_SIZES: dict[str, dict[str, Any]] = {
    "base": SIZES["base"],
    "large": SIZES["large"],
    "so400m": _SO400M,
    "giantopt": {**SIZES["giant"], "num_heads": 16},
}
for _name, _activation in {
    "base_patch32_256": "gelu_tanh", "base_patch16_224": "gelu", "base_patch16_256": "gelu",
    "base_patch16_384": "gelu", "base_patch16_512": "gelu", "large_patch16_256": "gelu", "large_patch16_384": "gelu",
    "large_patch16_512": "gelu_tanh", "so400m_patch14_224": "gelu", "so400m_patch14_378": "gelu",
    "so400m_patch16_256": "gelu_tanh", "so400m_patch16_384": "gelu_tanh", "so400m_patch16_512": "gelu_tanh",
    "giantopt_patch16_256": "gelu_tanh", "giantopt_patch16_384": "gelu_tanh",
}.items():  # fmt: skip
    _size, _patch, _image = _name.split("_")
    _tower = {**_SIGLIP_SIZES[_size], "patch_size": int(_patch[5:]), "img_size": int(_image), "num_classes": 0}
    _tower |= {"class_token": False, "activation": _activation}
    register(f"vit_{_size}_{_patch}_siglip_{_image}", VisionTransformer, **_tower, global_pool="map")
    register(f"vit_{_size}_{_patch}_siglip_gap_{_image}", VisionTransformer, **_tower, global_pool="avg", fc_norm=False)
