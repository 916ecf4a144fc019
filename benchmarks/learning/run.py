"""One run of docs/results.md: train, evaluate, record."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import peers
from benchmarks.learning.frozen import frozen
from benchmarks.learning.record import ROOT, RUNS, Record, cpu_seconds, read, thin
from benchmarks.learning.rows import Row, row_of
from pyvit.cli.evaluate import COMMANDS
from pyvit.train import Config, train
from pyvit.train.engine import resolve_config
from pyvit.train.presets import PRESETS
from pyvit.train.runs import load_run

SHEETS = ROOT / "docs" / "images" / "results"


def command_of(row: Row, seed: int) -> str:
    """The arguments of ``pyvit train``."""
    init = f" --init {_shown(RUNS / f'{row.init}-{seed}')}" if row.init else ""
    return f"{row.command}{init} --seed {seed}"


def preset_of(row: Row) -> dict[str, Any]:
    """The built-in settings of the row's recipe and data, and those of the run that it starts from."""
    words = row.command.split()
    preset = dict(PRESETS.get((words[0], words[words.index("--data") + 1]), {}))
    return preset | ({"init": preset_of(row_of(row.init))} if row.init else {})


def is_current(record: Record, row: Row) -> bool:
    """Whether ``record``, of the row or of a peer of it, is of the present command and settings."""
    ours = record.name != row.name or record.command == f"pyvit train {command_of(row, record.seed)}"
    return ours and record.preset == json.loads(json.dumps(preset_of(row)))


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def settings(row: Row, seed: int) -> Config:
    """The command as a Config."""
    words = command_of(row, seed).split()
    found: dict[str, Any] = {"recipe": words[0], "out": str(RUNS / f"{row.name}-{seed}"), "save_every": 500}
    for flag, value in zip(words[1::2], words[2::2], strict=True):
        key = flag[2:].replace("-", "_")
        if key in ("option", "set"):
            found.setdefault(key, []).append(value)
        elif key == "init":
            found[key] = str(ROOT / value)
        else:
            found[key] = float(value) if key == "epochs" else int(value) if value.isdigit() else value
    return Config(**found)


def run(row: Row, seed: int) -> Record:
    """Train ``row``, or resume it, and record the results."""
    config = settings(row, seed)
    folder = Path(config.out or "")
    spent = folder / "cpu_seconds.json"  # of several attempts together
    used = json.loads(spent.read_text()) if spent.exists() else 0.0
    before = cpu_seconds()
    try:
        results = train(config)
    finally:
        used += cpu_seconds() - before
        spent.write_text(json.dumps(used))
    if row.probe:
        results |= probes(folder, untrained=seed == 0 and row.table != "ablation")
    for name in row.evaluate:
        found = COMMANDS[name](str(folder), out=str(folder / f"{name}.png"))
        results |= found if isinstance(found, dict) else {name: found}
    for name in row.sheets if seed == 0 else ():
        SHEETS.mkdir(parents=True, exist_ok=True)
        COMMANDS[name](str(folder), out=str(SHEETS / f"{row.name}-{name}.png"))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    record = Record(row.name, seed, f"pyvit train {command_of(row, seed)}", results, round(used, 1), preset_of(row))
    record.curve = thin(max(step for step, _ in losses) + 1, losses)
    record.write()
    return record


def probes(folder: Path, untrained: bool) -> dict[str, float]:
    """k-NN and linear accuracy of the frozen features of a run, and of the network before training."""
    recipe, data = load_run(folder)
    torch.manual_seed(recipe.config.seed)
    initial = type(recipe)(recipe.config, data).eval()
    found = {}
    for prefix, network in (("", recipe), ("untrained ", initial))[: 1 + untrained]:
        found |= {f"{prefix}{key}": value for key, value in frozen(network.encoder(), data, network.normalize).items()}
    return found


def run_peer(name: str, row: Row, seed: int) -> Record:
    """Train another library's network for the CPU time of ``row``."""
    ours = read(row.name, seed)
    if ours is None:
        raise ValueError(f"results: {row.name} with seed {seed} must be run before {name}")
    torch.manual_seed(seed)
    config = resolve_config(settings(row, seed))
    results, used, losses, description = getattr(peers, name)(config, ours.cpu_seconds)
    record = Record(name, seed, description, results, round(used, 1), preset_of(row))
    record.curve = thin(len(losses), list(enumerate(losses)))
    record.write()
    return record


def run_named(name: str, seed: int) -> Record:
    """A row or a peer of a row, by name, with its output in the run's folder."""
    folder = RUNS / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as file, contextlib.redirect_stdout(_Lines(file)):
        if name in peers.NAMES:
            row = next(row for row in peers.rows() if name in row.peers)
            return run_peer(name, row, seed)
        return run(row_of(name), seed)


class _Lines(io.TextIOBase):
    """Writes to a file and flushes at once."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> int:
        self.file.write(text)
        self.file.flush()
        return len(text)


def discard(name: str, seed: int) -> None:
    """Remove the folder of a run, whose settings have changed."""
    shutil.rmtree(RUNS / f"{name}-{seed}", ignore_errors=True)
