"""The record of one run: a JSON file for each row (or peer) and seed, committed with the results."""

from __future__ import annotations

import datetime
import json
import resource
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import processor
from pyvit.train.checkpoint import write_atomic
from pyvit.version import __version__

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "learning"
RUNS = ROOT / "runs" / "results"


@dataclass
class Record:
    """``command`` is what was run, with the built-in settings ``preset``; ``cpu_seconds`` is the time of all its
    threads and processes."""

    name: str
    seed: int
    command: str
    results: dict[str, float]
    cpu_seconds: float
    preset: dict[str, Any] = field(default_factory=dict)
    #: (share of the training done, loss)
    curve: list[list[float]] = field(default_factory=list)
    machine: str = ""
    versions: str = ""
    date: str = ""

    @property
    def path(self) -> Path:
        return path_of(self.name, self.seed)

    def write(self) -> None:
        self.machine = processor()
        self.versions = f"pyvit {__version__}, torch {torch.__version__}"
        self.date = datetime.date.today().isoformat()
        text = json.dumps({k: v for k, v in asdict(self).items() if k != "curve"}, indent=1)
        curve = json.dumps(self.curve)
        text = f'{text[:-2]},\n "curve": {curve}\n}}\n'  # one line: it has a hundred pairs
        write_atomic(self.path, lambda file: file.write(text.encode()))


def path_of(name: str, seed: int) -> Path:
    return RECORDS / f"{name}-{seed}.json"


def read(name: str, seed: int) -> Record | None:
    """The record, or None if there is none."""
    path = path_of(name, seed)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return Record(**found)


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def thin(steps: int, curve: list[tuple[int, float]], points: int = 100) -> list[list[float]]:
    """Means of the curve over ``points`` equal parts of the training."""
    parts: dict[int, list[float]] = {}
    for step, loss in curve:
        parts.setdefault(min(step * points // max(steps, 1), points - 1), []).append(loss)
    return [[(at + 0.5) / points, round(sum(v) / len(v), 5)] for at, v in sorted(parts.items())]
