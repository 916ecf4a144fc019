"""Losses that compare pairs: CLIP, SigLIP, SimCLR, triplets."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.ops import info_nce, nt_xent, sigmoid_contrastive


class CLIPLoss(nn.Module):
    """InfoNCE of normalised embeddings with a learned temperature (Radford et al., 2021).

    Args:
        init_scale: exp(logit_scale) at the start, 1 / 0.07. max_scale: its bound, 100.
        group: ranks that share a batch, see :func:`pyvit.ops.info_nce`.

    >>> loss = CLIPLoss()(image_embeddings, text_embeddings)  # (N, D) each
    """

    def __init__(self, init_scale: float = 1 / 0.07, max_scale: float = 100.0, group: Any = None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.max_scale, self.group = max_scale, group

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=math.log(self.max_scale)).exp()
        return info_nce(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale, group=self.group)


class SigLIPLoss(nn.Module):
    """Sigmoid loss of normalised embeddings with learned scale and bias (Zhai et al., 2023: ln 10 and -10)."""

    def __init__(self, init_scale: float = 10.0, init_bias: float = -10.0, group: Any = None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(init_bias))
        self.group = group

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        scale = self.logit_scale.exp()
        return sigmoid_contrastive(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale, self.logit_bias, group=self.group)


class NTXentLoss(nn.Module):
    """NT-Xent of normalised embeddings of two views (Chen et al., 2020: 0.1 on ImageNet, 0.5 on CIFAR-10)."""

    def __init__(self, temperature: float = 0.1, group: Any = None) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"NTXentLoss: temperature must be positive, got {temperature}")
        self.temperature, self.group = temperature, group

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(F.normalize(z1, dim=-1), F.normalize(z2, dim=-1), self.temperature, group=self.group)


class TripletLoss(nn.Module):
    """mean max(0, sim(anchor, negative) - sim(anchor, positive) + margin), with cosine similarity.

    Schroff et al., "FaceNet" (2015), on similarities in place of distances.
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """(N, D) each."""
        near, far = F.cosine_similarity(anchor, positive, dim=-1), F.cosine_similarity(anchor, negative, dim=-1)
        return F.relu(far - near + self.margin).mean()
