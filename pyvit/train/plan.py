"""Which images a process sees in which step, and the seed of what is drawn there: functions of the run's seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """One seed for each step, process and micro-batch, so that a resumed run draws what the unbroken one drew."""
    digest = hashlib.blake2b(f"{seed} {step} {rank} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Plan(torch.utils.data.Sampler[list[int]]):
    """Which images this process sees in each micro-batch from step ``start`` on: a fresh order every epoch, a function
    of the seed alone.

    A step's batch is cut first by micro-batch, then by process. The images that do not fill a batch are left out of
    their epoch.
    """

    def __init__(
        self, n: int, batch: int, start: int, steps: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> None:
        if not 0 < batch <= n or batch % (world * accumulate):
            raise ValueError(
                f"Plan: batch must be at most {n} and a multiple of world x accumulate, {world} x {accumulate}, "
                f"got {batch}"
            )
        self.n, self.batch, self.start, self.steps, self.seed = n, batch, start, steps, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        per_epoch = self.n // self.batch
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(
                    self.n, generator=torch.Generator().manual_seed(step_seed(self.seed, epoch, 0)), device="cpu"
                )
            at = step % per_epoch * self.batch
            for micro in order[at : at + self.batch].chunk(self.accumulate):
                yield micro.chunk(self.world)[self.rank].tolist()
