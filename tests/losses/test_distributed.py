"""Losses of a batch that is divided over ranks equal those of a single process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pyvit.ops import info_nce, koleo, loss_tiles, nt_xent, sigmoid_contrastive, sinkhorn_knopp

N, D = 36, 8


def losses(x, group):
    return {
        "info_nce": info_nce(x["a"], x["b"], x["scale"], group=group),
        "nt_xent": nt_xent(x["a"], x["b"], x["scale"] / 10, group=group),
        "sigmoid_contrastive": sigmoid_contrastive(x["a"], x["b"], x["scale"], x["bias"], group=group),
        "koleo": koleo(x["a"], group=group),
    }


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (F.normalize(torch.randn(N, D, generator=generator), dim=1) for _ in range(2))
    return {"a": a, "b": b, "scale": torch.tensor(4.0), "bias": torch.tensor(-2.0)}


def grads(loss, x):
    return torch.autograd.grad(loss, list(x.values()), allow_unused=True, retain_graph=True)


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    loss_tiles.TILE = 5
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    group = dist.group.WORLD
    own = slice(rank * N // world, (rank + 1) * N // world)
    whole = tensors()
    x = {k: (v[own] if v.dim() else v).clone().requires_grad_() for k, v in whole.items()}
    everything = {k: v.clone().requires_grad_() for k, v in whole.items()}
    sharded, single = losses(x, group), losses(everything, None)
    for name, loss in sharded.items():
        torch.testing.assert_close(loss, single[name], msg=lambda m, name=name: f"{name}: {m}")
        for key, got, want in zip(x, grads(loss, x), grads(single[name], everything), strict=True):
            if want is None:
                assert got is None
                continue
            if want.dim():  # the mean over ranks, as DDP takes it, is the gradient of one big batch
                got, want = got / world, want[own]
            else:
                dist.all_reduce(got)
                got = got / world
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=1e-6, msg=lambda m, name=name, key=key: f"{name} {key}: {m}"
            )
    scores = torch.randn(N, 7, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(sinkhorn_knopp(scores[own], 0.2, group=group), sinkhorn_knopp(scores, 0.2)[own])
    with pytest.raises(ValueError, match="a must be of the same number of rows on every rank"):
        info_nce(x["a"][: 3 + rank], x["b"][: 3 + rank], 1.0, group=group)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one(world: int, tmp_path: Path) -> None:
    """Runs this file as a script, once per rank."""
    commands = [[sys.executable, __file__, str(rank), str(world), str(tmp_path)] for rank in range(world)]
    ranks = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
