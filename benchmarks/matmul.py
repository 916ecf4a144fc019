"""``python -m benchmarks.matmul``: what the rules of ``pyvit/ops/matmul_rules.py`` cost, per instruction set.

Times every candidate over the layers of ViT-Ti/S/B/L and Swin-T/S/B for one image and for eight: forward,
both gradients, and in inference with packed weights single layers and MLP branches. Prints each algorithm's time over
the best one's and the rules' regret, what they lose against the best algorithm of each shape. An instruction set other
than the processor's own is imposed on torch's libraries too, in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measure import interleave
from pyvit import library
from pyvit.dispatch.devices import cpu_isa
from pyvit.ops import matmul, prepacked
from pyvit.ops.prepacked import Branch, Prepacked

#: The same instruction set for the kernels, oneDNN and MKL.
ENVIRONMENTS = {
    "portable": {"PYVIT_CPU_ISA": "portable"},
    "avx2": {
        "PYVIT_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    "avx512": {"PYVIT_CPU_ISA": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx512bf16": {
        "PYVIT_CPU_ISA": "avx512bf16",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "native": {},
}
DTYPES = ("float32", "bfloat16", "float16")
MOST_COPIES, COLD_BYTES = 8, 64 << 20  # a layer finds its weights in memory, not in the cache that its last call left


class Case(NamedTuple):
    kind: str
    dtype: str
    rows: int
    out: int
    inner: int
    activation: str | None = None  # of a forward layer; a branch's is gelu, its second layer (inner, out)

    def __str__(self) -> str:
        return f"{self.kind}, {self.dtype}, {self.rows} x {self.inner} x {self.out}" + (
            f", {self.activation}" if self.activation else ""
        )


def layers() -> Iterator[tuple[int, int, int, str | None]]:
    """Rows, outputs, inputs and activation of every layer."""
    for batch in (1, 8):
        stages = [(197, dim) for dim in (192, 384, 768, 1024)]
        for width in (96, 128):
            stages += [(56**2 >> 2 * i, width << i) for i in range(4)]
            yield from (
                (batch * (28**2 >> 2 * i), width << (i + 1), width << (i + 2), None) for i in range(3)
            )  # patch merging
        for tokens, dim in stages:
            for out, inner, activation in (
                (3 * dim, dim, None),
                (dim, dim, None),
                (4 * dim, dim, "gelu"),
                (dim, 4 * dim, None),
            ):
                yield batch * tokens, out, inner, activation


def cases() -> list[Case]:
    found = []
    for dtype, (rows, out, inner, activation) in itertools.product(DTYPES, layers()):
        found.append(Case("forward", dtype, rows, out, inner, activation))
        found.append(Case("prepacked", dtype, rows, out, inner, activation))
        found += [Case(kind, dtype, rows, out, inner) for kind in ("grad_input", "grad_weight")]
        if activation:
            found.append(Case("prepacked branch", dtype, rows, out, inner))
    return list(dict.fromkeys(found))


def contenders(case: Case) -> tuple[dict[str, Callable[[], object]], str]:
    """A call of each algorithm, by name, and the name that the rules choose."""
    dtype, (rows, out, inner) = getattr(torch, case.dtype), case[2:5]
    copies = max(1, min(MOST_COPIES, COLD_BYTES // (out * inner * dtype.itemsize)))
    x, grad = torch.randn(rows, inner).to(dtype), torch.randn(rows, out).to(dtype)
    first = [nn.Linear(inner, out).to(dtype) for _ in range(copies)]
    calls: list[tuple[Any, ...]]
    if case.kind == "grad_input":
        candidates, calls = {**matmul.grad_input_candidates(dtype, dtype)}, [(grad, layer.weight) for layer in first]
    elif case.kind == "grad_weight":
        candidates, calls = {**matmul.grad_weight_candidates(dtype, dtype)}, [(grad, x, dtype)]
    elif case.kind == "forward":
        candidates = {**matmul.forward_candidates(dtype, dtype, case.activation)}
        calls = [(x, layer.weight, layer.bias, case.activation) for layer in first]
    else:
        branches = [Branch(layer.weight, layer.bias, case.activation) for layer in first]
        if case.kind == "prepacked branch":
            second = [nn.Linear(out, inner).to(dtype) for _ in first]
            norm = torch.ones(inner).to(dtype), torch.zeros(inner).to(dtype), 1e-6
            branches = [
                b._replace(activation="gelu", weight2=layer.weight, bias2=layer.bias, norm=norm, residual=x)
                for b, layer in zip(branches, second, strict=True)
            ]
            first += second
        candidates = prepacked_candidates([layer.weight for layer in first], case)
        calls = [(x, b) for b in branches]
    if dtype == torch.float16 and len(candidates) > 1:
        del candidates["torch"]  # twenty to fifty times the others' time, and of this command's
    kind = "prepacked" if case.kind == "prepacked branch" else case.kind
    best = matmul.by_rule(kind, candidates, rows, (out, inner), dtype)

    def turns(algorithm: Callable[..., object]) -> Callable[[], object]:
        following = itertools.cycle(calls)
        return lambda: algorithm(*next(following))

    return {name: turns(algorithm) for name, algorithm in candidates.items()}, best


def prepacked_candidates(weights: list[torch.Tensor], case: Case) -> dict[str, Callable[..., object]]:
    """By the packed form; a branch by pyvit's form in one pass and layer by layer."""
    kept = {
        form: {id(weight): Prepacked(weight, form) for weight in weights} for form in prepacked.forms(weights[0].dtype)
    }

    def with_form(form: str, one_pass: bool) -> Callable[[torch.Tensor, Branch], object]:
        def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str | None) -> torch.Tensor:
            if form == "torch":
                return matmul.by_torch(x, weight, bias, activation)
            setattr(weight, prepacked.ATTRIBUTE, kept[form][id(weight)])
            found = prepacked.linear_branch(x, Branch(weight, bias, activation)) if form == "pyvit" else None
            return prepacked.layer(x, weight, bias, activation) if found is None else found

        def call(x: torch.Tensor, b: Branch) -> object:
            if one_pass:
                for weight in (b.weight, b.weight2):
                    if weight is not None:
                        setattr(weight, prepacked.ATTRIBUTE, kept[form][id(weight)])
                return prepacked.linear_branch(x, b)
            if b.weight2 is None:
                return layer(x, b.weight, b.bias, b.activation)  # type: ignore[arg-type]
            second = (b.weight2, b.bias2, None)
            return prepacked.around(x, lambda y: layer(layer(y, b.weight, b.bias, b.activation), *second), b)  # type: ignore[arg-type]

        return call

    candidates = {form: with_form(form, form == "pyvit") for form in (*kept, "torch")}
    return (
        {**candidates, "layer by layer": with_form("pyvit", False)} if case.kind == "prepacked branch" else candidates
    )


def measure(case: Case, seconds: float) -> dict[str, Any]:
    with torch.no_grad():
        candidates, best = contenders(case)
        for call in candidates.values():  # every copy of the weights has been read once
            for _ in range(MOST_COPIES):
                call()
        timed = interleave(candidates, seconds=seconds, rounds=(2, 51), sample_ms=1.0)
    return {"case": case, "rule": best, "ms": {name: min(timing.samples) for name, timing in timed.items()}}


def work(args: argparse.Namespace) -> None:
    """All cases in this process, each with its share of the time; one JSON object a line."""
    chosen = [case for case in cases() if args.only in str(case)]
    random.Random(0).shuffle(chosen)  # where time runs out, all kinds have lost alike
    end = time.perf_counter() + args.seconds
    for done, case in enumerate(chosen):
        left = end - time.perf_counter()
        if left <= 0:
            print(f"{len(chosen) - done} of {len(chosen)} cases not run within {args.seconds:g} s", file=sys.stderr)
            return
        found = measure(case, left / (len(chosen) - done) / 2)  # what is left goes into warming up
        print(json.dumps({**found, "isa": cpu_isa(getattr(torch, case.dtype))}), flush=True)


def regret(found: dict[str, Any]) -> float:
    """Time of the rules' choice over the best one's."""
    return float(found["ms"][found["rule"]] / min(found["ms"].values()))


def report(results: list[dict[str, Any]], worst: int) -> None:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for found in results:
        groups[found["isa"], found["case"].kind, found["case"].dtype].append(found)
    print("time over the best algorithm's, mean (worst), by algorithm; then the rules'")
    for (isa, kind, dtype), group in sorted(groups.items()):
        cells = []
        for name in sorted({name for found in group for name in found["ms"]}):
            ratios = [found["ms"][name] / min(found["ms"].values()) for found in group if name in found["ms"]]
            cells.append(f"{name} {statistics.mean(ratios):.2f} ({max(ratios):.2f})")
        lost = [regret(found) for found in group]
        rules = f"rules {statistics.mean(lost):.3f} ({max(lost):.2f})"
        print(f"{isa:<11} {kind:<14} {dtype:<9} {len(group):>4} cases: {'; '.join(cells)}; {rules}")
    print(f"\nwhere the rules lose most, of {len(results)}")
    for found in sorted(results, key=regret, reverse=True)[:worst]:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(found["ms"].items(), key=lambda item: item[1]))
        print(f"{regret(found):.2f}  {found['isa']}, {found['case']}: {found['rule']} of {times}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matmul", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument(
        "--isa", default="native", help=f"comma-separated, of {', '.join(ENVIRONMENTS)} (default: native)"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="cases whose name contains TEXT: 'prepacked branch, float32', '1576 x'",
    )
    parser.add_argument("--seconds", type=float, default=600, help="for each instruction set (default: 600)")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument(
        "--worst", type=int, default=20, help="how many of the rules' worst cases to print (default: 20)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/matmul.csv"), help="every time, as CSV")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.work:
        work(args)
        return 0
    isas = args.isa.split(",")
    if unknown := [isa for isa in isas if isa not in ENVIRONMENTS]:
        parser.error(f"--isa: {', '.join(unknown)} is none of {', '.join(ENVIRONMENTS)}")
    if library.problem() is not None:
        parser.error(f"needs the compiled library: {library.problem()}")
    results: list[dict[str, Any]] = []
    passed = [f"--only={args.only}", f"--seconds={args.seconds}", f"--threads={torch.get_num_threads()}"]
    for isa in isas:
        command = [sys.executable, "-m", "benchmarks.matmul", "--work", *passed]
        env = {**os.environ, "PYVIT_LINEAR": "", **ENVIRONMENTS[isa]}
        lines = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        found = [{**each, "case": Case(*each["case"])} for each in map(json.loads, lines)]
        if not found:
            parser.error(f"--only: no case's name contains {args.only!r}")
        report(found, args.worst)
        results += found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["isa", *Case._fields, "algorithm", "ms", "rule"])
        writer.writerows(
            [f["isa"], *f["case"], name, f"{ms:.5f}", name == f["rule"]]
            for f in results
            for name, ms in f["ms"].items()
        )
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
