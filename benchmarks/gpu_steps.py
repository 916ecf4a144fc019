"""The steps of ``benchmarks.gpu``: what is measured, in items that are recorded one by one.

Part 1: do the kernels run, how fast is this GPU, which backend is faster. Part 2: where the time goes, and every peer.
Part 3: tuning, every test, whole models.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import gpu_canaries, gpu_cases, gpu_cost, gpu_micro, gpu_variants, providers, runner
from benchmarks.cases import Case
from benchmarks.ceiling import Ceiling
from benchmarks.gpu_device import Device, tool
from benchmarks.gpu_rows import Data, read
from benchmarks.inputs import DTYPES
from benchmarks.runner import Settings
from benchmarks.specs import Provider, Spec
from benchmarks.workload import OURS
from pyvit import library, testing
from pyvit.dispatch.capabilities import CAPABILITIES

_REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Context:
    """What a step needs to know of its run. ``left()``: seconds until the step must end."""

    device: Device
    out: Path
    left: Callable[[], float]

    @property
    def tiny(self) -> bool:
        return self.device.name == "fake"


@dataclass(frozen=True)
class Work:
    """One item: ``run`` returns its rows. ``digests``: of the kernels that it runs; ``limit``: seconds that it may
    take."""

    item: str
    run: Callable[[], Sequence[Data]]
    digests: tuple[str, ...] = ()
    limit: float = 120.0


@dataclass(frozen=True)
class Step:
    """``share``: the part of the time left that the step may take; ``spread``: its items are divided between
    processes; ``kernels``: whether it runs kernels, which a rehearsal interprets."""

    name: str
    part: int
    items: Callable[[Context], Iterator[Work]]
    share: float = 1.0
    spread: bool = False
    kernels: bool = True


def digests_of(op: str) -> tuple[str, ...]:
    """Digests of an operator's Triton and CUDA kernels."""
    from pyvit.triton_kernels import digests

    triton = digests.operator(op) if "triton" in CAPABILITIES.get(op, ()) else ""
    return triton, library.cuda_digests().get(op.removesuffix("_varlen"), "")


def every_digest() -> tuple[str, ...]:
    return tuple(digest for op in sorted(CAPABILITIES) for digest in digests_of(op))


def _versions(ctx: Context) -> Iterator[Work]:
    def run() -> list[Data]:
        packages = ("timm", "transformers", "nvidia-cudnn-frontend", "flash-attn", "flash-attn-4", "pytest")
        found = {name: gpu_cases.version(name).removeprefix(name).strip() or None for name in packages}
        return [{"properties": ctx.device.properties(), "packages": found, "flash 4": gpu_cases.no_flash_4() or "ok"}]

    yield Work("versions", run)


def _ceilings(ctx: Context) -> Iterator[Work]:
    device = ctx.device.tensors

    def product(dtype: torch.dtype, n: int) -> list[Data]:
        n = 64 if ctx.tiny else n
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        ms = ctx.device.milliseconds(lambda: a @ b)
        return [{"ms": ms, "gflops": 2 * n**3 / ms / 1e6, "n": n}]

    def copy() -> list[Data]:
        source = torch.ones(2**12 if ctx.tiny else 2**30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        ms = ctx.device.milliseconds(lambda: target.copy_(source))
        return [{"ms": ms, "gb_per_second": 2 * source.nbytes / ms / 1e6, "bytes": source.nbytes}]

    def calls() -> list[Data]:
        """Host time of one small call, until it has returned."""
        import pyvit

        q = torch.randn(1, 1, 16, 16, device=device)
        runs: dict[str, Callable[[], object]] = {"torch.add": lambda: q + q}
        runs["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
        for backend in ("cuda", "triton"):
            if gpu_cases.unable("flash_attention", backend, device) is None:
                runs[f"{OURS} {backend}"] = functools.partial(pyvit.ops.flash_attention, q, q, q, backend=backend)
        rows, count = [], 3 if ctx.tiny else 200
        for name, run in runs.items():
            run()
            ctx.device.lost()
            begun = time.perf_counter()
            for _ in range(count):
                run()
            rows.append({"call": name, "host_us": (time.perf_counter() - begun) / count * 1e6})
            ctx.device.lost()
        return rows

    yield Work("product bf16", lambda: product(torch.bfloat16, 8192))
    yield Work("product fp32", lambda: product(torch.float32, 4096))
    yield Work("copy", copy)
    yield Work("small calls", calls, digests_of("flash_attention"))


def ceiling(out: Path) -> Ceiling:
    """The measured ceilings of the run; NaN where there are none."""
    found = {i.item: i.rows[0] for i in read(out / "rows.jsonl") if i.step == "ceilings"}
    rates = {
        dtype: found[f"product {dtype}"]["gflops"]
        for dtype in ("bf16", "fp32")
        if "gflops" in found.get(f"product {dtype}", {})
    }
    copy = found.get("copy", {}).get("gb_per_second", math.nan)
    return Ceiling(rates, copy, 1, "matrix products of 8192 (bf16) and 4096 (fp32), copy of 1 GiB")


def _pipes(ctx: Context) -> Iterator[Work]:
    def run(kernel: gpu_micro.Kernel) -> list[Data]:
        try:
            return [{"per_second": ctx.device.rate(kernel), "unit": kernel.unit}]
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return [{"status": f"missing: {error}"}]

    for kernel in gpu_micro.kernels()[: 6 if ctx.tiny else None]:
        yield Work(kernel.name, functools.partial(run, kernel), (kernel.text,), 60.0)


def _canaries(ctx: Context) -> Iterator[Work]:
    def run(item: str, canary: gpu_canaries.Canary, on: testing.Served) -> list[Data]:
        torch.manual_seed(zlib.crc32(item.encode()))
        found = canary.run(on)
        wrong = "; ".join(str(c) for c in found if not c.passed)
        worst = max(found, key=lambda c: c.error / c.limit if c.limit else c.error)
        digest = digests_of(canary.op)[on.backend == "cuda"]
        about = {"op": canary.op, "backend": on.backend, "digest": digest, "error": worst.error, "allowed": worst.limit}
        return [{"status": f"red: {wrong}" if wrong else "ok", **about}]

    backends = [b for b in ("triton", "cuda") if gpu_cases.unable("flash_attention", b, ctx.device.tensors) is None]
    never, passed = gpu_canaries.never_run(), gpu_canaries.passed()
    works = []
    for item, canary, on in gpu_canaries.chosen(ctx.device.tensors, backends):
        if ctx.tiny and item not in TINY_CANARIES:
            continue
        known = (item, digests_of(canary.op)[on.backend == "cuda"]) in passed
        rank = 0 if (on.backend, canary.op) in never else 2 if known else 1
        works.append((rank, Work(item, functools.partial(run, item, canary, on), digests_of(canary.op))))
    yield from (work for _, work in sorted(works, key=lambda ranked: ranked[0]))


#: pytest's arguments for the operators' tests.
TESTS = ("tests/ops", "tests/losses", "tests/cuda/test_library.py", "-m", "gpu")
#: What a rehearsal runs of each step.
TINY_CANARIES = ("map of 70 tokens, triton-bfloat16", "nt_xent, triton-bfloat16")
TINY_WORKLOADS = ("attention map N=197 d=64",)
TINY_TESTS = ("tests/ops/test_attention_map.py", "-k", "triton-bfloat16 and (test_forms_of_rows or shifted)")


def _settings(ctx: Context, extra: Callable[[Case, Spec], Sequence[Provider]], peers: tuple[str, ...] = ()) -> Settings:
    if ctx.tiny:
        return Settings(0.0, (1, 1), (), "cpu", both_sources=False, extra=extra)
    return Settings(0.3, (5, 31), peers, "cuda", both_sources=False, extra=extra, floor=gpu_cost.floor_ms)


def _rows_of(
    ctx: Context, case: Case, settings: Settings, wanted: Callable[[str], bool] = lambda name: True
) -> list[Data]:
    work = runner.build(case, case.sources[0], settings)
    work.contenders = {name: c for name, c in work.contenders.items() if wanted(name)}
    work.unavailable = {name: why for name, why in work.unavailable.items() if wanted(name)}
    about = {"digests": digests_of(case.op)}
    rows = [asdict(row) | about for row in runner.run_workload(work, settings, ceiling(ctx.out))]
    if ctx.device.name == "cuda":
        torch.cuda.empty_cache()
    return rows


def _dispatch(ctx: Context) -> Iterator[Work]:
    wanted = lambda name: name.startswith(f"{OURS} ") or name in gpu_cases.PYTORCHS  # noqa: E731
    settings = _settings(ctx, gpu_cases.both)
    cases = gpu_cases.dispatch()
    if ctx.tiny:
        cases = [replace(c, label="tiny", dtype="bf16") for c in gpu_cases.tiny() if c.op == "patch_embed"]
    for case in cases:
        run = functools.partial(_rows_of, ctx, case, settings, wanted)
        yield Work(case.id, run, digests_of(case.op))


def _peers(ctx: Context) -> Iterator[Work]:
    """Every case of an operator with every peer. FlashAttention 4, which replaces SDPA's flash backend in the whole
    process, has items of its own."""
    extra = gpu_cases.extra
    if ctx.tiny:
        extra = lambda case, spec: [p for p in gpu_cases.extra(case, spec) if p.name != "flex"]  # noqa: E731
    settings = _settings(ctx, extra, ("compile",))
    cases = gpu_cases.ordered([*gpu_cases.ops(), *gpu_cases.features(), *gpu_cases.losses()])
    if ctx.tiny:
        cases = [c for c in gpu_cases.tiny_features() if c.op == "flash_attention" and c.shape["batch"] == 1]
    for case in cases:
        yield Work(case.id, functools.partial(_rows_of, ctx, case, settings), digests_of(case.op), 180.0)
    if gpu_cases.no_flash_4() is None:
        for case in cases:
            if case.op == "flash_attention":
                yield Work(f"{case.id}, FA4", functools.partial(_by_flash_4, ctx, case), digests_of(case.op), 180.0)


def _by_flash_4(ctx: Context, case: Case) -> list[Data]:
    with gpu_cases.flash_4():
        return _rows_of(ctx, case, _settings(ctx, gpu_cases.by_flash_4), lambda name: name in (OURS, gpu_cases.FA4))


def _kernels(ctx: Context) -> Iterator[Work]:
    """Time of each kernel in a forward and backward: variants beside the present form, every workload of Triton's, and
    CUDA's calls of the step "dispatch"."""
    from pyvit.triton_kernels.tools.tune import _agree
    from pyvit.triton_kernels.tools.workloads import CASES

    def rows(case: str, dtype: str, variant: str, times: dict[str, float]) -> list[Data]:
        about = {"case": case, "dtype": dtype, "variant": variant}
        return [{**about, "kernel": name, ctx.device.unit: spent} for name, spent in times.items()]

    def present(case: str, dtype: str) -> list[Data]:
        return rows(case, dtype, "", ctx.device.kernel_times(_prepared(ctx, case, dtype)))

    def changed(variant: gpu_variants.Variant) -> list[Data]:
        run = _prepared(ctx, variant.case, variant.dtype)
        wanted = run()
        found = rows(variant.case, variant.dtype, "", ctx.device.kernel_times(run))
        with variant.change():
            if not _agree(run(), wanted):
                return [*found, {"variant": variant.name, "status": "red: other results"}]
            return found + rows(variant.case, variant.dtype, variant.name, ctx.device.kernel_times(run))

    def by_cuda(case: Case) -> list[Data]:
        spec = providers.SPECS[case.op](case, case.sources[0], DTYPES[case.dtype], ctx.device.tensors)
        ours = gpu_cases.on_backend("cuda", next(p for p in spec.providers if p.name == OURS))
        run = providers.timed(ours, spec.tensors, spec.grads, case.mode)
        return rows(case.id, case.dtype, "cuda", ctx.device.kernel_times(run))

    whole = every_digest()
    for variant in gpu_variants.VARIANTS[: 1 if ctx.tiny else None]:
        yield Work(f"variant: {variant.name}", functools.partial(changed, variant), whole)
    for case in TINY_WORKLOADS if ctx.tiny else CASES:
        yield Work(f"{case}, bf16", functools.partial(present, case, "bf16"), whole)
    for case in gpu_cases.dispatch():
        if case.mode != "forward" and gpu_cases.unable(case.op, "cuda", ctx.device.tensors) is None:
            yield Work(f"cuda: {case.id}", functools.partial(by_cuda, case), digests_of(case.op))


def _prepared(ctx: Context, case: str, dtype: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    from pyvit.triton_kernels.tools import workloads

    return workloads.prepare(case, DTYPES[dtype], ctx.device.tensors, 1 if ctx.tiny else 64)


def _memcheck(ctx: Context) -> Iterator[Work]:
    """compute-sanitizer on the kernel that read out of bounds on an H100, in the dtype in which it did."""
    variant = gpu_variants.FLOAT32_SHORT

    def run() -> list[Data]:
        if (program := tool("compute-sanitizer", ctx.device, ctx.out)) is None:
            return [{"status": "missing: compute-sanitizer is not installed"}]
        command = [program, "--tool", "memcheck", "--error-exitcode", "3", "--print-limit", "20", sys.executable]
        done = _called([*command, "-m", "benchmarks.gpu_variants", variant.case, variant.dtype, variant.name], 240.0)
        (ctx.out / "memcheck.txt").write_text(done.stdout + done.stderr)
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        status = {0: "ok", 3: "red: memory errors, see memcheck.txt"}.get(done.returncode, "failed")
        return [{"status": status, "exit status": done.returncode, "said": "\n".join(lines)[-2000:]}]

    yield Work(variant.name, run, every_digest(), 300.0)


def _called(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
    )


def _nsight(ctx: Context) -> Iterator[Work]:
    """Nsight Compute on six kernels: every metric of its basic sections."""

    def run(kernel: str, case: str) -> list[Data]:
        if (program := tool("ncu", ctx.device, ctx.out)) is None:
            return [{"status": "missing: ncu is not installed"}]
        command = [program, "--csv", "--page", "details", "--set", "detailed", "--kernel-name", f"regex:^{kernel}$"]
        command += ["--launch-count", "1", "--export", str(ctx.out / f"ncu-{kernel}"), "--force-overwrite"]
        done = _called([*command, sys.executable, "-m", "benchmarks.gpu_variants", case, "bf16"], 150.0)
        metrics = metrics_of(done.stdout)
        if done.returncode == 0 and not metrics:  # some versions print nothing when they write a file
            command = [program, "--import", str(ctx.out / f"ncu-{kernel}.ncu-rep"), "--csv", "--page", "details"]
            metrics = metrics_of(_called(command, 60.0).stdout)
        if not metrics:
            said = (done.stdout + done.stderr).strip().splitlines()
            return [{"status": f"failed: {said[-1] if said else 'no output'}", "exit status": done.returncode}]
        return [{"status": "ok", "kernel": kernel, "case": case, "metrics": metrics}]

    for kernel, case in list(gpu_variants.PROFILED.items())[: 1 if ctx.tiny else None]:
        yield Work(kernel, functools.partial(run, kernel, case), every_digest(), 180.0)


def metrics_of(text: str) -> dict[str, str]:
    """Metrics in ``ncu --csv --page details``, whose table comes after lines of other text: name -> value and unit."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name"):
            found[f"{row['Section Name']}: {row['Metric Name']}"] = (
                f"{row['Metric Value']} {row['Metric Unit']}".strip()
            )
    return found


def _tuning(ctx: Context) -> Iterator[Work]:
    """Tile sizes, each saved when it is found; workloads in groups, so that every process compiles for all of one."""
    from pyvit.triton_kernels import tiles
    from pyvit.triton_kernels.tools import tune, workloads

    groups: dict[str, list[str]] = {}
    for case in TINY_WORKLOADS if ctx.tiny else workloads.CASES:
        groups.setdefault(case.split()[0], []).append(case)

    def run(cases: Sequence[str], share: float) -> list[Data]:
        budget = max(1.0, ctx.left() * share)
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            print(line, flush=True)

        rest = {"report": say, "device": ctx.device.tensors, "resume": True}
        if ctx.tiny:
            found = tune.tune(cases, budget=budget, batch=1, most=1, time_of=ctx.device.milliseconds, **rest)
        else:
            found = tune.tune(cases, budget=budget, jobs=ctx.device.workers, **rest)
        names = [f"{case} " for case in cases]
        entries = [asdict(e) for e in found if e.measured.startswith(tuple(names))]
        return [{"status": "ok", "file": str(tiles.overrides_path()), "entries": entries, "said": said[-40:]}]

    for i, (name, cases) in enumerate(groups.items()):
        share = 1.0 / (len(groups) - i)
        yield Work(name, functools.partial(run, cases, share), every_digest(), 600.0)


def _models(ctx: Context) -> Iterator[Work]:
    peers = ("compile", "accelerate", "timm", "transformers")
    settings = replace(_settings(ctx, gpu_cases.extra, peers), peers=() if ctx.tiny else peers)
    cases = gpu_cases.models()
    if ctx.tiny:
        cases = [
            Case("vit_tiny_patch16_224", "batch 1", "fp32", "inference", {"batch": 1, "size": 224}, sources=("random",))
        ]
        settings = replace(settings, device="cpu")
    for case in cases:
        yield Work(case.id, functools.partial(_rows_of, ctx, case, settings), every_digest(), 300.0)


def _tests(ctx: Context) -> Iterator[Work]:
    """The operators' tests, which :mod:`benchmarks.gpu_tests` runs."""
    yield from ()


STEPS = (
    Step("versions", 1, _versions),
    Step("ceilings", 1, _ceilings, 0.2),
    Step("pipes", 1, _pipes, 0.2),
    Step("canaries", 1, _canaries, 0.5, spread=True),
    Step("dispatch", 1, _dispatch),
    Step("kernels", 2, _kernels, 0.4),
    Step("memcheck", 2, _memcheck, 0.25),
    Step("nsight", 2, _nsight, 0.4),
    Step("peers", 2, _peers),
    Step("tuning", 3, _tuning, 0.4),
    Step("tests", 3, _tests, 0.6, spread=True),
    Step("models", 3, _models, kernels=False),
)
BY_NAME = {step.name: step for step in STEPS}
