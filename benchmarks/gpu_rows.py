"""The record of a GPU run: rows.jsonl, to which every result is appended as it is measured.

A line is one row of one item (a case, a test, a microbenchmark): ``step``, ``item``, ``key`` (a hash of the kernels'
digests and of the versions), ``row`` of ``rows``, date, command and versions, and the row's ``data``. An item's rows
are written together. A process that is killed leaves whole items; a torn last line is dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Data = dict[str, Any]
#: What happened to an item that has no results of its own.
STATUS = ("crashed", "timed out", "failed")


@dataclass(frozen=True)
class Item:
    """A finished item of the record: its rows, and what they were measured with."""

    step: str
    item: str
    key: str
    at: str
    versions: Mapping[str, str]
    rows: tuple[Data, ...]


def key_of(versions: Mapping[str, str], *digests: str) -> str:
    """A hash of what a result depends on."""
    return hashlib.sha256(json.dumps([sorted(versions.items()), digests]).encode()).hexdigest()[:12]


class Record:
    """Appends to ``path``. Several processes may append to the same file."""

    def __init__(self, path: Path, versions: Mapping[str, str], command: str) -> None:
        self.path, self.versions, self.command = path, dict(versions), command

    def append(self, step: str, item: str, key: str, rows: Sequence[Data]) -> None:
        """Write the item's rows, and wait until they are on the disk."""
        shared = {"step": step, "item": item, "key": key}
        about = {"at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "command": self.command}
        lines = [
            json.dumps({**shared, "row": i, "rows": len(rows), **about, "versions": self.versions, "data": _plain(row)})
            for i, row in enumerate(rows)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            left = ("\n".join(lines) + "\n").encode()
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)


def _plain(value: Any) -> Any:
    """``value`` for JSON, which has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def repair(path: Path) -> int:
    """Cut a torn last line off ``path``, so that the next row starts a line. Returns the bytes cut."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return len(content) - whole


def read(path: Path) -> list[Item]:
    """The items of ``path`` that are complete, in the order of their last row; of an item measured twice with the same
    key, the last."""
    found: dict[tuple[str, str, str], Item] = {}
    open_: dict[tuple[str, str, str, str], list[Data]] = {}
    for line in _lines(path):
        identity = line["step"], line["item"], line["key"]
        rows = open_.setdefault((*identity, line["at"]), [])
        rows.append(line["data"])
        if len(rows) == line["rows"]:
            found.pop(identity, None)
            found[identity] = Item(*identity, line["at"], line["versions"], tuple(rows))
    return list(found.values())


def _lines(path: Path) -> Iterator[Data]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text) if text.endswith("\n") else None
            except json.JSONDecodeError:
                line = None  # torn
            if isinstance(line, dict):
                yield line
