"""Hugging Face data sets read as they arrive, never whole: shards go to ranks, and a resumed run sees what the unbroken one saw."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from pyvit.data.files import DecodedImages, columns_of, decode_image, open_hugging_face
from pyvit.data.sets import Batch, Data, Images

#: Examples that are shuffled among each other, held out where there is no split for it, and read for nearest neighbours.
BUFFER, HELD, SAMPLE = 1024, 512, 2048


class Stream(Images):
    """The examples of an iterable table, in an order that is a function of the seed alone.

    Each epoch every rank takes its own shards, or every world-th example where shards do not divide evenly. An image that cannot be read is
    reported by its place in the stream, and another of its batch stands in for it.

    Args:
        table: a ``datasets.IterableDataset`` whose images are not decoded; image, label, caption: names of its columns, or None.
        decode: what makes uint8 (3, S, S) of an image file. count: examples per epoch, None when the source does not say.
    """

    def __init__(
        self, table: Any, decode: Callable[[Any], Tensor], image: str, label: str | None, caption: str | None, count: int | None
    ) -> None:
        self.table, self.decode, self.count = table, decode, count
        self.image, self.label, self.caption = image, label, caption
        self._problems: list[str] = []
        self._sample: Images | None = None

    def __len__(self) -> int:
        if self.count is None:
            raise ValueError("data: the stream does not say how many examples it has; give --steps in place of --epochs")
        return self.count

    @property
    def problems(self) -> list[str]:
        return self._problems

    def sample(self) -> Images:
        """The first examples, kept undecoded in memory."""
        if self._sample is None:
            self._sample = self.hold(self.table.take(SAMPLE))
        return self._sample

    def fetch(self, indices: Sequence[int]) -> Batch:
        raise TypeError("a stream has no order to fetch from; see Stream.sample and Stream.batches")

    def hold(self, rows: Any) -> DecodedImages:
        """``rows`` of the same columns as images that can be fetched."""
        rows = list(rows)
        labels = [int(row[self.label]) for row in rows] if self.label else None
        captions = [str(row[self.caption]) for row in rows] if self.caption else None
        return DecodedImages([row[self.image] for row in rows], self.decode, labels, captions)

    def batches(
        self, batch: int, start: int, steps: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> IterableDataset[Batch]:
        """The micro-batches of ``rank`` for steps ``start`` to ``steps``. Examples of earlier steps are read and passed over, undecoded."""
        size = batch // world // accumulate
        return _Batches(self, size, start * accumulate * size, (steps - start) * accumulate, seed, rank, world)

    def rows(self, seed: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """The rows of ``rank``, epoch after epoch without end."""
        from datasets.distributed import split_dataset_by_node

        for epoch in itertools.count():
            shuffled = self.table.shuffle(seed=seed + epoch, buffer_size=BUFFER)
            empty = True
            for row in split_dataset_by_node(shuffled, rank, world):
                empty = False
                yield row
            if empty:
                raise ValueError(f"data: the stream has no example for process {rank} of {world}")

    def read(self, rows: list[dict[str, Any]], first: int) -> Batch:
        """Decode ``rows``, of which the first is number ``first`` of this rank's stream."""
        images: list[Tensor | None] = []
        for number, row in enumerate(rows, first):
            try:
                images.append(self.decode(row[self.image]))
            except (OSError, ValueError, SyntaxError, EOFError, TypeError) as error:
                where = row.get("__key__") or (row[self.image] or {}).get("path") or f"example {number}"
                self._problems.append(f"{where}: {type(error).__name__}: {error}")
                warnings.warn(f"skipped {self._problems[-1]}", stacklevel=2)
                images.append(None)
        good = [i for i, image in enumerate(images) if image is not None]
        if not good:
            raise ValueError(f"data: none of {len(rows)} examples in a row can be read, the last: {self._problems[-1]}")
        at = [i if images[i] is not None else good[i % len(good)] for i in range(len(rows))]
        batch: Batch = {"image": torch.stack([images[i] for i in at])}
        if self.label:
            batch["label"] = torch.tensor([int(rows[i][self.label]) for i in at])
        if self.caption:
            batch["caption"] = [str(rows[i][self.caption]) for i in at]
        return batch


class _Batches(IterableDataset[Batch]):
    """See :meth:`Stream.batches`; picklable, so that a worker process can read ahead."""

    def __init__(self, stream: Stream, size: int, skip: int, count: int, seed: int, rank: int, world: int) -> None:
        self.stream, self.size, self.skip, self.count, self.seed, self.ranks = stream, size, skip, count, seed, (rank, world)

    def __iter__(self) -> Iterator[Batch]:
        rows = itertools.islice(self.stream.rows(self.seed, *self.ranks), self.skip, None)
        for number in range(self.count):
            yield self.stream.read(list(itertools.islice(rows, self.size)), self.skip + number * self.size)


class _Decode:
    """An undecoded ``datasets.Image``, {"bytes": ..., "path": ...}, to pixels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, source: Any) -> Tensor:
        from PIL import Image

        content = source["bytes"]
        return decode_image(Image.open(io.BytesIO(content)) if content is not None else source["path"], self.size)


def hugging_face_stream(spec: str, size: int) -> Data:
    """ "NAME[:SPLIT]" as in :func:`pyvit.data.files.hugging_face`, streamed. The first 512 examples are held out where no other split is.

    Labels are used where the data set names its classes (``ClassLabel``).
    """
    import datasets

    name, _, split = spec.partition(":")
    loaded = open_hugging_face(name, streaming=True)
    if (split or "train") not in loaded:
        raise ValueError(f"data: hf-stream:{name} must have the split {split or 'train'!r}, got {', '.join(loaded)}")
    train = loaded[split or "train"]
    image, label, caption = columns_of(spec, train.column_names or list(next(iter(train))))
    features = train.features or {}
    names = getattr(features.get(label), "names", None) if label else None
    if image in features:
        train = train.cast_column(image, datasets.Image(decode=False))
    known = (train.info.splits or {}).get(split or "train")
    count = getattr(known, "num_examples", None) or None
    make = lambda table, n: Stream(table, _Decode(size), image, label if names else None, caption, n)  # noqa: E731
    other = next((s for s in ("validation", "test", "val") if s in loaded and s != split), None)
    if other is not None:
        held = loaded[other].cast_column(image, datasets.Image(decode=False)) if image in features else loaded[other]
        stream = make(train, count)
    else:
        held, stream = train, make(train.skip(HELD), count - HELD if count else None)
    test = stream.hold(held.take(HELD))
    return Data(Path(name).name, stream, test, (size, size), names)
