"""Sinkhorn-Knopp assignment of samples to prototypes, in the logarithm, over ranks, and without storing the scores."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyvit import dispatch
from pyvit.ops import checks
from pyvit.ops.loss_tiles import LogSumExp, Ring, product, spans, widen


def sinkhorn_knopp(
    scores: Tensor, temperature: float, iterations: int = 3, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Assignment of B samples to K prototypes of equal total weight.

    exp(scores / temperature) is normalised over samples to 1 / K per prototype, then over prototypes to 1 / B per
    sample, ``iterations`` times.

    Args:
        scores: (B, K), this rank's samples.
        temperature: positive; DINOv2's teacher temperature.
        iterations: rounds, 3 in SwAV and DINOv2. Without any, the whole of the batch's B rows is normalised at once, as
            in their code.
        group: ranks that share one batch; only K numbers per round are exchanged.

    Returns (B, K) float32 (float64 for float64), each row summing to 1. No gradient: it is a target.

    Sources: Cuturi, "Sinkhorn Distances" (2013); Caron et al., "SwAV" (2020), section 3.1.
    """
    temperature, iterations = _check("sinkhorn_knopp", "scores", scores, temperature, iterations, 0)
    if iterations == 0:
        return _normalised(scores, temperature, Ring(group))
    center = sinkhorn_center(scores, temperature, iterations, group=group)
    return ((widen(scores.detach()) - center) / temperature).softmax(-1)


def _check(op: str, name: str, scores: Tensor, temperature: Any, iterations: Any, least: int) -> tuple[float, int]:
    checks.tensor(op, name, scores, "(B, K)", 2)
    checks.floating(op, name, scores)
    return checks.positive(op, "temperature", temperature), checks.whole(op, "iterations", iterations, least)


@torch.no_grad()
def _normalised(scores: Tensor, temperature: float, ring: Ring) -> Tensor:
    """exp(scores / temperature) over its sum, times the number of samples, both over ranks."""
    x = widen(scores) / temperature
    total = LogSumExp(1, x)
    if x.numel():
        total.add(slice(None), x.reshape(1, -1), 1)
    samples = ring.sum(torch.full((), float(x.shape[0]), dtype=x.dtype, device=x.device))
    return (x - _shared(total, ring)).exp() * samples


@torch.no_grad()
def sinkhorn_center(
    features: Tensor,
    temperature: float,
    iterations: int = 3,
    *,
    prototypes: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The potentials of :func:`sinkhorn_knopp`: assignments = softmax((scores - center) / temperature).

    Give it to :func:`pyvit.ops.distillation_cross_entropy` as ``center``, and the teacher is the Sinkhorn assignment,
    never stored.

    Args:
        features: scores (B, K), or features (B, C) with ``prototypes`` (K, C); scores = features prototypes^T, a tile
            at a time.
        temperature, iterations, group: as in :func:`sinkhorn_knopp`, but at least one iteration: no center describes
            zero iterations.

    Returns center (K,), float32 or float64.
    """
    op = "sinkhorn_center"
    temperature, iterations = _check(op, "features", features, temperature, iterations, 1)
    if prototypes is not None:
        checks.tensor(op, "prototypes", prototypes, "(K, C)", 2)
        checks.beside(op, "prototypes", prototypes, "features", features)
        if prototypes.shape[1] != features.shape[1]:
            checks.fail(op, "prototypes", f"of shape (K, {features.shape[1]})", checks.shape(prototypes))
    with dispatch.no_autocast(features):
        return _center(features, temperature, iterations, prototypes, Ring(group))


def _center(features: Tensor, temperature: float, iterations: int, prototypes: Tensor | None, ring: Ring) -> Tensor:
    b, k = features.shape[0], features.shape[1] if prototypes is None else prototypes.shape[0]

    def tile(rows: slice, columns: slice) -> Tensor:
        if prototypes is None:
            return widen(features[rows, columns]) / temperature
        return product(widen(features[rows]) / temperature, widen(prototypes[columns]))

    sample = features.new_zeros(b, dtype=checks.wide(features.dtype))  # log of each sample's factor
    prototype = sample.new_zeros(k)
    for i in range(iterations):
        over_samples = LogSumExp(k, sample)
        for rows in spans(b):
            for columns in spans(k, 4096):
                scores = tile(rows, columns) + sample[rows, None]
                over_samples.add(columns, scores, 0)
        prototype = -_shared(over_samples, ring) - math.log(k)
        if i + 1 == iterations:
            break  # the last normalisation over prototypes is the softmax
        over_prototypes = LogSumExp(b, sample)
        for rows in spans(b):
            for columns in spans(k, 4096):
                scores = tile(rows, columns) + prototype[columns]
                over_prototypes.add(rows, scores, 1)
        sample = -over_prototypes.value()
    return -temperature * prototype


def _shared(local: LogSumExp, ring: Ring) -> Tensor:
    """The log-sum-exp over the samples of every rank."""
    top = local.top
    if ring.size > 1:
        top = top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=ring.group)
    return top + ring.sum(local.total * (local.top - top).exp()).log()
