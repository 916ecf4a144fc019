"""flash_attention_varlen under the numerics rule."""

from __future__ import annotations

import functools

import pytest
import torch

from pyvit.ops import flash_attention, flash_attention_varlen
from pyvit.testing import Served, check_op, compare, served
from tests.extremes import ROWS, extreme_bias

varlen = functools.partial(flash_attention_varlen, return_lse=True)
on_varlen = pytest.mark.parametrize("on", served("flash_attention_varlen", "grad", "bias"), ids=str)
on_map = pytest.mark.parametrize("on", served("attention_map", "bias"), ids=str)


def packed(
    on: Served, lengths_q: list[int], lengths_k: list[int], h: int = 2, d: int = 32, dv: int = 0, hkv: int = 0
) -> tuple[dict, dict]:
    """Tensors and options of a call."""
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
def test_lengths(on: Served, lengths_q: list[int], lengths_k: list[int], is_causal: bool) -> None:
    """Includes a sequence without queries, and one without keys (zeros and -inf)."""
    tensors, options = packed(on, lengths_q, lengths_k)
    _check(on, tensors, options, is_causal=is_causal)


@on_varlen
@pytest.mark.parametrize("d", [8, 40, 64, 72, 80, 96, 128])
def test_head_dims_and_groups(on: Served, d: int) -> None:
    tensors, options = packed(on, [21, 40], [30, 9], h=4, d=d, dv=d + 8, hkv=2)
    _check(on, tensors, options, scale=0.2)


@on_varlen
@pytest.mark.parametrize("pattern", [(1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_bias(on: Served, pattern: tuple[int, ...], kind: str) -> None:
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
def test_strides(on: Served, store: str) -> None:
    tensors, options = packed(on, [9, 20, 4], [11, 6, 30])
    _check(on, tensors, options, store=store, store_grad=store)


@on_varlen
def test_against_dense_attention(on: Served) -> None:
    """Against flash_attention with a block-diagonal mask."""
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


@pytest.mark.isa
@on_varlen
def test_finite_masks(on: Served) -> None:
    for dtype in {torch.float32, on.dtype}:
        tensors, options = packed(on, [ROWS, 3, ROWS], [37, 12, 70])
        tensors["bias"] = extreme_bias(70, dtype).to(on.device)[None, None]
        _check(on, tensors, options, broadcast={"bias": (3, 2, ROWS, 70)})
