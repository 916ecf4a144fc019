"""decomposed_attention under the numerics rule: outputs, log-sum-exp and all gradients, and its errors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import pyvit
from pyvit.ops import decomposed_attention, flash_attention
from pyvit.testing import NumericsError, Served, check_op, served

on_every = pytest.mark.parametrize("on", served("decomposed_attention", "grad"), ids=str)
with_lse = functools.partial(decomposed_attention, return_lse=True)


def inputs(
    on: Served, lead: tuple[int, int], queries: int, grid: tuple[int, int], d: int, *, dv: int | None = None
) -> dict[str, Tensor]:
    """q, k, v of ``lead`` (B, H) and float32 biases of the rows and columns of a grid of keys."""
    keys = grid[0] * grid[1]
    tensors = {"q": on.randn(*lead, queries, d), "k": on.randn(*lead, keys, d), "v": on.randn(*lead, keys, dv or d)}
    tensors["rel_h"], tensors["rel_w"] = (torch.randn(*lead, queries, n, device=on.device) for n in grid)
    return tensors


def check(on: Served, tensors: dict[str, Tensor], call: Any = with_lse, **options: Any) -> None:
    options = {"name": "decomposed_attention", "backend": on.backend, "dtype": on.dtype, **options}
    check_op(call, tensors, **options)


GRIDS = [(1, 1), (1, 7), (9, 1), (2, 2), (3, 5), (7, 7), (14, 14), (4, 16), (5, 17), (3, 33), (15, 16), (16, 15)]


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("d", [8, 40, 64])
def test_grids(on: Served, grid: tuple[int, int], d: int) -> None:
    check(on, inputs(on, (2, 2), grid[0] * grid[1], grid, d))


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("queries", [1, 3, 49, 130])
@pytest.mark.parametrize(("d", "dv"), [(80, 24), (16, 96), (5, 3)])
def test_queries_off_the_grid(on: Served, queries: int, d: int, dv: int) -> None:
    check(on, inputs(on, (1, 3), queries, (6, 9), d, dv=dv), scale=0.3)


@pytest.mark.slow
@on_every
@pytest.mark.parametrize("grid", [(24, 25), (37, 57), (1, 2100), (2100, 1), (46, 45)], ids=str)
def test_long(on: Served, grid: tuple[int, int]) -> None:
    """Several pieces of a head, and blocks of keys that end within a row of the grid."""
    check(on, inputs(on, (1, 1), 600, grid, 32))


@on_every
@pytest.mark.parametrize("store", ["transposed", "permuted", "sliced", "stepped", "shifted"])
def test_strides(on: Served, store: str) -> None:
    check(on, inputs(on, (2, 3), 21, (4, 6), 40), store=store, store_grad=store)


@on_every
def test_biases_of_the_dtype_of_q_and_views(on: Served) -> None:
    tensors = inputs(on, (2, 3), 24, (4, 6), 32)
    tensors |= {name: tensors[name].to(on.dtype) for name in ("rel_h", "rel_w")}
    check(on, tensors)
    shared = {name: tensors[name][:1, :, :1].expand(2, 3, 24, -1) for name in ("rel_h", "rel_w")}
    found = decomposed_attention(**{**tensors, **shared}, backend=on.backend)
    want = decomposed_attention(**{**tensors, **{n: t.contiguous() for n, t in shared.items()}}, backend=on.backend)
    assert torch.equal(found, want)


@on_every
@pytest.mark.parametrize("size", [10.0, 100.0, 1000.0])
def test_large_biases(on: Served, size: float) -> None:
    """A log-sum-exp so large that float32 rounds away what was added to it."""
    tensors = inputs(on, (1, 2), 40, (5, 8), 16)
    tensors["rel_h"] *= size
    check(on, tensors)


@on_every
def test_equals_attention_with_the_sum_as_bias(on: Served) -> None:
    tensors = inputs(on, (2, 2), 33, (5, 7), 16)
    bias = (tensors["rel_h"][..., :, None] + tensors["rel_w"][..., None, :]).flatten(-2)
    parts = [tensors[name] for name in "qkv"]
    found = decomposed_attention(**tensors, return_lse=True, backend=on.backend)
    want = flash_attention(*parts, bias=bias, return_lse=True, backend=on.backend)
    assert all(map(torch.equal, found, want))
    assert found[0].transpose(1, 2).is_contiguous(), "heads merge without a copy"


@on_every
def test_a_masked_row_of_the_grid(on: Served) -> None:
    """A bias of -inf keeps a query from a row of keys."""
    tensors = inputs(on, (1, 2), 12, (4, 5), 16)
    tensors["rel_h"][..., 1] = -float("inf")
    changed = {**tensors, "v": tensors["v"].clone()}
    changed["v"][:, :, 5:10] = 99.0
    out = decomposed_attention(**tensors, backend=on.backend)
    assert torch.equal(out, decomposed_attention(**changed, backend=on.backend))
    assert out.isfinite().all()


@pytest.mark.isa
@on_every
def test_gradients_are_the_same_for_one_and_two_threads(on: Served, threads: Any) -> None:
    """Of a head in several pieces, of which two threads take different ones."""
    tensors = inputs(on, (1, 1), 600, (20, 30), 16)
    results = []
    for n in (1, 2):
        threads(n)
        leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
        out = decomposed_attention(**dict(zip(tensors, leaves, strict=True)), backend=on.backend)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    if on.backend != "reference":
        assert all(map(torch.equal, *results))


@on_every
def test_exchanged_rows_and_columns_are_noticed(on: Served) -> None:
    """The rule fails where the grid's rows are taken for its columns."""
    tensors = inputs(on, (1, 2), 36, (6, 6), 32)

    def wrong(*, rel_h: Tensor, rel_w: Tensor, backend: str, **kw: Any) -> Any:
        pair = (rel_h, rel_w) if backend == "reference" else (rel_w, rel_h)
        return decomposed_attention(**kw, rel_h=pair[0], rel_w=pair[1], backend=backend)

    if on.backend != "reference":
        with pytest.raises(NumericsError):
            check_op(
                wrong, tensors, backend=on.backend, dtype=on.dtype, naive=lambda **kw: wrong(backend="reference", **kw)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_channels(dtype: torch.dtype) -> None:
    """The backend "torch"."""
    on = Served("torch", "cpu", dtype)
    tensors = inputs(on, (2, 2), 45, (5, 9), 32)
    check(on, tensors)
    report = pyvit.explain(decomposed_attention, **tensors, backend="torch")
    assert any("then flash_attention" in note for note in report.notes)


def z(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BASE = {"q": z(2, 4, 9, 8), "k": z(2, 4, 12, 8), "v": z(2, 4, 12, 8), "rel_h": z(2, 4, 9, 3), "rel_w": z(2, 4, 9, 4)}
ERRORS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"rel_h": z(2, 4, 9, 4)}, ValueError, ["rel_h and rel_w", "grid of the 12 tokens", "4 rows and 4 columns"]),
    ({"rel_h": z(2, 4, 12, 3)}, ValueError, ["rel_h must", "(2, 4, 9, rows)", "(2, 4, 12, 3)"]),
    ({"rel_w": z(2, 1, 9, 4)}, ValueError, ["rel_w must", "(2, 4, 9, columns)", "(2, 1, 9, 4)"]),
    ({"rel_w": z(2, 4, 9, 0)}, ValueError, ["rel_w must", "(2, 4, 9, 0)"]),
    ({"rel_w": z(4, 9, 4)}, ValueError, ["rel_w must", "(B, H, Nq, columns)", "(4, 9, 4)"]),
    ({"rel_h": z(2, 4, 9, 3, dtype=torch.float64)}, TypeError, ["rel_h must be float32", "float64"]),
    ({"rel_h": z(2, 4, 9, 3, dtype=torch.int64)}, TypeError, ["rel_h must be float32", "int64"]),
    ({"rel_h": None}, TypeError, ["rel_h must be a Tensor", "NoneType"]),
    ({"k": z(2, 2, 12, 8), "v": z(2, 2, 12, 8)}, ValueError, ["k must", "4 heads"]),
    ({"v": z(2, 4, 11, 8)}, ValueError, ["v must", "(2, 4, 12, Dv)"]),
    ({"scale": "1"}, TypeError, ["scale"]),
]


@pytest.mark.parametrize(("changed", "kind", "parts"), ERRORS, ids=range(len(ERRORS)))
def test_errors(changed: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    for call in (decomposed_attention, functools.partial(pyvit.explain, decomposed_attention)):
        with pytest.raises(kind) as error:
            call(**{**BASE, **changed})
        assert str(error.value).startswith("decomposed_attention: ")
        assert all(part in str(error.value) for part in parts), str(error.value)
    decomposed_attention(**BASE)


def test_biases_of_two_dtypes() -> None:
    low = {name: t.bfloat16() for name, t in BASE.items()}
    with pytest.raises(TypeError, match="rel_w must have the dtype of rel_h"):
        decomposed_attention(**{**low, "rel_h": BASE["rel_h"]})
