"""pyvit doctor and the advice of pyvit info."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvit import doctor, library
from pyvit.dispatch import devices
from pyvit.doctor import FAIL, PASS, SKIPPED
from pyvit.info import PACKAGES, info

needs_library = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyvit", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@needs_library
def test_a_sound_installation_passes() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] is True
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert {status[name] for name in ("compiled library", "backend cpu", "backend torch", "threads")} == {PASS}
    assert set(status.values()) <= {PASS, SKIPPED}
    (cpu,) = (check["found"] for check in found["checks"] if check["name"] == "backend cpu")
    assert cpu.startswith("flash_attention, window_attention, patch_embed, linear agree")
    assert found["info"]["system"]["torch"].startswith(torch.__version__)


def test_without_the_library_it_fails_and_says_what_to_do() -> None:
    done = run(PYVIT_NO_LIBRARY="1")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["fail", "compiled", "library", "PYVIT_NO_LIBRARY=1", "is", "set"]
    assert lines[1].strip() == "-> unset it"
    assert "checks failed" in done.stdout
    assert "packages" in lines


@needs_library
def test_without_the_extension_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a wheel under a Python that it has no pyvit._C for: operators work, and doctor says what is absent."""
    monkeypatch.setitem(sys.modules, "pyvit._C", None)
    for check in (doctor._library(), doctor._instruction_set()):
        assert check.status == PASS
    assert "without pyvit._C" in doctor._library().found
    assert doctor._instruction_set().found.startswith(torch.ops.pyvit.cpu_isa())


@needs_library
def test_a_kernel_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = doctor.ops.flash_attention

    def wrong(*tensors: torch.Tensor, backend: str, **options: object) -> torch.Tensor:
        out = kernel(*tensors, backend=backend, **options)
        return out if backend == "reference" else out * 1.01

    monkeypatch.setattr(doctor.ops, "flash_attention", wrong)
    found = {check.name: check for check in doctor.doctor().checks}
    assert found["backend cpu"].status == FAIL
    assert "flash_attention, torch.float32: NumericsError" in found["backend cpu"].found
    assert not doctor.Report(list(found.values()), info()).passed


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "unreadable"}, 8),
    ],
    ids=str,
)
def test_usable_cpus(files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert doctor.usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("threads", "status"), [(9, FAIL), (8, PASS), (1, PASS)])
def test_threads(threads: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    check = doctor._threads()
    assert check.status == status
    assert ("OMP_NUM_THREADS=8" in check.advice) == (threads != 8)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver without a torch for it, a GPU that torch does not see, one that it sees."""
    monkeypatch.setattr(devices, "present", tuple)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_driver", lambda: "driver 1.0")
    check = doctor._gpu()
    assert (check.status, "pytorch.org" in check.advice) == (SKIPPED, True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor._gpu().status == FAIL
    monkeypatch.setattr(doctor, "_driver", lambda: "")
    assert doctor._gpu().status == SKIPPED
    monkeypatch.setattr(devices, "present", lambda: (devices.PARTS["sm_75"],))
    check = doctor._gpu()
    assert check.status == PASS
    assert "T4 (sm_75)" in check.found
    assert "triton: " in check.found
    if importlib.util.find_spec("triton"):
        assert "needs compute capability 8.0" in check.found


def test_info_names_what_to_install_next(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in PACKAGES else find(name, *rest)
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    advice = info().advice
    assert any("pip install 'pyvit-kernels[cli]' for command line" in line and "typer, rich" in line for line in advice)
    assert any("pip install 'pyvit-kernels[train]' for training" in line for line in advice)
    assert not any("[gpu]" in line for line in advice)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any("pip install 'pyvit-kernels[gpu]' for Triton kernels (triton)" in line for line in info().advice)


def test_the_report_prints_every_check() -> None:
    checks = [doctor.Check("one", PASS, "well"), doctor.Check("two", FAIL, "not well", "do something")]
    text = str(doctor.Report(checks, info()))
    assert "pass     one" in text
    assert "-> do something" in text
    assert "1 of 2 checks failed" in text
    assert str(info()) in text
    assert json.loads(doctor.Report(checks, info()).to_json())["checks"] == [dataclasses.asdict(c) for c in checks]
