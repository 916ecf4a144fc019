"""The GPU benchmarks, as far as they run without a GPU: a rehearsal on the PTX interpreter, the record, the watcher."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_canaries,
    gpu_cases,
    gpu_cost,
    gpu_device,
    gpu_micro,
    gpu_model,
    gpu_report,
    gpu_rows,
    gpu_steps,
    gpu_tests,
    gpu_variants,
    loss_specs,
    measure,
    report,
    runner,
    specs,
)
from benchmarks.cases import Case
from benchmarks.ceiling import Ceiling
from benchmarks.gpu_worker import Order, Watcher
from benchmarks.runner import Settings
from benchmarks.workload import OURS
from pyvit.dispatch import choice

REPOSITORY = Path(__file__).parents[2]
TOP = Ceiling({"fp32": 100.0, "bf16": 200.0}, 10.0, 1, "fixed for the test")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_says_what_it_needs(capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "needs a GPU that torch can use" in said[0]


@pytest.fixture
def no_collection(monkeypatch):
    """Garbage collection before every timing would take most of the time of tiny cases."""
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)


@pytest.mark.usefixtures("no_collection")
def test_gpu_cases_run_on_any_device(capsys):
    """The GPU cases end to end with tiny shapes. On a CPU the SDPA backends refuse them, and each row says so."""
    floor = lambda case: gpu_cost.floor_ms(case, "NVIDIA H200")  # noqa: E731
    settings = Settings(seconds=0.01, rounds=(2, 2), both_sources=False, extra=_uncompiled, floor=floor)
    so_far: list[int] = []
    results = runner.run(gpu_cases.tiny(), settings, TOP, lambda line: None, keep=lambda rows: so_far.append(len(rows)))
    assert not results.red
    assert len(so_far) == len(gpu_cases.tiny())
    assert so_far == sorted(set(so_far))
    assert so_far[-1] == len(results.rows)
    assert len(results.outcomes) == 5
    rows = {(row.op, row.mode, row.provider): row for row in results.rows}
    assert rows["flash_attention", "forward+backward", "sdpa math"].timed
    assert rows["flash_attention", "forward+backward", "sdpa cuDNN"].status.startswith("missing: RuntimeError")
    assert rows["window_attention", "backward", OURS].percent_of_roofline > 0
    assert rows["window_attention", "backward", OURS].floor_ms > rows["window_attention", "forward", OURS].floor_ms > 0
    for op in loss_specs.SPECS:
        assert rows[op, "forward+backward", OURS].timed
        assert rows[op, "forward+backward", "naive"].timed
        assert rows[op, "forward+backward", OURS].floor_ms > 0
    report.show_rows(results.rows)
    printed = capsys.readouterr().out
    assert "floor ms" in printed
    assert "missing: flash_attention tiny" in printed


def test_gpu_targets_are_all_there():
    """Every GPU target exists once, and every attention case is compared with a pinned SDPA backend."""
    by = {case.id: case.target for case in gpu_cases.every() if case.target}
    for batch, n in ((256, 197), (192, 257), (64, 577), (32, 1025)):
        target = by[f"flash_attention {batch}x12x{n}x64 bf16 forward+backward"]
        assert target.ratio == 1.2
        assert target.against == ("sdpa cuDNN", "sdpa flash", "sdpa efficient")
    windows = {name: target for name, target in by.items() if name.startswith("window")}
    assert {t.each for t in windows.values()} == {(("compile", 2.0), ("timm path", 5.0))}
    for mode, percent in (("forward", 60), ("backward", 40)):
        assert [t.roofline for name, t in windows.items() if name.endswith(f" {mode}")] == [percent] * 5
    assert by["patch_embed 256x224 patch 16 bf16 forward"].roofline == 80
    assert by["swin_base_patch4_window7_224 batch 128 bf16 inference"].ratio == 1.5
    assert by["swin_tiny_patch4_window7_224 batch 64 bf16 train"].memory == 0.7


def test_dispatch_measures_twenty_calls():
    """Ten shapes, forward and with the backward: each kind of tile once, as the recorded measurements have them."""
    cases = gpu_cases.dispatch()
    assert len({case.id for case in cases}) == len(cases) == 20
    assert {(c.op, gpu_model.shape(c)) for c in cases} == {(r.op, r.shape) for r in choice.MEASURED}


def test_every_feature_has_a_case():
    shapes = [case.shape for case in gpu_cases.features()]
    for name in ("lengths", "bias", "kv_heads", "dropout", "causal"):
        assert any(name in shape for shape in shapes)
    assert sum(shape.get("batch") == 1 for shape in shapes) == 2


@pytest.mark.usefixtures("no_collection")
def test_features_are_computed():
    """Tiny cases of every feature: ours passes the check, with the dropout mask of the definition; peers that cannot be
    compared or are missing say why."""
    settings = Settings(seconds=0.01, rounds=(1, 1), both_sources=False, extra=_uncompiled)
    results = runner.run(gpu_cases.tiny_features(), settings, TOP, lambda line: None)
    assert not results.red
    rows = {(row.op, row.case, row.provider): row for row in results.rows}
    ours = [row for row in results.rows if row.provider == OURS]
    assert len(ours) == len(gpu_cases.tiny_features())
    assert all(row.timed for row in ours)
    dropout = {provider: row for (_, case, provider), row in rows.items() if "dropout" in case}
    assert dropout[OURS].max_err <= dropout[OURS].allowed_err
    assert dropout["sdpa math"].status == "unchecked: its dropout mask is its own"
    assert dropout["sdpa math"].timed
    assert dropout["flex FLASH"].status == "missing: has no dropout"
    grouped = {provider: row for (_, case, provider), row in rows.items() if "GQA" in case}
    assert grouped["sdpa math"].status == grouped["naive"].status == "ok"
    one = {provider: row for (_, case, provider), row in rows.items() if case == "tiny launch-bound"}
    assert one[gpu_cases.GRAPH].status == "missing: CUDA graphs need a GPU"
    if gpu_cases.missing("flash_attn.cute"):
        assert one[gpu_cases.FA4].status.startswith("missing: flash_attn.cute")
        assert one["flex FLASH"].status.startswith("missing: flash_attn.cute")
    packed = {row.provider: row for row in results.rows if row.op == "flash_attention_varlen"}
    assert packed["varlen_attn"].status.startswith("missing: ")


def test_peers_are_asked_for_by_torch_s_names():
    """The interfaces that pin FlashAttention 4 and FlexAttention's backend exist in this torch."""
    from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls
    from torch.nn.attention.flex_attention import FlexKernelOptions

    assert "FA4" in list_flash_attention_impls()
    assert "FLASH" in str(FlexKernelOptions.__annotations__["BACKEND"]) or "_Backend" in str(
        FlexKernelOptions.__annotations__["BACKEND"]
    )
    if gpu_cases.missing("flash_attn.cute"):
        with pytest.raises(ImportError):
            activate_flash_attention_impl("FA4")


def test_floor_of_the_cost_model():
    """Bytes over bandwidth for short sequences, flops over rate for long ones, NaN for an unknown GPU."""
    short = next(case for case in gpu_cases.ops() if case.op == "window_attention" and case.mode == "forward")
    moved = 4 * 128 * 56 * 56 * 96 * 2  # qkv and out
    assert gpu_cost.floor_ms(short, "NVIDIA H200") == pytest.approx(1e3 * moved / 4.8e12, rel=0.1)
    assert math.isnan(gpu_cost.floor_ms(short, "NVIDIA GeForce GTX 970"))
    assert all(gpu_cost.floor_ms(case, "NVIDIA H100 80GB HBM3") > 0 for case in gpu_cases.ops() + gpu_cases.losses())
    assert all(math.isnan(gpu_cost.floor_ms(case, "H100")) for case in gpu_cases.models())


def _uncompiled(case: Case, spec: specs.Spec):
    return [provider for provider in gpu_cases.extra(case, spec) if provider.name != "flex"]


def _order(steps: tuple[str, ...], out: Path, seconds: float) -> Order:
    return Order(steps, str(out), "fake", "test", time.time() + seconds)


# The record


def test_record_reads_what_was_written_and_drops_what_is_torn(tmp_path):
    """A process that is killed while it writes leaves a torn line, or an item without some of its rows."""
    path = tmp_path / "rows.jsonl"
    record = gpu_rows.Record(path, {"torch": "2"}, "python -m benchmarks.gpu")
    record.append("cases", "a", "k1", [{"ms": 1.5, "ratio": math.nan}, {"ms": 2.0}])
    record.append("cases", "b", "k1", [{"ms": 3.0}])
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        path.write_bytes(whole[:-cut])
        assert [i.item for i in gpu_rows.read(path)] == ["a"]
        assert gpu_rows.repair(path) == len(whole.splitlines(keepends=True)[-1]) - cut
        assert gpu_rows.repair(path) == 0
    first = whole.splitlines(keepends=True)[0]
    path.write_bytes(first)  # one of a's two rows
    assert gpu_rows.read(path) == []
    record.append("cases", "a", "k1", [{"ms": 1.0}])
    (item,) = gpu_rows.read(path)
    assert (item.rows, item.versions) == (({"ms": 1.0},), {"torch": "2"})
    path.write_bytes(whole)
    assert gpu_rows.read(path)[0].rows == ({"ms": 1.5, "ratio": None}, {"ms": 2.0})


def test_a_key_depends_on_versions_and_digests():
    keys = {
        gpu_rows.key_of({"torch": "2", "triton": "3"}, "d1", ""),
        gpu_rows.key_of({"torch": "2", "triton": "3"}, "d2", ""),
        gpu_rows.key_of({"torch": "2", "triton": "4"}, "d1", ""),
        gpu_rows.key_of({"torch": "2", "triton": "3"}, "", "d1"),
    }
    assert len(keys) == 4
    assert gpu_rows.key_of({"a": "1", "b": "2"}) == gpu_rows.key_of({"b": "2", "a": "1"})


# The watcher

WORKER = """
import json, os, sys, time
sys.path.insert(0, {repository!r})
from pathlib import Path
from benchmarks import gpu_rows
order = json.loads(sys.argv[1])
record = gpu_rows.Record(Path(order["out"]) / "rows.jsonl", {{}}, order["command"])
done = {{i.item for i in gpu_rows.read(record.path)}}
say = lambda **m: os.write(1, ("\\n\\x1e" + json.dumps(m) + "\\n").encode())
print("this goes to the log")
for item in {items!r}:
    if item in done:
        continue
    say(kind="begin", step="ceilings", item=item, key="k", limit=100.0 if item == "is slow" else 1.0)
    if item == "is slow":
        time.sleep(600)
    if item == "hangs":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1234.5")
        time.sleep(600)
    if item == "crashes":
        os.abort()
    record.append("ceilings", item, "k", [{{"status": "ok"}}])
    say(kind="end")
    if item == "loses the GPU":
        sys.exit(75)
"""


def _watched(tmp_path: Path, items: list[str], seconds: float = 60.0) -> tuple[dict[str, str], list[str], Watcher]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(repository=str(REPOSITORY), items=items))
    shown: list[str] = []
    record = gpu_rows.Record(tmp_path / "rows.jsonl", {}, "test")
    watcher = Watcher(record, tmp_path / "log.txt", shown.append, command=(sys.executable, str(script)))
    watcher.run(_order(("ceilings",), tmp_path, seconds), dict(os.environ))
    return {i.item: i.rows[0]["status"] for i in gpu_rows.read(record.path)}, shown, watcher


def test_an_item_that_hangs_or_crashes_costs_its_own_row(tmp_path):
    """The others are done, by another worker; what the hanging one had started is ended too."""
    found, shown, _ = _watched(tmp_path, ["a", "hangs", "b", "crashes", "loses the GPU", "c"])
    assert found == {
        "a": "ok",
        "hangs": "timed out: after 1 s",
        "b": "ok",
        "crashes": f"crashed: exit status {-signal.SIGABRT}",
        "loses the GPU": "ok",
        "c": "ok",
    }
    assert "this goes to the log" in (tmp_path / "log.txt").read_text()
    assert "sleep" not in [Path(p).read_text().strip() for p in _children_named("sleep", "1234.5")]
    items = gpu_rows.read(tmp_path / "rows.jsonl")
    assert [line.split(": ")[2].split(" ")[0] for item in items for line in gpu_report.bad(item)] == [
        "timed",
        "crashed",
    ]
    assert len(shown) == 6


def _children_named(name: str, argument: str) -> Iterator[str]:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command.read_bytes().split(b"\0")[:2] == [name.encode(), argument.encode()]:
                yield str(command.parent / "comm")


def test_a_worker_that_cannot_begin_is_not_started_for_ever(tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    shown: list[str] = []
    record = gpu_rows.Record(tmp_path / "rows.jsonl", {}, "test")
    command = (sys.executable, str(tmp_path / "worker.py"))
    Watcher(record, tmp_path / "log.txt", shown.append, command=command).run(
        _order(("ceilings",), tmp_path, 60.0), dict(os.environ)
    )
    assert len(shown) == 2
    (item,) = gpu_rows.read(record.path)
    assert item.rows[0]["status"].startswith("failed: workers end with status 3")


def test_time_that_is_over_leaves_the_rest(tmp_path):
    begun = time.time()
    found, _, watcher = _watched(tmp_path, ["a", "is slow", "b"], seconds=5.0)
    assert 5.0 <= time.time() - begun < 30.0
    assert found == {"a": "ok"}
    assert watcher.left_out == ["ceilings: is slow and what follows"]


def test_stages():
    """Steps share a worker, but not with those whose items are divided, nor with pytest."""
    names = [step.name for step in gpu_steps.STEPS]
    assert gpu.stages(names[:5], 8) == [("versions", "ceilings", "pipes"), ("canaries",), ("dispatch",)]
    assert gpu.stages(names[:5], 1) == [tuple(names[:5])]
    assert gpu.stages(names[-3:], 1) == [("tuning",), ("tests",), ("models",)]
    assert [step.part for step in gpu_steps.STEPS] == sorted(step.part for step in gpu_steps.STEPS)
    assert names[-1] == "models"


# The rehearsal


def _rehearse(out: Path, *options: str) -> subprocess.Popen[str]:
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "fake", "--out", str(out), *options],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


TOOLS = {
    "ncu": """#!/bin/sh
echo "==PROF== Profiling"
echo '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","forward_short","GPU Speed Of Light Throughput","Duration","us","12.5"'
""",
    "compute-sanitizer": """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "========= Invalid __global__ read of size 2 bytes"
exit 3
""",
    "nvidia-smi": """#!/bin/sh
echo "2026/01/01, 1755 MHz, 2619 MHz, 500 W, 60, 99 %"
""",
}


def test_a_killed_rehearsal_is_resumed(tmp_path):
    """All three parts on the PTX interpreter. SIGKILL in the middle, and a torn line: nothing is lost, nothing measured
    twice. Programs named as the CUDA toolkit's say what these would."""
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = tmp_path / "rows.jsonl"
    first = _rehearse(tmp_path)
    for _ in range(2000):
        if path.exists() and len(path.read_bytes().splitlines()) >= 12:
            break
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    first.kill()
    first.wait()
    with (tmp_path / "lock").open("r+") as lock:  # its worker has ended too once the lock is free
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_bytes()
    with path.open("ab") as file:
        file.write(before.splitlines()[-1][:70])
    second = _rehearse(tmp_path, "--resume")
    said, _ = second.communicate(timeout=400)
    after = path.read_bytes()
    assert after.startswith(before)
    assert "dropped a torn last line of 70 bytes" in said
    lines = [json.loads(line) for line in after.splitlines()]
    seen = Counter((line["step"], line["item"], line["row"]) for line in lines)
    assert set(seen.values()) == {1}
    items = gpu_rows.read(path)
    assert {(i.step, i.item) for i in items} == {(step, item) for step, item, _ in seen}
    assert {i.step for i in items} == {step.name for step in gpu_steps.STEPS}
    for line in lines:
        assert line["versions"]["gpu"] == "none: PTX interpreter, sm_90"
        assert {"torch", "triton", "commit"} <= line["versions"].keys()
        assert line["command"].startswith("python -m benchmarks.gpu --device fake")
    # By what the stand-ins for the toolkit's programs say, one thing is wrong, and the run's exit status says so.
    assert [line for item in items for line in gpu_report.bad(item)] == [
        "memcheck: backward_short in float32: red: memory errors, see memcheck.txt"
    ], said
    assert second.returncode == 1
    by = {step: [i for i in items if i.step == step] for step, _, _ in seen}
    assert by["nsight"][0].rows[0]["metrics"] == {"GPU Speed Of Light Throughput: Duration": "12.5 us"}
    assert {row["status"] for item in by["tests"] for row in item.rows} == {"ok"}
    assert len(by["tests"]) == 2
    assert {row["status"] for item in by["canaries"] for row in item.rows} == {"ok"}
    (variant,) = (i for i in by["kernels"] if i.item.startswith("variant"))
    assert {row["variant"] for row in variant.rows} == {"", gpu_variants.VARIANTS[0].name}
    assert {row["kernel"] for row in variant.rows if row["variant"]} >= {"backward_dq", "backward_dkdv"}
    assert {row["kernel"] for row in variant.rows if not row["variant"]} >= {"backward_short"}
    assert all(row["instructions"] > 0 for row in variant.rows)
    (entry,) = json.loads((tmp_path / "tiles.json").read_text())
    assert (entry["kernel"], entry["triton"]) == ("attention_map", lines[0]["versions"]["triton"])
    assert (tmp_path / "clocks.csv").read_text().count("1755 MHz") > 1
    page = (tmp_path / "results.md").read_text()
    assert "memory errors, see memcheck.txt" in page
    assert "| canaries | 2 | 2 ok |" in page
    assert "| flash_attention tiny launch-bound fp32 forward, random | ours triton |" in page


# What it is made of


def test_canaries_launch_every_triton_kernel():
    """In every dtype that an operator serves, recorded without running; some kernels have no float32."""
    tiles = pytest.importorskip("pyvit.triton_kernels.tiles")
    from pyvit.triton_kernels import common, digests

    from pyvit.dispatch import capabilities

    before = capabilities.MISSING["triton", "cpu"]
    found: set[tuple[str, torch.dtype]] = set()
    recorder = common._Recorder("sm_90")
    capabilities.MISSING["triton", "cpu"] = None
    try:
        common._recorder = recorder
        for _, canary, on in gpu_canaries.chosen("cpu", ("triton",)):
            recorder.launches.clear()
            with contextlib.suppress(Exception):
                canary.run(on)
            found |= {(launch.kernel.__name__, on.dtype) for launch in recorder.launches}
    finally:
        capabilities.MISSING["triton", "cpu"], common._recorder = before, None
    kernels = {digests._FUNCTIONS.get(e.kernel, e.kernel) for e in tiles.TABLE}
    wanted = set(itertools.product(kernels, (torch.float32, torch.float16, torch.bfloat16)))
    assert wanted - found == {(kernel, torch.float32) for kernel in ("backward_short", "forward_persistent")}


@pytest.mark.parametrize("variant", [gpu_variants.FLOAT32_SHORT, *gpu_variants.VARIANTS], ids=lambda v: v.name)
def test_variants_differ_from_the_present_form(variant):
    """In kernels, tiles or warps, as recorded for sm_90; afterwards the present form is in force again."""
    common = pytest.importorskip("pyvit.triton_kernels.common")
    from pyvit.triton_kernels.tools import workloads

    def launches() -> list[tuple[Any, ...]]:
        with common.recording("sm_90") as found:
            workloads.prepare(variant.case, gpu_steps.DTYPES[variant.dtype], "meta")()
        return [(x.kernel.__name__, x.grid, x.options, {k: v for k, v in x.args.items() if k.isupper()}) for x in found]

    before = launches()
    with variant.change():
        assert launches() != before
    assert launches() == before


def test_kernels_that_never_ran_come_first(tmp_path, monkeypatch):
    """By the status page and by earlier records: never on a GPU, then changed since, then as recorded."""
    page = tmp_path / "status.md"
    page.write_text(
        "| backend | operator | run on a GPU |\n|---|---|---|\n| triton | flash_attention | H100: passes |\n"
        "| triton | nt_xent, sigmoid_contrastive | never |\n\n| backend | operator | x |\n| cuda | info_nce | never |\n"
    )
    assert gpu_canaries.never_run(page) == {("triton", "nt_xent"), ("triton", "sigmoid_contrastive")}
    assert gpu_canaries.never_run(tmp_path / "absent.md") == set()
    folder = tmp_path / "results" / "some-gpu"
    for name, gpu_name, status, digest in (
        ("passed", "NVIDIA H100", "ok", "d1"),
        ("rehearsed", "none: PTX interpreter", "ok", "d1"),
        ("wrong", "NVIDIA H100", "red: far off", "d1"),
    ):
        record = gpu_rows.Record(folder / "rows-1.jsonl", {"gpu": gpu_name}, "")
        record.append("canaries", name, "k", [{"status": status, "digest": digest}])
    assert gpu_canaries.passed(tmp_path / "results") == {("passed", "d1")}

    items = ["map of 70 tokens, triton-bfloat16", "nt_xent, triton-bfloat16"]
    with gpu_steps_on_fake() as ctx:
        monkeypatch.setattr(gpu_canaries, "never_run", lambda: {("triton", "nt_xent")})
        assert [work.item for work in gpu_steps.BY_NAME["canaries"].items(ctx)] == items[::-1]
        monkeypatch.setattr(gpu_canaries, "never_run", lambda: set())
        assert [work.item for work in gpu_steps.BY_NAME["canaries"].items(ctx)] == items
        digest = gpu_steps.digests_of("attention_map")[0]
        monkeypatch.setattr(gpu_canaries, "passed", lambda: {(items[0], digest)})
        assert [work.item for work in gpu_steps.BY_NAME["canaries"].items(ctx)] == items[::-1]


@contextlib.contextmanager
def gpu_steps_on_fake() -> Iterator[gpu_steps.Context]:
    from benchmarks.gpu_device import Rehearsal

    device = Rehearsal()
    with device.active():
        yield gpu_steps.Context(device, Path(), lambda: 60.0)


def test_a_canary_that_is_wrong_is_red(monkeypatch):
    canary = gpu_canaries.CANARIES["map of 70 tokens"]
    wrong = gpu_canaries.Canary(canary.op, (), (32,), lambda on: _doubled(canary.run(on)))
    monkeypatch.setitem(gpu_canaries.CANARIES, "map of 70 tokens", wrong)
    with gpu_steps_on_fake() as ctx:
        work = next(w for w in gpu_steps.BY_NAME["canaries"].items(ctx) if w.item.startswith("map"))
        (row,) = work.run()
    assert row["status"].startswith("red: FAIL attention_map")
    assert row["backend"] == "triton"


def _doubled(found: list[Any]) -> list[Any]:
    from dataclasses import replace

    return [replace(c, error=2 * c.limit) for c in found]


@pytest.mark.parametrize("kernel", gpu_micro.kernels(), ids=lambda kernel: kernel.name)
def test_microbenchmarks_are_programs(kernel, tmp_path):
    """The PTX interpreter runs them, and ptxas keeps the instructions that they count."""
    triton = pytest.importorskip("triton")
    from tests.ptx import machine
    from tests.ptx.program import parse

    out = torch.full((kernel.threads,), math.nan)
    issued = machine.run(parse(kernel.text), [out, 2], [out], kernel.shared, 1)
    assert not out.isnan().any()
    of = {"ex2": "ex2", "max": "max", "fma": "fma", "mma_m16n8k16": "mma.sync"}.get(kernel.name, "wgmma.mma_async")
    count = sum(n for op, n in issued.items() if op.startswith(of))
    each = {"mma_m16n8k16": 2 * 16 * 8 * 16}.get(kernel.name, 32)
    if kernel.name.startswith("wgmma"):
        each = 2 * 64 * int(kernel.name.split("_")[1].removeprefix("n")) * 16 / 4  # a warp's share
    assert count * each == 2 * kernel.work
    (tmp_path / "kernel.ptx").write_text(kernel.text)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin"
    arch = "sm_90a" if kernel.capability else "sm_80"
    made = [tool / "ptxas", f"-arch={arch}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    subprocess.run(made, check=True, capture_output=True)
    sass = subprocess.run([tool / "cuobjdump", "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    name = {"ex2": "MUFU.EX2", "max": "FMNMX", "fma": "FFMA", "mma_m16n8k16": "HMMA"}.get(kernel.name, "HGMMA")
    assert sass.stdout.count(name) == (64 if kernel.name in ("ex2", "max", "fma") else 16)


def test_measured_rows_are_made_of_a_record(tmp_path):
    """Both backends right and timed: a line for MEASURED that says what it measured, with PyTorch's fastest. One wrong:
    none."""
    case, wrong = (c for c in gpu_cases.dispatch()[:2])
    record = gpu_rows.Record(tmp_path / "rows.jsonl", {"gpu": "NVIDIA H200", "triton": "3.9"}, "")

    def row(of: Case, provider: str, ms: float, status: str = "ok") -> dict[str, Any]:
        found = runner.Row(of.op, of.label, provider, of.dtype, of.mode, 1, median_ms=ms, status=status)
        return vars(found) | {"digests": ["t1", "c1"]}

    ours = [row(case, f"{OURS} cuda", 2.0), row(case, f"{OURS} triton", 1.23456)]
    theirs = [row(case, "sdpa cuDNN", 1.5), row(case, "sdpa flash", 1.4), row(case, "sdpa math", 1.0, "outside rule")]
    record.append("dispatch", case.id, "k", [*ours, *theirs])
    bad = row(wrong, f"{OURS} cuda", math.nan, "red: far off")
    record.append("dispatch", wrong.id, "k", [bad, row(wrong, f"{OURS} triton", 1.0)])
    items = gpu_rows.read(tmp_path / "rows.jsonl")
    (line,) = gpu_report.measured_rows(items)
    (found,) = eval(f"({line})", {"Measured": choice.Measured, "torch": torch, "NAN": math.nan})
    shape, today = gpu_model.shape(case), items[0].at[:10]
    grad = case.mode == "forward+backward"
    assert found == choice.Measured(
        "H200", case.op, torch.bfloat16, grad, shape, 2.0, 1.235, 1.4, today, ("c1", "t1"), "3.9"
    )
    assert gpu_report.write(tmp_path) == 1  # one of ours is wrong
    assert line in (tmp_path / "results.md").read_text()


def test_ncu_s_table_is_read():
    text = TOOLS["ncu"].split("echo ")
    printed = "\n".join(line.strip().strip("'") for line in text[1:])
    assert gpu_steps.metrics_of(printed) == {"GPU Speed Of Light Throughput: Duration": "12.5 us"}
    assert gpu_steps.metrics_of("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_tests_are_divided_once(tmp_path):
    """Every test is in one process; those that need most of the memory are in the same one; recorded ones in none."""
    from types import SimpleNamespace

    items = [SimpleNamespace(nodeid=f"t::{i}", fixturenames=["far"] if i % 9 == 0 else []) for i in range(90)]
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    got = []
    for shard in range(4):
        mine = list(items)
        plugin = gpu_tests.Recorder(None, "", {"t::5"}, (shard, 4), lambda: 1.0, lambda **_: None)
        plugin.pytest_collection_modifyitems(config, mine)
        got.append(mine)
    assert sorted(i.nodeid for mine in got for i in mine) == sorted(i.nodeid for i in items if i.nodeid != "t::5")
    assert all(not i.fixturenames for mine in got[1:] for i in mine)


def _tests_run(folder: Path, lost: str = "lambda: None") -> tuple[int, dict[str, dict[str, Any]], list[Any]]:
    """pytest in a process of its own, as in a worker: its exit status, rows by name, and what it said at its end."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks import gpu_rows, gpu_tests\n"
        "record = gpu_rows.Record(Path('rows.jsonl').absolute(), {}, '')\n"
        "done = {item.item for item in gpu_rows.read(record.path)}\nleft = []\n"
        "say = lambda kind, **fields: left.extend(fields['items'] if kind == 'left' else ())\n"
        f"plugin = gpu_tests.Recorder(record, 'k', done, (0, 1), lambda: 1.0, say, {lost})\n"
        "gpu_tests.run(plugin, ['.', '--rootdir', '.', '-c', '/dev/null'], '.')\nprint(left)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    rows = {i.item.rpartition("::")[2]: i.rows[0] for i in gpu_rows.read(folder / "rows.jsonl")}
    return done.returncode, rows, done.stdout.strip().splitlines()[-1:]


def test_a_failing_test_is_recorded_and_the_others_run(tmp_path):
    """The row has the message. Neither a failure nor a file that cannot be imported ends the run."""
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): assert 1 == 2\ndef test_b(): pass\ndef test_c(): pytest.skip('no reason')\n"
    )
    status, found, said = _tests_run(tmp_path)
    assert (status, said) == (0, ["[]"])
    assert {name: row["status"] for name, row in found.items()} == {
        "test_broken.py": "red: cannot be collected",
        "test_a": "red: test failed",
        "test_b": "ok",
        "test_c": "skipped",
    }
    assert "assert 1 == 2" in found["test_a"]["said"]
    assert "no_such_module" in found["test_broken.py"]["said"]
    before = (tmp_path / "rows.jsonl").read_bytes()
    _tests_run(tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == before  # what is recorded is not run again


def test_a_test_that_loses_the_gpu_does_not_fail_the_others(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a(): assert False\ndef test_b(): pass\n")
    status, found, _ = _tests_run(tmp_path, lost="lambda: 'an illegal memory access was encountered'")
    assert status == gpu_device.LOST
    assert list(found) == ["test_a"]
    assert _tests_run(tmp_path)[1]["test_b"]["status"] == "ok"


def test_a_checkout_needs_no_installation():
    """On a GPU machine pyvit may not be installed: its kernels are imported from the checkout."""
    code = (
        "import sys\nsys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import benchmarks, pyvit\nfrom pyvit.triton_kernels import digests\nprint(digests.__file__)"
    )
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == str(REPOSITORY / "triton_kernels" / "digests.py"), done.stderr


def test_gpu_folder():
    assert gpu.folder("NVIDIA H200") == "nvidia-h200"
    assert gpu.folder("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"
