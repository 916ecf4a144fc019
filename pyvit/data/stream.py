"""Streamed Hugging Face data sets: shards are divided over ranks, and a resumed run reads the same examples."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pyvit.data.crops import Crop, generator
from pyvit.data.dataset import Batch, Data, Images
from pyvit.data.decode import CENTRE, ImageDecoder
from pyvit.data.files import TOLERATED, TOLERATED_FILES, DecodedImages, Decoder, stack_views, warn_skipped
from pyvit.data.hub import caption_texts, choose_splits, columns_of, open_hugging_face, split_spec, undecoded

#: Examples in the shuffle buffer, in the held-out set if there is no split for it, and in the sample for k-NN.
BUFFER, HELD, SAMPLE = 1024, 512, 2048


class Stream(Images):
    """The examples of an iterable table, in an order that depends only on the seed.

    In each epoch a rank reads its own shards, or every world-th example if the shards cannot be divided evenly. An
    unreadable image is reported by its position in the stream and replaced by another image of its batch; too many of
    them raise ValueError.

    Args:
        table: a ``datasets.IterableDataset`` with undecoded images.
        decoder: decodes an image file.
        image, label, caption: names of the columns, or None.
        count: examples per epoch, or None if unknown.
        classes: number of classes.
        name: of the source, for messages.
    """

    streamed = True

    def __init__(
        self,
        table: Any,
        decoder: Decoder,
        image: str,
        label: str | None,
        caption: str | None,
        count: int | None,
        classes: int = 0,
        name: str = "the stream",
    ) -> None:
        self.table = table
        self.decoder = decoder
        self.count = count
        self.classes = classes
        self.name = name
        self.image, self.label, self.caption = image, label, caption
        self.captions = [] if caption else None
        self._bad: dict[int, str] = {}
        self._read = 0
        self._sample: Images | None = None

    def __len__(self) -> int:
        if self.count is None:
            raise ValueError("data: the stream does not say how many examples it has; give --steps instead of --epochs")
        return self.count

    def counted(self) -> str:
        return "streamed" if self.count is None else str(self.count)

    @property
    def bad(self) -> dict[int, str]:
        return self._bad

    def note(self, problems: Mapping[int, str]) -> None:
        for at, problem in problems.items():
            if at not in self._bad:
                self._bad[at] = problem
                warn_skipped(problem, len(self._bad))

    def sample(self) -> Images:
        """The first examples, kept undecoded in memory."""
        if self._sample is None:
            self._sample = self.hold(self.table.take(SAMPLE))
        return self._sample

    def fetch(self, indices: Sequence[int]) -> Batch:
        raise TypeError("a stream has no order to fetch from; see Stream.sample and Stream.batches")

    def hold(self, rows: Any) -> DecodedImages:
        """``rows`` as images that can be fetched by index."""
        rows = [row for row in rows if not self.caption or caption_texts(row[self.caption])]
        labels = [self._label(row) for row in rows] if self.label else None
        captions = [self._caption(row) for row in rows] if self.caption else None
        return DecodedImages([row[self.image] for row in rows], self.decoder, labels, captions)

    def _label(self, row: dict[str, Any]) -> int:
        value = row[self.label]
        if not isinstance(value, int) or not 0 <= value < self.classes:
            raise ValueError(f"data: labels of {self.name} must be in 0..{self.classes - 1}, got {value!r}")
        return value

    def _caption(self, row: dict[str, Any], draw: random.Random | None = None) -> str:
        """The example's caption. Of several captions a random one if ``draw`` is given, else the first."""
        texts = caption_texts(row[self.caption])
        return texts[0] if draw is None else draw.choice(texts)

    def batches(
        self,
        batch: int,
        start: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        crops: Mapping[str, Crop] | None = None,
    ) -> IterableDataset[Batch]:
        """The micro-batches of ``rank`` for steps ``start`` to ``steps``. Examples of earlier steps are skipped without
        decoding."""
        size = batch // world // accumulate
        return _Batches(
            self, size, start * accumulate * size, (steps - start) * accumulate, seed, rank, world, crops or {}
        )

    def rows(self, seed: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """The rows of ``rank``, over endless epochs."""
        from datasets.distributed import split_dataset_by_node

        for epoch in itertools.count():
            shuffled = self.table.shuffle(seed=seed + epoch, buffer_size=BUFFER)
            number = 0
            try:
                for row in split_dataset_by_node(shuffled, rank, world):
                    if self.caption and not caption_texts(row[self.caption]):
                        warnings.warn(f"{self.name}: examples without a caption are left out", stacklevel=2)
                        continue
                    number += 1
                    yield row
            except Exception as error:  # readers raise many kinds of exceptions for damaged shards and lost connections
                raise ValueError(
                    f"data: {self.name} failed after {number} examples: {type(error).__name__}: {error}"
                ) from error
            if not number:
                raise ValueError(f"data: {self.name} has no example for process {rank} of {world}")

    def read(
        self,
        rows: list[dict[str, Any]],
        first: int,
        crops: Mapping[str, Crop] | None = None,
        seed: int = 0,
        rank: int = 0,
    ) -> Batch:
        """Decode ``rows``; the first has number ``first`` in this rank's stream."""
        found: list[dict[str, list[Tensor]] | None] = []
        captions: list[str] = []
        problems: dict[int, str] = {}
        for number, row in enumerate(rows, first):
            draw = generator(seed, rank, number)
            captions.append(self._caption(row, draw) if self.caption else "")
            try:
                views = self.decoder.views(row[self.image], crops, draw) if crops else None
                found.append(views or {"image": [self.decoder.whole(row[self.image])]})
            except ImportError:
                raise
            except Exception as error:
                item = row[self.image]
                where = (
                    row.get("__key__")
                    or (item.get("path") if isinstance(item, Mapping) else None)
                    or f"example {number}"
                )
                problems[number] = f"{where}: {type(error).__name__}: {error}"
                found.append(None)
        self._read += len(rows)
        if get_worker_info() is None:
            self.note(problems)
        else:
            self._bad.update(problems)  # the main process reports it
        good = [i for i, views in enumerate(found) if views is not None]
        if not good:
            raise ValueError(
                f"data: none of {len(rows)} examples in a row can be read, the last: {[*self._bad.values()][-1]}"
            )
        if len(self._bad) > max(TOLERATED * self._read, TOLERATED_FILES):
            last = [*self._bad.values()][-1]
            raise ValueError(
                f"data: {len(self._bad)} of the {self._read} examples read cannot be decoded, the last: {last}"
            )
        at = [i if found[i] is not None else good[i % len(good)] for i in range(len(rows))]
        batch: Batch = {**stack_views([found[i] for i in at], crops or {}, self.decoder), "problems": problems}
        if self.label:
            batch["label"] = torch.tensor([self._label(rows[i]) for i in at], device="cpu")
        if self.caption:
            batch["caption"] = [captions[i] for i in at]
        return batch


class _Batches(IterableDataset[Batch]):
    """See :meth:`Stream.batches`. Picklable, so that a worker process can read ahead."""

    def __init__(
        self,
        stream: Stream,
        size: int,
        skip: int,
        count: int,
        seed: int,
        rank: int,
        world: int,
        crops: Mapping[str, Crop],
    ) -> None:
        self.stream = stream
        self.size = size
        self.skip = skip
        self.count = count
        self.seed = seed
        self.ranks, self.crops = (rank, world), crops

    def __iter__(self) -> Iterator[Batch]:
        rows = itertools.islice(self.stream.rows(self.seed, *self.ranks), self.skip, None)
        for number in range(self.count):
            part = list(itertools.islice(rows, self.size))
            yield self.stream.read(part, self.skip + number * self.size, self.crops, self.seed, self.ranks[0])


def hugging_face_stream(spec: str, size: int) -> Data:
    """ "NAME[:SPLIT]" as in :func:`pyvit.data.hub.hugging_face`, streamed. If there is no other split, the first 512
    examples are held out.

    Labels are used if the data set names its classes (``ClassLabel``).
    """
    name, split = split_spec(spec)
    loaded, notes = open_hugging_face(name, streaming=True)
    if (split or "train") not in loaded:
        raise ValueError(f"data: hf-stream:{name} must have the split {split or 'train'!r}, got {', '.join(loaded)}")
    train, other = choose_splits(loaded, name, split, notes)
    image, label, caption = columns_of(spec, train.column_names or list(next(iter(train))))
    names = getattr((train.features or {}).get(label), "names", None) if label else None
    if label and not names:
        notes.append(f"labels of the column {label} are not used: the stream does not name its classes")
    known = (train.info.splits or {}).get(split or "train")
    count = getattr(known, "num_examples", None) or None
    decoder = ImageDecoder(size, CENTRE if caption is None else 1.0)

    def stream(table: Any, count: int | None) -> Stream:
        kept = label if names else None
        return Stream(
            undecoded(table, image), decoder, image, kept, caption, count, len(names or ()), f"hf-stream:{name}"
        )

    if other is not None:
        train, test = stream(train, count), stream(other, None).hold(undecoded(other, image).take(HELD))
    else:
        notes[0] = f"trained on the split {split or 'train'}, the first {HELD} examples are held out"
        whole = stream(train, count)
        test = whole.hold(whole.table.take(HELD))
        if len(test) < HELD or (count is not None and count <= HELD):
            raise ValueError(
                f"data: hf-stream:{name} must have more than the {HELD} examples that are held out; read it as "
                f"hf:{name}"
            )
        train = stream(train.skip(HELD), count - HELD if count else None)
    notes.append("not searched for repeated images: a stream is not known in advance")
    return Data(Path(name).name, train, test, (size, size), names, flip=caption is None, notes=notes)
