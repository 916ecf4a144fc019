"""Masked autoencoder. He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.losses.masked import masked_pixel_loss, patchify, unpatchify
from pyvit.models.registry import register
from pyvit.models.vit import SIZES, VisionTransformer
from pyvit.nn import Block, LayerNorm, Linear, resample_positions, sincos_2d


class MaskedAutoencoder(VisionTransformer):
    """A ViT that encodes a quarter of the patches, and a small decoder that reconstructs the others (section 3).

    The encoder's parameters have a ViT's names, so its weights load into ``vit_*`` for fine-tuning.

    Args:
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        norm_pix_loss: predict pixels normalised within each patch (section 4, "Reconstruction target").
        encoder: settings of :class:`pyvit.models.vit.VisionTransformer`.
    """

    def __init__(
        self,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
        **encoder: Any,
    ) -> None:
        super().__init__(**{"num_classes": 0, "global_pool": "token", "pos_embed": "sincos", **encoder})
        (ph, pw) = self.patch_embed.patch_size
        c = self.patch_embed.in_chans
        eps = self.norm_eps
        if ph != pw:
            raise ValueError(f"MaskedAutoencoder: patch_size must be square, got {(ph, pw)}")
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = Linear(self.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        positions = F.pad(
            sincos_2d(decoder_embed_dim, self.grid).to(self.mask_token), (0, 0, self.num_prefix_tokens, 0)
        )[None]
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_embed_dim, decoder_num_heads, eps=eps) for _ in range(decoder_depth))
        )
        self.decoder_norm = LayerNorm(decoder_embed_dim, eps, before_linear=True)
        self.decoder_pred = Linear(decoder_embed_dim, ph * pw * c)
        self.init_autoencoder()

    def init_autoencoder(self) -> None:
        """Xavier-uniform initialisation of linear layers and the patch projection; tokens from a normal distribution of
        0.02 (appendix A.1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.data.view(weight.shape[0], -1))
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def random_masking(
        self, batch: int, patches: int, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A random choice of patches per image: ids of the kept patches (B, K) in random order, ids that restore the
        order (B, N), and the mask (B, N), 1 where masked.

        ``noise`` (B, N) determines the order if given; patches with the smallest values are kept.
        """
        noise = (
            torch.rand(batch, patches, dtype=torch.float32, device=self.mask_token.device) if noise is None else noise
        )
        shuffle = noise.argsort(1)
        restore = shuffle.argsort(1)
        kept = int(patches * (1 - mask_ratio))
        if not 0 < kept < patches:
            raise ValueError(
                f"MaskedAutoencoder: mask_ratio must hide some of the {patches} patches and leave some, "
                f"{mask_ratio} leaves {kept}"
            )
        return shuffle[:, :kept], restore, (restore >= kept).float()

    def decode(self, latent: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Encoded visible tokens (B, P + K, D) to predicted pixels of every patch (B, N, ph * pw * C)."""
        x = self.decoder_embed(latent)
        prefix, visible = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        hidden = self.mask_token.to(x.dtype).expand(x.shape[0], restore.shape[1] - visible.shape[1], -1)
        patches = torch.cat((visible, hidden), 1).gather(
            1, restore[:, :, None].expand(-1, -1, x.shape[2])
        )  # in the original order
        pos = self.decoder_pos_embed[0]
        first = pos.shape[0] - self.grid[0] * self.grid[1]
        pos = torch.cat((pos[:first], resample_positions(pos[first:], self.grid, grid, **self.interpolation)))  # type: ignore[arg-type]
        x = torch.cat((prefix, patches), 1) + pos.to(x.dtype)
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        return self.decoder_pred(self.decoder_norm(x))[:, self.num_prefix_tokens :]

    def forward(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, C, H, W) to the loss (), predicted patches (B, N, ph * pw * C) and the mask (B, N)."""
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"MaskedAutoencoder: mask_ratio must be in (0, 1), got {mask_ratio}")
        grid = self.patch_embed.grid(images.shape[2:])
        keep, restore, mask = self.random_masking(images.shape[0], grid[0] * grid[1], mask_ratio, noise)
        latent = self.forward_features(images, keep=keep)  # the encoder does not compute masked patches
        prediction = self.decode(latent, restore, grid)
        patch = self.patch_embed.patch_size[0]
        return masked_pixel_loss(prediction, images, mask, patch, self.norm_pix_loss), prediction, mask

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images with their masked patches reconstructed (B, C, H, W), and the mask as an image (B, 1, H, W)."""
        _, prediction, mask = self(images, mask_ratio, noise)
        patch, grid = self.patch_embed.patch_size[0], self.patch_embed.grid(images.shape[2:])
        patches = patchify(images, patch)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(patches, -1, keepdim=True)
            prediction = prediction * (var + 1e-6).sqrt() + mean
        painted = torch.where(mask[:, :, None] > 0, prediction, patches)
        shape = (mask.shape[0], 1, *grid)
        return unpatchify(painted, patch, grid), F.interpolate(mask.view(shape), size=images.shape[2:], mode="nearest")


for _size, _patch in (("base", 16), ("large", 16), ("huge", 14)):
    register(f"mae_vit_{_size}_patch{_patch}_224", MaskedAutoencoder, patch_size=_patch, **SIZES[_size])
