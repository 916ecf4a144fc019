"""Pooling tokens into one vector by attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit.nn.attention import Packing
from pyvit.nn.linear import Linear
from pyvit.nn.mlp import Mlp
from pyvit.ops import flash_attention, flash_attention_varlen


class AttentionPool(nn.Module):
    """A learned query attends over all tokens, then an MLP with a residual: (B, N, C) -> (B, C), or with a ``packing``
    of S sequences (T, C) -> (S, C).

    MAP pooling of Zhai et al., "Scaling Vision Transformers" (2022), as used by SigLIP.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, activation: str = "gelu", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)
        self.q, self.kv, self.proj = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        if packing is not None:
            y = self.proj(self._attend_packed(x, packing))
            return y + self.mlp(self.norm(y))
        b = x.shape[0]
        q = self.q(self.latent.expand(b, -1, -1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, 1, d)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).transpose(1, 3).unbind(2)  # (B, H, N, d)
        out = flash_attention(q, k, v).transpose(1, 2).flatten(2)  # type: ignore[union-attr]
        y = self.proj(out)
        return (y + self.mlp(self.norm(y)))[:, 0]

    def _attend_packed(self, x: Tensor, packing: Packing) -> Tensor:
        """The query of each sequence over its own tokens: (T, C) -> (S, C)."""
        sequences = len(packing.lengths)
        q = self.q(self.latent[0].expand(sequences, -1)).unflatten(-1, (self.num_heads, -1))  # (S, H, d)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(1)  # (T, H, d)
        queries = torch.arange(sequences + 1, dtype=torch.int32, device=x.device)
        longest = max(packing.lengths, default=0)
        out = flash_attention_varlen(q, k, v, queries, packing.cu_seqlens, 1, longest)
        return out.flatten(1)  # type: ignore[union-attr]
