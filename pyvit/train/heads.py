"""Projection heads of the self-supervised recipes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeHead(nn.Module):
    """DINO's head up to its last product: (B, D) to unit vectors (B, bottleneck), beside unit prototypes (K, bottleneck).

    Scores are ``features @ prototypes.T``; the losses take both and never store the scores. A GELU MLP of three layers (Caron et al.,
    2021, appendix C); the prototypes' norm is fixed at 1. ``batch_norm``: over all rows before each GELU, which the paper's table of heads
    leaves out for ViTs at its scale; small networks, whose features of all images begin alike, are spread by it at once.
    """

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, batch_norm: bool = False) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        again = [nn.BatchNorm1d(hidden)] if batch_norm else []
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), *norm, nn.GELU(), nn.Linear(hidden, hidden), *again, nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.directions = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.directions, -(bottleneck**-0.5), bottleneck**-0.5)  # as nn.Linear's: the longer, the slower Adam turns them

    @property
    def prototypes(self) -> Tensor:
        return F.normalize(self.directions, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mlp(x.flatten(0, -2))
        return F.normalize(rows, dim=-1).view(*x.shape[:-1], -1)


def projection(dim: int, hidden: int, out: int) -> nn.Sequential:
    """SimCLR's head: linear, batch norm, ReLU, linear, batch norm without shift (Chen et al., 2020, appendix B)."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=True),
    )
