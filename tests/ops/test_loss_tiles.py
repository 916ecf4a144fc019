"""Internal operators on tiles of scores: against float64, against torch's operators, and with extreme values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyvit import library
from pyvit.ops import loss_tiles
from pyvit.ops.loss_tiles import LogSumExp
from pyvit.testing import compare

SHAPES = [(1, 1), (3, 5), (16, 64), (17, 67), (130, 33), (40, 512)]
needs_library = pytest.mark.skipif(
    library.problem() is not None, reason="without the library torch's operators make the passes"
)


@pytest.fixture(params=["library", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(loss_tiles, "in_library", lambda _: False)
    elif library.problem() is not None:
        pytest.skip("the library is not in use")
    return request.param


def running(tiles: list[Tensor], dim: int) -> Tensor:
    lse = LogSumExp(tiles[0].shape[1 - dim], tiles[0])
    for tile in tiles:
        lse.add(slice(None), tile, dim)
    return lse.value()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_log_sum_exp(way: str, shape: tuple[int, int], dim: int) -> None:
    """Three tiles with increasing scores, so that earlier sums are rescaled."""
    tiles = [torch.randn(shape) * 20 + 15 * i for i in range(3)]
    wide = torch.cat(tiles, dim)
    compare("lse", running(tiles, dim), wide.logsumexp(dim), wide.double().logsumexp(dim))


@pytest.mark.parametrize("dim", [0, 1])
def test_masked_and_not_finite_scores(way: str, dim: int) -> None:
    """A fully masked first tile, scores of a CLIP at scale 100, a NaN, an infinity."""
    masked = torch.full((4, 9), -math.inf)
    mixed = torch.randn(4, 9) * 100
    mixed[1, 2] = -math.inf
    found = running([masked, mixed], dim)
    torch.testing.assert_close(found, torch.cat([masked, mixed], dim).logsumexp(dim))
    assert (running([masked], dim) <= torch.finfo(torch.float32).min).all()
    broken = mixed.clone()
    broken[2, 3] = math.nan
    line = running([mixed, broken], dim)
    assert line[2 if dim == 1 else 3].isnan()
    assert line.isnan().sum() == 1


@needs_library
def test_same_bits_for_any_number_of_threads() -> None:
    scores = torch.randn(200, 300) * 9
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((running([scores, scores], 1), running([scores, scores], 0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_library
def test_the_library_refuses_what_it_cannot_take() -> None:
    scores, n = torch.zeros(4, 6), torch.zeros(4)
    with pytest.raises(RuntimeError, match="top must be 6 contiguous float32 numbers"):
        torch.ops.pyvit.log_sum_exp(scores, 0, n, n.clone())
    with pytest.raises(RuntimeError, match="scores must be 24 contiguous"):
        torch.ops.pyvit.log_sum_exp(scores.t().contiguous().t(), 1, n, n.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 3), (200, 193, 33), (1, 1, 1), (17, 400, 700), (3, 5, 0), (0, 4, 4)], ids=str)
def test_products_in_float32(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Both operands may be transposed; products of 16-bit operands are rounded only to float32."""
    n, m, k = shape
    x, w = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype)
    exact = x.double() @ w.double().t()
    for a, b in itertools.product((x, x.t().contiguous().t()), (w, w.t().contiguous().t())):
        found = [loss_tiles.product(a, b)]
        if library.problem() is None:
            out = torch.full((n, m + 3), 7.0)
            torch.ops.pyvit.product(a, b.t(), None, out[:, :m], False)
            assert (out[:, m:] == 7).all()
            found.append(out[:, :m])
        for y in found:
            assert y.dtype == torch.float32
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
        held = torch.ones(n, m)
        assert loss_tiles.product(a, b, held, add=True) is held
        torch.testing.assert_close(held.double(), exact + 1, rtol=1e-5, atol=1e-4)
        loss_tiles.product(a, b, held)
        torch.testing.assert_close(held.double(), exact, rtol=1e-5, atol=1e-4)
    if library.problem() is None:
        with pytest.raises(RuntimeError, match="matrices that fit each other"):
            torch.ops.pyvit.product(x, torch.zeros(k + 1, m, dtype=dtype), None, torch.zeros(n, m), False)
