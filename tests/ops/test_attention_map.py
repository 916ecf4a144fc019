"""attention_map under the numerics rule."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from pyvit.ops import attention_map, flash_attention
from pyvit.testing import Served, check_op, layout, poisoned, served
from tests.extremes import ROWS, extreme_bias

on_map = pytest.mark.parametrize("on", served("attention_map", "bias"), ids=str)


def _check(on: Served, tensors: dict[str, Tensor], rows: object, **options: object) -> None:
    """Forward and gradients. Rows are an option because they are not converted to float64."""
    check_op(functools.partial(attention_map, rows=rows), tensors, backend=on.backend, name="attention_map", **options)


@pytest.mark.isa
@on_map
@pytest.mark.parametrize("d", [8, 16, 32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (17, 17), (50, 197)])
def test_shapes(on: Served, nq: int, nk: int, d: int) -> None:
    tensors = {"q": on.randn(2, 3, nq, d), "k": on.randn(2, 3, nk, d)}
    _check(on, tensors, 0)
    _check(on, tensors, torch.randint(nq, (2, 5), device=on.device), scale=0.3)


@on_map
@pytest.mark.parametrize("pattern", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 1, 1)], ids=str)
def test_bias(on: Served, pattern: tuple[int, ...]) -> None:
    tensors = {"q": on.randn(2, 4, 9, 32), "k": on.randn(2, 2, 21, 32)}
    bias = torch.randn([n if keep else 1 for n, keep in zip((2, 4, 9, 21), pattern, strict=True)], device=on.device)
    for given in (bias, bias > -1, bias.masked_fill(bias > 0, -math.inf), (bias * 0).bool()):
        _check(on, {**tensors, "bias": given}, [8, 0, 3, 3], broadcast={"bias": (2, 4, 9, 21)})


@on_map
@pytest.mark.parametrize("store", ["transposed", "permuted", "sliced", "stepped", "shifted", "expanded"])
def test_strides(on: Served, store: str) -> None:
    _check(
        on,
        {"q": on.randn(2, 3, 9, 40), "k": on.randn(2, 3, 21, 40), "bias": on.randn(2, 3, 9, 21)},
        [4, 5],
        store=store,
        store_grad=store,
    )


@on_map
def test_forms_of_rows(on: Served) -> None:
    """An int, a list, tensors of one and two dimensions with any strides, and an empty list."""
    q, k = on.randn(2, 3, 9, 16), on.randn(2, 3, 21, 16)
    full = attention_map(q, k, range(9), backend=on.backend)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=4 * torch.finfo(on.dtype).eps)
    close(attention_map(q, k, 4, backend=on.backend), full[:, :, 4:5])
    close(attention_map(q, k, [8, 0, 0], backend=on.backend), full[:, :, [8, 0, 0]])
    close(attention_map(q, k, torch.tensor([3, 1], dtype=torch.int32), backend=on.backend), full[:, :, [3, 1]])
    rows = torch.randint(9, (2, 4), device=on.device)
    wanted = torch.stack([full[b][:, rows[b]] for b in range(2)])
    for how in ("contiguous", "transposed", "stepped"):
        close(attention_map(q, k, layout(rows, how), backend=on.backend), wanted)
    assert attention_map(q, k, [], backend=on.backend).shape == (2, 3, 0, 21)
    with poisoned():
        assert attention_map(q[:0], k[:0], 1, backend=on.backend).shape == (0, 3, 1, 21)
        assert attention_map(q, k[:, :, :0], 1, backend=on.backend).shape == (2, 3, 1, 0)


@on_map
def test_against_flash_attention(on: Served) -> None:
    """Probabilities times v equal flash_attention's output for these queries."""
    q, k, v = on.randn(2, 3, 9, 32), on.randn(2, 3, 50, 32), on.randn(2, 3, 50, 32)
    p = attention_map(q, k, [0, 7], backend=on.backend)
    out = flash_attention(q, k, v, backend="reference")[:, :, [0, 7]]
    torch.testing.assert_close(p.float() @ v.float(), out.float(), rtol=0, atol=30 * torch.finfo(on.dtype).eps)
    torch.testing.assert_close(
        p.float().sum(-1), torch.ones(2, 3, 2, device=on.device), rtol=0, atol=4 * torch.finfo(on.dtype).eps
    )


@pytest.mark.isa
@on_map
def test_finite_masks(on: Served) -> None:
    """Every row sums to 1, except fully masked rows."""
    for dtype in {torch.float32, on.dtype}:
        tensors = {
            "q": on.randn(1, 2, ROWS, 32),
            "k": on.randn(1, 2, 70, 32),
            "bias": extreme_bias(70, dtype).to(on.device),
        }
        op = functools.partial(attention_map, rows=range(ROWS))
        check_op(op, tensors, backend=on.backend, grads=())
        sums = op(**tensors, backend=on.backend).float().sum(-1)
        wanted = torch.ones(ROWS, device=on.device)
        wanted[8] = 0
        if not (
            on.backend == "reference" and dtype == torch.float16
        ):  # there the sum of score and bias overflows, as in torch
            torch.testing.assert_close(sums, wanted.expand_as(sums), rtol=0, atol=0.02)
