"""Running a network over a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.data import Images


@torch.no_grad()
def over(images: Images, compute: Callable[[dict[str, Any]], Tensor], batch: int = 256, device: torch.device | str = "cpu") -> Tensor:
    """``compute`` of every batch in order, concatenated on the CPU."""
    found = []
    for start in range(0, len(images), batch):
        part = images.fetch(range(start, min(start + batch, len(images))))
        found.append(compute({k: v.to(device) if isinstance(v, Tensor) else v for k, v in part.items()}).cpu())
    return torch.cat(found)


def labels_of(images: Images) -> Tensor:
    """Labels of a data set (N,) int64. Raises ValueError when it has none."""
    known = getattr(images, "labels", None)
    if known is None:
        raise ValueError("this evaluation needs labels, and the data set has none")
    return torch.as_tensor(known)


def predict(model: nn.Module, images: Images, normalize: Callable[[Tensor], Tensor], batch: int = 256) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) float32 and labels (N,)."""
    device = next(model.parameters()).device
    logits = over(images, lambda b: model(normalize(b["image"])).float(), batch, device)
    return logits, labels_of(images)


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """One feature vector (B, D) per image: what would enter the head, of ViT and Swin alike."""
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images), pre_logits=True)
    if hasattr(model, "encode_image"):
        return model.encode_image(images)
    features = model.forward_features(images)
    return features[:, 0] if features.dim() == 3 else features.flatten(2).mean(2) if features.dim() == 4 else features


def features(model: nn.Module, images: Images, normalize: Callable[[Tensor], Tensor], batch: int = 256) -> tuple[Tensor, Tensor]:
    """Feature vectors (N, D) float32 and labels (N,)."""
    device = next(model.parameters()).device
    return over(images, lambda b: embed(model, normalize(b["image"])).float(), batch, device), labels_of(images)
