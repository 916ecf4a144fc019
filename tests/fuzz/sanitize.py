"""Random calls on the CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set
of this processor: ``python tests/fuzz/sanitize.py [CASES]``, by gcc on Linux. The build is in build/sanitized.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize=vptr"
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
REPORT = "import torch, pyvit; print(pyvit.__file__, torch.ops.pyvit.cpu_isa())"


def build() -> None:
    variables = {"CXX": "g++ -fsanitize=address,undefined", "CXXFLAGS": FLAGS, "PYVIT_CUDA": "0"}
    folders = ["--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "native")]
    command = [sys.executable, "setup.py", "-q", "build", *folders]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)


def environment(isa: str) -> dict[str, str]:
    """For a Python that imports the sanitized pyvit. The sanitizers' libraries must come before all others."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python does not free all of its own memory
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": f"{BUILD / 'lib'}:{ROOT}",
        "PYVIT_CPU_ISA": isa,
    }


def main(cases: int = 25) -> None:
    build()
    for isa in ISAS:
        variables = {**environment(isa), "PYVIT_FUZZ_CASES": str(cases)}
        asked = subprocess.run([sys.executable, "-c", REPORT], env=variables, cwd=BUILD, capture_output=True, text=True)
        if "not supported by this processor" in asked.stderr:
            print(f"{isa}: this processor does not have it", flush=True)
            continue
        if asked.stdout.split() != [str(BUILD / "lib" / "pyvit" / "__init__.py"), isa]:
            sys.exit(f"{isa}: the sanitized library does not load: {asked.stdout}{asked.stderr}")
        print(f"{isa}:", flush=True)
        tests = [str(ROOT / "tests" / "fuzz" / "test_fuzz.py"), "-k", "cpu-"]
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        done = subprocess.run([sys.executable, "-m", "pytest", *options, *tests], env=variables, cwd=BUILD)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
