"""What training a model costs on this machine, measured in a few steps: time, memory, decoding."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit.data import Data
from pyvit.train.config import Config
from pyvit.train.recipe import Recipe, load_recipe

#: Share of the free memory for activations.
SHARE = 0.5


class Cost(NamedTuple):
    """Seconds of training per image, images that fit into memory at once, and processes that decode."""

    seconds: float
    fits: int
    workers: int


def measure(config: Config, data: Data) -> Cost:
    """The cost of training ``config``'s model on ``data``, from a few steps of a small batch. The shortest times count:
    longer ones wait for other programs."""
    rows = min(16, len(data.train))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    recipe = load_recipe(config.recipe)(dataclasses.replace(config, init=None, batch_size=rows), data).to(device)
    recipe.train()
    indices = [i * (len(data.train) // rows) for i in range(rows)]
    load = fastest(lambda n: data.train.draw(indices, recipe.crops, n, 0), 3) / rows
    batch = data.train.draw(indices, recipe.crops, 0, 0)
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    step = fastest(lambda _: _step(recipe, batch, config, device), 4) / rows
    kept = activations(lambda: _loss(recipe, batch, config, device), recipe) / rows
    trained = 16 * sum(p.numel() for p in recipe.parameters())  # float32 weights, gradients and two moments
    fits = max(int(SHARE * (free_memory() - trained) / max(kept, 1)), 1)
    gpu, spare = device.type == "cuda", max(cores() - 1, 1)
    workers = min(spare, 8) if load > 0.1 * step and cores() > 1 else 0
    seconds = max(step, load / max(workers, 1)) if gpu else step + load / cores()
    return Cost(seconds, 1 << fits.bit_length() - 1, workers)


def _loss(recipe: Recipe, batch: dict[str, Any], config: Config, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return recipe(recipe.views(batch, 0, 1))["loss"]


def _step(recipe: Recipe, batch: dict[str, Any], config: Config, device: torch.device) -> None:
    _loss(recipe, batch, config, device).backward()
    recipe.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()


def activations(forward: Callable[[], Tensor], model: torch.nn.Module) -> int:
    """Bytes that ``forward()`` keeps for the backward pass, besides the parameters of ``model``."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address might be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def fastest(call: Callable[[int], Any], times: int) -> float:
    """The shortest duration of ``call(i)`` in seconds, after a call to warm up."""
    call(times)
    found = []
    for i in range(times):
        began = time.perf_counter()
        call(i)
        found.append(time.perf_counter() - began)
    return min(found)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Free bytes on the GPU, or else of this machine; 8 GB if that is not known."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 8e9
