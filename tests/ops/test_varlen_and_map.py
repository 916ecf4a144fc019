"""flash_attention_varlen and attention_map under the numerics rule."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from pyvit.ops import attention_map, flash_attention, flash_attention_varlen
from pyvit.testing import Served, check_op, compare, layout, poisoned, served
from tests.extremes import ROWS, extreme_bias

varlen = functools.partial(flash_attention_varlen, return_lse=True)
on_varlen = pytest.mark.parametrize("on", served("flash_attention_varlen", "grad", "bias"), ids=str)
on_map = pytest.mark.parametrize("on", served("attention_map", "bias"), ids=str)


def packed(
    on: Served, lengths_q: list[int], lengths_k: list[int], h: int = 2, d: int = 32, dv: int = 0, hkv: int = 0
) -> tuple[dict, dict]:
    """Tensors and options of a packed call."""
    hkv = hkv or h
    tensors = {
        "q": on.randn(sum(lengths_q), h, d),
        "k": on.randn(sum(lengths_k), hkv, d),
        "v": on.randn(sum(lengths_k), hkv, dv or d),
    }
    ends = [torch.tensor([0, *lengths], device=on.device).cumsum(0) for lengths in (lengths_q, lengths_k)]
    options = {
        "cu_seqlens_q": ends[0].int(),
        "cu_seqlens_k": ends[1],
        "max_seqlen_q": max([1, *lengths_q]),
        "max_seqlen_k": max([1, *lengths_k]),
    }
    return tensors, options


def _check(on: Served, tensors: dict, options: dict, **more: object) -> None:
    cu = {name: options.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    check_op(functools.partial(varlen, **cu), tensors, backend=on.backend, name="varlen", **options, **more)


MIXES = [
    ([5], [5]),
    ([1, 50, 17, 197], [1, 50, 17, 197]),
    ([3, 0, 9], [4, 6, 0]),
    ([49] * 6, [49] * 6),
    ([0, 0], [0, 0]),
    ([], []),
    ([7, 2], [300, 1]),
]


@pytest.mark.isa
@on_varlen
@pytest.mark.parametrize(("lengths_q", "lengths_k"), MIXES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen(on: Served, lengths_q: list[int], lengths_k: list[int], is_causal: bool) -> None:
    """A sequence without queries, and one without keys (zeros, and -inf), among the others."""
    tensors, options = packed(on, lengths_q, lengths_k)
    _check(on, tensors, options, is_causal=is_causal)


@on_varlen
@pytest.mark.parametrize("d", [8, 40, 64, 72, 80, 96, 128])
def test_varlen_head_dims_and_groups(on: Served, d: int) -> None:
    tensors, options = packed(on, [21, 40], [30, 9], h=4, d=d, dv=d + 8, hkv=2)
    _check(on, tensors, options, scale=0.2)


@on_varlen
@pytest.mark.parametrize("pattern", [(1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_varlen_bias(on: Served, pattern: tuple[int, ...], kind: str) -> None:
    tensors, options = packed(on, [9, 20, 4], [11, 6, 30])
    shape = [
        n if keep else 1
        for n, keep in zip((3, 2, options["max_seqlen_q"], options["max_seqlen_k"]), pattern, strict=True)
    ]
    bias = torch.randn(shape, device=on.device)
    full = (3, 2, options["max_seqlen_q"], options["max_seqlen_k"])
    _check(on, {**tensors, "bias": bias > -1.0 if kind == "bool" else bias}, options, broadcast={"bias": full})


@on_varlen
@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "shifted"])
def test_varlen_strides(on: Served, store: str) -> None:
    tensors, options = packed(on, [9, 20, 4], [11, 6, 30])
    _check(on, tensors, options, store=store, store_grad=store)


@on_varlen
def test_varlen_is_dense_attention_per_sequence(on: Served) -> None:
    """Against flash_attention with a block-diagonal mask, an independent way to the same answer."""
    lengths = [7, 31, 1, 16]
    tensors, options = packed(on, lengths, lengths)
    owner = torch.repeat_interleave(torch.arange(4, device=on.device), torch.tensor(lengths, device=on.device))
    dense = {name: t.transpose(0, 1)[None] for name, t in tensors.items()}
    out, lse = varlen(**tensors, **options, backend=on.backend)
    wide = {name: t.double() for name, t in dense.items()}
    same = [
        flash_attention(**x, bias=owner[:, None] == owner, return_lse=True, backend="reference") for x in (dense, wide)
    ]
    compare("varlen", [out.transpose(0, 1)[None], lse[None]], *same, dtype=on.dtype)


def _maps(on: Served, tensors: dict[str, Tensor], rows: object, **options: object) -> None:
    """Forward and gradients, the rows given as an option since they are not widened."""
    check_op(functools.partial(attention_map, rows=rows), tensors, backend=on.backend, name="attention_map", **options)


@pytest.mark.isa
@on_map
@pytest.mark.parametrize("d", [8, 16, 32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (17, 17), (50, 197)])
def test_map(on: Served, nq: int, nk: int, d: int) -> None:
    tensors = {"q": on.randn(2, 3, nq, d), "k": on.randn(2, 3, nk, d)}
    _maps(on, tensors, 0)
    _maps(on, tensors, torch.randint(nq, (2, 5), device=on.device), scale=0.3)


@on_map
@pytest.mark.parametrize("pattern", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 1, 1)], ids=str)
def test_map_bias(on: Served, pattern: tuple[int, ...]) -> None:
    tensors = {"q": on.randn(2, 4, 9, 32), "k": on.randn(2, 2, 21, 32)}
    bias = torch.randn([n if keep else 1 for n, keep in zip((2, 4, 9, 21), pattern, strict=True)], device=on.device)
    for given in (bias, bias > -1, bias.masked_fill(bias > 0, -math.inf), (bias * 0).bool()):
        _maps(on, {**tensors, "bias": given}, [8, 0, 3, 3], broadcast={"bias": (2, 4, 9, 21)})


@on_map
@pytest.mark.parametrize("store", ["transposed", "permuted", "sliced", "stepped", "shifted", "expanded"])
def test_map_strides(on: Served, store: str) -> None:
    _maps(
        on,
        {"q": on.randn(2, 3, 9, 40), "k": on.randn(2, 3, 21, 40), "bias": on.randn(2, 3, 9, 21)},
        [4, 5],
        store=store,
        store_grad=store,
    )


@on_map
def test_map_rows_in_every_form(on: Served) -> None:
    """An int, a list, tensors of one and two dimensions, of any strides, and none at all."""
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
def test_map_rows_are_those_of_attention(on: Served) -> None:
    """Probabilities times v is what flash_attention gives for those queries."""
    q, k, v = on.randn(2, 3, 9, 32), on.randn(2, 3, 50, 32), on.randn(2, 3, 50, 32)
    p = attention_map(q, k, [0, 7], backend=on.backend)
    out = flash_attention(q, k, v, backend="reference")[:, :, [0, 7]]
    torch.testing.assert_close(p.float() @ v.float(), out.float(), rtol=0, atol=30 * torch.finfo(on.dtype).eps)
    torch.testing.assert_close(
        p.float().sum(-1), torch.ones(2, 3, 2, device=on.device), rtol=0, atol=4 * torch.finfo(on.dtype).eps
    )


@pytest.mark.isa
@on_varlen
def test_finite_masks_of_packed_sequences(on: Served) -> None:
    for dtype in {torch.float32, on.dtype}:
        tensors, options = packed(on, [ROWS, 3, ROWS], [37, 12, 70])
        tensors["bias"] = extreme_bias(70, dtype).to(on.device)[None, None]
        _check(on, tensors, options, broadcast={"bias": (3, 2, ROWS, 70)})


@pytest.mark.isa
@on_map
def test_maps_of_finite_masks(on: Served) -> None:
    """Every row of probabilities sums to 1, but for those that may attend to nothing, and to no more."""
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
