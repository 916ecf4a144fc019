"""Batches read ahead by worker processes, in the order that was asked for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyvit.data.crops import Crop
from pyvit.data.sets import Batch, Images

#: Fewer images than this are read faster here than worker processes start.
_FEW = 512


class _Drawn(Dataset[Batch]):
    """Batches of training views, asked for by (step, indices)."""

    def __init__(self, images: Images, crops: Mapping[str, Crop], seed: int) -> None:
        self.images, self.crops, self.seed = images, crops, seed

    def __getitems__(self, pick: tuple[int, Sequence[int]]) -> Batch:
        step, indices = pick
        return self.images.draw(indices, self.crops, self.seed, step)


class _Fetched(Dataset[Batch]):
    """Batches of whole images, asked for by indices."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.images.fetch(indices)


def drawn(
    images: Images, crops: Mapping[str, Crop], picks: Iterable[tuple[int, Sequence[int]]], seed: int, workers: int
) -> Iterator[Batch]:
    """Training batches of ``picks``, (step, indices) each: see :meth:`Images.draw`."""
    yield from _read(images, _Drawn(images, crops, seed), workers, batch_sampler=picks, collate_fn=_whole)


def streamed(images: Images, batches: IterableDataset[Batch], workers: int) -> Iterator[Batch]:
    """Training batches of a stream, which one worker at most reads in order."""
    yield from _read(images, batches, min(workers, 1), batch_size=None)


def fetched(images: Images, indices: Sequence[int], batch: int, workers: int | None = None) -> Iterator[Batch]:
    """The images at ``indices`` in order, whole: see :meth:`Images.fetch`. ``workers``: None for as many as are of use
    here."""
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    if workers is None:
        workers = min(8, max((os.cpu_count() or 1) - 1, 1)) if images.decodes and len(indices) >= _FEW else 0
    yield from _read(images, _Fetched(images), min(workers, len(parts)), batch_sampler=parts, collate_fn=_whole)


def _read(images: Images, source: Any, workers: int, **options: Any) -> Iterator[Batch]:
    """What a loader brings, after what its workers could not read is known to ``images`` here."""
    ahead = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
    own = torch.Generator()  # a loader draws a seed for its workers: not from the random numbers of the run
    for batch in DataLoader(source, **options, **ahead, generator=own, worker_init_fn=_ignore_signals):
        images.note(batch.pop("problems", {}))
        yield batch


def _ignore_signals(_: int) -> None:
    """Terminals and schedulers signal all processes of a run, and the one that trains still needs those that read.

    It ends them when it is done, and they end by themselves when it is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _whole(batch: Any) -> Any:
    """Data sets here return whole batches."""
    return batch
