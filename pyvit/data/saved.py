"""What a run keeps of its data, so that its network can be used where the data are not: classes, sizes, normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvit.data.crops import Crop
from pyvit.data.sets import Batch, Data, Images


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


def describe(data: Data, source: str) -> dict[str, Any]:
    """A JSON record of ``data``, read from ``source``."""
    path = Path(source).expanduser()
    return {
        "source": str(path.absolute()) if path.exists() else source,
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
