"""Triton kernels on CPU tensors, against the reference: in Triton's interpreter (TRITON_INTERPRET=1 pytest
tests/triton), or compiled for a GPU and run by the PTX interpreter of tests/ptx (pytest tests/triton)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from pyvit.testing import FORWARD_FACTOR, GRADIENT_FACTOR, compare

pytest.importorskip("triton")

interpreter = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/triton" not in str(item.path).replace(os.sep, "/"):
            continue
        if interpreter and item.path.name.startswith("test_compiled"):
            item.add_marker(
                pytest.mark.skip(reason="kernels cannot be compiled where TRITON_INTERPRET=1 made them interpreted")
            )


#: Modules whose tests run kernels: interpreted, or compiled for each of these architectures.
RUN = ("test_flash_attention.py", "test_window_attention.py", "test_pairwise_losses.py")
PARTS = ("sm_80", "sm_90")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.name in RUN:
        metafunc.parametrize("part", ["interpreter"] if interpreter else PARTS, indirect=True)


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
def small_tiles() -> Iterator[None]:
    """Small tiles, so that small shapes have partial tiles and several loop steps."""
    from pyvit.triton_kernels import tiles

    names = ("forward_short", "forward_long", "backward_short", "backward_dq", "backward_dkdv", "bias_grad")
    for name in names:
        tiles.force(name, tiles.Config(block_m=16, block_n=32, edge_n=16, group=2))
    yield
    for name in names:
        tiles.force(name, None)
