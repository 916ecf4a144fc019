"""Two processes: options with unused parameters, cached gradients, a teacher under DDP and FSDP2, a rank that stops."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

TINY = ["embed_dim=24", "depth=1", "num_heads=1", "patch_size=8"]
TOWERS = ["width=24", "depth=1", "num_heads=1", "patch_size=8"]
SELF = ["prototypes=40", "hidden=16", "bottleneck=8", "local_crops=1", "local_size=16", "drop_path=0.0"]
CLIP = {"model": "clip_pico_patch8_32", "set": [*TOWERS, "text_depth=1"]}

#: The rows of DINOv2's ablation and other settings with unused parts.
RUNS = {
    "no ibot": {"recipe": "dinov2", "set": TINY, "option": [*SELF, "ibot=0.0"]},
    "no koleo": {
        "recipe": "dinov2",
        "set": TINY,
        "option": [*SELF, "koleo=0.0", "separate_head=False", "layer_scale=0.0"],
    },
    "centre": {"recipe": "dinov2", "set": TINY, "option": [*SELF, "centering='centering'", "local_crops=0"]},
    "sinkhorn": {
        "recipe": "dino",
        "set": TINY,
        "option": [*SELF, "centering='sinkhorn_knopp'", "norm_last_layer=False"],
    },
    "mae avg": {
        "recipe": "mae",
        "set": [*TINY, "global_pool=avg"],
        "option": ["decoder_dim=16", "decoder_depth=0", "decoder_heads=1"],
    },
    "clip of siglip": {"recipe": "clip", "model": "siglip_pico_patch8_32", "set": TOWERS, "option": ["context=24"]},
    "plain": {
        "recipe": "supervised",
        "set": TINY,
        "option": ["mixup=0.0", "cutmix=0.0", "smoothing=0.0", "drop_path=0.0"],
    },
    "simclr": {"recipe": "simclr", "set": TINY, "option": ["hidden=16", "out=8"], "accumulate": 2},
    "clip": {"recipe": "clip", **CLIP, "option": ["context=24"], "accumulate": 2},
}


def trained(folder: str, name: str, kind: str) -> dict[str, torch.Tensor]:
    """The gradients of a run's first step, after which two more steps must succeed."""
    from pyvit.train import Config, engine

    settings = {"data": "digits", "batch_size": 8, "steps": 3, "fsdp": kind == "fsdp", "out": f"{folder}/{name}-{kind}"}
    run = engine.Run(Config(**settings, **RUNS[name]))
    batches, found = run.batches(), {}

    def keep(step: int, steps: int) -> None:
        for key, p in run.recipe.named_parameters():
            if p.grad is not None and not found.get("done"):
                found[key] = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()

    run.recipe.gradients = keep
    run.step(0, batches)
    found["done"] = torch.ones(())
    run.step(1, batches)
    if hasattr(run.recipe.model, "teacher"):
        drop_path_is_off(run)
    run.signals.last = 15 if run.rank == 1 else 0  # asked of one rank alone
    run.step(2, batches)
    assert run.stop == 15
    run.lock.release()
    return found


def drop_path_is_off(run) -> None:
    from pyvit.nn import DropPath
    from pyvit.train.sharding import whole

    for m in run.recipe.modules():
        if isinstance(m, DropPath):
            m.p = 0.5
    run.model.train()
    images = torch.randn(4, 3, 32, 32)
    with whole(run.recipe), torch.no_grad():
        teacher = run.recipe.model.teacher["backbone"]
        assert torch.equal(teacher(images), teacher(images))


def one_rank_without_masks() -> None:
    """The other ranks must not wait for it."""
    from pyvit.losses import IBOTLoss

    for centering in ("centering", "sinkhorn_knopp"):
        loss = IBOTLoss(6, centering=centering, group=dist.group.WORLD)
        rows = 3 if dist.get_rank() == 0 else 0
        torch.manual_seed(0)
        student, teacher = torch.randn(3, 6)[:rows].requires_grad_(), torch.randn(3, 6)[:rows]
        value = loss(student, teacher, torch.ones(rows), 0.07)
        value.backward()
        assert torch.isfinite(value)
        want = IBOTLoss(6, centering=centering)
        torch.manual_seed(0)
        student, teacher = torch.randn(3, 6), torch.randn(3, 6)
        alone = want(student, teacher, torch.ones(3), 0.07)
        if rows:
            torch.testing.assert_close(value.detach(), alone)
        torch.testing.assert_close(loss.center, want.center)


def worker(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    one_rank_without_masks()
    for name, settings in RUNS.items():
        found = {"ddp": trained(folder, name, "ddp")}
        if name in ("simclr", "clip", "no ibot"):
            found["fsdp"] = trained(folder, name, "fsdp")
        if settings.get("accumulate"):  # against the same images in one batch, which needs the same views
            same_gradients(folder, name, found)
    dist.destroy_process_group()


def same_gradients(folder: str, name: str, found: dict[str, dict[str, torch.Tensor]]) -> None:
    """DDP and FSDP2 give the gradients that one process computes from the views of all ranks and micro-batches."""
    from pyvit.data import load_data
    from pyvit.train import Config, engine
    from pyvit.train.recipe import load_recipe
    from pyvit.train.sampler import BatchSampler, step_seed

    config = engine.resolve_config(Config(data="digits", batch_size=8, steps=3, **RUNS[name]))
    data, parts, world = load_data("digits"), config.accumulate, dist.get_world_size()
    torch.manual_seed(0)
    recipe = load_recipe(config.recipe)(config, data).train()
    views = []
    for rank in range(world):
        plan = iter(BatchSampler(len(data.train), 8, 0, 3, 0, rank, world, parts))
        for part in range(parts):
            torch.manual_seed(step_seed(1, 0, rank, part))
            views.append(recipe.views(data.train.draw(next(plan), recipe.crops, 0, 0), 0, 3))
    alone = recipe.encode({k: torch.cat([v[k] for v in views]) for k in views[0]})
    group, type(recipe).group = type(recipe).group, None
    if hasattr(recipe, "loss"):
        recipe.loss.group = None
    norms = [m for m in recipe.modules() if hasattr(m, "running_mean")]
    for norm in norms:
        norm.__class__ = torch.nn.BatchNorm1d
    recipe.compare(alone)["loss"].backward()
    type(recipe).group = group
    wanted = {n: p.grad for n, p in recipe.named_parameters() if p.grad is not None}
    most = max(float(g.abs().max()) for g in wanted.values())
    for kind, gradients in found.items():
        gradients.pop("done")
        assert gradients.keys() == wanted.keys(), (kind, gradients.keys() ^ wanted.keys())
        for key, want in wanted.items():
            atol = 1e-3 * float(want.abs().max()) + 1e-4 * most  # SimCLR's batch norms, see test_distributed.py
            torch.testing.assert_close(
                gradients[key], want, rtol=0, atol=atol, msg=lambda m, s=f"{name} {kind} {key}": f"{s}: {m}"
            )


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """All in one pair of processes, because starting them takes longer than a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**env, "ACCELERATE_USE_CPU": "true", "RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(2)
    ]
    said = [p.communicate(timeout=600)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(said)


if __name__ == "__main__":
    worker(sys.argv[1])
