"""The launcher with a scripted CUDA runtime: each failure is reported by the call that caused it, and does not affect
later calls."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

STUB = Path(__file__).parent / "stub_runtime"
CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
CXX = os.environ.get("CXX", "g++")
Launch = Callable[..., tuple[str | None, list[str], int]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which(CXX) is None:
        pytest.skip(f"{CXX} is not on PATH")
    built = tmp_path_factory.mktemp("stub") / "scripted.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{STUB}", f"-I{CUDA}"]
    subprocess.run([CXX, *flags, STUB / "scripted.cpp", "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    for name in ("launch", "calls", "limit"):
        getattr(library, f"scripted_{name}").restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def launch(library: ctypes.CDLL) -> Launch:
    def run(script: str = "", device: int = 0, shared: int = 1024) -> tuple[str | None, list[str], int]:
        error = library.scripted_launch(script.encode(), device, shared)
        assert library.scripted_last_error() == 0, "left for the next call to report"
        return error and error.decode(), library.scripted_calls().decode().split(";")[:-1], library.scripted_device()

    return run


def test_on_the_current_device(launch: Launch) -> None:
    assert launch() == (None, ["cudaGetDevice", "cudaLaunchKernel 3 64 1024 42"], 0)


def test_on_another_device_with_much_shared_memory(launch: Launch) -> None:
    calls = [
        "cudaGetDevice",
        "cudaSetDevice 2",
        "cudaFuncSetAttribute 65536",
        "cudaLaunchKernel 3 64 65536 42",
        "cudaSetDeviceBack 0",
    ]
    assert launch("", 2, 65536) == (None, calls, 0)


@pytest.mark.parametrize(
    ("script", "named", "calls"),
    [
        ("cudaGetDevice=1;", "cudaGetDevice", 1),
        ("cudaSetDevice=101;", "cudaSetDevice", 3),
        ("cudaFuncSetAttribute=1;", "cudaFuncSetAttribute", 4),
        ("cudaLaunchKernel=1;", "cudaLaunchKernel", 5),
        ("cudaSetDeviceBack=101;", "cudaSetDevice (back)", 5),
    ],
)
def test_the_call_that_failed_is_named_and_nothing_runs_after_it(
    launch: Launch, script: str, named: str, calls: int
) -> None:
    error, said, device = launch(script, 2, 65536)
    code = script.split("=")[1].strip(";")
    assert error == f"attention: {named} failed: error {code} (grid 3 x 2 x 1, block 64, 65536 bytes of shared memory)"
    assert len(said) == calls
    assert device == (2 if "back" in named else 0)
    assert any("Launch" in call for call in said) == (named in ("cudaLaunchKernel", "cudaSetDevice (back)"))


def test_more_shared_memory_than_the_device_gives_is_refused_before_any_call(launch: Launch) -> None:
    refusal = "attention: a block needs 101392 bytes of shared memory, and device 2 gives 101376 at most"
    assert launch("", 2, 101392) == (refusal, [], 0)
    assert launch("", 2, 101376)[0] is None


def test_each_device_is_asked_once_for_its_limit(library: ctypes.CDLL) -> None:
    limit = ctypes.c_int()

    def ask(script: str, device: int) -> tuple[str | None, int, int]:
        error = library.scripted_limit(script.encode(), device, ctypes.byref(limit))
        assert library.scripted_last_error() == 0, "left for the next call to report"
        return error and error.decode(), limit.value, library.scripted_calls().count(b"cudaDeviceGetAttribute")

    error, _, calls = ask("cudaDeviceGetAttribute=101;", 1)
    assert (error, calls) == ("cudaDeviceGetAttribute failed on device 1: error 101", 1)
    assert ask("", 1) == (None, 101376, 1)
    assert ask("", 1) == (None, 101376, 0)
    assert ask("", 2) == (None, 101376, 1)
    assert [ask("", 64), ask("", 64)] == [(None, 101376, 1)] * 2  # beyond what is kept


def test_the_first_of_two_failures_is_told(launch: Launch) -> None:
    error, _, _ = launch("cudaLaunchKernel=1;cudaSetDeviceBack=101;", 2)
    assert error.startswith("attention: cudaLaunchKernel failed: error 1 ")


@pytest.mark.parametrize("script", ["cudaGetDevice=700;", "cudaLaunchKernel=719;"])
def test_an_earlier_kernels_fault_is_not_this_launchs(launch: Launch, script: str) -> None:
    error, _, _ = launch(script)
    call, code = script.strip(";").split("=")
    assert error.startswith(
        "attention was not launched: an earlier kernel of this process, not necessarily pyvit's, failed with "
    )
    assert f"'error {code}' (seen by {call})" in error
    assert "CUDA_LAUNCH_BLOCKING=1" in error
