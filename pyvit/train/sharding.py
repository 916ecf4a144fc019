"""Processes: FSDP2's cut of parameters, gradients and optimizer over them, on any device, and how they part."""

from __future__ import annotations

import contextlib
import gc
import importlib
import operator
from collections.abc import Iterator

import torch
import torch.distributed as dist

# Before any group exists: the defaults of its functions keep the one they find for ever (DDP and FSDP import it when
# first used).
import torch.distributed.nn
from torch import nn


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` on ``device``, its parameters cut in place over all processes.

    torch's ``fully_shard`` is called here and not through Accelerate, which replicates without a word where there is no
    GPU. A parameter without a dimension to cut, the temperature and the bias of CLIP and SigLIP, stays whole on every
    rank; its gradient is averaged over the ranks as all others are.
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


def leave() -> None:
    """Leave the default process group; whoever holds a model on it must have dropped that before.

    ``destroy_process_group`` alone forgets the group; gloo's threads end with its last reference. One that still lets
    go of its last message while Python ends wants the interpreter's lock, which then ends the thread and with it the
    process, by ``std::terminate``.
    """
    for module, clear in _MEMORIES:
        with contextlib.suppress(ImportError, AttributeError):
            operator.attrgetter(clear)(importlib.import_module(f"torch.distributed.tensor.{module}"))()
    gc.collect()  # DDP and the groups of FSDP refer to themselves
    dist.destroy_process_group()


#: Where DTensor remembers layouts, plans and costs, and with them the mesh and its group.
_MEMORIES = (
    ("debug", "_clear_sharding_prop_cache"),
    ("_redistribute", "clear_redistribute_planner_cache"),
    ("_redistribute", "_gen_transform_infos.cache_clear"),
    ("_collective_utils", "MeshTopoInfo.build_from_mesh.cache_clear"),
)
