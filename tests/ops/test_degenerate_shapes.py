"""Dimensions of size 0 and 1: every operator gives the result of the reference, or of the library it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyvit import ops
from pyvit.losses import KoLeoLoss
from pyvit.testing import check_op

r = torch.randn


def _attention(b: int, h: int, nq: int, nk: int, d: int = 8) -> dict[str, Tensor]:
    return {"q": r(b, h, nq, d), "k": r(b, h, nk, d), "v": r(b, h, nk, d)}


def _varlen(lengths_q: list[int], lengths_k: list[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"q": r(sum(lengths_q), 2, 8), "k": r(sum(lengths_k), 2, 8), "v": r(sum(lengths_k), 2, 8)}
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k)]
    options = {
        "cu_seqlens_q": ends[0],
        "cu_seqlens_k": ends[1],
        "max_seqlen_q": max([0, *lengths_q]),
        "max_seqlen_k": max([0, *lengths_k]),
    }
    return tensors, options


def _patch(b: int, keep: int | None = None, prefix: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"images": r(b, 3, 8, 8), "weight": r(5, 3, 4, 4), "bias": r(5)}
    if prefix is not None:
        tensors["prefix"] = r(prefix, 5)
    return tensors, {} if keep is None else {"keep": torch.zeros(b, keep, dtype=torch.int64)}


CASES: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "attention, no images": (ops.flash_attention, lambda: _attention(0, 2, 5, 7)),
    "attention, no heads": (ops.flash_attention, lambda: _attention(2, 0, 5, 7)),
    "attention, no queries": (ops.flash_attention, lambda: _attention(2, 2, 0, 7)),
    "attention, no keys": (ops.flash_attention, lambda: _attention(2, 2, 5, 0)),
    "attention, nothing": (ops.flash_attention, lambda: _attention(2, 2, 0, 0)),
    "attention, one": (ops.flash_attention, lambda: _attention(1, 1, 1, 1, 1)),
    "attention, bias without keys": (ops.flash_attention, lambda: _attention(2, 2, 5, 0) | {"bias": r(1, 2, 5, 0)}),
    "packed, no images": (ops.flash_attention_qkvpacked, lambda: {"qkv": r(0, 5, 3, 2, 8)}),
    "packed, no tokens": (ops.flash_attention_qkvpacked, lambda: {"qkv": r(2, 0, 3, 2, 8)}),
    "packed, one": (ops.flash_attention_qkvpacked, lambda: {"qkv": r(1, 1, 3, 1, 8)}),
    "varlen, no sequences": (ops.flash_attention_varlen, lambda: _varlen([], [])),
    "varlen, empty ones": (ops.flash_attention_varlen, lambda: _varlen([0, 3, 0], [2, 0, 0])),
    "varlen, all empty": (ops.flash_attention_varlen, lambda: _varlen([0, 0], [0, 0])),
    "varlen, no keys": (ops.flash_attention_varlen, lambda: _varlen([3, 2], [0, 0])),
    "varlen, of one": (ops.flash_attention_varlen, lambda: _varlen([1, 1], [1, 1])),
    "map, no images": (ops.attention_map, lambda: ({"q": r(0, 2, 5, 8), "k": r(0, 2, 7, 8)}, {"rows": 0})),
    "map, no rows": (ops.attention_map, lambda: ({"q": r(2, 2, 5, 8), "k": r(2, 2, 7, 8)}, {"rows": []})),
    "map, no keys": (ops.attention_map, lambda: ({"q": r(2, 2, 5, 8), "k": r(2, 2, 0, 8)}, {"rows": 0})),
    "window, no images": (
        ops.window_attention,
        lambda: ({"qkv": r(0, 4, 4, 48), "bias_table": r(9, 2)}, {"window_size": 2, "num_heads": 2}),
    ),
    "window, one token": (
        ops.window_attention,
        lambda: ({"qkv": r(1, 1, 1, 48), "bias_table": r(49, 2)}, {"window_size": 4, "num_heads": 2}),
    ),
    "window of one": (
        ops.window_attention,
        lambda: (
            {"qkv": r(1, 3, 2, 48), "bias_table": r(1, 2), "logit_scale": r(2)},
            {"window_size": 1, "num_heads": 2},
        ),
    ),
    "patches, no images": (ops.patch_embed, lambda: _patch(0)),
    "patches, none kept": (ops.patch_embed, lambda: _patch(2, keep=0)),
    "patches, none kept beside a prefix": (ops.patch_embed, lambda: _patch(2, keep=0, prefix=2)),
    "patches, no prefix": (ops.patch_embed, lambda: _patch(2, prefix=0)),
    "info_nce, no channels": (ops.info_nce, lambda: {"a": r(3, 0), "b": r(3, 0), "scale": torch.tensor(2.0)}),
    "sigmoid, one row": (
        ops.sigmoid_contrastive,
        lambda: {"a": r(1, 8), "b": r(1, 8), "scale": torch.tensor(2.0), "bias": torch.tensor(-1.0)},
    ),
    "sigmoid, no channels": (
        ops.sigmoid_contrastive,
        lambda: {"a": r(3, 0), "b": r(3, 0), "scale": torch.tensor(2.0), "bias": torch.tensor(-1.0)},
    ),
    "distillation, no samples": (
        ops.distillation_cross_entropy,
        lambda: ({"student": r(2, 0, 6)}, {"teacher": r(2, 0, 6), "student_temp": 0.5, "teacher_temp": 0.5}),
    ),
    "distillation, one prototype": (
        ops.distillation_cross_entropy,
        lambda: ({"student": r(1, 3, 1)}, {"teacher": r(1, 3, 1), "student_temp": 0.5, "teacher_temp": 0.5}),
    ),
    "layer_norm, no rows": (ops.layer_norm, lambda: {"x": r(0, 8), "weight": r(8), "bias": r(8)}),
    "layer_norm, one channel": (ops.layer_norm, lambda: {"x": r(3, 1), "weight": r(1), "bias": r(1)}),
    "rms_norm, no rows": (ops.rms_norm, lambda: {"x": r(0, 8), "weight": r(8)}),
    "rms_norm, one channel": (ops.rms_norm, lambda: {"x": r(3, 1), "weight": r(1)}),
    "linear, no rows": (ops.linear, lambda: {"x": r(0, 8), "weight": r(3, 8), "bias": r(3)}),
    "koleo, one row": (ops.koleo, lambda: {"x": r(1, 8)}),
    "koleo, two rows": (ops.koleo, lambda: {"x": r(2, 8)}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_the_reference(case: str, seeded: int) -> None:
    op, make = CASES[case]
    made = make()
    tensors, options = made if isinstance(made, tuple) else (made, {})
    check_op(op, tensors, backend="cpu", **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.koleo(r(0, 4)), "koleo: x must be of at least one row"),
        (lambda: ops.info_nce(r(0, 4), r(0, 4), 1.0), "info_nce: a must be of at least one row"),
        (lambda: ops.flash_attention(r(1, 2, 3, 0), r(1, 2, 3, 0), r(1, 2, 3, 4)), "at least one channel"),
        (lambda: ops.attention_map(r(1, 2, 3, 0), r(1, 2, 3, 0), 0), "at least one channel"),
        (lambda: ops.window_attention(r(1, 0, 4, 48), 2, num_heads=2), "at least one token"),
    ],
)
def test_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("op", [ops.info_nce, ops.nt_xent])
def test_one_row_has_no_negatives(op: Callable[..., Tensor], seeded: int) -> None:
    """Loss and gradients are zero, up to the rounding of the logits."""
    a, b, s = r(1, 8, requires_grad=True), r(1, 8, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    for found in (loss := op(a, b, s), *torch.autograd.grad(loss, (a, b, s))):
        assert found.abs().max() < 1e-5


@pytest.mark.parametrize("module", [False, True])
def test_koleo_of_one_row(module: bool) -> None:
    """As DINOv2's code, the row is its own nearest neighbour: the logarithm of eps's distance, with zero gradient."""
    x = r(1, 16, requires_grad=True)
    loss = KoLeoLoss()(x) if module else ops.koleo(x)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(-math.log(1e-8 * math.sqrt(16) + 1e-8)))
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sinkhorn_without_iterations(dtype: torch.dtype, seeded: int) -> None:
    """As in SwAV's and DINOv2's code: normalised by the total sum, times the number of samples."""
    scores = r(6, 9).to(dtype)
    q = (scores.double() / 0.5).exp()
    got = ops.sinkhorn_knopp(scores, 0.5, 0)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), q / q.sum() * 6, rtol=1e-5, atol=1e-6)
    assert ops.sinkhorn_knopp(scores * 1000, 0.5, 0).isfinite().all()
    for n in (1, 3):  # what follows is what it was
        q = q / q.sum() if n == 1 else q
        torch.testing.assert_close(
            ops.sinkhorn_knopp(scores, 0.5, n).sum(1).double(), torch.ones(6, dtype=torch.float64)
        )
