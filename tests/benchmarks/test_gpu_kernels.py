"""What a GPU run executes: canaries, variants of kernels, microbenchmarks."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_canaries, gpu_micro, gpu_rows, gpu_steps, gpu_variants


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
