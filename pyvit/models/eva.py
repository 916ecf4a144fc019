"""EVA-02 and Perception Encoder: ViTs with learned and rotary positions.

Fang et al., "EVA-02: A Visual Representation for Neon Genesis" (2023); Sun et al., "EVA-CLIP" (2023); Bolya et al.,
"Perception Encoder: The best visual embeddings are not at the output of the network" (2025).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyvit.models.registry import register
from pyvit.models.vit import SIZES, VisionTransformer, vit_block
from pyvit.nn import AxialRotaryEmbedding, Block, LayerNorm, Packing, SwiGLU
from pyvit.nn.patch_embed import pair
from pyvit.nn.residual import add_branch


class PostNormBlock(Block):
    """x + LN(Attention(x)), then x + LN(MLP(x)): (B, N, C) -> (B, N, C). EVA-CLIP's largest model."""

    post_norm = True  # metadata of its checkpoints

    def forward(
        self, x: Tensor, *, packing: Packing | None = None, rope: Tensor | None = None, **attend: Any
    ) -> Tensor:
        """x (B, N, C), or (T, C) with ``packing``; the rest as for :class:`pyvit.nn.Attention`."""

        def attention(y: Tensor, packing: Packing | None) -> Tensor:
            return self.norm1(self.attn(y, packing=packing, rope=rope, **attend))  # type: ignore[no-any-return]

        x = add_branch(self.drop_path1, x, attention, packing)
        return add_branch(self.drop_path2, x, lambda y, _: self.norm2(self.mlp(y)), packing)


def eva_block(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    *,
    swiglu: bool,
    scale_mlp: bool,
    scale_norm: bool,
    eps: float = 1e-6,
    **options: Any,
) -> Block:
    """A block of :class:`Eva`."""
    norm = functools.partial(LayerNorm, eps=eps)
    if swiglu:
        options["mlp_layer"] = functools.partial(SwiGLU, norm_layer=norm if scale_mlp else None)
    block = vit_block(dim, num_heads, mlp_ratio, eps=eps, **options)
    block.attn.rope_interleaved = True
    if scale_norm:
        block.attn.norm = norm(dim)
    return block


class Eva(VisionTransformer):
    """A ViT whose learned positions are joined by rotary ones: images (B, C, H, W) to logits (B, num_classes).

    Args:
        rope_reference: rows and columns of the grid in pre-training, or one number for both: the coordinates of other
            grids are scaled to it. None: no rotary positions.
        rope_offset, rope_column_first: see :class:`pyvit.nn.AxialRotaryEmbedding`.
        swiglu: gated MLPs of hidden width int(embed_dim * mlp_ratio) (section 2.1 of EVA-02).
        scale_mlp, scale_norm: layer norms of the hidden layer and of the merged heads (sub-LN).
        post_norm: norms at the end of the residual branches, without swiglu, scale_norm and rotary positions.
        settings: of :class:`~pyvit.models.vit.VisionTransformer`.
    """

    def __init__(
        self,
        *,
        rope_reference: int | Sequence[int] | None = 16,
        rope_offset: float = 0.0,
        rope_column_first: bool = False,
        swiglu: bool = False,
        scale_mlp: bool = False,
        scale_norm: bool = False,
        post_norm: bool = False,
        **settings: Any,
    ) -> None:
        if post_norm and (swiglu or scale_norm or rope_reference or settings.get("init_values") is not None):
            raise ValueError("Eva: post_norm goes with none of swiglu, scale_norm, rope_reference and init_values")
        if scale_mlp and not swiglu:
            raise ValueError("Eva: scale_mlp needs swiglu=True")
        rope = functools.partial(
            AxialRotaryEmbedding,
            reference=None if rope_reference is None else pair(rope_reference),
            offset=rope_offset,
            column_first=rope_column_first,
        )
        block = functools.partial(eva_block, swiglu=swiglu, scale_mlp=scale_mlp, scale_norm=scale_norm)
        super().__init__(
            rope_layer=None if rope_reference is None else rope,
            block_layer=functools.partial(vit_block, kind=PostNormBlock) if post_norm else block,
            **settings,
        )


# EVA-02, the released configurations. Larger images keep the reference grid of pre-training.
_EVA02: dict[str, Any] = {"qkv_bias": "qv", "mlp_ratio": 8 / 3, "swiglu": True, "patch_size": 14}
_SUB_LN: dict[str, Any] = {"scale_mlp": True}
for _size, _large, _more in (
    ("tiny", 336, {}),
    ("small", 336, {}),
    ("base", 448, _SUB_LN),
    ("large", 448, _SUB_LN),
):
    _pool = {"global_pool": "avg", **SIZES[_size], **_more}
    register(f"eva02_{_size}_patch14_224", Eva, **_EVA02, **_pool, num_classes=0)
    register(f"eva02_{_size}_patch14_{_large}", Eva, **_EVA02, **_pool, img_size=_large)
# EVA-CLIP's image towers, with the projection as timm's head.
_CLIP: dict[str, Any] = {**_EVA02, "scale_mlp": True, "scale_norm": True}
register("eva02_base_patch16_clip_224", Eva, **{**_CLIP, "patch_size": 16}, **SIZES["base"], num_classes=512)
for _image in (224, 336):
    register(f"eva02_large_patch14_clip_{_image}", Eva, **_CLIP, **SIZES["large"], img_size=_image, num_classes=768)
_ENORMOUS: dict[str, Any] = {"embed_dim": 1792, "depth": 64, "num_heads": 16, "mlp_ratio": 15360.5 / 1792}
_ENORMOUS |= {"patch_size": 14, "qkv_bias": "qv", "post_norm": True, "rope_reference": None}
register("eva02_enormous_patch14_clip_224", Eva, **_ENORMOUS, num_classes=1024)

# Perception Encoder, the released configurations: core (contrastive), language and spatial. The largest has no class
# token.
_PE: dict[str, Any] = {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "rope_column_first": True}
_CORE: dict[str, Any] = {**_PE, "global_pool": "map", "pool_heads": 8}
_OTHER: dict[str, Any] = {**_PE, "global_pool": "avg", "final_norm": False, "num_classes": 0}
_GIANT: dict[str, Any] = {"embed_dim": 1536, "depth": 50, "num_heads": 16, "mlp_ratio": 8960.5 / 1536}
_GIANT |= {"class_token": False, "img_size": 448, "rope_reference": 32}
_TOKEN: dict[str, Any] = {"rope_offset": 1.0}
for _name, _classes, _settings in (
    ("tiny_patch16_384", 512, {**SIZES["tiny"], **_TOKEN, "rope_reference": 24}),
    ("small_patch16_384", 512, {**SIZES["small"], **_TOKEN, "rope_reference": 24}),
    ("base_patch16_224", 1024, {**SIZES["base"], **_TOKEN, "rope_reference": 14}),
    ("large_patch14_336", 1024, {**SIZES["large"], **_TOKEN, "rope_reference": 24}),
    ("gigantic_patch14_448", 1280, {**_GIANT, "pool_mlp_ratio": 4.0}),
):
    _patch, _image = (int(part) for part in _name.partition("_patch")[2].split("_"))
    _sized = {**_CORE, **_settings, "patch_size": _patch, "img_size": _image}
    register(f"vit_pe_core_{_name}", Eva, **_sized, num_classes=_classes)
for _size in ("tiny", "small", "base"):
    _sized = {**_OTHER, **SIZES[_size], **_TOKEN, "img_size": 512, "rope_reference": 32}
    register(f"vit_pe_spatial_{_size}_patch16_512", Eva, **_sized)
_LARGE: dict[str, Any] = {**SIZES["large"], **_TOKEN, "patch_size": 14, "img_size": 448, "rope_reference": 32}
_GIANT |= {"patch_size": 14, "init_values": 0.1}
register("vit_pe_spatial_large_patch14_448", Eva, **_OTHER, **_LARGE)
register("vit_pe_spatial_gigantic_patch14_448", Eva, **_OTHER, **_GIANT)
register("vit_pe_lang_large_patch14_448", Eva, **_OTHER, **{**_LARGE, "depth": 23, "init_values": 0.1})
register("vit_pe_lang_gigantic_patch14_448", Eva, **_OTHER, **{**_GIANT, "depth": 47})
