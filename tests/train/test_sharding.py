"""FSDP2 per block on two processes: what is gathered at once, in which dtype, and the same results as one process."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pyvit.train import Config, train

DEPTH = 6
#: Without random numbers that depend on the rank.
SETTINGS = {
    "data": "digits", "batch_size": 16, "clip": 1.0, "checkpointing": True, "save_every": 1, "ema": 0.5,
    "optimizer": "lamb", "lr": 1e-2, "warmup": 0.0,
    "set": ["embed_dim=24", f"depth={DEPTH}", "num_heads=1", "patch_size=8", "init_values=0.5"],
    "option": ["augment='none'", "drop_path=0.0", "mixup=0.0", "cutmix=0.0"],
}  # fmt: skip


SELF = {
    "recipe": "dinov2", "data": "digits", "batch_size": 8, "steps": 2, "fsdp": True, "precision": "bf16",
    "set": ["embed_dim=24", "depth=2", "num_heads=1", "patch_size=8"],
    "option": ["prototypes=40", "hidden=16", "bottleneck=8", "local_crops=1", "local_size=16"],
}  # fmt: skip


def recipe_and_views(rank: int, world: int):
    from pyvit.data import load_data
    from pyvit.train.engine import resolve_config
    from pyvit.train.recipe import load_recipe

    config = resolve_config(Config(**{**SETTINGS, "checkpointing": False}, steps=1))
    torch.manual_seed(0)
    recipe = load_recipe("supervised")(config, load_data("digits")).train()
    torch.nn.init.normal_(recipe.model.head.weight, std=0.1)  # zero weights give no gradients
    return recipe, recipe.views(recipe.data.train.fetch(range(rank, 16, world)), 0, 1)


def is_gathered(block) -> bool:
    return not hasattr(block.attn.qkv.weight, "full_tensor")


def few_blocks_are_gathered_at_once(rank: int, world: int) -> None:
    """Forward and backward: the block that runs, the next one, and one that is not freed yet."""
    from pyvit.train.sharding import shard, stacks_of, whole

    plain, views = recipe_and_views(rank, world)
    with torch.autocast("cpu", torch.bfloat16):
        plain(views)["loss"].backward()
    for p in plain.parameters():
        dist.all_reduce(p.grad)
        p.grad /= world
    recipe = recipe_and_views(rank, world)[0]
    model = shard(recipe, torch.device("cpu"), "bf16")
    (blocks,) = stacks_of(recipe)
    counts: dict[str, list[int]] = {"forward": [], "backward": []}

    def note(kind: str, block) -> None:
        counts[kind].append(sum(map(is_gathered, blocks)))
        assert block.attn.qkv.weight.dtype == torch.bfloat16
        assert recipe.model.head.weight.dtype == torch.float32

    def in_backward(block, attn, args, out) -> None:
        out.register_hook(lambda gradient: note("backward", block))

    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda *_, block=block: note("forward", block))
        block.attn.register_forward_hook(functools.partial(in_backward, block))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(views)["loss"]
        loss.backward()
        assert not any(map(is_gathered, blocks))
    assert all(len(found) == 2 * DEPTH for found in counts.values()), counts
    assert max(counts["forward"]) <= 2, counts
    assert max(counts["backward"]) <= 3, counts
    for (name, p), want in zip(recipe.named_parameters(), plain.parameters(), strict=True):
        got, want = p.grad.full_tensor() / 2, want.grad
        assert got.dtype == torch.float32
        off = float((got - want).norm() / (want.norm() + 1e-3 * want.numel() ** 0.5))
        assert off < 0.05, (name, off)  # bfloat16 has 8 bits
    with whole(recipe):
        assert all(map(is_gathered, blocks))
        recipe.model(views["images"])
        assert all(map(is_gathered, blocks))  # no rank waits for another
    assert not any(map(is_gathered, blocks))


def worker(folder: str) -> None:
    from accelerate.state import AcceleratorState

    from pyvit.train.engine import Run

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    few_blocks_are_gathered_at_once(dist.get_rank(), dist.get_world_size())
    for steps in (2, 4):
        run = Run(Config(**SETTINGS, steps=steps, fsdp=True, out=f"{folder}/two"))
        run.evaluate()  # before any step: blocks run that are not the root of the sharded modules
        run.run()
        run.close()
    AcceleratorState._reset_state()  # for another precision
    run = Run(Config(**SELF, out=f"{folder}/self"))  # packed crops, and a teacher whose blocks have no gradients
    batches = run.batches()
    for step in range(2):
        assert run.step(step, batches)["grad_norm"] > 0
    run.evaluate()
    run.close()
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """With LAMB, averaged weights and checkpointed blocks, resumed after two steps for two more."""
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
    for steps in (2, 4):
        train(Config(**SETTINGS, steps=steps, out=str(tmp_path / "one")))
    said = [p.communicate(timeout=600)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(said)
    assert "extending" in said[0]
    one, two = (load_file(str(tmp_path / name / "model.safetensors")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, want in one.items():
        if key.endswith("qkv.bias"):  # a bias of keys moves no softmax: its gradient is rounding
            for state in (one, two):
                state[key].chunk(3)[1].zero_()
        torch.testing.assert_close(two[key], want, rtol=1e-3, atol=3e-5, msg=lambda m, key=key: f"{key}: {m}")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert abs(results[0]["accuracy"] - results[1]["accuracy"]) < 1


if __name__ == "__main__":
    worker(sys.argv[1])
