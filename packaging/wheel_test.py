"""Install a wheel into fresh environments, with no compiler on PATH, and run tests/smoke.py in each:
``make wheel-test ARGS="dist/NAME.whl --python 3.10 3.13 --torch 2.10.0 2.13.0"``.

Downloads each torch (several GB where the index has CUDA builds only) and removes each environment afterwards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wheels import PYTHONS, ROOT, interpreter


def test(wheel: Path, python: str, torch: str, folder: Path) -> tuple[bool, str]:
    """Whether the smoke test passes, and what it printed."""
    found = interpreter(python)
    if found is None:
        return False, f"Python {python} is not found"
    environment = folder / "environment"
    log = ""
    try:
        subprocess.run([found, "-m", "venv", environment], check=True)
        inside = str(environment / "bin/python")
        requirement = f"torch=={torch}" if torch != "newest" else "torch"
        for what in (["--upgrade", "pip"], [requirement], ["--no-deps", str(wheel)]):
            command = [inside, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *what]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return False, done.stdout + done.stderr
        smoke = shutil.copy(ROOT / "tests/smoke.py", folder)
        # Only what the environment brings: no compiler, no pyvit but the installed one.
        variables = {"PATH": str(environment / "bin"), "HOME": str(folder), "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run([inside, smoke], cwd=folder, env=variables, capture_output=True, text=True)
        log = done.stdout + done.stderr
        return done.returncode == 0, log
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "newest"])
    options = parser.parse_args()
    failed = 0
    for python in options.python:
        for torch in options.torch:
            with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
                passed, log = test(options.wheel.resolve(), python, torch, Path(folder))
            failed += not passed
            print(f"{'passed' if passed else 'FAILED'}: Python {python}, torch {torch}", flush=True)
            print("\n".join(f"    {line}" for line in log.splitlines()), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
