"""Attention probabilities of chosen queries: the CLS maps of DINO in O(N) memory, beside a flash kernel that never
stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Operator
from pyvit.ops import checks, reference


def attention_map(
    q: Tensor,
    k: Tensor,
    rows: int | Sequence[int] | Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q[rows] k^T + bias), for the query rows asked for.

    Args:
        q: queries (B, H, Nq, D).
        k: keys (B, Hkv, Nk, D), Hkv dividing H.
        rows: indices of queries in [0, Nq): an int, a sequence, or an int64 tensor (R,) or (B, R).
        bias: as in :func:`pyvit.ops.flash_attention`.
        scale: factor on the scores, default 1/sqrt(D).
        backend: force one backend.

    Returns:
        probabilities (B, H, R, Nk) in the dtype of q. Differentiable through the reference formula.

    Raises ValueError, TypeError, BackendError as :func:`pyvit.ops.flash_attention`.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), section 4.2.
    """
    q, k, bias = _prepare(q, k, bias)
    indices = _rows(q, rows)
    call = _check(q, k, bias)
    scale = checks.scale("attention_map", scale, q.shape[3])
    return MAP(q, k, indices, bias, scale, dispatch.select(call, backend))


def _prepare(q: Tensor, k: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands in autocast's dtype, bias with its leading dimensions."""
    device = checks.device("attention_map", "q", q)
    q, k = dispatch.autocast(device, q, k)
    return q, k, checks.with_leading("attention_map", bias)


def _rows(q: Tensor, rows: int | Sequence[int] | Tensor) -> Tensor:
    op = "attention_map"
    checks.tensor(op, "q", q, "(B, H, Nq, D)", 4)
    if not isinstance(rows, Tensor):
        given = [rows] if hasattr(rows, "__index__") else rows
        if not isinstance(given, Sequence) and not hasattr(given, "__array__"):
            raise TypeError(
                f"{op}: rows must be an int, a sequence of ints or an int64 Tensor, got {type(rows).__name__}"
            )
        rows = torch.tensor([checks.whole(op, "rows", row) for row in given], dtype=torch.int64, device="cpu")
    checks.dense(op, "rows", rows)
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: rows must hold int64 indices, got {rows.dtype}")
    if rows.dim() not in (1, 2) or (rows.dim() == 2 and rows.shape[0] != q.shape[0]):
        checks.fail(op, "rows", f"of shape (R,) or ({q.shape[0]}, R)", checks.shape(rows))
    # Reading indices back from a GPU would stall it; there, as with any gather, an index out of range is a device-side
    # error.
    if rows.is_meta and not q.is_meta and not checks.is_fake(rows):
        checks.fail(op, "rows", "a tensor of values", "one on meta, which has none")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= q.shape[2]:
            checks.fail(op, "rows", f"indices in [0, {q.shape[2]})", f"{low}..{high}")
    return rows.to(q.device, torch.int64).expand(q.shape[0], -1)


def _check(q: Tensor, k: Tensor, bias: Tensor | None) -> Call:
    op = "attention_map"
    checks.tensor(op, "k", k, "(B, Hkv, Nk, D)", 4)
    checks.floating(op, "q", q)
    checks.same(op, "k", k, "q", q)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        checks.fail(op, "k", f"of shape ({q.shape[0]}, Hkv, Nk, {q.shape[3]}) to fit q", checks.shape(k))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        checks.fail(op, "k", f"with a number of heads that divides q's {q.shape[1]}", k.shape[1])
    if q.shape[3] == 0:
        checks.fail(op, "q and k", "of at least one channel per head", "D = 0")
    features = ["gqa"] if k.shape[1] != q.shape[1] else []
    if bias is not None:
        checks.bias(op, bias, q, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
        features.append("bool_mask" if bias.dtype == torch.bool else "bias")
    return Call(op, q.device.type, q.dtype, tuple(features), (q.shape[3],))


@dispatch.describes(attention_map)
def _describe(
    q: Tensor, k: Tensor, rows: Any, bias: Tensor | None, scale: Any, backend: str | None
) -> tuple[Call, list[str]]:
    q, k, bias = _prepare(q, k, bias)
    _rows(q, rows)
    call = _check(q, k, bias)
    checks.scale("attention_map", scale, q.shape[3])
    return call, dispatch.copy_notes(q=q, k=k)


def _check_low(q: Tensor, k: Tensor, rows: Tensor, bias: Tensor | None, _scale: float) -> Call:
    checks.tensor("attention_map", "rows", rows, "(B, R)", 2)
    if rows.dtype != torch.int64:
        raise TypeError(f"attention_map: rows must be int64, got {rows.dtype}")
    _rows(q, rows)
    checks.same("attention_map", "rows", rows, "q", q, dtype=False)
    return _check(q, k, bias)


def _fake(q: Tensor, k: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], rows.shape[1], k.shape[2])


MAP = Operator(
    "attention_map",
    reference=reference.attention_map,
    fake=_fake,
    check=_check_low,
    differentiable=("q", "k", "bias"),
    autocast=("q", "k"),
    kernels={"triton": "pyvit.triton_kernels.attention_map:attention_map"},
)
