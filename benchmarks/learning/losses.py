"""Compare pyvit's streaming losses with naive ones: time, memory and training curves, for docs/results.md.

``python -m benchmarks.learning.losses [costs] [curves]`` writes one or both tables. Each measurement runs in a separate
process. Memory is the increase of the peak resident memory over forward and backward.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import pyvit

ROOT = Path(__file__).resolve().parents[2]
N, D, PROTOTYPES = 4096, 512, 32768
STEPS = 40
CURVES = ("clip", "simclr", "dino")


def compute(loss: str, backend: str | None) -> torch.Tensor:
    """A loss of ``N`` rows, or the distillation loss of 4 crops of 64 images and ``PROTOTYPES`` prototypes."""

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape), dim=-1).requires_grad_()

    if loss == "distillation_cross_entropy":
        student = unit(4, 64, 256)
        teacher = unit(2, 64, 256)
        rows = [unit(PROTOTYPES, 256) for _ in range(2)]
        given = {"student_prototypes": rows[0], "teacher_prototypes": rows[1].detach(), "backend": backend}
        return pyvit.ops.distillation_cross_entropy(student, teacher.detach(), 0.1, 0.04, **given)
    more = {"info_nce": (20.0,), "nt_xent": (0.1,), "sigmoid_contrastive": (10.0, -10.0)}[loss]
    return getattr(pyvit.ops, loss)(unit(N, D), unit(N, D), *more, backend=backend)


def peak() -> float:
    """Peak resident memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(loss: str, kind: str) -> dict[str, float]:
    backend = "reference" if kind == "naive" else None
    torch.manual_seed(0)
    torch.randn(8, D) @ torch.randn(D, 8)
    before, began = peak(), time.perf_counter()
    value = compute(loss, backend)
    value.backward()
    first, memory = time.perf_counter() - began, peak() - before
    times = [first]
    for _ in range(2):
        torch.manual_seed(0)
        began = time.perf_counter()
        compute(loss, backend).backward()
        times.append(time.perf_counter() - began)
    return {"value": value.item(), "seconds": min(times), "memory": memory}


def curve(recipe: str, kind: str) -> list[float]:
    """Losses of a run's first steps: with pyvit's kernels ("ours"), or with plain PyTorch in float32 ("naive") or
    float64 ("exact").

    All augment in float32, so that their views are the same.
    """
    from pyvit.train import Config
    from pyvit.train.augment import Augment
    from pyvit.train.engine import Run

    with tempfile.TemporaryDirectory() as folder, pyvit.use_backend(None if kind == "ours" else "reference"):
        run = Run(Config(recipe=recipe, data="digits", batch_size=64, steps=STEPS, out=folder))
        if kind == "exact":
            float32_views = run.recipe.views

            def to_float64(view: object) -> object:
                return view.double() if isinstance(view, torch.Tensor) and view.is_floating_point() else view

            run.recipe.double()
            for module in run.recipe.modules():
                if isinstance(module, Augment):
                    module.float()
            run.recipe.mean, run.recipe.std = run.recipe.mean.float(), run.recipe.std.float()
            run.recipe.views = lambda *of: {name: to_float64(view) for name, view in float32_views(*of).items()}
        run.model.train()
        batches = run.batches()
        return [run.step(step, batches)["loss"] for step in range(STEPS)]


def child(*arguments: str, **env: str) -> str:
    """Run this file with ``arguments`` and return the last line of its output."""
    command = [sys.executable, "-m", "benchmarks.learning.losses", *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    ).stdout.splitlines()[-1]


def costs() -> list[str]:
    lines = [
        "| loss | streaming | naive | streaming memory | naive memory | difference of values |",
        "|---|---|---|---|---|---|",
    ]
    for loss in ("info_nce", "nt_xent", "sigmoid_contrastive", "distillation_cross_entropy"):
        ours, naive = (json.loads(child("measure", loss, kind)) for kind in ("streaming", "naive"))
        times = (
            f"{ours['seconds']:.2f} s | {naive['seconds']:.2f} s | {ours['memory']:.0f} MB | {naive['memory']:.0f} MB"
        )
        lines.append(f"| `{loss}` | {times} | {abs(ours['value'] / naive['value'] - 1):.0e} |")
        print(lines[-1], flush=True)
    return lines


def curves() -> list[str]:
    lines = [
        "| recipe on digits | first loss | last loss | ours - naive | ours - float64 | naive - float64 |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in CURVES:
        ours, naive, exact = (json.loads(child("curve", recipe, kind)) for kind in ("ours", "naive", "exact"))
        apart = [
            max(abs(a / b - 1) for a, b in zip(*pair, strict=True))
            for pair in ((ours, naive), (ours, exact), (naive, exact))
        ]
        lines.append(
            f"| {recipe}, {STEPS} steps | {ours[0]:.4f} | {ours[-1]:.4f} | "
            + " | ".join(f"{x:.0e}" for x in apart)
            + " |"
        )
        print(lines[-1], flush=True)
    return lines


TABLES = {"costs": costs, "curves": curves}


def main(names: list[str]) -> None:
    if unknown := set(names) - set(TABLES):
        sys.exit(f"losses: names must be among {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    for name in names or TABLES:
        lines, page = TABLES[name](), ROOT / "docs" / "results.md"
        before, _, rest = page.read_text().partition(f"<!-- {name} -->")
        end = f"<!-- end {name} -->"
        page.write_text(f"{before}<!-- {name} -->\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    elif sys.argv[1:2] == ["curve"]:
        print(json.dumps(curve(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
