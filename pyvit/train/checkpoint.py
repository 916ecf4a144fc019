"""Atomic files: a file is complete or does not exist."""

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
    """Write to a temporary file beside ``path``, flush it to disk and rename it. A reader, or a crash at any time, sees
    the old file or the new one.

    If writing fails (for example on a full disk), the temporary file is removed, the old file stays, and the OSError is
    raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask applies, as to any other file
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
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder; the file itself is complete
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
    """Load what :func:`save` wrote, or return None if there is no file. Temporary files of interrupted writes are
    removed.

    Raises ValueError if the file is damaged or is not a checkpoint.
    """
    sweep(path.parent, path.name)
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler may raise any exception for damaged files
        raise ValueError(
            f"{path} is damaged or no checkpoint of pyvit: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a checkpoint of pyvit: it holds a {type(found).__name__}")
    return found


def sweep(folder: Path, *names: str) -> None:
    """Remove the temporary files that interrupted writes of ``names`` left in ``folder``. No other process may be
    writing there."""
    for name in names:
        for stale in folder.glob(f".{glob.escape(name)}.*"):
            with contextlib.suppress(OSError):
                stale.unlink()


def save_json(path: Path, value: Any) -> None:
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load_json(path: Path) -> Any:
    """Load what :func:`save_json` wrote. Raises ValueError if the file is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def save_weights(path: Path, state: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write ``state`` as a safetensors file, atomically; ``header`` is its metadata."""
    from safetensors.torch import save as serialise

    content = serialise({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, header)
    write_atomic(path, lambda file: file.write(content))
