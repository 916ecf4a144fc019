"""The pairwise sigmoid loss (SigLIP) without the matrix of similarities."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, loss_tiles, pairwise_losses, reference_losses
from pyvit.ops.loss_tiles import Ring, widen


def sigmoid_contrastive(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """-1/N sum_ij log sigmoid(y_ij (scale a_i . b_j + bias)), y = 1 on the diagonal and -1 elsewhere.

    Args:
        a, b: embeddings (N, D), used as they are (SigLIP normalises them first); rows i belong together.
        scale, bias: numbers or tensors of one element, which get gradients. SigLIP starts them at 10 and -10.
        group: ranks that share one batch, as in :func:`pyvit.ops.info_nce`.
        backend: force one backend.

    Returns:
        the loss, a float32 scalar (float64 for float64 inputs). Memory is O(N D), forward and backward.

    Raises ValueError, TypeError for arguments that do not fit; BackendError when ``backend`` cannot serve.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), equation 1.
    """
    call = _check(a, b, scale, bias, group)
    chosen = dispatch.select(call, backend)
    s, t = loss_tiles.scalar(scale, a), loss_tiles.scalar(bias, a)
    with dispatch.no_autocast(a):
        if group is not None:
            Ring(group).check_equal("sigmoid_contrastive", "a", a.shape[0], a.device)
            return _Sharded.apply(a, b, s, t, group)
        return SIGMOID(a, b, s, t, chosen)


def _check(a: Tensor, b: Tensor, scale: float | Tensor, bias: float | Tensor, group: Any) -> Call:
    loss_tiles.embeddings("sigmoid_contrastive", a=a, b=b)
    loss_tiles.check_scalars("sigmoid_contrastive", scale=scale, bias=bias)
    found = loss_tiles.features(a, b, *(t for t in (scale, bias) if isinstance(t, Tensor)), group=group)
    return Call("sigmoid_contrastive", a.device.type, a.dtype, tuple(found))


@dispatch.describes(sigmoid_contrastive)
def _describe(
    a: Tensor, b: Tensor, scale: float | Tensor, bias: float | Tensor, group: Any, backend: str | None
) -> tuple[Call, list[str]]:
    return _check(a, b, scale, bias, group), []


def _check_low(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Call:
    call = _check(a, b, scale, bias, None)
    for name, t in (("scale", scale), ("bias", bias)):
        checks.exactly("sigmoid_contrastive", name, t, (), checks.wide(a.dtype), a)
    return call


def _forward(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> Tensor:
    total = torch.zeros_like(scale)

    def compute(owner: int, other: Tensor) -> None:
        total.add_(pairwise_losses.add_sigmoid(a, other, scale, bias, 0 if owner == ring.rank else None))

    ring.visit([b], [], compute)
    return ring.sum(total) / (a.shape[0] * ring.size)


def _gradients(
    grad: Tensor, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = a.shape
    grad_a, grad_bias = pairwise_losses.gradients(a), torch.zeros_like(scale)

    def compute(owner: int, other: Tensor, grad_other: Tensor) -> None:
        shift = 0 if owner == ring.rank else None
        grad_bias.add_(pairwise_losses.add_sigmoid_gradients(a, other, scale, bias, grad_a, grad_other, shift))

    (grad_b,) = ring.visit([b], [pairwise_losses.gradients(b)], compute)
    grad_a, grad_b = grad_a[:, :d], grad_b[:, :d]
    weight = grad / (n * ring.size)
    factor = weight * scale
    return (
        (grad_a * factor).to(a.dtype),
        (grad_b * factor).to(b.dtype),
        (grad_a * widen(a)).sum() * weight,
        grad_bias * weight,
    )


def _tiled(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, _backend: str) -> Tensor:
    return _forward(a, b, scale, bias, Ring(None))


def _tiled_backward(
    grad: Tensor, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, _backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(grad, a, b, scale, bias, Ring(None))


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ring = Ring(group)
        ctx.save_for_backward(a, b, scale, bias)
        return _forward(a, b, scale, bias, ctx.ring)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @dispatch.without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx.ring.sum(grad), *ctx.saved_tensors, ctx.ring), None  # type: ignore[call-arg]


def _fake(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, _backend: str) -> Tensor:
    return scale.new_empty(())


_TILES, _TILES_BACKWARD = "pyvit.ops.sigmoid_contrastive:_tiled", "pyvit.ops.sigmoid_contrastive:_tiled_backward"

SIGMOID_BACKWARD = Gradient(
    "sigmoid_contrastive",
    formula=reference_losses.sigmoid_contrastive,
    kernels={
        "cpu": _TILES_BACKWARD,
        "cuda": _TILES_BACKWARD,
        "triton": "pyvit.triton_kernels.pairwise_losses:sigmoid_contrastive_backward",
    },
)
SIGMOID = Operator(
    "sigmoid_contrastive",
    reference=reference_losses.sigmoid_contrastive,
    fake=_fake,
    check=_check_low,
    gradient=SIGMOID_BACKWARD,
    kernels={"cpu": _TILES, "cuda": _TILES, "triton": "pyvit.triton_kernels.pairwise_losses:sigmoid_contrastive"},
)
