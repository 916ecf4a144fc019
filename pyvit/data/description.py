"""The description of a run's data that is saved with the run: classes, sizes, normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvit.data.crops import Crop
from pyvit.data.dataset import Batch, Data, Images
from pyvit.data.load import builtin


class MissingImages(Images):
    """Stands for training images that are not available."""

    def __init__(self, name: str, captioned: bool) -> None:
        self.name, self.captions = name, [] if captioned else None

    def __len__(self) -> int:
        return 0

    def fetch(self, indices: Sequence[int]) -> Batch:
        raise FileNotFoundError(f"data: the images of {self.name} are not loaded")

    def draw(
        self,
        indices: Sequence[int],
        crops: Mapping[str, Crop],
        seed: int,
        step: int,
        repetitions: Sequence[int] | None = None,
    ) -> Batch:
        return self.fetch(indices)


def _path(source: str) -> tuple[str, Path | None]:
    """ "hf:", "hf-stream:" or "", and the path after it; None for a built-in data set."""
    kind = next((kind for kind in ("hf-stream:", "hf:") if source.startswith(kind)), "")
    return kind, Path(source[len(kind) :]).expanduser() if source not in builtin() else None


def locate(source: str, recorded: str) -> str:
    """``source`` as it was given, or if that does not exist, the path recorded by :func:`describe`."""
    here, there = (path for _, path in map(_path, (source, recorded)))
    gone = here is not None and not here.exists() and there is not None and there.exists()
    return recorded if gone else source


def describe(data: Data, source: str) -> dict[str, Any]:
    """A JSON record of ``data``, which was loaded from ``source``."""
    kind, path = _path(source)
    return {
        "source": f"{kind}{path.absolute()}" if path is not None and path.exists() else source,
        "name": data.name,
        "classes": data.classes,
        "size": list(data.size),
        "mean": list(data.mean),
        "std": list(data.std),
        "sound": data.sound,
        "multilabel": data.multilabel,
        "flip": data.flip,
        "centre": getattr(getattr(data.test, "decoder", None), "centre", None),
        "captioned": data.train.captions is not None,
        "images": [data.train.counted(), data.test.counted()],
    }


def from_description(record: Mapping[str, Any]) -> Data:
    """The data recorded by :func:`describe`, without images."""
    none = MissingImages(record["name"], record["captioned"])
    size, mean, std = (tuple(record[key]) for key in ("size", "mean", "std"))
    return Data(
        record["name"], none, none, size, record["classes"], record["flip"], mean, std, record["sound"],
        record.get("multilabel", False),
    )  # type: ignore[arg-type]  # fmt: skip
