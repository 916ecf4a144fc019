"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside ``path``, flush to the disk, then rename: a reader, or a crash at any moment, sees the old file or the new one.

    When writing fails (a full disk) the partial file is removed, the old one stays, and the OSError is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Save ``state`` as torch.save does, atomically. A write error is raised as OSError."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch's archive writer wraps the OSError of a full disk
            raise OSError(f"cannot write {path}: {error}") from error

    write_atomic(path, write)


def load(path: Path) -> dict[str, Any] | None:
    """What :func:`save` wrote, or None where there is no file. Remains of interrupted writes are removed."""
    for stale in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            stale.unlink()
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def save_json(path: Path, value: Any) -> None:
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_weights(path: Path, state: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
    """A safetensors file of ``state``, atomically; ``header``: texts beside it."""
    from safetensors.torch import save as serialise

    content = serialise({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, header)
    write_atomic(path, lambda file: file.write(content))
