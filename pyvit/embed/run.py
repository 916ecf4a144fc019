"""Embedding of folders and archives: decoding and the model side by side, a part of the output at a time."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from pyvit.embed import shards
from pyvit.embed.encoder import Encoder, Settings, load_encoder
from pyvit.embed.pipeline import Decoded, Times, batches, vectors
from pyvit.embed.source import Images, open_images
from pyvit.train.run_folder import Lock
from pyvit.version import __version__

R = TypeVar("R")


@dataclass(frozen=True)
class Summary:
    """What :func:`embed_images` did: rows in ``out`` altogether, unreadable images with reasons, images of this call,
    images per second, and one line about what limits."""

    out: Path
    rows: int
    unreadable: list[tuple[str, str]]
    embedded: int
    rate: float
    limits: str


def embed_images(
    source: str | Path,
    out: str | Path,
    settings: Settings | Encoder | str,
    *,
    form: str = "parquet",
    stored: str | None = None,
    per_part: int = 4096,
    batch: int | None = None,
    workers: int | None = None,
    labels: bool = False,
    device: Any = None,
    say: Callable[[str], object] = lambda line: None,
) -> Summary:
    """Embed all images of ``source`` into the folder ``out``. Continues an interrupted call with the same arguments.

    Args:
        source: see :func:`pyvit.embed.open_images`.
        settings: of the encoder, or the path of a run or of weights (see :func:`pyvit.embed.load_encoder`), or an
            encoder.
        form: "parquet", "npy" or "safetensors".
        stored: "float16" or "float32"; None: float16 if the model computes in 16 bits.
        per_part: images of a file of ``out``. After a crash at most one part of each process is computed again.
        batch: images of a forward pass; None: 16 on CPUs, 128 on GPUs.
        workers: threads; None: one for each core of this process.
        labels: also store classes.
        say: gets lines about inputs and weights.

    Under ``torchrun`` the processes divide the parts; all return the same summary but for their own images. The vectors
    do not depend on ``workers`` and on the number of processes.

    Raises ValueError if ``out`` was made from other images or by another model, if no image can be read, or if the
    model's output is not finite.
    """
    if isinstance(settings, str):
        settings = Settings(settings)
    if form not in shards.FORMATS:
        raise ValueError(f"embed: format must be one of {', '.join(shards.FORMATS)}, got {form!r}")
    if stored not in (None, *shards.STORED):
        raise ValueError(f"embed: stored must be one of {', '.join(shards.STORED)}, got {stored!r}")
    for name, value in (("shard", per_part), ("batch", batch), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"embed: {name} must be at least 1, got {value}")
    if form == "parquet":
        shards._pyarrow("write")
    with _ranks() as (rank, world):
        say = say if rank == 0 else lambda line: None
        images = open_images(source)
        say(f"{len(images)} images in {images.root} ({images.kind})")
        for note in images.notes:
            say(f"  {note}")
        encoder = settings if isinstance(settings, Encoder) else load_encoder(settings, device, say)
        say(encoder.describe())
        manifest = {
            "pyvit": __version__,
            "source": {"kind": images.kind, "path": str(Path(source).expanduser().absolute())},
            "images": len(images),
            "parts": -(-len(images) // per_part),
            "per_part": per_part,
            "format": form,
            "stored": stored or ("float32" if encoder.settings.dtype == "fp32" else "float16"),
            "labels": labels,
            "encoder": encoder.record(),
        }
        out = Path(out).expanduser()
        lock = Lock(out)

        def begin() -> list[int]:
            lock.acquire()
            return shards.prepare(out, manifest, images)

        try:
            missing = _on_first(rank, world, begin)
            if len(missing) < manifest["parts"]:
                say(f"{out} has {manifest['parts'] - len(missing)} of {manifest['parts']} parts: continuing")
            times = _embed(images, out, manifest, encoder, missing[rank::world], batch, workers, rank == 0)
            if world > 1:
                dist.barrier()
            rows, unreadable = _on_first(rank, world, lambda: shards.finish(out, manifest))
        finally:
            lock.release()
    if not rows:
        reason = f"; the first: {': '.join(unreadable[0])}" if unreadable else ""
        raise ValueError(f"embed: none of the {len(images)} images can be read{reason}")
    return Summary(out, rows, unreadable, times.images, times.rate(), limit(times, encoder))


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int]]:
    """Rank and number of processes, which torchrun sets."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    # A process may wait for as long as another takes for its parts.
    dist.init_process_group("gloo", timeout=timedelta(days=365))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _on_first(rank: int, world: int, compute: Callable[[], R]) -> R:
    """``compute`` on rank 0; its result, or its error, on all."""
    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = compute()
        except (ValueError, OSError) as error:
            if world == 1:
                raise
            found[1] = error
    if world > 1:
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _embed(
    images: Images,
    out: Path,
    manifest: dict[str, Any],
    encoder: Encoder,
    numbers: list[int],
    batch: int | None,
    workers: int | None,
    told: bool,
) -> Times:
    """Compute and write the parts ``numbers``."""
    on_cpu = encoder.device.type == "cpu"
    size = batch or (16 if on_cpu else 128)
    per, total = manifest["per_part"], len(images)
    times = Times()
    progress = Progress(sum(min((n + 1) * per, total) - n * per for n in numbers) if told else 0, times)
    part = Part(manifest)
    todo = batches(images, numbers, per, size)
    for done, rows in vectors(encoder, todo, workers or _cores(), times):
        part.add(done, rows)
        times.images += len(done.batch.items)
        if done.batch.last:
            shards.write_part(out, done.batch.part, part.rows(), manifest["format"])
            part = Part(manifest)
        progress.update()
    return times


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


class Part:
    """Collects the rows of a part."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.stored = np.dtype(manifest["stored"])
        self.width = manifest["encoder"]["width"]
        self.part = shards.Part(labels=[] if manifest["labels"] else None)
        self.vectors: list[np.ndarray] = []

    def add(self, done: Decoded, vectors: np.ndarray) -> None:
        items = [done.batch.items[place] for place in done.places]
        with np.errstate(over="ignore"):
            stored = vectors.astype(self.stored)
        if (bad := ~np.isfinite(stored).all(1)).any():
            name = items[int(bad.argmax())].name
            kept = np.isfinite(vectors).all()
            hint = "they exceed float16, store float32" if kept else "the weights are damaged, or dtype needs fp32"
            raise ValueError(f"embed: the vector of {name} is not finite: {hint}")
        self.vectors.append(stored)
        self.part.index += [done.batch.start + place for place in done.places]
        self.part.names += [_name(item.name) for item in items]
        if self.part.labels is not None:
            self.part.labels += [None if label is None else _name(label) for label in (item.label for item in items)]
        self.part.unreadable += [(_name(name), reason) for name, reason in done.unreadable]

    def rows(self) -> shards.Part:
        self.part.vectors = np.concatenate([np.zeros((0, self.width), self.stored), *self.vectors])
        return self.part


def _name(name: str) -> str:
    """``name`` as UTF-8 can write it: bytes of a file name that are not UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Progress:
    """A line on stderr every ten seconds."""

    def __init__(self, total: int, times: Times) -> None:
        self.total, self.times, self.said = total, times, times.began

    def update(self) -> None:
        now, times = time.perf_counter(), self.times
        if not self.total or now - self.said < 10:
            return
        self.said = now
        left = timedelta(seconds=round((self.total - times.images) / max(times.rate(), 1e-9)))
        share = f"waiting for decoding {times.share():.0%}" if times.waiting else f"decoding {times.share():.0%}"
        line = f"{times.images} of {self.total} images, {times.rate():.1f} images/s, {share} of the time, {left} left"
        print(line, file=sys.stderr, flush=True)


def limit(times: Times, encoder: Encoder) -> str:
    """What limits the speed, and what would help."""
    share = times.share()
    if encoder.device.type == "cpu":
        parts = f"decoding took {share:.0%} of the threads' time, the model {1 - share:.0%}"
        if share > 0.5:
            return f"{parts}: decoding limits (more cores, or smaller files)"
        faster = "bf16, " if encoder.settings.dtype == "fp32" else ""
        return f"{parts}: the model limits ({faster}more cores, a GPU, a smaller model or size)"
    if share > 0.2:
        return f"the model waited {share:.0%} of the time: decoding limits (more --workers, more cores, smaller files)"
    return f"the model waited {share:.0%} of the time for decoding: the model limits"
