"""``python -m benchmarks.gpu`` without a GPU: its rehearsal on the PTX interpreter, and what it needs."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_report, gpu_rows, gpu_steps, gpu_variants

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_run_says_what_it_needs(capsys):
    assert gpu.main([]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "needs a GPU that torch can use" in said[0]


def test_stages():
    """Steps share a worker, but not with those whose items are divided, nor with pytest."""
    names = [step.name for step in gpu_steps.STEPS]
    assert gpu.stages(names[:5], 8) == [("versions", "ceilings", "pipes"), ("canaries",), ("dispatch",)]
    assert gpu.stages(names[:5], 1) == [tuple(names[:5])]
    assert gpu.stages(names[-3:], 1) == [("tuning",), ("tests",), ("models",)]
    assert [step.part for step in gpu_steps.STEPS] == sorted(step.part for step in gpu_steps.STEPS)
    assert names[-1] == "models"


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


def test_ncu_s_table_is_read():
    text = TOOLS["ncu"].split("echo ")
    printed = "\n".join(line.strip().strip("'") for line in text[1:])
    assert gpu_steps.metrics_of(printed) == {"GPU Speed Of Light Throughput: Duration": "12.5 us"}
    assert gpu_steps.metrics_of("==ERROR== ERR_NVGPUCTRPERM") == {}


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
