"""Data loaders with worker processes, in a fixed order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyvit.data.crops import Crop
from pyvit.data.dataset import Batch, Images

#: Fewer images than this are read without workers, which take time to start.
_FEW = 512

#: More workers than this do not help one process: it cannot take over their batches faster.
_MOST = 16


def default_workers(images: Images, count: int) -> int:
    """Worker processes for reading ``count`` images: none for images in memory and for few images.

    The cores of the machine are divided by the processes on it. With a GPU, all but one of a process's share load
    images; without one, half of it, because training takes the other half.
    """
    if not (images.decodes or images.streamed) or count < _FEW:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    mine = cores // processes
    return min(max(mine - 1 if torch.cuda.is_available() else mine // 2, 1), _MOST)


class _TrainingData(Dataset[Batch]):
    """Batches of training crops, indexed by (step, indices, repetitions)."""

    def __init__(self, images: Images, crops: Mapping[str, Crop], seed: int) -> None:
        self.images, self.crops, self.seed = images, crops, seed

    def __getitems__(self, pick: tuple[int, Sequence[int], Sequence[int]]) -> Batch:
        step, indices, repetitions = pick
        return self.images.draw(indices, self.crops, self.seed, step, repetitions)


class _EvaluationData(Dataset[Batch]):
    """Batches of whole images, indexed by indices."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.images.fetch(indices)


def training_batches(
    images: Images,
    crops: Mapping[str, Crop],
    picks: Iterable[tuple[int, Sequence[int], Sequence[int]]],
    seed: int,
    workers: int,
) -> Iterator[Batch]:
    """Training batches for ``picks``, an iterable of (step, indices, repetitions): see :meth:`Images.draw`."""
    yield from _read(images, _TrainingData(images, crops, seed), workers, batch_sampler=picks, collate_fn=_whole)


def stream_batches(images: Images, batches: IterableDataset[Batch], workers: int) -> Iterator[Batch]:
    """Training batches of a stream. At most one worker reads it, to keep the order."""
    yield from _read(images, batches, min(workers, 1), batch_size=None)


def evaluation_batches(
    images: Images, indices: Sequence[int], batch: int, workers: int | None = None
) -> Iterator[Batch]:
    """The whole images at ``indices``, in order: see :meth:`Images.fetch`. ``workers`` None chooses their number."""
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    if workers is None:
        workers = default_workers(images, len(indices))
    yield from _read(images, _EvaluationData(images), min(workers, len(parts)), batch_sampler=parts, collate_fn=_whole)


def _read(images: Images, source: Any, workers: int, **options: Any) -> Iterator[Batch]:
    """Batches of a data loader, in pinned memory if there is a GPU. Unreadable files that its workers found are
    recorded in ``images``."""
    ahead = {"num_workers": workers, "prefetch_factor": 4 if workers else None, "pin_memory": torch.cuda.is_available()}
    own = torch.Generator()  # the loader draws a seed for its workers, which must not change the run's random numbers
    for batch in DataLoader(source, **options, **ahead, generator=own, worker_init_fn=_ignore_signals):
        images.note(batch.pop("problems", {}))
        yield batch


def _ignore_signals(_: int) -> None:
    """Ignore SIGINT and SIGTERM in workers: terminals and schedulers send them to all processes of a run, but the
    training process still needs its workers.

    The training process ends them, and they end by themselves when it is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _whole(batch: Any) -> Any:
    """The identity: data sets return whole batches."""
    return batch
