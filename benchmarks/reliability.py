"""``make reliability``, ``python -m benchmarks.reliability``: long training and large tensors, on a CPU under Linux.

The parts run one after the other, each in a process of its own, and each is recorded when it ends in
benchmarks/results/<machine>/reliability.json; a part that was recorded is not run again unless named with ``--parts``
or ``--again``. ``python -m benchmarks.docs`` writes the record into docs/reliability.md.

    python -m benchmarks.reliability --parts soak --minutes 30 --threads 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, reliability_large, reliability_soak

FILE = "reliability.json"
RESULTS = Path(__file__).resolve().parent / "results"
SOAK = "soak"
NAMES = (*reliability_large.PARTS, SOAK)

#: Of the soak, in GiB.
_SOAK_MEMORY = 2.0


def available() -> float:
    """Memory that can be had without swapping, in GiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/meminfo has no MemAvailable")


def compute(name: str, minutes: float, scale: float) -> dict[str, Any]:
    """The figures of a part, as they are recorded; its exceptions pass. Peak memory is that of the process."""
    started = time.monotonic()
    torch.manual_seed(0)
    if name == SOAK:
        found: dict[str, Any] = {"soak": reliability_soak.soak(minutes)}
    else:
        found = {"checks": [check._asdict() for check in reliability_large.PARTS[name][0](scale)]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {"peak_gib": round(peak, 1), "seconds": round(time.monotonic() - started)}


def _child(name: str, minutes: float, scale: float, threads: int, out: str) -> None:
    torch.set_num_threads(threads)
    about = machine.describe(None)
    kept = ("threads", "torch", "python", "pyvit", "revision", "date")
    Path(out).write_text(json.dumps({key: about[key] for key in kept} | compute(name, minutes, scale)))


def run(name: str, path: Path, minutes: float, scale: float, threads: int) -> bool:
    """Run a part and record it in ``path``; whether it passed. A part that fails loses its record."""
    out = path.with_name(f".{name}.json")
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(name, minutes, scale, threads, str(out))
    )
    process.start()
    process.join()
    record = read(path)
    record.pop(name, None)
    if process.exitcode == 0:
        record[name] = json.loads(out.read_text())
    out.unlink(missing_ok=True)
    path.write_text(json.dumps({key: record[key] for key in NAMES if key in record}, indent=1) + "\n")
    return process.exitcode == 0


def read(path: Path) -> dict[str, Any]:
    """The record: part -> its figures; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: a table of the large calls, and one of the soak."""
    lines = [
        "| call | elements of the largest tensor, or of scores, not stored | compared with float64 | error / limit |",
        "|---|---:|---|---:|",
    ]
    for name in reliability_large.PARTS:
        for c in record.get(name, {}).get("checks", ()):
            lines.append(f"| {c['call']} | {c['elements']:,} | {c['compared']} | {c['of_limit']:.2f} |")
    large = [record[name] for name in reliability_large.PARTS if name in record]
    if large:
        lines += [
            "",
            f"Peak memory of a process: {max(part['peak_gib'] for part in large):.1f} GiB. {_versions(large)}",
        ]
    if SOAK in record:
        s = record[SOAK]["soak"]
        steps = ", ".join(f"{name} {n:,}" for name, n in s["steps"].items())
        lines += [
            "",
            "| training with random sizes | |",
            "|---|---|",
            f"| duration, threads | {s['minutes']} minutes, {record[SOAK]['threads']} |",
            f"| steps | {steps} |",
            f"| comparisons of logits and all gradients with float64 | {s['checks']}; largest error "
            f"{s['of_limit']:.2f} of its limit |",
            f"| memory when warm, growth until the end | {s['warm_mib']} MiB, {s['growth_mib']} MiB "
            f"(bound: {s['bound_mib']:.0f} MiB) |",
            "",
            _versions([record[SOAK]]),
        ]
    return "\n".join(lines) + "\n"


def _versions(parts: Sequence[dict[str, Any]]) -> str:
    torches, dates = ({part[key][:n] for part in parts} for key, n in (("torch", 20), ("date", 10)))
    return f"torch {', '.join(sorted(torches))}; {', '.join(sorted(dates))}."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=NAMES, help="only these, also if they were recorded")
    parser.add_argument("--again", action="store_true", help="also what was recorded")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak (default: 30)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the large tensors, to try the script: 0.01")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<machine>)")
    args = parser.parse_args(arguments)
    path = (args.out or RESULTS / machine.slug()) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.parts or NAMES:
        if not args.parts and not args.again and name in read(path):
            print(f"{name}: recorded", flush=True)
            continue
        needed = _SOAK_MEMORY if name == SOAK else max(1.0, reliability_large.PARTS[name][1] * min(args.scale, 1.0))
        if available() < needed:
            print(f"{name}: needs {needed:.0f} GiB of memory, {available():.0f} are available", file=sys.stderr)
            failed.append(name)
            continue
        passed = run(name, path, args.minutes, args.scale, args.threads)
        print(f"{name}: {'passed' if passed else 'FAILED'}", flush=True)
        failed += [] if passed else [name]
    print(f"{table(read(path))}\n{path}")
    if failed:
        print(f"failed or not run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
