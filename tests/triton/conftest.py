"""Triton kernels on CPU tensors, against the reference: in Triton's interpreter (TRITON_INTERPRET=1 pytest
tests/triton), or compiled for a GPU and run by the PTX interpreter of tests/ptx (pytest tests/triton)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyvit.testing import FORWARD_FACTOR, GRADIENT_FACTOR, compare
from tests.alternate import deselect, parity

pytest.importorskip("triton")

interpreter = os.environ.get("TRITON_INTERPRET") == "1"


#: Modules whose tests run kernels, interpreted or compiled for these architectures. The others are not interpreted.
RUN = ("test_flash_attention.py", "test_window_attention.py", "test_pairwise_losses.py")
PARTS = ("sm_80", "sm_90")
if interpreter:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.name in RUN:
        metafunc.parametrize("part", ["interpreter"] if interpreter else PARTS, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with several independent parameters, each combination is compiled for one architecture, in turn."""
    ours = [] if interpreter else [i for i in items if i.path.parent == Path(__file__).parent and i.path.name in RUN]
    deselect(config, items, [i for i in ours if parity(i) == 1 - PARTS.index(i.callspec.params["part"])])


@pytest.fixture(autouse=True)
def part(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a test's kernels run: Triton's interpreter, or the PTX interpreter, compiled for an architecture."""
    if getattr(request, "param", "interpreter") == "interpreter":
        yield
        return
    from tests.ptx.launch import running

    with running(request.param):
        yield


Check = Callable[..., None]


@pytest.fixture
def agree() -> Check:
    """The numerics rule for a kernel's results. The first ``outputs`` of them are outputs, the others gradients;
    ``scores`` as in :func:`pyvit.testing.compare`."""

    def check(
        got: Sequence[Tensor], exact: Sequence[Tensor], naive: Sequence[Tensor], outputs: int, scores: float = 0.0
    ) -> None:
        dtype = max((t.dtype for t in got), key=lambda d: torch.finfo(d).eps)
        for name, part, factor in (
            ("output", slice(outputs), FORWARD_FACTOR),
            ("gradient", slice(outputs, None), GRADIENT_FACTOR),
        ):
            compare(name, got[part], naive[part], exact[part], factor, dtype=dtype, scores=scores)

    return check


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that elements no program writes are noticed."""
    empty = Tensor.new_empty

    def new_empty(self: Tensor, *size: object, **kwargs: object) -> Tensor:
        out = empty(self, *size, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.device.type == "cpu" else out

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


@pytest.fixture
def tuned_tiles() -> None:
    """For tests of the tiles and the pipelined loops that a GPU has."""
    if interpreter:
        pytest.skip("the interpreter has other tiles, and no pipelines")


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Small tiles, so that small shapes have partial tiles and several loop steps."""
    from pyvit.triton_kernels import tiles

    names = ("forward_short", "forward_long", "backward_short", "backward_dq", "backward_dkdv", "bias_grad")
    for name in names:
        tiles.force(name, tiles.Config(block_m=16, block_n=32, edge_n=16, group=2))
    yield
    for name in names:
        tiles.force(name, None)
