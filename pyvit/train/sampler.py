"""The images of each process and step, and the random seed of each step. Both depend only on the run's seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def step_seed(seed: int, step: int, rank: int, part: int = 0) -> int:
    """A seed for each step, process and micro-batch, so that a resumed run draws the same random numbers."""
    digest = hashlib.blake2b(f"{seed} {step} {rank} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BatchSampler(torch.utils.data.Sampler[list[int]]):
    """The image indices of this process for each micro-batch from step ``start`` on. Each epoch has a new order, which
    depends only on the seed.

    A batch is split by micro-batch first, then by process. Images that do not fill a batch are left out of the epoch.
    With ``repeats`` above 1, each image is that many times in a row, on different processes, and an epoch has a share
    of 1 / repeats of the images (Touvron et al., 2021, "repeated augmentation").
    """

    def __init__(
        self,
        n: int,
        batch: int,
        start: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        repeats: int = 1,
    ) -> None:
        if not 0 < batch <= n or batch % (world * accumulate):
            raise ValueError(
                f"BatchSampler: batch must be at most {n} and a multiple of world x accumulate, "
                f"{world} x {accumulate}, got {batch}"
            )
        self.n, self.batch, self.seed = n, batch, seed
        self.start, self.steps = start, steps
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.repeats = repeats

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        return (indices for indices, _ in self.picks())

    def picks(self) -> Iterator[tuple[list[int], list[int]]]:
        """The indices of each micro-batch, and for each the number of its repetition, from 0 on."""
        epoch, order = -1, torch.empty(0)
        per_epoch = self.n // self.batch
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(step_seed(self.seed, epoch, 0))
                order = torch.randperm(self.n, generator=generator, device="cpu")
            at = step % per_epoch * self.batch
            for micro in torch.arange(at, at + self.batch, device="cpu").chunk(self.accumulate):
                mine = micro.chunk(self.world)[self.rank] if self.repeats == 1 else micro[self.rank :: self.world]
                yield order[mine // self.repeats].tolist(), (mine % self.repeats).tolist()
