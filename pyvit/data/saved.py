"""What a run keeps of its data, so that its network can be used where the data are not: classes, sizes,
normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvit.data.crops import Crop
from pyvit.data.sets import Batch, Data, Images, builtin


class Absent(Images):
    """Images that were trained on and are not at hand."""

    def __init__(self, name: str, captioned: bool) -> None:
        self.name, self.captions = name, [] if captioned else None

    def __len__(self) -> int:
        return 0

    def fetch(self, indices: Sequence[int]) -> Batch:
        raise FileNotFoundError(f"data: the images of {self.name} are not loaded")

    def draw(self, indices: Sequence[int], crops: Mapping[str, Crop], seed: int, step: int) -> Batch:
        return self.fetch(indices)


def _path(source: str) -> tuple[str, Path | None]:
    """ "hf:" or "hf-stream:" or nothing, and the path after it; None for a built-in set."""
    kind = next((kind for kind in ("hf-stream:", "hf:") if source.startswith(kind)), "")
    return kind, Path(source[len(kind) :]).expanduser() if source not in builtin() else None


def found(source: str, recorded: str) -> str:
    """``source`` as it was given, or where that is not here, the place that :func:`describe` recorded of it."""
    here, there = (path for _, path in map(_path, (source, recorded)))
    gone = here is not None and not here.exists() and there is not None and there.exists()
    return recorded if gone else source


def describe(data: Data, source: str) -> dict[str, Any]:
    """A JSON record of ``data``, read from ``source``."""
    kind, path = _path(source)
    return {
        "source": f"{kind}{path.absolute()}" if path is not None and path.exists() else source,
        "name": data.name,
        "classes": data.classes,
        "size": list(data.size),
        "mean": list(data.mean),
        "std": list(data.std),
        "sound": data.sound,
        "flip": data.flip,
        "centre": getattr(getattr(data.test, "decoder", None), "centre", None),
        "captioned": data.train.captions is not None,
        "images": [data.train.counted(), data.test.counted()],
    }


def described(record: Mapping[str, Any]) -> Data:
    """The data that :func:`describe` recorded, without their images."""
    none = Absent(record["name"], record["captioned"])
    size, mean, std = (tuple(record[key]) for key in ("size", "mean", "std"))
    return Data(record["name"], none, none, size, record["classes"], record["flip"], mean, std, record["sound"])  # type: ignore[arg-type]
