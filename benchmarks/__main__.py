"""``python -m benchmarks [ops] [models] [scaling]``: check, time, report."""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from pathlib import Path

import torch

import pyvit
from benchmarks import cases, ceiling, report, runner
from benchmarks.workload import PEERS

SUITES = (*cases.SUITES, "scaling")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Check and time pyvit against naive, PyTorch and peers."
    )
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="suite",
        help=f"any of: {', '.join(SUITES)} (default: all; scaling is shorter without --full)",
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick",
        dest="level",
        action="store_const",
        const="quick",
        help="tiny shapes: a check that everything runs, in seconds",
    )
    level.add_argument("--full", dest="level", action="store_const", const="full", help="every case")
    parser.add_argument("--peers", default="none", help=f"none, all, or a comma-separated list of: {', '.join(PEERS)}")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name contains TEXT (of every level)"
    )
    parser.add_argument("--dtype", default="", help="only cases of this dtype: fp32, bf16 or int8")
    parser.add_argument("--threads", type=int, default=0, help="threads for every contender (default: torch's choice)")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="seconds per case (default: 0.4, --quick 0.05, --full 2)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="minutes after which no case starts (default: 4.5; no limit with --full, --only or peers)",
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="call pyvit.keep_memory() first, for all contenders (default: off)",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results.csv, results.md and plots go")
    parser.add_argument("--no-plots", action="store_true", help="write no pictures")
    parser.add_argument("--targets", action="store_true", help="also compare with the project's targets")
    args = parser.parse_args(argv)
    args.suites = tuple(args.suites) or SUITES
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; choose from {', '.join(SUITES)}")
    args.peers = (
        {"all": PEERS, "none": ()}.get(args.peers) if args.peers in ("all", "none") else tuple(args.peers.split(","))
    )
    strangers = [name for name in args.peers if name not in PEERS]
    if strangers:
        parser.error(f"unknown peer {', '.join(strangers)}; choose from {', '.join(PEERS)}")
    if args.dtype not in ("", "fp32", "bf16", "int8"):
        parser.error(f"unknown dtype {args.dtype}; choose from fp32, bf16, int8")
    args.level = args.level or "default"
    args.seconds = args.seconds or {"quick": 0.05, "default": 0.4, "full": 2.0}[args.level]
    args.minutes = args.minutes or (
        4.5 if args.level == "default" and not (args.only or args.dtype or args.peers) else math.inf
    )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    start = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    kept = args.keep_memory and pyvit.keep_memory()
    top = ceiling.measure(torch.get_num_threads(), 0.05 if args.level == "quick" else 0.5)
    print(
        "\n".join(report.machine(top)),
        *(["keep_memory: freed memory stays in the process"] if kept else []),
        sep="\n",
        flush=True,
    )
    settings = runner.Settings(
        seconds=args.seconds, rounds=(3, 5) if args.level == "quick" else (5, 101), peers=args.peers
    )
    chosen = cases.select(tuple(s for s in args.suites if s in cases.SUITES), args.level, args.only, args.dtype)
    ops = list(dict.fromkeys(case.op for case in chosen))
    if args.minutes < math.inf:
        chosen = cases.spread(chosen)
    clock = lambda: time.perf_counter() - start  # noqa: E731
    left = lambda: 60 * args.minutes - clock()  # noqa: E731
    say = lambda line: print(f"{clock():6.1f} s  {line}", flush=True)  # noqa: E731
    results = runner.run(
        chosen, settings, top, say, left, lambda rows: report.write_csv(rows, args.out / "results.csv")
    )
    results.rows.sort(key=lambda row: ops.index(row.op))
    results.outcomes.sort(key=lambda outcome: ops.index(outcome.case.op))
    pictures: list[Path] = []
    if "scaling" in args.suites and not args.only and not args.dtype:
        from benchmarks import scaling

        rows, pictures, late = scaling.run(args.level, settings, top, args.out, not args.no_plots, left)
        results.rows += rows
        results.left_out += late
    report.show_rows(results.rows)
    if not args.targets:
        results.outcomes.clear()
    elif results.outcomes:
        report.show_outcomes(results.outcomes)
    if results.compared:
        print("", *report.never_lose(results.compared), sep="\n")
    written = report.write(results, top, args.out, plots=not args.no_plots) + pictures
    print(f"wrote {', '.join(str(path) for path in written)} in {clock():.0f} s")
    if results.left_out:
        print(f"not run within {args.minutes:g} minutes (--minutes): {'; '.join(results.left_out)}")
    for row in results.red:
        print(f"RED {row.op} {row.case} {row.dtype} {row.mode} {row.provider}: {row.status}", file=sys.stderr)
    return 1 if results.red else 0


if __name__ == "__main__":
    sys.exit(main())
