"""InfoNCE over all pairs of a batch (CLIP's loss) without the matrix of similarities."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, loss_tiles, pairwise_losses, reference_losses
from pyvit.ops.loss_tiles import LogSumExp, Ring, widen


def info_nce(
    a: Tensor, b: Tensor, scale: float | Tensor, *, group: dist.ProcessGroup | None = None, backend: str | None = None
) -> Tensor:
    """Symmetric cross-entropy of logits = scale * a b^T, whose diagonal holds the positives; the mean of both
    directions.

    Args:
        a, b: embeddings (N, D), used as they are (CLIP normalises them first). Row i of one belongs to row i of the
            other.
        scale: the inverse temperature, a number or a tensor of one element, which gets a gradient.
        group: ranks that share one batch, each with the same number of rows. Blocks of ``b`` pass from rank to rank
            while tiles are computed. Every rank returns the loss of the whole batch, and receives the gradient of the
            sum of those copies, so that the mean that DistributedDataParallel takes over ranks is the gradient of one
            big batch.
        backend: force one backend.

    Returns:
        the loss, a float32 scalar (float64 for float64 inputs). Memory is O(N D), forward and backward.

    Raises ValueError, TypeError for arguments that do not fit; BackendError when ``backend`` cannot serve.

    Sources: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018); Radford et al.,
    "Learning Transferable Visual Models From Natural Language Supervision" (2021), figure 3.
    """
    call = _check(a, b, scale, group)
    chosen = dispatch.select(call, backend)
    s = loss_tiles.scalar(scale, a)
    with dispatch.no_autocast(a):
        if group is not None:
            Ring(group).check_equal("info_nce", "a", a.shape[0], a.device)
            return _Sharded.apply(a, b, s, group)
        return INFO_NCE(a, b, s, chosen)[0]


def _check(a: Tensor, b: Tensor, scale: float | Tensor, group: Any) -> Call:
    loss_tiles.embeddings("info_nce", a=a, b=b)
    loss_tiles.check_scalars("info_nce", scale=scale)
    found = loss_tiles.features(a, b, scale if isinstance(scale, Tensor) else None, group=group)
    return Call("info_nce", a.device.type, a.dtype, tuple(found))


@dispatch.describes(info_nce)
def _describe(a: Tensor, b: Tensor, scale: float | Tensor, group: Any, backend: str | None) -> tuple[Call, list[str]]:
    return _check(a, b, scale, group), []


def _check_low(a: Tensor, b: Tensor, scale: Tensor) -> Call:
    call = _check(a, b, scale, None)
    checks.exactly("info_nce", "scale", scale, (), checks.wide(a.dtype), a)
    return call


def _forward(a: Tensor, b: Tensor, scale: Tensor, ring: Ring) -> tuple[Tensor, Tensor, Tensor]:
    rows, home = LogSumExp(a.shape[0], a), LogSumExp(b.shape[0], b)

    def compute(_owner: int, other: Tensor, top: Tensor, total: Tensor) -> None:
        pairwise_losses.add_softmax(a, other, scale, rows, LogSumExp.of(top, total))

    lse_b = LogSumExp.of(*ring.visit([b], [home.top, home.total], compute)).value()
    lse_a = rows.value()
    diagonal = (widen(a) * widen(b)).sum(1) * scale
    loss = ring.sum(((lse_a + lse_b) / 2 - diagonal).sum()) / (a.shape[0] * ring.size)
    return loss, lse_a, lse_b


def _gradients(
    grad: Tensor, lse_a: Tensor, lse_b: Tensor, a: Tensor, b: Tensor, scale: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = a.shape
    grad_a = pairwise_losses.gradients(a)

    def compute(owner: int, other: Tensor, lse: Tensor, grad_other: Tensor) -> None:
        pairwise_losses.add_softmax_gradients(
            a, other, scale, lse_a, lse, grad_a, grad_other, 0 if owner == ring.rank else None
        )

    (grad_b,) = ring.visit([b, lse_b], [pairwise_losses.gradients(b)], compute)
    grad_a, grad_b = grad_a[:, :d], grad_b[:, :d]
    weight = grad / (2 * n * ring.size)
    grad_scale = (grad_a * widen(a)).sum() * weight
    factor = weight * scale
    return (grad_a * factor).to(a.dtype), (grad_b * factor).to(b.dtype), grad_scale


def _tiled(a: Tensor, b: Tensor, scale: Tensor, _backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(a, b, scale, Ring(None))


def _tiled_backward(
    grad: Tensor, lse_a: Tensor, lse_b: Tensor, a: Tensor, b: Tensor, scale: Tensor, _backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad, lse_a, lse_b, a, b, scale, Ring(None))


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ring = Ring(group)
        loss, lse_a, lse_b = _forward(a, b, scale, ctx.ring)
        ctx.save_for_backward(a, b, scale, lse_a, lse_b)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    @dispatch.without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, lse_a, lse_b = ctx.saved_tensors
        return *_gradients(ctx.ring.sum(grad), lse_a, lse_b, a, b, scale, ctx.ring), None


def _fake(a: Tensor, b: Tensor, scale: Tensor, _backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return scale.new_empty(()), scale.new_empty(a.shape[0]), scale.new_empty(a.shape[0])


_TILES, _TILES_BACKWARD = "pyvit.ops.info_nce:_tiled", "pyvit.ops.info_nce:_tiled_backward"

INFO_NCE_BACKWARD = Gradient(
    "info_nce",
    formula=reference_losses.info_nce,
    kernels={
        "cpu": _TILES_BACKWARD,
        "cuda": _TILES_BACKWARD,
        "triton": "pyvit.triton_kernels.pairwise_losses:info_nce_backward",
    },
)
INFO_NCE = Operator(
    "info_nce",
    reference=reference_losses.info_nce,
    fake=_fake,
    check=_check_low,
    gradient=INFO_NCE_BACKWARD,
    kernels={"cpu": _TILES, "cuda": _TILES, "triton": "pyvit.triton_kernels.pairwise_losses:info_nce"},
)
