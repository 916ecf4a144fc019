"""Visualisation: attention, reconstructions, patch features, phrases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.eval.contact_sheet import enlarge, heat
from pyvit.models.resnet import ResNet


def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Attention from the class token to the patches in the last block, per head: (B, heads, rows, columns), from
    normalised images."""
    if not hasattr(model, "attention_map") or getattr(model, "cls_token", None) is None:
        raise ValueError("attention: the model must be a vision transformer with a class token")
    rows = model.attention_map(images)[:, :, 0, model.num_prefix_tokens :]  # type: ignore[operator,misc]
    return rows.float().unflatten(2, model.patch_embed.grid(images.shape[2:]))  # type: ignore[union-attr,operator]


def keep_mass(maps: Tensor, mass: float) -> Tensor:
    """bool (..., H, W): the fewest cells that contain ``mass`` of each map's total (Caron et al., 2021, figure 1)."""
    if not 0 < mass <= 1:
        raise ValueError(f"attention: mass must be in (0, 1], got {mass}")
    flat = maps.flatten(-2)
    values, order = (flat / flat.sum(-1, keepdim=True)).sort(-1, descending=True)
    kept = values.cumsum(-1) - values < mass
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, kept).view(maps.shape)


def attention_columns(
    model: nn.Module, images: Tensor, normalised: Tensor, mass: float, side: int = 128
) -> list[tuple[str, Tensor]]:
    """Columns of a sheet: the image, each head's map, and the cells that contain ``mass`` of the heads' mean."""
    maps = attention_maps(model, normalised)
    kept = keep_mass(maps.mean(1), mass)[:, None]
    picture = enlarge(images, side)
    heads = [(f"head {h}", enlarge(heat(maps[:, h]), side)) for h in range(maps.shape[1])]
    return [
        ("image", picture),
        *heads,
        (f"{100 * mass:.0f} % of the mean", picture * (0.2 + 0.8 * enlarge(kept, side))),
    ]


def reconstruction_columns(recipe: Any, images: Tensor, mask_ratio: float, side: int = 128) -> list[tuple[str, Tensor]]:
    """Columns of a sheet for an MAE run: masked input, reconstruction, original."""
    model = recipe.exported()
    if not hasattr(model, "reconstruct"):
        raise ValueError("reconstruct: the run must be of the recipe mae")
    painted, mask = model.reconstruct(recipe.normalize(images), mask_ratio)
    painted = painted * recipe.std + recipe.mean
    columns = (("seen", images * (1 - mask) + 0.5 * mask), ("painted", painted), ("truth", images))
    return [(name, enlarge(x, side)) for name, x in columns]


@torch.no_grad()
def patch_features(model: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens (B, rows, columns, D) of a ViT, or the last map of a Swin or ResNet."""
    if not hasattr(model, "forward_features"):
        raise ValueError(f"patches: the run's network must be a ViT, Swin or ResNet, {type(model).__name__} is none")
    features = model.forward_features(images)  # type: ignore[operator]
    if isinstance(model, ResNet):
        return features.permute(0, 2, 3, 1)
    if features.dim() == 4:
        return features
    return features[:, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid(images.shape[2:]))  # type: ignore[misc,union-attr,operator]


def pca_colors(features: Tensor) -> Tensor:
    """The first three principal components of all patches as colours (B, 3, rows, columns) in [0, 1]."""
    b, h, w, d = features.shape
    flat = features.reshape(-1, d).float()
    flat = flat - flat.mean(0)
    _, _, v = torch.linalg.svd(flat, full_matrices=False)
    parts = flat @ v[: min(3, len(v))].t()
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[1]))
    spread = 2 * parts.std(0).clamp(min=1e-12)
    return (parts / spread / 2 + 0.5).clamp(0, 1).view(b, h, w, 3).permute(0, 3, 1, 2)


def choose(count: int, total: int) -> list[int]:
    """``count`` indices at equal distances in ``total``."""
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    return [math.floor(i * total / min(count, total)) for i in range(min(count, total))]
