"""load_data: from a name or a path to a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyvit.data.dataset import Data


def builtin() -> dict[str, Callable[..., Data]]:
    """The built-in data sets, by name."""
    from pyvit.data.digits import digits
    from pyvit.data.fashion_mnist import fashion_mnist
    from pyvit.data.icons import emoji, icons
    from pyvit.data.scenes import scenes
    from pyvit.data.spoken_words import words
    from pyvit.data.synthetic import synthetic

    return {
        "digits": digits,
        "emoji": emoji,
        "fashion-mnist": fashion_mnist,
        "icons": icons,
        "scenes": scenes,
        "synthetic": synthetic,
        "words": words,
    }


def load_data(
    spec: str, size: int | None = None, validation: float = 0.0, train_images: int | None = None, **options: Any
) -> Data:
    """Load the data set that ``spec`` names.

    Args:
        spec: "digits", "fashion-mnist", "scenes", "words" or "synthetic" (built in); "emoji" or "icons" (Debian's
            fonts-noto-color-emoji and papirus-icon-theme), or the path of an emoji font or icon theme; a folder of
            images or .wav files, with or without a subfolder per class; a .csv, .tsv or .txt table of image paths and
            captions or labels; "hf:NAME[:SPLIT]" for a Hugging Face data set (a hub name or a folder), or
            "hf-stream:NAME[:SPLIT]" to stream it.
        size: side of the square images, by default the data set's own or 224; for audio the number of frames of the
            spectrogram, by default 1024 (10 s).
        validation: share of the training images that replaces the held-out ones, see :meth:`Data.validation`.
        train_images: use only this many training images, of those that ``validation`` leaves; see :meth:`Data.limited`.

    Raises ValueError for an unknown name, FileNotFoundError for a path that does not exist.
    """
    if not spec.strip() or spec in ("hf:", "hf-stream:"):
        raise ValueError(
            f"data: must name a folder, a table of captions, a Hugging Face data set or a built-in one, got {spec!r}"
        )
    if size is not None and size < 1:
        raise ValueError(f"data: size must be at least 1, got {size}")
    if train_images is not None:
        return load_data(spec, size, validation, **options).limited(train_images)
    if validation:
        return load_data(spec, size, **options).validation(validation)
    sets = builtin()
    if spec in sets:
        return sets[spec](**({} if size is None else {"size": size}), **options)
    if spec.startswith("hf-stream:"):
        from pyvit.data.stream import hugging_face_stream

        return hugging_face_stream(spec[10:], size or 224, **options)
    if spec.startswith("hf:"):
        from pyvit.data.hub import hugging_face

        return hugging_face(spec[3:], size or 224, **options)
    path = Path(spec).expanduser()
    if path.suffix.lower() in (".ttf", ".otf") and path.is_file():
        return sets["emoji"](size or 64, path, **options)
    if (path / "index.theme").is_file():
        return sets["icons"](size or 64, path, **options)
    if path.is_dir():
        from pyvit.data.files import folder

        return folder(path, size, **options)
    from pyvit.data.captions import ENDINGS, captioned
    from pyvit.data.labels import has_labels, labelled

    if path.suffix.lower() in ENDINGS and path.exists():
        return (labelled if has_labels(path) else captioned)(path, size or 224, **options)
    if path.exists():
        raise ValueError(
            f"data: {spec!r} is a file; it must be a table of captions or labels ({', '.join(ENDINGS)}) or a folder"
        )
    if "/" in spec or path.suffix:
        raise FileNotFoundError(f"data: {spec!r} does not exist")
    raise ValueError(f"data: must be a folder, a CSV file, hf:NAME or one of {', '.join(sets)}, got {spec!r}")
