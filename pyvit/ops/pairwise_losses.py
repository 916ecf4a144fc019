"""Similarities of every row of one matrix with every row of another, tile by tile, for the contrastive losses.

On a CPU the compiled library computes the tiles; for float64, on a GPU, and without the library, torch's products do.
Everything is added to the caller's sums, so that the blocks of several ranks can follow one another. ``shift``:
positive pairs are (i, i + shift), None where the blocks hold none. ``own``: b is a, no row is its own candidate, and
the tiles above the diagonal stand for their mirror images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit import library
from pyvit.ops import checks
from pyvit.ops.loss_tiles import LogSumExp, product, spans, widen

Tile = tuple[slice, slice]


def _fused(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype != torch.float64 and library.problem() is None


def _tiles(a: Tensor, b: Tensor, own: bool = False) -> list[Tile]:
    return [(i, j) for i in spans(a.shape[0]) for j in spans(b.shape[0]) if not own or j.start >= i.start]


def _positives(scores: Tensor, tile: Tile, shift: int | None) -> Tensor:
    """A view of those of a tile."""
    return scores[:0, 0] if shift is None else scores.diagonal(tile[0].start + shift - tile[1].start)


def gradients(x: Tensor) -> Tensor:
    """Zeros to add the gradient of ``x`` to; rows are padded to 16 for the kernels, which write whole vectors."""
    return torch.zeros(x.shape[0], -(-x.shape[1] // 16) * 16, dtype=checks.wide(x.dtype), device=x.device)


def add_softmax(
    a: Tensor, b: Tensor, scale: Tensor, rows: LogSumExp, cols: LogSumExp | None, own: bool = False
) -> None:
    """Take the logits scale a b^T into the log-sum-exp of every row and, where given, of every column (into ``rows``
    when ``own``)."""
    if _fused(a):
        state = (None, None) if cols is None else (cols.top, cols.total)
        torch.ops.pyvit.pair_softmax(a, b, own, float(scale), rows.top, rows.total, *state)
        return
    for i, j in _tiles(a, b, own):
        scores = product(widen(a[i]) * scale, widen(b[j]))
        if own and i == j:
            scores.fill_diagonal_(-math.inf)
        rows.add(i, scores, 1)
        mirror = rows if own and i != j else cols
        if mirror is not None:
            mirror.add(j, scores, 0)


def add_softmax_gradients(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    lse_a: Tensor,
    lse_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor | None,
    shift: int | None,
    own: bool = False,
) -> None:
    """Add G b to ``grad_a`` and G^T a to ``grad_b``, G the gradient of the sum of both directions' cross-entropies to
    the logits."""
    if _fused(a):
        where = -1 if shift is None else shift
        torch.ops.pyvit.pair_softmax_backward(
            a, b, own, where, float(scale), lse_a.contiguous(), lse_b.contiguous(), grad_a, grad_b
        )
        return
    d = a.shape[1]
    for i, j in _tiles(a, b, own):
        x, y = widen(a[i]), widen(b[j])
        scores = product(x * scale, y)
        g = torch.sub(scores, lse_a[i, None]).exp_()
        scores.sub_(lse_b[j])
        if own and i == j:  # the sums were taken over rows, and a product need not be rounded as its mirror image
            scores.clamp_(max=0)
        g += scores.exp_()
        if own and i == j:
            g.fill_diagonal_(0)
            _positives(g, (i, j), None if shift is None else -shift).sub_(2)  # the mirror image is in the same tile
        _positives(g, (i, j), shift).sub_(2)
        grad_a[i, :d] += product(g, y.t())
        mirror = grad_a if own and i != j else grad_b
        if mirror is not None:
            mirror[j, :d] += product(g.t(), x.t())


def add_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, shift: int | None) -> Tensor:
    """The sum of softplus(l) over the logits l = scale a b^T + bias, of softplus(-l) for positive pairs."""
    total = torch.zeros(a.shape[0], dtype=scale.dtype, device=a.device)
    if _fused(a):
        return torch.ops.pyvit.pair_sigmoid(
            a, b, -1 if shift is None else shift, float(scale), float(bias), total
        ).sum()
    for i, j in _tiles(a, b):
        logits = product(widen(a[i]) * scale, widen(b[j])).add_(bias)
        _positives(logits, (i, j), shift).neg_()
        total[i] += F.softplus(logits).sum(1)
    return total.sum()


def add_sigmoid_gradients(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, grad_a: Tensor, grad_b: Tensor, shift: int | None
) -> Tensor:
    """Add G b to ``grad_a`` and G^T a to ``grad_b``, G the gradient of that sum to the logits; returns the sum of G."""
    total = torch.zeros(a.shape[0], dtype=scale.dtype, device=a.device)
    if _fused(a):
        where = -1 if shift is None else shift
        return torch.ops.pyvit.pair_sigmoid_backward(
            a, b, where, float(scale), float(bias), total, grad_a, grad_b
        ).sum()
    d = a.shape[1]
    for i, j in _tiles(a, b):
        x, y = widen(a[i]), widen(b[j])
        g = product(x * scale, y).add_(bias)
        _positives(g, (i, j), shift).neg_()
        g.sigmoid_()
        _positives(g, (i, j), shift).neg_()
        total[i] += g.sum(1)
        grad_a[i, :d] += product(g, y.t())
        grad_b[j, :d] += product(g.t(), x.t())
    return total.sum()
