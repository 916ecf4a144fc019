"""KoLeo: pushes each embedding away from its nearest neighbour, found without the matrix of similarities."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Operator
from pyvit.ops import checks, loss_tiles, reference_losses
from pyvit.ops.loss_tiles import Ring, product, spans, widen


def koleo(
    x: Tensor, *, eps: float = 1e-8, group: dist.ProcessGroup | None = None, backend: str | None = None
) -> Tensor:
    """-mean_i log(||x_i - x_nn(i)|| + eps), nn(i) the row of the largest inner product with x_i, itself left out.

    Args:
        x: embeddings (N, D), used as they are (DINOv2 normalises them first, which makes nn the nearest). A single row
            is its own neighbour, as in DINOv2's code: a constant loss, without a gradient.
        eps: keeps the logarithm and its gradient finite for rows that coincide.
        group: ranks that share one batch, each with as many rows: neighbours are sought on all of them. Every rank
            returns the loss of the whole batch, and receives the gradient of the sum of those copies.
        backend: force one backend for the search.

    Returns a float32 scalar (float64 for float64). Raises ValueError or TypeError naming the argument that does not
    fit.

    Source: Sablayrolles et al., "Spreading vectors for similarity search" (2019), equation 5.
    """
    call, eps = _check(x), checks.number("koleo", "eps", eps)
    if not eps >= 0:
        checks.fail("koleo", "eps", "at least 0", eps)
    if group is not None:
        Ring(group).check_equal("koleo", "x", x.shape[0], x.device)
        x = loss_tiles.all_rows(x, group)
    chosen = dispatch.select(call, backend)
    with dispatch.no_autocast(x):
        wide = widen(x)
        nearest = NEAREST(x.detach(), chosen)
        # The root's slope is infinite where rows coincide, so eps enters under it too.
        distance = ((wide - wide[nearest] + eps).square().sum(1)).sqrt()
        return -(distance + eps).log().mean()


@dispatch.describes(koleo)
def _describe(x: Tensor, eps: Any, group: Any, backend: str | None) -> tuple[Call, list[str]]:
    checks.number("koleo", "eps", eps)
    return _check(x), []


def _check(x: Tensor) -> Call:
    checks.tensor("koleo", "x", x, "(N, D)", 2)
    checks.floating("koleo", "x", x)
    if x.shape[0] == 0:
        checks.fail("koleo", "x", "of at least one row", checks.shape(x))
    return Call("nearest_neighbor", x.device.type, x.dtype, tuple(loss_tiles.features(x)))


def _tiled(x: Tensor, _backend: str) -> Tensor:
    n = x.shape[0]
    best = torch.full((n,), -math.inf, dtype=checks.wide(x.dtype), device=x.device)
    index = torch.zeros(n, dtype=torch.int64, device=x.device)
    for i in spans(n):
        for j in spans(n):
            scores = product(widen(x[i]), widen(x[j]))
            if i == j:
                scores.fill_diagonal_(-math.inf)
            top, at = scores.max(1)
            better = top > best[i]
            best[i] = torch.where(better, top, best[i])
            index[i] = torch.where(better, at + j.start, index[i])
    return index


def _fake(x: Tensor, _backend: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


NEAREST = Operator(
    "nearest_neighbor",
    reference=reference_losses.nearest_neighbor,
    fake=_fake,
    check=_check,
    kernels={"cpu": "pyvit.ops.koleo:_tiled", "cuda": "pyvit.ops.koleo:_tiled"},
)
