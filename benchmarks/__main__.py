"""``pyvit bench [GROUP ...]``, or ``python -m benchmarks`` in a checkout: check, time, report."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
import warnings
from pathlib import Path

import torch

import pyvit
from benchmarks import attention_peers, cases, ceiling, compare, energy, machine, report, revision, runner, share
from benchmarks.workload import PEERS

GROUPS = (*cases.SUITES, "scaling")
#: Seconds per case, by level.
_SECONDS = {"quick": 0.05, "default": 0.4, "full": 2.0}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pyvit bench", description="Check and time pyvit against naive, PyTorch and peers."
    )
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="group",
        help=f"any of: {', '.join(GROUPS)} (default: all; scaling is shorter without --full)",
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
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
        "--rounds",
        type=int,
        default=0,
        help=f"least rounds per case (default: 5, --quick 3, --compare {compare.ROUNDS})",
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
    parser.add_argument(
        "--busy", action="store_true", help="measure although the machine is busy; the report then says so"
    )
    parser.add_argument(
        "--price", type=float, default=0.0, metavar="DOLLARS", help="of the machine per hour: adds images per dollar"
    )
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="show what became significantly faster or slower since BASE: a results.json, the folder that has it, or a "
        "git revision, which is built and measured first; exits with an error if anything of pyvit became slower",
    )
    parser.add_argument(
        "--share",
        nargs="?",
        type=Path,
        const=share.RESULTS,
        metavar="FOLDER",
        help="also write FOLDER/MACHINE/ in the form that is committed (default: benchmarks/results of a checkout)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="where report.html, results.* and plots go (default: results)"
    )
    parser.add_argument("--no-plots", action="store_true", help="write no pictures")
    parser.add_argument("--targets", action="store_true", help="also compare with the project's targets")
    args = parser.parse_args(argv)
    args.suites = tuple(args.suites) or GROUPS
    unknown = [name for name in args.suites if name not in GROUPS]
    if unknown:
        parser.error(f"unknown group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    args.peers = (
        {"all": PEERS, "none": ()}.get(args.peers) if args.peers in ("all", "none") else tuple(args.peers.split(","))
    )
    strangers = [name for name in args.peers if name not in PEERS]
    if strangers:
        parser.error(f"unknown peer {', '.join(strangers)}; choose from {', '.join(PEERS)}")
    if args.dtype not in ("", "fp32", "bf16", "int8"):
        parser.error(f"unknown dtype {args.dtype}; choose from fp32, bf16, int8")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no GPU")
    args.revision = None
    if args.compare and not Path(args.compare).exists():
        args.revision = revision.commit_of(args.compare)
        if args.revision is None:
            parser.error(f"--compare: {args.compare} is neither a file or folder nor a revision of this checkout")
    args.level = args.level or "default"
    args.seconds = args.seconds or _SECONDS[args.level]
    args.rounds = args.rounds or (compare.ROUNDS if args.compare else 3 if args.level == "quick" else 5)
    args.minutes = args.minutes or (
        4.5 if args.level == "default" and not (args.only or args.dtype or args.peers) else math.inf
    )
    return args


def measure(
    args: argparse.Namespace, settings: runner.Settings, top: ceiling.Ceiling
) -> tuple[runner.Results, list[Path]]:
    """All results of the cases that were asked for, and the plots of the scaling curves."""
    start = time.perf_counter()
    clock = lambda: time.perf_counter() - start  # noqa: E731
    left = lambda: 60 * args.minutes - clock()  # noqa: E731
    say = lambda line: print(f"{clock():6.1f} s  {line}", flush=True)  # noqa: E731
    chosen = cases.select(tuple(s for s in args.suites if s in cases.SUITES), args.level, args.only, args.dtype)
    if args.device != "cpu":
        chosen = [case for case in chosen if case.dtype != "int8"]  # which is inference on CPUs
    ops = list(dict.fromkeys(case.op for case in chosen))
    if args.minutes < math.inf:
        chosen = cases.spread(chosen)
    keep = lambda rows: report.records.write_csv(rows, args.out / "results.csv")  # noqa: E731
    results = runner.run(chosen, settings, top, say, left, keep)
    results.rows.sort(key=lambda row: ops.index(row.op))
    results.outcomes.sort(key=lambda outcome: ops.index(outcome.case.op))
    pictures: list[Path] = []
    if "scaling" in args.suites and not args.only and not args.dtype and args.device == "cpu":
        from benchmarks import scaling

        rows, pictures, late = scaling.run(args.level, settings, top, args.out, not args.no_plots, left)
        results.rows += rows
        results.left_out += late
    return results, pictures


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    start = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    seen = machine.busy()
    if seen:
        print(f"the machine is busy: {seen}", file=sys.stderr)
        if not args.busy and args.level != "quick":
            print("times of a busy machine mislead; --busy measures all the same", file=sys.stderr)
            return 2
    if args.revision:
        args.compare = revision.measure(args.revision, args)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    kept = args.keep_memory and pyvit.keep_memory()
    top = ceiling.measure(torch.get_num_threads(), 0.05 if args.level == "quick" else 0.5, args.device)
    joules, source = energy.counter(args.device)
    about = machine.describe(top, args.device, command=machine.command(argv), energy=source, busy=seen)
    print(
        "\n".join(machine.lines(about)),
        *(["keep_memory: freed memory stays in the process"] if kept else []),
        sep="\n",
        flush=True,
    )
    settings = runner.Settings(
        seconds=args.seconds,
        rounds=(args.rounds, max(args.rounds, 5 if args.level == "quick" else 101)),
        peers=args.peers,
        device=args.device,
        joules=joules,
        extra=functools.partial(attention_peers.extra, args.peers),
    )
    results, pictures = measure(args, settings, top)
    report.show_rows(results.rows)
    if not args.targets:
        results.outcomes.clear()
    elif results.outcomes:
        report.show_outcomes(results.outcomes)
    if results.compared:
        print("", *report.never_lose(results.compared), sep="\n")
    written = report.write(results, about, args.out, not args.no_plots, args.price) + pictures
    if args.share:
        written += share.write(results, about, args.share, args.price)
    slower = False
    if args.compare:
        _, base = report.records.read(Path(args.compare))
        lines, slower = compare.report(base, results.rows)
        print("", *lines, sep="\n")
    print(f"wrote {', '.join(str(path) for path in written)} in {time.perf_counter() - start:.0f} s")
    if results.left_out:
        print(f"not run within {args.minutes:g} minutes (--minutes): {'; '.join(results.left_out)}")
    for row in results.red:
        print(f"RED {row.op} {row.case} {row.dtype} {row.mode} {row.provider}: {row.status}", file=sys.stderr)
    return 1 if results.red or slower else 0


if __name__ == "__main__":
    sys.exit(main())
