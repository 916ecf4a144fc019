"""FSDP2 on any device, and leaving the process group."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

# Import it before a process group exists: the defaults of its functions keep a reference to the current group. DDP and
# FSDP would import it when first used.
import torch.distributed.nn
from torch import nn

from pyvit.models.swin import SwinBlock
from pyvit.nn import Block
from pyvit.torch_private import make_fsdp_root


def shard(model: nn.Module, device: torch.device, precision: str = "no") -> nn.Module:
    """Move ``model`` to ``device`` and shard its parameters over all processes, in place.

    Each transformer block is a unit: its parameters are gathered when it runs and freed afterwards, while those of the
    next block are on their way. All other parameters are the root unit. With ``precision`` "bf16" the blocks'
    parameters are gathered in bfloat16, with activations between blocks in bfloat16 too, and their gradients are
    reduced in float32. The root unit (heads, prototypes, embeddings) stays in float32, and autocast rounds it where it
    is used.

    Uses torch's ``fully_shard`` directly, because Accelerate silently replicates the parameters without a GPU. Scalar
    parameters (the temperature and bias of CLIP and SigLIP) cannot be sharded; every rank keeps them, and their
    gradients are averaged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.to(device)
    scalars = {p for p in model.parameters() if p.dim() == 0}
    for p in scalars:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_average)
    shared: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "ignored_params": scalars,
    }
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16" else {}
    for blocks in stacks_of(model):
        units = []
        for block in blocks:
            policy = MixedPrecisionPolicy(**half, output_dtype=torch.float32 if half and block is blocks[-1] else None)
            units.append(fully_shard(block, mp_policy=policy, **shared))
        for unit, following in itertools.pairwise(units):
            unit.set_modules_to_forward_prefetch([following])
    return fully_shard(model, **shared)


def stacks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The stacks of transformer blocks in ``model``, in the order of their calls."""
    found = [[m for m in stack.children() if isinstance(m, (Block, SwinBlock))] for stack in model.modules()]
    return [blocks for blocks in found if blocks]


def _average(p: torch.Tensor) -> None:
    if p.grad is not None:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all parameters on every rank, to call parts of a model that :func:`shard` has sharded. The calls need not
    be the same on all ranks."""
    units = [m for m in model.modules() if hasattr(m, "unshard")]
    if not units:
        yield
        return
    make_fsdp_root(model)  # before a block of it runs, which would take itself for the root
    blocks: list[Any] = [unit for unit in units if unit is not model]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    for unit in units:
        unit.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()  # type: ignore[operator]
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)


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
