"""Token merging: fewer tokens from block to block, by averaging the most similar ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.ops import flash_attention


class TokenMerging:
    """Runs the blocks of a vision transformer and merges ``r`` tokens in each, between its attention and its MLP.

    Bolya et al., "Token Merging: Your ViT But Faster" (2023). Every second token proposes itself to the most similar of
    the others, by the cosine of their keys averaged over the heads; the ``r`` best proposals are merged, as means
    weighted by the number of patches that a token stands for. Attention adds the logarithm of that number to the scores
    (the paper's proportional attention), so that a token that stands for s equal patches counts as s patches. Tokens
    keep their order. Nothing is dropped: the numbers of patches always add up to N.

    No weights, and no training needed; training through it works too.

    Args:
        r: tokens to merge in each block, or a number for each block. At most half of the tokens that are not prefix
            tokens are merged in one block, as in the paper's code.
        prefix: tokens at the start (class token, registers) that are never merged.
    """

    def __init__(self, r: int | Sequence[int], prefix: int = 1) -> None:
        for value in r if isinstance(r, Sequence) and not isinstance(r, str) else (r,):
            if type(value) is not int or value < 0:
                raise ValueError(f"TokenMerging: r must be an int of at least 0, or one for each block, got {r!r}")
        if type(prefix) is not int or prefix < 0:
            raise ValueError(f"TokenMerging: prefix must be an int of at least 0, got {prefix!r}")
        self.r = r if isinstance(r, int) else tuple(r)
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"TokenMerging(r={self.r}, prefix={self.prefix})"

    def rates(self, depth: int) -> tuple[int, ...]:
        """``r`` for each of ``depth`` blocks."""
        rates = (self.r,) * depth if isinstance(self.r, int) else self.r
        if len(rates) != depth:
            raise ValueError(f"TokenMerging: r must have a number for each of {depth} blocks, got {len(rates)}")
        return rates

    def __call__(self, blocks: Sequence[nn.Module] | nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens x (B, N, C) through pre-norm blocks that have the attributes of timm's ``Block``.

        Returns the tokens (B, M, C) and the rows (B, N) int64 of the token that each of the N stands in;
        :func:`unmerge` gives (B, N, C) from both.
        """
        rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        size = x.new_ones(x.shape[:2], dtype=torch.float32)
        for block, r in zip(blocks, self.rates(len(blocks)), strict=True):
            y, metric = attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(y))
            r = min(r, (x.shape[1] - self.prefix) // 2)
            if r > 0:
                target = match(metric, r, self.prefix)
                x, size, rows = *merge(x, size, target, r), target.gather(1, rows)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x, rows


def attend(attn: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, N, C) of an attention layer with timm's attributes on x (B, N, C), whose tokens stand for ``size``
    (B, N) patches each, and the keys averaged over the heads (B, N, d)."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).transpose(1, 3).unbind(2)  # (B, H, N, d)
    q, k = attn.q_norm(q), attn.k_norm(k)
    drop = attn.attn_drop if isinstance(attn.attn_drop, float) else attn.attn_drop.p
    bias = size.log()[:, None, None]
    out = flash_attention(q, k, v, bias=bias, dropout_p=drop if attn.training else 0.0)
    out = attn.norm(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr]
    return attn.proj_drop(attn.proj(out)), k.detach().float().mean(1)


@torch.no_grad()
def match(metric: Tensor, r: int, prefix: int) -> Tensor:
    """The rows (B, N) int64 to which N tokens go when the ``r`` most similar pairs are merged; N - r rows, in order.

    metric (B, N, d): tokens are compared by the cosine. Tokens at even and at odd places form pairs; the first
    ``prefix`` tokens form none.
    """
    b, n = metric.shape[:2]
    metric = F.normalize(metric, dim=-1)
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = even @ odd.transpose(1, 2)  # (B, ceil(N / 2), floor(N / 2))
    scores[:, : (prefix + 1) // 2] = -torch.inf
    scores[:, :, : prefix // 2] = -torch.inf
    best, partner = scores.max(-1)  # of each even token
    merged = best.topk(r, dim=1).indices  # (B, r)
    goes = torch.zeros(b, n, dtype=torch.bool, device=metric.device).scatter(1, 2 * merged, True)
    target = (~goes).cumsum(1) - 1  # a token's place among those that stay
    return target.scatter(1, 2 * merged, target.gather(1, 2 * partner.gather(1, merged) + 1))


def merge(x: Tensor, size: Tensor, target: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Means of tokens x (B, N, C) weighted by size (B, N), by the rows that :func:`match` gives: (B, N - r, C), and the
    sums of their sizes (B, N - r)."""
    b, n, c = x.shape
    total = size.new_zeros(b, n - r).scatter_add(1, target, size)
    share = (size / total.gather(1, target)).to(x.dtype)[:, :, None]
    return x.new_zeros(b, n - r, c).scatter_add(1, target[:, :, None].expand(b, n, c), x * share), total


def unmerge(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens x (B, M, C) back at the places of the N that they stand for: (B, N, C)."""
    return x.gather(1, rows[:, :, None].expand(*rows.shape, x.shape[2]))
