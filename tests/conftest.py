"""Shared fixtures. Random inputs use the seed PYVIT_TEST_SEED, by default 0; ``PYVIT_TEST_SEED=random`` draws one and
prints it in the header.

With ``PYVIT_TEST_PTX=sm_90`` (or sm_80) Triton's kernels serve CPU tensors: they are compiled for that architecture and
run by the PTX interpreter of tests/ptx. So ``pytest tests/ops tests/losses -k triton`` runs without a GPU what ``pytest
-m gpu`` runs on one.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import torchvision_operators  # noqa: F401  (before transformers and timm import torchvision)
from tests.alternate import deselect, parity

# A separate compiler cache per worker: two workers writing the same file have left it incomplete.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "inductor" / _worker))

_asked = os.environ.get("PYVIT_TEST_SEED") or "0"
SEED = int.from_bytes(os.urandom(4), "little") if _asked == "random" else int(_asked)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "every_dtype: of the tests of every operator's contract, one to run in each dtype"
    )
    config.addinivalue_line(
        "markers", "isa: run again for every instruction set of the machine (tests/ops/test_isa.py)"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[object]:
    """Start the PTX interpreter before collection: test modules ask at import which backends serve an operator."""
    part = os.environ.get("PYVIT_TEST_PTX")
    if part:
        from tests.ptx.launch import running

        on_machine = running(part)
        on_machine.__enter__()
        session.config.add_cleanup(lambda: on_machine.__exit__(None, None, None))
    return (yield)


def pytest_report_header() -> str:
    return f"PYVIT_TEST_SEED={SEED} PYVIT_CPU_ISA={os.environ.get('PYVIT_CPU_ISA', 'default')}"


@pytest.hookimpl(tryfirst=True)  # before ``-m`` selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases on CUDA tensors (a parameter of type pyvit.testing.Served says so) are marked ``gpu``. Of the tests of
    every instruction set, PYVIT_TEST_HALF (0 or 1) leaves out half of the combinations of parameters."""
    if half := os.environ.get("PYVIT_TEST_HALF"):
        deselect(config, items, [i for i in items if i.get_closest_marker("isa") and parity(i) == int(half)])
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(getattr(p, "device", None) == "cuda" for p in parameters):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> int:
    """Seed each test by its id, so that it draws the same numbers alone and among others."""
    seed = SEED ^ zlib.crc32(request.node.nodeid.rpartition("/")[2].encode())
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
