"""``python -m benchmarks.gpu``: an hour on a GPU, in three parts of at most nine minutes each.

Needs torch with a GPU and Triton, and reads nothing from a network; a library that was built elsewhere
(pyvit/lib/libpyvit_ops.so) is used as it is. pytest, timm, transformers, Nsight Compute and compute-sanitizer are used
where they are installed, and rows say where they are not.

Every result is appended to ``rows.jsonl`` as it is measured. A run that was ended, at any point, is continued by
``--resume``: what was measured with the same kernels and versions is not measured again. ``--report`` writes the tables
from the record.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch

from benchmarks import gpu_device, gpu_report, gpu_rows, gpu_steps
from benchmarks.gpu_worker import Order, Watcher, work

_REPOSITORY = Path(__file__).parent.parent
PARTS = tuple(sorted({step.part for step in gpu_steps.STEPS}))


def lacking() -> str | None:
    """What this machine lacks, in one line, or None."""
    if not torch.cuda.is_available():
        kind = (
            f"CUDA {torch.version.cuda}"
            if torch.version.cuda
            else f"ROCm {torch.version.hip}"
            if torch.version.hip
            else "a CPU-only build"
        )
        return (
            f"needs a GPU that torch can use: torch {torch.__version__} ({kind}) finds none; on a machine with "
            "one, use its Python: make gpu PY=python3"
        )
    if importlib.util.find_spec("triton") is None:
        return "needs the package 'triton' (pip install 'triton>=3.6')"
    return None


def folder(name: str) -> str:
    """A GPU's name as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stages(names: Sequence[str], workers: int) -> list[tuple[str, ...]]:
    """Steps that one worker does one after another. A step whose items are divided between several, and the tests, in
    which pytest runs, are a stage of their own."""
    alone = {name for name in names if name == "tests" or (gpu_steps.BY_NAME[name].spread and workers > 1)}
    found: list[tuple[str, ...]] = []
    for name in names:
        if found and not {name, found[-1][-1]} & alone:
            found[-1] = (*found[-1], name)
        else:
            found.append((name,))
    return found


class _Clocks:
    """Clocks, power and temperature once a second, beside the rows."""

    FIELDS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"

    def __init__(self, path: Path, program: str | None) -> None:
        self.path, self.program = path, program
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> _Clocks:
        if self.program is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _log(self) -> None:
        command = [str(self.program), f"--query-gpu={self.FIELDS}", "--format=csv,noheader"]
        with self.path.open("a") as log:
            log.write(f"{self.FIELDS}\n")
            while not self._over.wait(1.0):
                try:
                    log.write(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout)
                    log.flush()
                except (OSError, subprocess.TimeoutExpired) as error:
                    log.write(f"# {error}\n")
                    return


def measure(names: Sequence[str], minutes: float, device: gpu_device.Device, out: Path, command: str) -> list[str]:
    """Run steps, each part within ``minutes``. Returns the items for which no time was left."""
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT)
    try:  # workers inherit it: those of a run that was killed have ended when it is free
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run in {out}", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    if cut := gpu_rows.repair(out / "rows.jsonl"):
        print(f"dropped a torn last line of {cut} bytes from rows.jsonl", flush=True)
    begun = time.time()
    show = lambda line: print(f"{time.time() - begun:6.1f} s  {line}", flush=True)  # noqa: E731
    record = gpu_rows.Record(out / "rows.jsonl", device.versions(), command)
    watcher = Watcher(record, out / "log.txt", show, (lock,))
    paths = filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")])
    environment = {"PYVIT_TILES": str(out / "tiles.json"), **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if device.name == "fake":
        environment |= {"PYVIT_TEST_PTX": "sm_90", "PYVIT_NO_LIBRARY": "1"}
    with _Clocks(out / "clocks.csv", gpu_device.tool("nvidia-smi", device, out)):
        for part in PARTS:
            chosen = [name for name in names if gpu_steps.BY_NAME[name].part == part]
            end = time.time() + 60 * minutes
            for stage in stages(chosen, device.workers):
                step = gpu_steps.BY_NAME[stage[0]]
                shards = device.workers if step.spread else 1
                share = step.share if len(stage) == 1 else 1.0
                until = time.time() + share * max(0.0, end - time.time())
                orders = [Order(stage, str(out), device.name, command, until, i, shards) for i in range(shards)]
                with ThreadPoolExecutor(shards) as pool:
                    for _ in pool.map(lambda order: watcher.run(order, environment), orders):
                        pass
    os.close(lock)
    return watcher.left_out


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--worker"]:
        fields = json.loads(arguments[1])
        return work(Order(**{**fields, "steps": tuple(fields["steps"])}))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ", ".join(step.name for step in gpu_steps.STEPS)
    parser.add_argument("--parts", default=",".join(map(str, PARTS)), help="of 1,2,3 (default: all)")
    parser.add_argument("--steps", default="", help=f"only these, separated by commas: {every}")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for each part (default 9)")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<gpu>")
    parser.add_argument("--resume", action="store_true", help="continue the record in --out")
    parser.add_argument("--report", action="store_true", help="only write the tables of the record in --out")
    parser.add_argument(
        "--device", choices=("cuda", "fake"), default="cuda", help="fake: rehearse on a CPU, with small shapes"
    )
    args = parser.parse_args(arguments)
    parts = {int(part) for part in args.parts.split(",")}
    names = [s.name for s in gpu_steps.STEPS if s.part in parts and (not args.steps or s.name in args.steps.split(","))]
    if unknown := set(filter(None, args.steps.split(","))) - {step.name for step in gpu_steps.STEPS}:
        parser.error(f"unknown step {', '.join(sorted(unknown))}; choose from {every}")
    if args.report and args.out is None:
        parser.error("--report needs --out")
    if args.report:
        return gpu_report.write(args.out)
    if args.device == "cuda" and (why := lacking()) is not None:
        print(f"make gpu {why}", file=sys.stderr)
        return 2
    device = gpu_device.open_device(args.device)
    out = args.out or _REPOSITORY / "benchmarks" / "results" / folder(device.versions()["gpu"])
    if not args.resume and (out / "rows.jsonl").exists():
        (out / "rows.jsonl").rename(out / f"rows-{datetime.now():%Y%m%d-%H%M%S}.jsonl")
    command = shlex.join(["python", "-m", "benchmarks.gpu", *arguments])
    left_out = measure(names, args.minutes, device, out.absolute(), command)
    return gpu_report.write(out, left_out)


if __name__ == "__main__":
    sys.exit(main())
