"""Attention with decomposed relative positions: contract, fake kernels and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, reference
from pyvit.ops.flash_attention import check, check_results, flash_attention, prepare

_OP = "decomposed_attention"


def decomposed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the tokens of a map with a bias for the row and one for the column of every key, as in MViTv2,
    ViTDet and SAM.

    The scaled score of query i and the key in row y and column x gets ``rel_h[..., i, y] + rel_w[..., i, x]``. Usually
    these are products of the query with relative-position embeddings: ``rel_h[..., i, y] = q_i . Rh[y_i - y]``. No
    (Nq, Nk) bias is stored, forward or backward: the backend ``cpu`` adds the two numbers as it computes a row's
    softmax, and the backend ``torch`` appends them to the channels of q, and one-hot vectors to those of k, for
    :func:`pyvit.ops.flash_attention`.

    Args:
        q: queries (B, H, Nq, D), float32, bfloat16 or float16 (float64 on the backends ``reference`` and ``torch``);
            any strides. They need not lie on the keys' grid.
        k: keys (B, H, rows * columns, D), row by row.
        v: values (B, H, rows * columns, Dv).
        rel_h: biases of the rows of keys (B, H, Nq, rows), float32 or the dtype of q. Infinite ones give NaN on the
            backend ``torch``.
        rel_w: biases of the columns of keys (B, H, Nq, columns), of the dtype of rel_h.
        scale, return_lse, backend: as in :func:`pyvit.ops.flash_attention`.

    Returns:
        out (B, H, Nq, Dv), stored as (B, Nq, H, Dv); with ``return_lse`` also lse (B, H, Nq) float32.

    Raises ValueError, TypeError, BackendError as :func:`pyvit.ops.flash_attention`.

    Sources: Li et al., "MViTv2" (2022), equation 4; Kirillov et al., "Segment Anything" (2023).
    """
    q, k, v, _ = prepare(_OP, q, k, v, None)
    call = _check(q, k, v, rel_h, rel_w, False, return_lse)
    scale = checks.scale(_OP, scale, q.shape[3])
    chosen = dispatch.select(call, backend)
    if chosen == "torch":
        return _by_channels(q, k, v, rel_h, rel_w, scale, return_lse=return_lse)
    out, lse = DECOMPOSED_ATTENTION(q, k, v, rel_h, rel_w, scale, chosen)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, gqa: bool, return_lse: bool) -> Call:
    call = check(q, k, v, None, False, 0.0, gqa, return_lse, op=_OP)
    b, h, n, _ = q.shape
    for name, t, axis in (("rel_h", rel_h, "rows"), ("rel_w", rel_w, "columns")):
        checks.tensor(_OP, name, t, f"(B, H, Nq, {axis})", 4)
        if t.dtype is not torch.float32 and t.dtype != q.dtype:
            raise TypeError(f"{_OP}: {name} must be float32 or of the dtype of q, {q.dtype}, got {t.dtype}")
        checks.same(_OP, name, t, "q", q, dtype=False)
        if t.shape[:3] != q.shape[:3] or t.shape[3] == 0:
            checks.fail(_OP, name, f"of shape ({b}, {h}, {n}, {axis})", checks.shape(t))
    checks.same(_OP, "rel_w", rel_w, "rel_h", rel_h)
    if rel_h.shape[3] * rel_w.shape[3] != k.shape[2]:
        grid = f"{rel_h.shape[3]} rows and {rel_w.shape[3]} columns"
        checks.fail(_OP, "rel_h and rel_w", f"of a grid of the {k.shape[2]} tokens of k", grid)
    features = call.features
    grad = "lse_grad" if return_lse else "grad"
    if grad not in features and torch.is_grad_enabled() and (rel_h.requires_grad or rel_w.requires_grad):
        features = (*features, grad)
    return call._replace(op=_OP, features=features)


def _by_channels(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float, *, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The backend "torch": biases as further channels of the queries, of which each key takes two."""
    rows, columns = rel_h.shape[3], rel_w.shape[3]
    y = torch.eye(rows, device=q.device, dtype=q.dtype).repeat_interleave(columns, 0)  # (Nk, rows)
    x = torch.eye(columns, device=q.device, dtype=q.dtype).repeat(rows, 1)  # (Nk, columns)
    wide_q = torch.cat((q * scale, rel_h.to(q.dtype), rel_w.to(q.dtype)), -1)
    wide_k = torch.cat((k, torch.cat((y, x), -1).expand(*k.shape[:2], -1, -1)), -1)
    return flash_attention(wide_q, wide_k, v, scale=1.0, enable_gqa=True, return_lse=return_lse)


@dispatch.describes(decomposed_attention)
def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    scale: Any,
    return_lse: bool,
    backend: str | None,
) -> tuple[Call, list[str]]:
    q, k, v, _ = prepare(_OP, q, k, v, None)
    call = _check(q, k, v, rel_h, rel_w, False, return_lse)
    checks.scale(_OP, scale, q.shape[3])
    notes = dispatch.copy_notes(q=q, k=k, v=v, rel_h=rel_h, rel_w=rel_w)
    if dispatch.select(call, backend) == "torch":
        notes.append(
            "torch: biases as channels of queries and keys, then flash_attention, which chooses its own backend"
        )
    return call, notes


def _check_low(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, _scale: float) -> Call:
    return _check(q, k, v, rel_h, rel_w, True, True)


def _check_low_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Call:
    call = _check_low(q, k, v, *rest)
    check_results(grad_out, grad_lse, out, lse, False, None, (*q.shape[:3], v.shape[3]), q.shape[:3], q)
    return call


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, h, n, _d = q.shape
    return q.new_empty(b, n, h, v.shape[3]).transpose(1, 2), q.new_empty(b, h, n, dtype=checks.wide(q.dtype))


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    heads = [t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v)]
    return (*heads, rel_h.new_empty(rel_h.shape), rel_w.new_empty(rel_w.shape))


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.decomposed_attention(*args)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _plain(*args: Any) -> Any:
    return _by_channels(*args[:-1], return_lse=True)


DECOMPOSED_ATTENTION_BACKWARD = Gradient(
    _OP, formula=reference.decomposed_attention, fake=_fake_backward, check=_check_low_backward
)
DECOMPOSED_ATTENTION = Operator(
    _OP,
    reference=_reference,
    fake=_fake,
    check=_check_low,
    gradient=DECOMPOSED_ATTENTION_BACKWARD,
    autocast=("q", "k", "v"),
    plain=_plain,
)
