"""``python -m benchmarks.gpu``: tests, tuning, operators, models and targets on a GPU, in one command.

Needs torch with a GPU, triton, numpy, matplotlib and pytest. timm, transformers and scikit-learn are used if installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_cases, report, runner
from benchmarks.cases import Case
from benchmarks.ceiling import Ceiling
from benchmarks.runner import Outcome, Results, Settings

STEPS = ("tests", "tune", "ops", "losses", "models")
_REPOSITORY = Path(__file__).parent.parent


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
            "one, install torch for it"
        )
    if importlib.util.find_spec("triton") is None:
        return "needs the package 'triton' (pip install 'triton>=3.6')"
    return None


def measure_ceiling() -> Ceiling:
    """The GPU's rates in a large matrix product and a large copy."""
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        n = 8192 if dtype == torch.bfloat16 else 4096
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        rates[name] = 2 * n**3 / _milliseconds(lambda a=a, b=b: a @ b) / 1e6
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _milliseconds(lambda: target.copy_(source)) / 1e6
    return Ceiling(rates, copy, 1, f"{torch.cuda.get_device_name()}: matrix product of 8192 (bf16), copy of 1 GiB")


def _milliseconds(run: object) -> float:
    from benchmarks import measure

    return min(
        measure.interleave({"ceiling": run}, seconds=0.5, device="cuda", rounds=(5, 21), sample_ms=20.0)[
            "ceiling"
        ].samples
    )  # type: ignore[dict-item]


def run_tests(limit: float) -> str:
    """Run the tests marked ``gpu`` in a separate process. Returns their summary line."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "-m",
        "gpu",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    try:
        done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()] or done.stderr.splitlines() or ["no output"]
    if done.returncode not in (0, 5):  # pytest's exit code 5: no test was selected
        print(done.stdout[-4000:])
    return f"{'pass' if done.returncode == 0 else 'FAIL'}: {lines[-1]}"


def tune(limit: float) -> str:
    """Run the tuner, which writes the tile table for this GPU."""
    if importlib.util.find_spec("pyvit.triton_kernels.tools.tune") is None:
        return "this pyvit has no pyvit.triton_kernels.tools.tune"
    command = [sys.executable, "-m", "pyvit.triton_kernels.tools.tune", "--budget", f"{0.8 * limit:.0f}"]
    try:
        done = subprocess.run(command, cwd=_REPOSITORY, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s; the tiles are unchanged"
    return "done" if done.returncode == 0 else f"FAIL: exit status {done.returncode}"


def folder(name: str) -> str:
    """A GPU's name as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _peers() -> tuple[str, ...]:
    return ("compile", *(name for name in ("timm", "transformers") if importlib.util.find_spec(name)))


def chosen_cases(steps: Sequence[str]) -> list[Case]:
    """The cases of ``steps``, in order of priority."""
    kinds = {"ops": gpu_cases.ops, "losses": gpu_cases.losses, "models": gpu_cases.models}
    return gpu_cases.ordered([case for step in steps if step in kinds for case in kinds[step]()])


def measure_within(
    chosen: Sequence[Case], settings: Settings, top: Ceiling, left: Callable[[], float], say: Callable[[str], None]
) -> Results:
    """Measure case by case while the ``left()`` seconds are enough for a case as slow as the slowest so far. Targets of
    the others are reported as not measured."""
    results, slowest = Results(), 10.0
    for i, case in enumerate(chosen):
        begun = left()
        if begun < slowest:
            results.left_out += [late.id for late in chosen[i:]]
            results.outcomes += [Outcome(late, "not run: no time left", None) for late in chosen[i:] if late.target]
            break
        one = runner.run([case], settings, top, lambda line, i=i: say(f"{i + 1}/{len(chosen)} {line}"))
        results.rows += one.rows
        results.outcomes += one.outcomes
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        slowest = max(slowest, begun - left())
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Test, tune and time pyvit on this machine's GPU."
    )
    parser.add_argument("steps", nargs="*", metavar="step", help=f"any of: {', '.join(STEPS)} (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="time for everything (default 7.5); what does not fit is listed"
    )
    parser.add_argument("--out", type=Path, default=None, help="default benchmarks/results/<gpu>")
    args = parser.parse_args(argv)
    steps = tuple(args.steps) or STEPS
    if unknown := [step for step in steps if step not in STEPS]:
        parser.error(f"unknown step {', '.join(unknown)}; choose from {', '.join(STEPS)}")
    if (why := lacking()) is not None:
        print(f"make gpu {why}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    left = lambda: 60 * args.minutes - (time.perf_counter() - start)  # noqa: E731
    torch.backends.cuda.matmul.allow_tf32 = False
    said: dict[str, str] = {}
    if "tests" in steps:
        said["tests"] = run_tests(0.35 * left())
        print(f"tests: {said['tests']}", flush=True)
    if "tune" in steps:
        said["tune"] = tune(0.25 * left())
        print(f"tune: {said['tune']}", flush=True)
    from benchmarks import gpu_cost

    top = measure_ceiling()
    print("\n".join(report.machine(top)), flush=True)
    settings = runner.Settings(
        seconds=0.3,
        rounds=(5, 31),
        peers=_peers(),
        device="cuda",
        both_sources=False,
        extra=gpu_cases.extra,
        floor=gpu_cost.floor_ms,
    )
    say = lambda line: print(f"{time.perf_counter() - start:6.1f} s  {line}", flush=True)  # noqa: E731
    results = measure_within(chosen_cases(steps), settings, top, left, say)
    if results.left_out:
        said["not run: no time left"] = "; ".join(results.left_out)
    out = args.out or _REPOSITORY / "benchmarks" / "results" / folder(torch.cuda.get_device_name())
    report.show_rows(results.rows)
    written = report.write(results, top, out)
    print(f"wrote {', '.join(str(path) for path in written)}")
    report.show_outcomes(results.outcomes)
    for step, line in said.items():
        print(f"{step}: {line}")
    print(f"{time.perf_counter() - start:.0f} s")
    return 1 if results.red or any(line.startswith("FAIL") for line in said.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
