"""FSDP2 on any device, and leaving the process group."""

from __future__ import annotations

import contextlib
import gc
import importlib
import operator
from collections.abc import Iterator

import torch
import torch.distributed as dist

# Import it before a process group exists: the defaults of its functions keep a reference to the current group. DDP and
# FSDP would import it when first used.
import torch.distributed.nn
from torch import nn


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Move ``model`` to ``device`` and shard its parameters over all processes, in place.

    Uses torch's ``fully_shard`` directly, because Accelerate silently replicates the parameters without a GPU. Scalar
    parameters (the temperature and bias of CLIP and SigLIP) cannot be sharded; every rank keeps them, and their
    gradients are averaged.
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
    """Gather all parameters on every rank, to call parts of a model that :func:`shard` has sharded."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        model.reshard()  # type: ignore[operator]


def leave() -> None:
    """Destroy the default process group. Models that use it must have been deleted before.

    This also drops all references to the group, because gloo's threads only end with the last one. If a gloo thread
    releases its last message while Python shuts down, it needs the interpreter's lock, which terminates the process.
    """
    for module, clear in _MEMORIES:
        with contextlib.suppress(ImportError, AttributeError):
            operator.attrgetter(clear)(importlib.import_module(f"torch.distributed.tensor.{module}"))()
    gc.collect()  # DDP and FSDP have reference cycles
    dist.destroy_process_group()


#: Caches of DTensor that refer to the device mesh and its group.
_MEMORIES = (
    ("debug", "_clear_sharding_prop_cache"),
    ("_redistribute", "clear_redistribute_planner_cache"),
    ("_redistribute", "_gen_transform_infos.cache_clear"),
    ("_collective_utils", "MeshTopoInfo.build_from_mesh.cache_clear"),
)
