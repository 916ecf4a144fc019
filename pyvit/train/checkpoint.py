"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside ``path``, flush to the disk, then rename: a reader, or a crash at any moment, sees the old file or
    the new one.

    When writing fails (a full disk) the partial file is removed, the old one stays, and the OSError is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask, as any other file
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
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder; the file is in place
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
    """What :func:`save` wrote, or None where there is no file. Remains of interrupted writes are removed.

    Raises ValueError for a file that is damaged or is no checkpoint.
    """
    sweep(path.parent, path.name)
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises whatever the damage leads to
        raise ValueError(
            f"{path} is damaged or no checkpoint of pyvit: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no checkpoint of pyvit: it holds a {type(found).__name__}")
    return found


def sweep(folder: Path, *names: str) -> None:
    """Remove what interrupted writes of the files ``names`` left in ``folder``, which nobody else may be writing to."""
    for name in names:
        for stale in folder.glob(f".{glob.escape(name)}.*"):
            with contextlib.suppress(OSError):
                stale.unlink()


def save_json(path: Path, value: Any) -> None:
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load_json(path: Path) -> Any:
    """What :func:`save_json` wrote. Raises ValueError for a file that is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def save_weights(path: Path, state: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
    """A safetensors file of ``state``, atomically; ``header``: texts beside it."""
    from safetensors.torch import save as serialise

    content = serialise({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, header)
    write_atomic(path, lambda file: file.write(content))
