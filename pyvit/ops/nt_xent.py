"""NT-Xent (SimCLR's loss) without the matrix of similarities; its symmetry halves the tiles."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, loss_tiles, pairwise_losses, reference_losses
from pyvit.ops.loss_tiles import LogSumExp, Ring, widen


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalised-temperature cross-entropy: each of the 2N views picks its partner among the 2N - 1 others.

    Args:
        z1, z2: two views' embeddings (N, D), used as they are (SimCLR normalises them first); rows i are partners.
        temperature: a number or a tensor of one element, which gets a gradient.
        group: ranks that share one batch, as in :func:`pyvit.ops.info_nce`.
        backend: force one backend.

    Returns:
        the mean over 2N views, a float32 scalar (float64 for float64 inputs). Memory is O(N D), forward and backward.

    Raises ValueError, TypeError for arguments that do not fit; BackendError when ``backend`` cannot serve.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020), equation 1.
    """
    call = _check(z1, z2, temperature, group)
    chosen = dispatch.select(call, backend)
    t = loss_tiles.scalar(temperature, z1)
    with dispatch.no_autocast(z1):
        if group is not None:
            Ring(group).check_equal("nt_xent", "z1", z1.shape[0], z1.device)
            return _Sharded.apply(z1, z2, t, group)
        return NT_XENT(z1, z2, t, chosen)[0]


def _check(z1: Tensor, z2: Tensor, temperature: float | Tensor, group: Any) -> Call:
    loss_tiles.embeddings("nt_xent", z1=z1, z2=z2)
    loss_tiles.check_scalars("nt_xent", temperature=temperature)
    if not isinstance(temperature, Tensor):
        checks.positive("nt_xent", "temperature", temperature)
    found = loss_tiles.features(z1, z2, temperature if isinstance(temperature, Tensor) else None, group=group)
    return Call("nt_xent", z1.device.type, z1.dtype, tuple(found))


@dispatch.describes(nt_xent)
def _describe(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, group: Any, backend: str | None
) -> tuple[Call, list[str]]:
    return _check(z1, z2, temperature, group), []


def _check_low(z1: Tensor, z2: Tensor, temperature: Tensor) -> Call:
    call = _check(z1, z2, temperature, None)
    checks.exactly("nt_xent", "temperature", temperature, (), checks.wide(z1.dtype), z1)
    return call


def _forward(z1: Tensor, z2: Tensor, temperature: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    z, scale = torch.cat([z1, z2]), 1 / temperature
    n = z.shape[0]
    lse = LogSumExp(n, z)
    ring.visit(
        [z], [], lambda owner, other: pairwise_losses.add_softmax(z, other, scale, lse, None, own=owner == ring.rank)
    )
    value = lse.value()
    positive = (widen(z1) * widen(z2)).sum(1) * scale
    return ring.sum(value.sum() - 2 * positive.sum()) / (n * ring.size), value


def _gradients(
    grad: Tensor, lse: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, ring: Ring
) -> tuple[Tensor, Tensor, Tensor]:
    z, scale = torch.cat([z1, z2]), 1 / temperature
    n, d = z.shape
    # The matrix is symmetric: what row i sends to z_j and what row j sends to z_i meet in one weight, P_ij + P_ji.
    grad_z = pairwise_losses.gradients(z)

    def compute(owner: int, other: Tensor, lse_other: Tensor) -> None:
        own = owner == ring.rank
        pairwise_losses.add_softmax_gradients(
            z, other, scale, lse, lse_other, grad_z, None, n // 2 if own else None, own
        )

    ring.visit([z, lse], [], compute)
    grad_z = grad_z[:, :d]
    weight = grad / (n * ring.size)
    grad_temperature = -(grad_z * widen(z)).sum() / 2 * weight / temperature**2
    grad_z = (grad_z * (weight / temperature)).to(z.dtype)
    return grad_z[: n // 2], grad_z[n // 2 :].clone(), grad_temperature


def _tiled(z1: Tensor, z2: Tensor, temperature: Tensor, _backend: str) -> tuple[Tensor, Tensor]:
    return _forward(z1, z2, temperature, Ring(None))


def _tiled_backward(
    grad: Tensor, lse: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, _backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad, lse, z1, z2, temperature, Ring(None))


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, temperature: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ring = Ring(group)
        loss, lse = _forward(z1, z2, temperature, ctx.ring)
        ctx.save_for_backward(lse, z1, z2, temperature)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    @dispatch.without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx.ring.sum(grad), *ctx.saved_tensors, ctx.ring), None  # type: ignore[call-arg]


def _fake(z1: Tensor, z2: Tensor, temperature: Tensor, _backend: str) -> tuple[Tensor, Tensor]:
    return temperature.new_empty(()), temperature.new_empty(2 * z1.shape[0])


_TILES, _TILES_BACKWARD = "pyvit.ops.nt_xent:_tiled", "pyvit.ops.nt_xent:_tiled_backward"

NT_XENT_BACKWARD = Gradient(
    "nt_xent",
    formula=reference_losses.nt_xent,
    kernels={
        "cpu": _TILES_BACKWARD,
        "cuda": _TILES_BACKWARD,
        "triton": "pyvit.triton_kernels.pairwise_losses:nt_xent_backward",
    },
)
NT_XENT = Operator(
    "nt_xent",
    reference=reference_losses.nt_xent,
    fake=_fake,
    check=_check_low,
    gradient=NT_XENT_BACKWARD,
    kernels={"cpu": _TILES, "cuda": _TILES, "triton": "pyvit.triton_kernels.pairwise_losses:nt_xent"},
)
