"""Decoding and the model, side by side."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyvit.embed.encoder import Encoder
from pyvit.embed.source import Images, Item

T = TypeVar("T")
R = TypeVar("R")


class Batch(NamedTuple):
    """Images of a part, and whether they are its last."""

    part: int
    start: int  # position in the source
    items: list[Item]
    last: bool


class Decoded(NamedTuple):
    """The readable images of a batch, their places in it, and why the others are not."""

    batch: Batch
    images: Tensor | list[Tensor]
    places: list[int]
    unreadable: list[tuple[str, str]]


@dataclass
class Times:
    """Seconds that threads spent decoding, in the model, and waiting for a decoded batch."""

    decoding: float = 0.0
    model: float = 0.0
    waiting: float = 0.0
    images: int = 0
    began: float = field(default_factory=time.perf_counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **seconds: float) -> None:
        with self.lock:
            for name, value in seconds.items():
                setattr(self, name, getattr(self, name) + value)

    def share(self) -> float:
        """Decoding's share: of the threads' time where they do both, else the time that the model waited for it."""
        if self.waiting or not self.decoding:
            return min(self.waiting / max(time.perf_counter() - self.began, 1e-9), 1.0)
        return self.decoding / (self.decoding + self.model)

    def rate(self) -> float:
        return self.images / max(time.perf_counter() - self.began, 1e-9)


def batches(images: Images, numbers: Iterable[int], per: int, size: int) -> Iterator[Batch]:
    for number in numbers:
        start, stop = number * per, min((number + 1) * per, len(images))
        items = images.items(start, stop)
        for at in range(start, stop, size):
            yield Batch(number, at, list(itertools.islice(items, min(size, stop - at))), at + size >= stop)


def vectors(
    encoder: Encoder, todo: Iterable[Batch], workers: int, times: Times
) -> Iterator[tuple[Decoded, np.ndarray]]:
    """Vectors of each batch, in order.

    On a CPU every thread decodes a batch and then runs the model on it, with one thread per operator: all cores are
    busy without waiting for each other. On a GPU the threads decode into pinned memory, and the model runs in the
    calling thread; the vectors of a batch are copied back while the next one is computed.
    """
    pinned = encoder.device.type == "cuda"

    def decoded(batch: Batch) -> Decoded:
        began = time.perf_counter()
        found = _decode(encoder, batch, pinned)
        times.add(decoding=time.perf_counter() - began)
        return found

    def both(batch: Batch) -> tuple[Decoded, np.ndarray]:
        found = decoded(batch)
        began = time.perf_counter()
        result = encoder(found.images).numpy() if found.places else np.zeros((0, encoder.width), np.float32)
        times.add(model=time.perf_counter() - began)
        return found, result

    if encoder.device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from ahead(both, todo, workers)
        finally:
            torch.set_num_threads(threads)
        return
    last: tuple[Decoded, Tensor] | None = None
    for found in ahead(decoded, todo, workers, lambda seconds: times.add(waiting=seconds)):
        result = encoder(found.images) if found.places else torch.zeros(0, encoder.width)
        if last is not None:
            yield last[0], last[1].cpu().numpy()
        last = found, result
    if last is not None:
        yield last[0], last[1].cpu().numpy()


def ahead(
    compute: Callable[[T], R],
    tasks: Iterable[T],
    workers: int,
    waited: Callable[[float], object] = lambda seconds: None,
) -> Iterator[R]:
    """``compute`` of each of ``tasks``, in order, by threads that are up to two tasks each ahead. ``waited`` gets the
    seconds that the caller waited for a result."""
    pool = ThreadPoolExecutor(workers)
    running: deque[Future[R]] = deque()

    def first() -> R:
        began = time.perf_counter()
        result = running.popleft().result()
        waited(time.perf_counter() - began)
        return result

    try:
        for task in tasks:
            running.append(pool.submit(compute, task))
            if len(running) > 2 * workers:
                yield first()
        while running:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(encoder: Encoder, batch: Batch, pinned: bool) -> Decoded:
    images: list[Tensor] = []
    places: list[int] = []
    unreadable: list[tuple[str, str]] = []
    for place, item in enumerate(batch.items):
        try:
            images.append(encoder.decode(item.source()))
            places.append(place)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # decoders raise many kinds of exceptions for damaged files
            unreadable.append((item.name, f"{type(error).__name__}: {error}"))
    if encoder.settings.native:
        return Decoded(batch, [x.pin_memory() for x in images] if pinned else images, places, unreadable)
    size = encoder.settings.size
    whole = torch.empty(len(images), 3, size, size, dtype=torch.uint8, pin_memory=pinned)
    return Decoded(batch, torch.stack(images, out=whole) if images else whole, places, unreadable)
