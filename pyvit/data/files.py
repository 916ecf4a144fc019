"""Images, spectrograms and captions read from disk or from Hugging Face ``datasets``."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyvit.data.audio import BANDS, MEAN, STD, read_wave, spectrogram
from pyvit.data.sets import Batch, Data, Images

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

#: More than this share of unreadable files is a mistake in the data, not an accident.
_TOLERATED = 0.2


class DecodedImages(Images):
    """Items decoded when asked for.

    One that cannot be read is reported once, by name, and the next readable one takes its place, so that a batch keeps its size and a run
    its course.
    """

    def __init__(
        self,
        items: Sequence[Any],
        decode: Callable[[Any], Tensor],
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.items, self.labels, self.captions, self._decode = items, labels, captions, decode
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.items)

    @property
    def problems(self) -> list[str]:
        return list(self._bad.values())

    def _read(self, index: int) -> tuple[int, Tensor]:
        for step in range(len(self)):
            at = (index + step) % len(self)
            if at in self._bad:
                continue
            try:
                return at, self._decode(self.items[at])
            except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow and wave raise for damaged files
                name = self.items[at] if isinstance(self.items[at], (str, Path)) else f"item {at}"
                self._bad[at] = f"{name}: {type(error).__name__}: {error}"
                warnings.warn(f"skipped {self._bad[at]}", stacklevel=2)
                if len(self._bad) > max(_TOLERATED * len(self), 1):
                    raise ValueError(f"{len(self._bad)} of {len(self)} files cannot be read, the last: {self._bad[at]}") from error
        raise ValueError("no file could be read")

    def fetch(self, indices: Sequence[int]) -> Batch:
        read = [self._read(int(i)) for i in indices]
        batch: Batch = {"image": torch.stack([image for _, image in read])}
        if self.labels is not None:
            batch["label"] = torch.tensor([self.labels[i] for i, _ in read])
        if self.captions is not None:
            batch["caption"] = [self.captions[i] for i, _ in read]
        return batch


def decode_image(source: Any, size: int) -> Tensor:
    """A path or a PIL image to uint8 (3, size, size): shorter side to ``size`` (bicubic, antialiased), then the centre."""
    from PIL import Image

    with Image.open(source) if isinstance(source, (str, Path)) else source as image:
        if hasattr(image, "draft"):
            image.draft("RGB", (size, size))  # JPEG decodes at a fraction of its size when that is enough
        rgb = image.convert("RGB")
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    square = rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).contiguous()


class _DecodeImage:
    """A picklable ``decode_image`` of one size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, source: Any) -> Tensor:
        return decode_image(source, self.size)


class _DecodeAudio(_DecodeImage):
    def __call__(self, source: Any) -> Tensor:
        return spectrogram(*read_wave(source), self.size)


def _split(n: int) -> tuple[list[int], list[int]]:
    """One item in ten held out, by position: the same split every time."""
    held = [i for i in range(n) if i % 10 == 9] or [n - 1]
    kept = set(held)
    return [i for i in range(n) if i not in kept] or held, held


def folder(root: Path, size: int | None = None) -> Data:
    """A folder of images or of .wav files.

    Subfolders are classes; ``train/`` and ``val/`` (or ``test/``) at the top are the split, else one item in ten is held out.
    """
    parts = [root / "train", next((root / n for n in ("val", "test") if (root / n).is_dir()), root / "val")]
    split = parts[0].is_dir() and parts[1].is_dir()
    files = [sorted(p for p in part.rglob("*") if p.is_file()) for part in (parts if split else [root])]
    found = [[p for p in part if p.suffix.lower() in _IMAGES] for part in files]
    sounds = not any(found)
    if sounds:
        found = [[p for p in part if p.suffix.lower() == ".wav"] for part in files]
    if not all(found):
        empty = parts[[bool(f) for f in found].index(False)] if split else root
        raise FileNotFoundError(f"data: no image ({', '.join(_IMAGES)}) and no .wav file under {empty}")
    roots = parts if split else [root]
    names = [
        [p.relative_to(r).parts[0] if len(p.relative_to(r).parts) > 1 else "" for p in part] for part, r in zip(found, roots, strict=True)
    ]
    classes = sorted({n for part in names for n in part})
    labelled = len(classes) > 1 and "" not in classes
    size = size or (1024 if sounds else 224)
    decode = (_DecodeAudio if sounds else _DecodeImage)(size)

    def part(paths: list[Path], kinds: list[str]) -> Images:
        return DecodedImages(paths, decode, [classes.index(k) for k in kinds] if labelled else None)

    if split:
        train, test = (part(p, k) for p, k in zip(found, names, strict=True))
    else:
        train, test = (part([found[0][i] for i in at], [names[0][i] for i in at]) for at in _split(len(found[0])))
    known = classes if labelled else None
    if sounds:
        return Data(root.name, train, test, (BANDS, size), known, flip=False, mean=MEAN, std=STD, sound=True)
    return Data(root.name, train, test, (size, size), known)


def captioned_csv(path: Path, size: int) -> Data:
    """A CSV file with a header and the columns ``image`` (paths, relative to the file) and ``caption``; ``label`` is optional."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "caption"} <= rows[0].keys():
        seen = ", ".join(rows[0]) if rows else "no row"
        raise ValueError(f"data: {path} must have a header with the columns image and caption, got {seen}")
    classes = sorted({r["label"] for r in rows}) if "label" in rows[0] else None

    def part(at: list[int]) -> Images:
        labels = [classes.index(rows[i]["label"]) for i in at] if classes else None
        return DecodedImages([path.parent / rows[i]["image"] for i in at], _DecodeImage(size), labels, [rows[i]["caption"] for i in at])

    train, test = (part(at) for at in _split(len(rows)))
    return Data(path.stem, train, test, (size, size), classes)


class _Column(Sequence[Any]):
    """One column of a Hugging Face table, read item by item."""

    def __init__(self, table: Any, name: str, at: Sequence[int]) -> None:
        self.table, self.name, self.at = table.select_columns([name]), name, at

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: Any) -> Any:
        return self.table[self.at[index]][self.name]


def open_hugging_face(name: str, streaming: bool = False) -> Any:
    """The splits of a hub name, or of a folder of images with metadata, of parquet files or of WebDataset shards."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data 'hf:' needs the package datasets: pip install datasets") from error
    if not Path(name).is_dir():
        return datasets.load_dataset(name, streaming=streaming)
    for kind, ending in (("webdataset", "tar"), ("parquet", "parquet")):
        shards = sorted(map(str, Path(name).glob(f"*.{ending}")))
        if shards:
            return datasets.load_dataset(kind, data_files={"train": shards}, streaming=streaming)
    return datasets.load_dataset("imagefolder", data_dir=name, streaming=streaming)


def columns_of(spec: str, columns: Sequence[str]) -> tuple[str, str | None, str | None]:
    """Which columns hold images, labels and captions."""
    find = lambda *names: next((c for c in names if c in columns), None)  # noqa: E731
    image = find("image", "jpg", "jpeg", "png", "webp", "img")
    if image is None:
        raise ValueError(f"data: hf:{spec} must have a column image, jpg, png or img, got {', '.join(columns)}")
    return image, find("label", "labels", "cls", "fine_label"), find("caption", "text", "txt")


def hugging_face(spec: str, size: int) -> Data:
    """ "NAME[:SPLIT]" of ``datasets``: a hub name, a folder of images with metadata, of parquet files or of WebDataset shards."""
    name, _, split = spec.partition(":")
    loaded = open_hugging_face(name)
    train = loaded[split or "train"]
    held = next((loaded[s] for s in ("validation", "test", "val") if s in loaded and s != split), None)
    image, label, caption = columns_of(spec, train.column_names)
    names = getattr(train.features.get(label), "names", None) if label else None

    def part(table: Any, at: Sequence[int]) -> Images:
        labels = [int(v) for v in table.select(at)[label]] if label else None
        captions = list(table.select(at)[caption]) if caption else None
        return DecodedImages(_Column(table, image, at), _DecodeImage(size), labels, captions)

    if held is not None:
        parts = part(train, range(len(train))), part(held, range(len(held)))
    else:
        parts = tuple(part(train, at) for at in _split(len(train)))  # type: ignore[assignment]
    if label and names is None:
        names = [str(v) for v in sorted({*parts[0].labels, *parts[1].labels})]  # type: ignore[attr-defined]
    return Data(name.rstrip("/").rpartition("/")[2], *parts, (size, size), names)
