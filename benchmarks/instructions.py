"""Instructions of the CPU kernels, counted by valgrind's callgrind: a comparison of two builds without a quiet machine.

``python -m benchmarks.instructions --out base.json`` counts what one call of pyvit executes within its compiled library
on one thread, per case. ``--compare base.json`` (or a git revision, which is built and counted by its own suite first)
shows changes of 1 % and more, and exits with an error if any case needs more. Valgrind knows no AVX-512: the AVX2
kernels are counted. Instructions are no times: a slower access to memory does not show.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks import revision

#: A change that is reported.
LIMIT = 0.01
#: Cases that are counted if none are asked for: the quick ones, one per operator.
LEVEL = "quick"
_READY = "ready to count"


def measured(case_id: str) -> None:
    """In the process under valgrind: wait for instrumentation after everything is loaded and warm, then call once."""
    import torch

    from benchmarks import cases, providers
    from benchmarks.workload import OURS

    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = next(c for c in cases.select(tuple(cases.SUITES), "full", case_id) if c.id == case_id)
    run = providers.build(case, "random", ()).contenders[OURS].run
    run()
    run()
    print(_READY, flush=True)
    sys.stdin.readline()
    run()
    os._exit(0)


def of_library(text: str, library: str) -> Counter[str]:
    """Instructions by function of the objects whose path contains ``library``, from a file of callgrind."""
    names: dict[tuple[str, str], str] = {}
    found: Counter[str] = Counter()
    current = {"ob": "", "fn": ""}
    called = False
    for line in text.splitlines():
        if match := re.match(r"(ob|fn|cob|cfn|cfi|cfl|fi|fe|fl)=(?:\((\d+)\))?\s*(.*)", line):
            kind, number, name = match.groups()
            table = "fn" if kind.endswith("fn") else "ob" if kind.endswith("ob") else "fl"
            if number and name:
                names[table, number] = name
            if kind in current:
                current[kind] = names.get((table, number), "") if number else name
        elif line.startswith("calls="):
            called = True  # the next line is the cost of the call, which its own function has too
        elif match := re.match(r"[+\-*\d]\S* (\d+)", line):
            if not called and library in current["ob"]:
                found[current["fn"]] += int(match[1])
            called = False
    return found


def count(case_id: str) -> Counter[str]:
    """Instructions of one call by function of pyvit's library."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        child = subprocess.Popen(
            [*command, sys.executable, "-m", "benchmarks.instructions", "--case", case_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )
        assert child.stdin is not None
        assert child.stdout is not None
        if not any(_READY in line for line in child.stdout):
            raise RuntimeError(f"{case_id}: the process under valgrind ended with status {child.wait()}")
        subprocess.run(["callgrind_control", "-i", "on", str(child.pid)], check=True, capture_output=True)
        child.stdin.write("\n")
        child.stdin.close()
        if child.wait():
            raise RuntimeError(f"{case_id}: the process under valgrind ended with status {child.returncode}")
        return of_library(out.read_text(), "libpyvit_ops")


def short(function: str) -> str:
    """A C++ function's name without namespace, arguments and result."""
    plain = re.sub(r"\(anonymous namespace\)::|pyvit::|^void ", "", function)
    return re.split(r"[<(]", plain)[0].rpartition("::")[2]


def changes(base: Mapping[str, int], new: Mapping[str, int]) -> list[tuple[str, float]]:
    """Cases whose counts differ by :data:`LIMIT` or more, and new / base - 1, the largest increase first."""
    found = [(name, new[name] / base[name] - 1) for name in new if base.get(name)]
    return sorted(((n, c) for n, c in found if abs(c) >= LIMIT), key=lambda item: -item[1])


def of_revision(commit: str, only: str) -> Path:
    """The file of counts of another revision, by its own suite."""
    tree = revision.tree_of(commit)
    out = tree / "instructions.json"
    command = [sys.executable, "-m", "benchmarks.instructions", "--only", only, "--out", str(out)]
    subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=Path("instructions.json"))
    parser.add_argument("--compare", metavar="BASE", help="a file that an earlier run wrote, or a git revision")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        measured(args.case)
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    from benchmarks import cases, providers

    base = Path(args.compare) if args.compare else None
    if base is not None and not base.exists():
        commit = revision.commit_of(args.compare)
        if commit is None:
            parser.error(f"--compare: {args.compare} is neither a file nor a revision of this checkout")
        base = of_revision(commit, args.only)
    chosen = [c for c in cases.select(tuple(cases.SUITES), LEVEL, args.only) if c.op in providers.SPECS]
    found: dict[str, int] = {}
    for case in chosen:
        functions = count(case.id)
        found[case.id] = functions.total()
        most = ", ".join(f"{short(name)} {n:,}" for name, n in functions.most_common(2))
        print(f"{found[case.id]:>14,}  {case.id}: {most}", flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if base is None:
        return 0
    changed = changes(json.loads(base.read_text()), found)
    print(f"{len(changed)} of {len(found)} cases changed by {100 * LIMIT:g} % or more")
    for name, change in changed:
        print(f"  {100 * change:+.1f} %  {name}")
    return 1 if any(change > 0 for _, change in changed) else 0


if __name__ == "__main__":
    sys.exit(main())
