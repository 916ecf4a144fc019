"""A fused qkv projection whose keys have no bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyvit.nn.linear import Linear, bypassed
from pyvit.ops import linear
from pyvit.ops.prepacked import Norm


@bypassed
class QueryValueLinear(Linear):
    """Queries, keys and values in one product, (..., C) -> (..., 3 C), with biases ``q_bias`` and ``v_bias`` (C,) and
    none for the keys.

    Without rotary positions a bias of the keys adds the same to all scores of a query, which the softmax removes. BEiT
    (Bao et al., 2022), EVA-02 and DINOv3 leave it out.
    """

    fuses_residual = True  # see pyvit.nn.residual.fusion_args

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__(dim, 3 * dim, bias=False, **factory)
        self.q_bias = nn.Parameter(torch.zeros(dim, **factory))
        self.v_bias = nn.Parameter(torch.zeros(dim, **factory))

    def forward(
        self, x: Tensor, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``norm``, ``scale`` and ``residual`` as in :func:`pyvit.ops.linear`."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return linear(x, self.weight, bias, norm=norm, scale=scale, residual=residual)
