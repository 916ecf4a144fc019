"""Contrastive losses: CLIP, SigLIP, NT-Xent (SimCLR), triplet."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.ops import info_nce, nt_xent, sigmoid_contrastive


def positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def need_negatives(name: str, rows: int, group: Any) -> None:
    """Raise ValueError for a batch with a single pair, which has no negatives."""
    world = 1 if group is None else dist.get_world_size(group)
    if rows * world < 2:
        raise ValueError(
            f"{name}: the batch must have at least 2 pairs over all ranks, because the negatives of a pair are the "
            f"other pairs, got {rows * world} (if it is an epoch's last batch, use drop_last=True)"
        )


class CLIPLoss(nn.Module):
    """InfoNCE of normalised embeddings with a learned temperature (Radford et al., 2021).

    Args:
        init_scale: initial scale exp(logit_scale), 1 / 0.07.
        max_scale: upper bound of the scale, 100. ``logit_scale`` is clamped in place before it is used, as the paper's
            training does after each step; a clamp in the loss would stop its gradient.
        group: ranks that share a batch, see :func:`pyvit.ops.info_nce`.

    Raises ValueError for a batch of a single pair, which has no negatives.

    >>> loss = CLIPLoss()(image_embeddings, text_embeddings)  # (N, D) each
    """

    def __init__(self, init_scale: float = 1 / 0.07, max_scale: float = 100.0, group: Any = None) -> None:
        super().__init__()
        positive("CLIPLoss: init_scale", init_scale)
        positive("CLIPLoss: max_scale", max_scale)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.max_scale, self.group = max_scale, group

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        need_negatives("CLIPLoss", images.shape[0], self.group)
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_scale))
        scale = self.logit_scale.exp()
        return info_nce(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale, group=self.group)


class SigLIPLoss(nn.Module):
    """Sigmoid loss of normalised embeddings with a learned scale and bias (Zhai et al., 2023: ln 10 and -10). The scale
    is not bounded.

    Raises ValueError for a batch of a single pair, which has no negatives.
    """

    def __init__(self, init_scale: float = 10.0, init_bias: float = -10.0, group: Any = None) -> None:
        super().__init__()
        positive("SigLIPLoss: init_scale", init_scale)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(init_bias))
        self.group = group

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        need_negatives("SigLIPLoss", images.shape[0], self.group)
        scale = self.logit_scale.exp()
        return sigmoid_contrastive(
            F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale, self.logit_bias, group=self.group
        )


class NTXentLoss(nn.Module):
    """NT-Xent of normalised embeddings of two views (Chen et al., 2020: 0.1 on ImageNet, 0.5 on CIFAR-10).

    Raises ValueError for a batch of a single image, which has no negatives.
    """

    def __init__(self, temperature: float = 0.1, group: Any = None) -> None:
        super().__init__()
        positive("NTXentLoss: temperature", temperature)
        self.temperature, self.group = temperature, group

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        need_negatives("NTXentLoss", z1.shape[0], self.group)
        return nt_xent(F.normalize(z1, dim=-1), F.normalize(z2, dim=-1), self.temperature, group=self.group)


class TripletLoss(nn.Module):
    """mean max(0, sim(anchor, negative) - sim(anchor, positive) + margin), with cosine similarity.

    Schroff et al., "FaceNet" (2015), with similarities instead of distances.
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        if not 0 <= margin < math.inf:
            raise ValueError(f"TripletLoss: margin must be at least 0 and finite, got {margin}")
        self.margin = margin

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """(N, D) each, N at least 1."""
        if not anchor.shape == positive.shape == negative.shape or anchor.dim() != 2 or not len(anchor):
            shapes = ", ".join(str(tuple(x.shape)) for x in (anchor, positive, negative))
            raise ValueError(
                "TripletLoss: anchor, positive and negative must be of one shape (N, D) with at least one row, "
                f"got {shapes}"
            )
        positive_similarity = F.cosine_similarity(anchor, positive, dim=-1)
        negative_similarity = F.cosine_similarity(anchor, negative, dim=-1)
        return F.relu(negative_similarity - positive_similarity + self.margin).mean()
