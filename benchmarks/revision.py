"""Another revision of this repository, measured by the present suite: ``pyvit bench --compare REVISION``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Worktrees with their builds, one per revision, for later calls.
TREES = ROOT / "build" / "compare"

# pyvit is imported from the revision's tree, everything else from here.
_CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import pyvit
sys.path[0] = sys.argv[2]
from benchmarks.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


def commit_of(name: str) -> str | None:
    """The commit that ``name`` (a branch, a tag, HEAD~1) means in this checkout, or None."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() if found.returncode == 0 and (ROOT / ".git").exists() else None


def tree_of(commit: str) -> Path:
    """A worktree of the commit, built. Raises RuntimeError if it cannot be built."""
    tree = TREES / commit[:12]
    if not tree.exists():
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), commit], check=True)
    if not list((tree / "pyvit" / "lib").glob("*")):
        print(f"building {commit[:12]} in {tree}", flush=True)
        built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree)
        if built.returncode:
            raise RuntimeError(f"--compare: {commit[:12]} could not be built (status {built.returncode}); see above")
    return tree


def options(args: argparse.Namespace) -> list[str]:
    """The options that decide what is measured, and how, of a parsed command line."""
    found = [*args.suites, "--device", args.device, "--no-plots", "--seconds", str(args.seconds)]
    found += {"quick": ["--quick"], "full": ["--full"]}.get(args.level, [])
    found += ["--rounds", str(args.rounds)]
    found += ["--peers", ",".join(args.peers) or "none"]
    for name in ("only", "dtype", "threads"):
        if value := getattr(args, name):
            found += [f"--{name}", str(value)]
    found += [f"--{name.replace('_', '-')}" for name in ("keep_memory", "busy") if getattr(args, name)]
    return found + (["--minutes", str(args.minutes)] if args.minutes < float("inf") else [])


def measure(commit: str, args: argparse.Namespace) -> Path:
    """The results.json of the commit on this machine, measured now with the options of ``args``. Raises RuntimeError if
    the suite does not run with that revision."""
    tree = tree_of(commit)
    out = tree / "results"
    command = [sys.executable, "-c", _CHILD, str(tree), str(ROOT), *options(args), "--out", str(out)]
    (out / "results.json").unlink(missing_ok=True)
    print(f"measuring {commit[:12]}", flush=True)
    done = subprocess.run(command, cwd=ROOT)
    if not (out / "results.json").exists():
        raise RuntimeError(
            f"--compare: the suite does not run with {commit[:12]} (status {done.returncode}); see above"
        )
    return out / "results.json"
