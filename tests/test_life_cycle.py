"""Threads, processes and settings that change around the operators. Each test is a process of its own with a limit of
time, so that a hang or a crash fails it alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pyvit import library

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library.problem() is not None, reason=str(library.problem())),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork and processor affinity"),
]
PREPARE = """
import os, sys, threading, torch, pyvit
from pyvit import ops
torch.manual_seed(0)
q, k, v = (torch.randn(2, 3, 65, 32, requires_grad=True) for _ in range(3))
x, w1, w2 = torch.randn(40, 48), torch.randn(96, 48) / 7, torch.randn(48, 96) / 10
qkv = torch.randn(1, 8, 8, 3 * 32)

def every(by=None) -> list[torch.Tensor]:
    out = ops.flash_attention(q, k, v, backend=by)
    found = [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]
    with torch.no_grad():
        found += [ops.window_attention(qkv, 4, 2, num_heads=2, backend=by), ops.mlp(x, w1, None, w2, None, backend=by)]
        return [*found, ops.layer_norm(x, backend=by)]

def right(found) -> bool:
    return same(found, every("reference"), exact=False)

def same(found, want, exact=True) -> bool:
    if exact:
        return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, want, strict=True))
"""


def run(code: str, seconds: float = 90, allowed: str = "", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREPARE + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=ROOT,
    )
    if allowed and allowed in done.stderr and done.returncode == -signal.SIGABRT:
        return done.stdout
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_many_python_threads_at_once() -> None:
    run("""
        want, wrong = every(), []
        def work():
            for _ in range(20):
                if not same(every(), want):
                    wrong.append(1)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert not wrong
    """)


def test_numbers_of_threads_that_change_between_calls_and_during_them() -> None:
    run("""
        want = every()
        for n in (1, 3, 2, 8, 1, 2):
            torch.set_num_threads(n)
            assert same(every(), want, exact=False)
        stop = threading.Event()
        def change():
            n = 0
            while not stop.is_set():
                n += 1
                torch.set_num_threads(1 + n % 4)
        changing = threading.Thread(target=change)
        changing.start()
        good = all(same(every(), want, exact=False) for _ in range(30))
        stop.set(); changing.join()
        assert good
    """)


@pytest.mark.parametrize("first", [True, False], ids=["after a call", "after import"])
def test_fork(first: bool) -> None:
    """With one thread: an OpenMP runtime does not survive a fork with its threads, and torch's own operators hang."""
    run(f"""
        torch.set_num_threads(1)
        assert not {first} or right(every())
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                good = False
                try:
                    good = all(right(every()) for _ in range(3))
                finally:
                    os._exit(0 if good else 1)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        assert right(every())
    """)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str, tmp_path: Path) -> None:
    (tmp_path / "items.py").write_text(
        "import torch, pyvit\nfrom pyvit import ops\n"
        "class Items(torch.utils.data.Dataset):\n"
        "    def __len__(self):\n        return 12\n"
        "    def __getitem__(self, i):\n"
        "        torch.set_num_threads(1)\n"
        "        x = torch.arange(64.0).view(1, 1, 8, 8) / (i + 9)\n"
        "        return ops.flash_attention(x, x, x)\n"
    )
    run(
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        from items import Items
        every()
        want = torch.stack([Items()[i] for i in range(12)])
        for _ in range(2):
            loader = torch.utils.data.DataLoader(Items(), 4, num_workers=2, multiprocessing_context={method!r})
            assert torch.equal(torch.cat(list(loader)), want)
        """,
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )


def test_pools_within_pools() -> None:
    run("""
        want = every()
        from concurrent.futures import ThreadPoolExecutor
        def several():
            with ThreadPoolExecutor(2) as inside:
                return list(inside.map(lambda _: every(), range(2)))
        with ThreadPoolExecutor(4) as pool:
            assert all(same(found, want) for part in pool.map(lambda _: several(), range(4)) for found in part)
    """)


def test_the_interpreter_ends_during_a_call() -> None:
    """CPython ends daemon threads where they come back from native code, which C++ takes for an error: torch's own
    operators abort in the same way. Nothing else may happen."""
    code = """
        big = torch.randn(4, 8, 2048, 64)
        def forever():
            with torch.no_grad():
                while True:
                    ops.flash_attention(big, big, big)
        threading.Thread(target=forever, daemon=True).start()
        every()
        print("end")
    """
    assert run(code, allowed="terminate called without an active exception").endswith("end\n")


def test_an_error_in_a_call_leaves_the_threads_usable() -> None:
    run("""
        want = every()
        for _ in range(20):
            try:
                ops.flash_attention(q, k, v[:, :, :3])
            except ValueError:
                pass
            try:
                torch.ops.pyvit.linear(x, w2, None, None, "auto")
            except (ValueError, RuntimeError):
                pass
            assert same(every(), want)
    """)


def test_processors_that_are_taken_away() -> None:
    run("""
        want = every()
        here = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(here)})
        assert same(every(), want)
        os.sched_setaffinity(0, here)
        assert same(every(), want)
    """)


def test_more_threads_than_processors() -> None:
    run("torch.set_num_threads(33); assert right(every())")


def test_denormal_numbers() -> None:
    run("""
        small = [t.detach() * 1e-39 for t in (q, k, v)]
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            out = ops.flash_attention(*small)
            want = ops.flash_attention(*small, backend="reference")
            assert out.isfinite().all(), flush
            assert float((out - want).abs().max()) < 1e-38, flush
    """)


@pytest.mark.parametrize("name", ["libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libmimalloc.so.2.0"])
def test_other_allocators(name: str) -> None:
    found = [
        p for p in (Path("/usr/lib/x86_64-linux-gnu") / name, Path("/usr/lib/aarch64-linux-gnu") / name) if p.exists()
    ]
    if not found:
        pytest.skip(f"{name} is not installed")
    run("assert right(every())", LD_PRELOAD=str(found[0]))


def test_memory_stays_flat_over_hundreds_of_calls() -> None:
    run("""
        import resource
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
        for _ in range(100): every()
        before = resident()
        for _ in range(500): every()
        assert resident() - before < 8, (before, resident())
    """)
