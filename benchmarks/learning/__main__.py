"""Train the runs of docs/results.md: ``python -m benchmarks.learning [ROW ...] [--seeds N] [--jobs N] [--all]``.

Only runs without a record, or whose command or built-in settings have changed, are trained. Each runs in its own
process on one thread; an interrupted one resumes from its last checkpoint in ``runs/results``. The page is rewritten
after every run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch

from benchmarks.learning import page
from benchmarks.learning.record import ROOT, RUNS, Record, path_of, read
from benchmarks.learning.rows import ABLATION, ROWS, SEEDS
from benchmarks.learning.run import discard, is_current, run_named


def pixels() -> None:
    """The record of k-NN and a linear probe on raw pixels."""
    from pyvit.data import load_data
    from pyvit.eval.features import labels_of
    from pyvit.eval.knn import knn_accuracy
    from pyvit.eval.linear import linear_probe

    data = load_data("fashion-mnist")
    pair = [(part.images[:, 0].flatten(1).float(), labels_of(part)) for part in (data.train, data.test)]  # type: ignore[attr-defined]
    found = {"knn": knn_accuracy(*pair), "linear": linear_probe(*pair)["linear"]}
    Record("pixels", 0, "raw pixels", found, 0.0).write()


def wanted(names: list[str], seeds: int, every: bool) -> list[tuple[str, int, tuple[str, int] | None]]:
    """(name, seed, what must be recorded before) of all runs to do, in order."""
    rows = {row.name: row for row in (*ROWS, *ABLATION)}
    of = {name: row for row in ROWS for name in row.peers}
    unknown = set(names) - rows.keys() - of.keys()
    if unknown:
        sys.exit(f"results: ROW must be one of {', '.join([*rows, *of])}, got {', '.join(sorted(unknown))}")
    found = []
    for seed in SEEDS[:seeds]:
        for name in names or [*rows, *of]:
            record, row = read(name, seed), rows.get(name) or of[name]
            if record is not None and is_current(record, row) and not every:
                continue
            before = row.name if name in of else row.init
            found.append((name, seed, (before, seed) if before else None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows; default all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time, one thread each")
    parser.add_argument("--all", action="store_true", help="also train runs that have a record")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        torch.set_num_threads(1)
        run_named(given.rows[0], given.one)
        return
    if read("pixels", 0) is None:
        pixels()
    waiting = wanted(given.rows, given.seeds, given.all)
    for name, seed, _ in waiting if given.all else ():
        path_of(name, seed).unlink(missing_ok=True)
    for name, seed, _ in waiting:
        if given.all or path_of(name, seed).exists():
            discard(name, seed)
            path_of(name, seed).unlink(missing_ok=True)
    failed = _work(waiting, given.jobs)
    if failed:
        sys.exit(f"results: failed: {', '.join(failed)}; see output.txt in {RUNS.relative_to(ROOT)}/ROW-SEED")


def _work(waiting: list[tuple[str, int, tuple[str, int] | None]], jobs: int) -> list[str]:
    """Run all in child processes, at most ``jobs`` at a time. Returns the names of those that failed."""
    running: dict[subprocess.Popen[bytes], tuple[str, int]] = {}
    failed: list[str] = []
    count, began = len(waiting), time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    while waiting or running:
        for item in list(waiting):
            name, seed, before = item
            if len(running) >= jobs:
                break
            if before is not None and f"{before[0]}-{before[1]}" in failed:
                waiting.remove(item)
                failed.append(f"{name}-{seed}")
            elif before is None or path_of(*before).exists():
                waiting.remove(item)
                command = [sys.executable, "-m", "benchmarks.learning", name, "--one", str(seed)]
                running[subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.STDOUT)] = (name, seed)
                print(f"{name}, seed {seed}: started, {len(waiting)} of {count} waiting", flush=True)
        if waiting and not running:
            return [*failed, *(f"{name}-{seed} (needs {before})" for name, seed, before in waiting)]
        time.sleep(1)
        for process in [process for process in running if process.poll() is not None]:
            name, seed = running.pop(process)
            record = read(name, seed)
            if process.returncode or record is None:
                failed.append(f"{name}-{seed}")
            figures = "failed" if record is None else ", ".join(f"{k} {v:.2f}" for k, v in record.results.items())
            print(f"{name}, seed {seed}: {figures} ({(time.monotonic() - began) / 60:.0f} min so far)", flush=True)
            page.write()
    return failed


if __name__ == "__main__":
    main()
