"""Which defects the tests notice: ``python -m tests.mutation [PATTERN]``, or ``make mutation``.

Each defect of :mod:`tests.mutation.defects` is made in a copy of the checkout (build/mutation), which is built again
where it is in C++, and its tests must fail. Results are kept as they come: a second call runs what is new or survived.
The table is written to benchmarks/results/mutation.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.mutation.defects import DEFECTS, Defect

ROOT = Path(__file__).resolve().parents[2]
COPY, RECORDS = ROOT / "build/mutation/tree", ROOT / "build/mutation/records.json"
TABLE = ROOT / "benchmarks/results/mutation.md"
SECONDS = 900  # of one defect's tests
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def key(defect: Defect) -> str:
    return hashlib.sha256("\0".join(defect).encode()).hexdigest()[:16]


def copied() -> None:
    """The files of the checkout that git knows or does not ignore, and its library."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept = set(filter(None, listed.stdout.split("\0")))
    for name in kept:
        source, target = ROOT / name, COPY / name
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    link = COPY / "pyvit/triton_kernels"  # an editable installation would find the checkout's
    if not link.is_symlink():
        link.symlink_to("../triton_kernels")


def build() -> str:
    """Build the copy; the compiler's errors, if any."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"PYVIT_CUDA": "0"}
    done = subprocess.run(command, cwd=COPY, capture_output=True, text=True, env=environment)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def tested(defect: Defect) -> tuple[str, str]:
    """ "caught" and the first test that failed, "survived", or "not run" and why."""
    environment = os.environ | {"PYTHONPATH": str(COPY), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if defect.interpreted:
        environment |= {"TRITON_INTERPRET": "1", "PYVIT_NO_LIBRARY": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(defect.tests)]
    try:
        done = subprocess.run(command, cwd=COPY, capture_output=True, text=True, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "not run", f"more than {SECONDS} s"
    if done.returncode == 0:
        return "survived", ""
    failed = _FAILED.search(done.stdout)
    if done.returncode == 1 and failed:
        return "caught", failed[1]
    if done.returncode < 0:
        return "caught", f"signal {-done.returncode}"
    return "not run", (done.stdout + done.stderr)[-1000:]


def examine(defect: Defect) -> dict[str, Any]:
    file = COPY / defect.file
    original = file.read_text()
    begin = time.monotonic()
    try:
        file.write_text(original.replace(defect.old, defect.new))
        problem = build() if defect.compiled else ""
        verdict, note = ("not run", f"does not compile: {problem}") if problem else tested(defect)
    finally:
        file.write_text(original)
    return {"verdict": verdict, "note": note, "seconds": round(time.monotonic() - begin)}


def write_table(records: dict[str, dict[str, Any]]) -> None:
    done = [(d, records[key(d)]) for d in DEFECTS if key(d) in records]
    caught = sum(record["verdict"] == "caught" for _, record in done)
    lines = [
        "# Mutation check",
        "",
        f"{caught} of {len(done)} defects are caught (`make mutation`). Each is made alone, and the named test fails.",
        "",
        "| file | defect | result | first test that failed |",
        "|---|---|---|---|",
    ]
    for defect, record in done:
        note = record["note"].partition("[")[0].replace("|", "/").splitlines()
        lines.append(f"| `{defect.file}` | {defect.what} | {record['verdict']} | {f'`{note[0]}`' if note else ''} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only defects of files or with words that contain it")
    given = parser.parse_args()
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    wanted = [d for d in DEFECTS if given.pattern in f"{d.file} {d.what}"]
    waiting = [d for d in wanted if records.get(key(d), {}).get("verdict") != "caught"]
    if waiting:
        copied()
        if problem := build():
            sys.exit(f"mutation: the copy does not build: {problem}")
    for i, defect in enumerate(waiting, 1):
        record = records[key(defect)] = examine(defect)
        RECORDS.write_text(json.dumps(records, indent=1))
        print(
            f"[{i}/{len(waiting)}] {defect.file}: {defect.what}: {record['verdict']} in {record['seconds']} s "
            f"{record['note'].splitlines()[0] if record['note'] else ''}",
            flush=True,
        )
    write_table(records)
    left = [d for d in wanted if records[key(d)]["verdict"] != "caught"]
    print(f"{len(wanted) - len(left)} of {len(wanted)} caught")
    if left:
        sys.exit("not caught: " + "; ".join(f"{d.file}: {d.what}" for d in left))


if __name__ == "__main__":
    main()
