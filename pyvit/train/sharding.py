"""FSDP2: parameters, gradients and optimizer cut over the processes, on any device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` on ``device``, its parameters cut in place over all processes.

    torch's ``fully_shard`` is called here and not through Accelerate, which replicates without a word where there is no GPU. A parameter
    without a dimension to cut, the temperature and the bias of CLIP and SigLIP, stays whole on every rank; its gradient is averaged over
    the ranks as all others are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(device)
    scalars = {p for p in model.parameters() if p.dim() == 0}
    for p in scalars:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_average)
    return fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)), ignored_params=scalars)


def _average(p: torch.Tensor) -> None:
    if p.grad is not None:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Parameters gathered on every rank, for calls of parts of a model that :func:`shard` cut."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        model.reshard()  # type: ignore[operator]
