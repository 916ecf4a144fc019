"""The lock of a run's folder, and the fingerprint of its training set."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

import torch

from pyvit.data import Data

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """``run.lock`` in a run's folder, held by one process at a time. The file names the process.

    The operating system releases the lock when the process ends, so a leftover file locks nothing. Other threads of the
    process, and a second run in it, are not locked out.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock. Raises ValueError, naming the process that holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = self.path.open("a+")
            holder = self._holder(file)
            if not self._lock(file, holder):
                file.close()
                named = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
                raise ValueError(
                    f"{self.path.parent} is in use by {named}; wait for it, end it, or choose another --out"
                )
            if self._is_here(file):  # the previous holder may have removed it before it was locked here
                self._file = file
            else:
                file.close()
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        self._file.flush()

    @staticmethod
    def _lock(file: IO[str], holder: dict[str, Any]) -> bool:
        """Lock ``file`` if no other process has locked it. On file systems without locks, the process that it names
        must not be running on this machine."""
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
        return (
            holder.get("host") != socket.gethostname()
            or holder.get("pid") == os.getpid()
            or not _runs(holder.get("pid"))
        )

    def _is_here(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    @staticmethod
    def _holder(file: IO[str]) -> dict[str, Any]:
        """The process that the file names, or {}."""
        try:
            file.seek(0)
            found = json.load(file)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._file.close()
            self._file = None


def _runs(pid: Any) -> bool:
    """Whether a process with the id ``pid`` runs on this machine."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return True


def fingerprint(data: Data) -> dict[str, Any]:
    """Number of images, classes, and a hash of the images' names, labels and captions, to notice changes of a training
    set.

    Names are relative to the images' common folder, so that data may be moved. Streams have no hash.
    """
    train = data.train
    if train.streamed:
        return {"images": train.count, "classes": data.classes, "hash": None}
    digest = hashlib.sha256()
    if (labels := getattr(train, "labels", None)) is not None:
        digest.update(torch.as_tensor(labels).cpu().numpy().tobytes())
    for strings in (_names(train), getattr(train, "captions", None) or ()):
        digest.update("\0".join(map(str, strings)).encode("utf-8", "surrogateescape") + b"\1")
    return {"images": len(train), "classes": data.classes, "hash": digest.hexdigest()[:16]}


def _names(images: Any) -> list[str]:
    """Paths relative to the images' common folder; [] if the images are not files."""
    at = getattr(images, "indices", None)
    items = getattr(images if at is None else images.whole, "items", None)
    if not isinstance(items, (list, tuple)) or not items or not isinstance(items[0], (str, Path)):
        return []
    names = [str(item) for item in (items if at is None else (items[i] for i in at))]
    shared = os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])
    return [name[len(shared) :] for name in names]


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two fingerprints as text; "" if there are none."""
    said = []
    if before.get("images") != now["images"]:
        said.append(f"it had {before.get('images')} images and has {now['images']}")
    if before.get("classes") != now["classes"]:
        lost = [c for c in before.get("classes") or [] if c not in (now["classes"] or [])]
        new = [c for c in now["classes"] or [] if c not in (before.get("classes") or [])]
        said.append(f"classes removed: {', '.join(lost) or 'none'}, new: {', '.join(new) or 'none'}")
    if not said and before.get("hash") != now["hash"]:
        said.append("other files, labels or captions of the same number")
    return "; ".join(said)
