"""AIMv2: a ViT with RMS norms, gated MLPs and few biases. Fini et al., "Multimodal Autoregressive Pre-training of Large
Vision Encoders" (2024)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyvit.models.registry import register
from pyvit.models.vit import VisionTransformer, vit_block
from pyvit.nn import Block, Linear, PatchEmbed, RMSNorm, SwiGLU, sincos_2d


def aimv2_block(dim: int, num_heads: int, mlp_ratio: float, **options: Any) -> Block:
    """A block without biases, with a gated MLP of hidden width int(dim * mlp_ratio)."""
    mlp = functools.partial(SwiGLU, bias=False)
    block = vit_block(dim, num_heads, mlp_ratio, mlp_layer=mlp, **options)
    block.attn.proj = Linear(dim, dim, bias=False)
    return block


class Aimv2(VisionTransformer):
    """Images (B, C, H, W) to logits (B, num_classes), or to the mean of the tokens (B, D).

    Patches are normalised before their positions are added.

    Args:
        native: sines and cosines for the grid of each image as positions, instead of learned ones that are resampled.
        norm_eps: of all norms.
        settings: of :class:`~pyvit.models.vit.VisionTransformer`.
    """

    def __init__(self, *, native: bool = False, norm_eps: float = 1e-5, **settings: Any) -> None:
        self.norm_eps = norm_eps
        settings.setdefault("global_pool", "avg")
        super().__init__(
            class_token=False,
            qkv_bias=False,
            fc_norm=False,
            pos_embed="none" if native else "learn",
            norm_eps=norm_eps,
            norm_layer=RMSNorm,
            block_layer=aimv2_block,
            **settings,
        )
        self.native = native

    def make_patch_embed(
        self, patch_size: int | Sequence[int], in_chans: int, embed_dim: int, **options: Any
    ) -> PatchEmbed:
        norm: Any = functools.partial(RMSNorm, eps=self.norm_eps)
        return PatchEmbed(patch_size, in_chans, embed_dim, norm_layer=norm, **options)

    def positions(self, grid: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Positions of a grid (N, D); no other token has one."""
        if self.native:
            like = self.patch_embed.proj.weight
            return sincos_2d(self.embed_dim, grid).to(like), None
        return super().positions(grid)

    def embed(self, images: Tensor, masks: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D), the input of the first block. ``masks`` and ``keep`` are not supported."""
        if masks is not None or keep is not None:
            raise ValueError("Aimv2: masks and keep are not supported")
        pos, _ = self.positions(self.patch_embed.grid(images.shape[2:]))
        x = self.patch_embed(images)
        return self.pos_drop(x if pos is None else x + pos.to(x.dtype))


_SIZES: dict[str, dict[str, Any]] = {
    "large": {"embed_dim": 1024, "num_heads": 8, "mlp_ratio": 2.75},
    "huge": {"embed_dim": 1536, "num_heads": 12, "mlp_ratio": 4096.5 / 1536},
    "1b": {"embed_dim": 2048, "num_heads": 16, "mlp_ratio": 2.75},
    "3b": {"embed_dim": 3072, "num_heads": 24, "mlp_ratio": 8192.5 / 3072},
}
for _size, _settings in _SIZES.items():
    for _image in (224, 336, 448):
        register(
            f"aimv2_{_size}_patch14_{_image}",
            Aimv2,
            **_settings,
            depth=24,
            patch_size=14,
            img_size=_image,
            num_classes=0,
        )
register("aimv2_large_patch14_native", Aimv2, **_SIZES["large"], depth=24, patch_size=14, num_classes=0, native=True)
