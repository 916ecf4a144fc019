"""Multi-head self-attention on the fused kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvit.nn.linear import Linear, apply, bypassed, idle, plain
from pyvit.nn.quantized import quantized, quantized_attention
from pyvit.nn.rates import check_rate
from pyvit.ops import attention_map, flash_attention, flash_attention_qkvpacked, flash_attention_varlen
from pyvit.ops.prepacked import Norm, attention_branch


class Packing(NamedTuple):
    """Where each sequence lies in a packed batch (T, C): cu_seqlens (S + 1,) int32, ascending from 0 to T, and the
    lengths."""

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device | None = None) -> Packing:
        """The packing of sequences of these lengths, one after another."""
        lengths = tuple(lengths)
        return cls(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device), lengths)

    def spread(self, x: Tensor) -> Tensor:
        """One row per sequence (S, ...) to one row per token (T, ...)."""
        lengths = torch.tensor(self.lengths, device=x.device)
        return x.repeat_interleave(lengths, 0, output_size=sum(self.lengths))

    def select(self, x: Tensor, chosen: list[int]) -> tuple[Tensor, Packing]:
        """Tokens' row numbers (t,) of the chosen sequences of x, and their packing."""
        ends = list(itertools.accumulate(self.lengths))
        rows = [torch.arange(ends[s] - self.lengths[s], ends[s], device=x.device) for s in chosen]
        return torch.cat(rows), Packing.of([self.lengths[s] for s in chosen], x.device)


@bypassed
class Attention(nn.Module):
    """Multi-head self-attention, (B, N, C) -> (B, N, C); takes the place of timm's ``attn_layer``. Vaswani et al.
    (2017).

    Args:
        dim, num_heads: C and H; C divides by H.
        qkv_bias, proj_bias: biases of the two projections.
        qk_norm: normalise q and k per head (Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters",
            2023).
        scale_norm: normalise the merged heads before the output projection.
        attn_drop, proj_drop: dropout on attention weights and on the output.
        norm_layer: of qk_norm and scale_norm.
        rope_interleaved: which channels the ``rope`` of a call rotates together, see :func:`pyvit.nn.rotate`.
    """

    fuses_residual = True  # see pyvit.nn.residual.fusion_args

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: torch.dtype | None = None,
        rope_interleaved: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: num_heads must divide dim = {dim}, got {num_heads}")
        check_rate("Attention: attn_drop", attn_drop, one=True)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = Linear(dim, 3 * dim, qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.norm = norm_layer(dim, **factory) if scale_norm else nn.Identity()
        self.proj = Linear(dim, dim, proj_bias, **factory)
        self.attn_drop = attn_drop
        self.rope_interleaved = rope_interleaved
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x: Tensor, rope: Tensor | None = None, norm: Norm | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (..., N, H, d) of x (..., N, C): views of one product unless normalised or rotated."""
        q, k, v = apply(self.qkv, x, norm=norm).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (rotate(t, rope, self.rope_interleaved) for t in (q, k))
        return q, k, v

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        rope: Tensor | None = None,
        packing: Packing | None = None,
        norm: Norm | None = None,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, C), or (T, C) with ``packing``; attn_mask as ``bias`` of :func:`pyvit.ops.flash_attention`.

        rope (N, 2, d) or (T, 2, d): sines and cosines, see :class:`pyvit.nn.RotaryEmbedding` and
        :func:`pyvit.nn.rotate`. With ``norm``, ``scale`` and ``residual`` (see :func:`pyvit.ops.linear`) the whole
        branch: residual + scale * attention(norm(x)).
        """
        dropout = self.attn_drop if self.training else 0.0
        if packing is not None:
            if dropout:
                raise ValueError("Attention: attn_drop must be 0 to train on packed sequences")
            q, k, v = self.project(x, rope, norm)
            cu, longest = packing.cu_seqlens, max(packing.lengths, default=0)
            out = flash_attention_varlen(q, k, v, cu, cu, longest, longest, bias=attn_mask, is_causal=is_causal)
        elif rope is None and self._plain_heads():
            if attn_mask is None and not dropout:
                fused = self._branch(x, is_causal, norm, scale, residual)
                if fused is not None:
                    return fused
            packed = apply(self.qkv, x, norm=norm).unflatten(-1, (3, self.num_heads, self.head_dim))
            out = flash_attention_qkvpacked(packed, bias=attn_mask, is_causal=is_causal, dropout_p=dropout)
        else:
            q, k, v = (t.transpose(1, 2) for t in self.project(x, rope, norm))  # (B, H, N, d), no copy
            out = flash_attention(q, k, v, bias=attn_mask, is_causal=is_causal, dropout_p=dropout).transpose(1, 2)  # type: ignore[union-attr]
        return apply(self.proj, self.norm(out.flatten(-2)), self.proj_drop, scale=scale, residual=residual)  # type: ignore[union-attr]

    def _plain_heads(self) -> bool:
        """Whether q and k are not normalised."""
        parts: dict[str, Any] = self._modules  # attributes of a module take half a microsecond each
        return plain(parts["q_norm"], nn.Identity) and plain(parts["k_norm"], nn.Identity)

    def _branch(
        self, x: Tensor, is_causal: bool, norm: Norm | None, scale: Tensor | None, residual: Tensor | None
    ) -> Tensor | None:
        """The branch in one call, None where that does not compute these layers."""
        parts: dict[str, Any] = self._modules
        qkv, proj = parts["qkv"], parts["proj"]
        if not plain(parts["norm"], nn.Identity) or not idle(parts["proj_drop"]):
            return None
        if plain(qkv) and plain(proj) and not qkv.activation and not proj.activation:
            return attention_branch(x, qkv, proj, self.num_heads, is_causal, norm, scale, residual)
        if quantized(qkv, proj):
            return quantized_attention(x, qkv, proj, self.num_heads, is_causal, norm, scale, residual)
        return None

    def score_shape(self, x: Tensor) -> tuple[int, int, int]:
        """Sequences times heads, queries and keys of the scores that x (B, N, C) stands for."""
        return x.shape[0] * self.num_heads, x.shape[1], x.shape[1]

    def attention_map(self, x: Tensor, rows: int | list[int] | Tensor = 0, rope: Tensor | None = None) -> Tensor:
        """Probabilities (B, H, R, N) that the queries ``rows`` of x (B, N, C) give to every token."""
        q, k, _ = self.project(x, rope)
        return attention_map(q.transpose(1, 2), k.transpose(1, 2), rows)


def rotate(x: Tensor, rope: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of channels of x (..., N, H, d) by the angles of rope: sines at 0, cosines at 1.

    Su et al., "RoFormer" (2021).

    Args:
        rope: (N, 2, R), or (H, N, 2, R) with angles of their own for each head (Heo et al., "Rotary Position Embedding
            for Vision Transformer", 2024). R is even and at most d: the first R channels are rotated.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2); the sines and cosines are those of each channel in
            both cases.
    """
    channels = rope.shape[-1]
    if rope.dim() not in (3, 4) or rope.shape[-2] != 2:
        raise ValueError(f"rotate: rope must be of shape (N, 2, R) or (H, N, 2, R), got {tuple(rope.shape)}")
    if channels % 2 or not 0 < channels <= x.shape[-1]:
        raise ValueError(f"rotate: rope must have an even number of channels, at most {x.shape[-1]}, got {channels}")
    sin, cos = rope.to(x.dtype).unbind(-2)
    # (N, 1 or H, R), to fit x
    sin, cos = (t.unsqueeze(-2) if t.dim() == 2 else t.transpose(0, 1) for t in (sin, cos))
    rotated = x[..., :channels]
    if interleaved:
        a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        quarter = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        quarter = torch.cat((-b, a), -1)
    out = rotated * cos + quarter * sin
    return out if channels == x.shape[-1] else torch.cat((out, x[..., channels:]), -1)
