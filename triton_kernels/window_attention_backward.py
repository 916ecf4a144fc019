"""Backward kernel of shifted windows that fit into a tile; terms as in :mod:`pyvit.triton_kernels.window_coordinates`.
No atomics: sums are kept on chip."""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import (
    LOG2E,
    add_products,
    dot_parts,
    dot_rows,
    dropout_mask,
    dropout_seed,
    exp2_scores,
    load_rows,
    zero_parts,
    zeros_of,
)
from pyvit.triton_kernels.flash_attention_backward import any_large, log_total, probabilities
from pyvit.triton_kernels.window_attention_forward import (
    gather,
    normalised,
    normalised_backward,
    scatter,
    score_factor,
    table_bias,
    times,
)
from pyvit.triton_kernels.window_coordinates import (
    inside_windows,
    row_offset,
    window_tokens,
    within_regions,
)


@triton.jit
def query_side(
    qkv, pad, grad_out, shifts, rests, row_sums, window, y, x, real, token, inside, h, HEADS, windows, qkv_strides,
    grad_out_strides, padded, D: tl.constexpr, D_PARTS: tl.constexpr, AREA: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """For queries at given coordinates: their rows and 1 / norm, the gradients of their outputs, their row sums and
    rests if given, and the shift subtracted from their scores: infinite past the windows, finite in fully masked rows,
    so that their probabilities are 0. Without row sums, ``shifts`` is the log-sum-exp."""
    offset = row_offset(window, y, x, windows, qkv_strides)
    queries, inverse = normalised(gather(qkv, pad, h * D, offset, real, padded, D, D_PARTS), COSINE)  # (queries, D)
    offset = row_offset(window, y, x, windows, grad_out_strides)
    grad = load_rows(grad_out + h * D, offset, None if padded is None else real, 1, D, D_PARTS)  # (queries, D)
    at = (window.to(tl.int64) * HEADS + h) * AREA + token
    row_sum, rest = 0.0, 0.0
    shift = tl.load(shifts + at, mask=inside, other=float("inf"))
    if row_sums is None:
        shift = tl.where(shift == float("-inf"), 0.0, shift)
    else:
        row_sum = tl.load(row_sums + at, mask=inside, other=0.0)
        rest = tl.load(rests + at, mask=inside, other=0.0)
    return queries, inverse, grad, row_sum, shift, rest


@triton.jit
def accumulate_pad(acc, values, padding):
    """Add the padding tokens' rows to the gradient of their common value."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (acc[i] + tl.sum(tl.where(padding[:, None], values[i], 0.0), 0),)
    return out


@triton.jit
def zero_vector(N: tl.constexpr):
    return tl.zeros((N,), tl.float32)


@triton.jit
def zero_vectors(PARTS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (zero_vector(PARTS[i]),)
    return out


@triton.jit
def store_vectors(base, values, D: tl.constexpr, PARTS: tl.constexpr):
    start: tl.constexpr = 0
    for i in tl.static_range(len(PARTS)):
        cols = start + tl.arange(0, PARTS[i])
        tl.store(base + cols, values[i], mask=cols < D)
        start = start + PARTS[i]


@triton.jit
def window_backward(
    grad_out,
    qkv,
    table,
    logit_scale,
    pad,
    lse,
    grad_qkv,
    bias_partial,
    logit_partial,
    pad_partial,
    seed,
    grad_out_strides,
    qkv_strides,
    grad_qkv_strides,
    size,
    padded,
    shift,
    windows,
    windows_x,
    total,
    share,
    HEADS,
    scale,
    threshold,
    keep_scale,
    D: tl.constexpr,
    D_PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of ``share`` packs of PACK windows, each in one tile. Those of the bias, the temperature and the
    padding are summed on chip over the windows; each program stores its sum."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    ROWS: tl.constexpr = PACK * AREA
    COSINE: tl.constexpr = logit_scale is not None
    pid = tl.program_id(0)
    h, group = pid % HEADS, pid // HEADS
    at_q, at_k, at_v = h * D, (HEADS + h) * D, (2 * HEADS + h) * D
    natural = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    rows = tl.arange(0, BLOCK_M)
    bias = zeros_of(BLOCK_M, BLOCK_M)
    if table is not None:
        bias = table_bias(table, rows[:, None], rows[None, :], h, HEADS, WINDOW, PACK)
    grad_bias = zeros_of(BLOCK_M, BLOCK_M)
    grad_logit = zero_vector(BLOCK_M)
    grad_pad_k, grad_pad_v = zero_vectors(D_PARTS), zero_vectors(D_PARTS)
    for pack_id in range(group * share, tl.minimum(group * share + share, tl.cdiv(total, PACK))):
        window, y, x, real = window_tokens(rows, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK)
        inside = inside_windows(rows, pack_id, total, WINDOW, PACK)
        queries, q_inverse, grad, _, shift_of, _ = query_side(
            qkv, pad, grad_out, lse, None, None, window, y, x, real, rows % AREA, inside, h, HEADS, windows,
            qkv_strides, grad_out_strides, padded, D, D_PARTS, AREA, COSINE,
        )  # fmt: skip
        offset = row_offset(window, y, x, windows, qkv_strides)
        keys, k_inverse = normalised(gather(qkv, pad, at_k, offset, real, padded, D, D_PARTS), COSINE)  # (keys, D)
        values = gather(qkv, pad, at_v, offset, real, padded, D, D_PARTS)
        s = dot_parts(queries, keys, BLOCK_M, BLOCK_M, PRECISION) * natural  # (queries, keys)
        if table is not None:
            s += bias
        elif BLOCK_M > ROWS:
            s = tl.where(rows[None, :] < ROWS, s, float("-inf"))
        s = within_regions(
            s, rows[:, None], rows[None, :], pack_id, size, padded, shift, windows, windows_x, pad, WINDOW, PACK
        )
        if any_large(shift_of):
            top = tl.max(s, 1)
            top = tl.where(top == float("-inf"), 0.0, top)
            rest = log_total(tl.sum(exp2_scores(s, top[:, None], LOG2E), 1))
            p = probabilities(s, tl.where(inside, top, float("inf"))[:, None], rest[:, None], LOG2E)
        else:
            p = exp2_scores(s, shift_of[:, None], LOG2E)
        if qkv.dtype.element_ty == tl.float32:  # whole rows are on chip: correct the rounding of the log-sum-exp
            total_p = tl.sum(p, 1)
            p = p * (1.0 / tl.where(total_p == 0.0, 1.0, total_p))[:, None]
        dp = dot_parts(grad, values, BLOCK_M, BLOCK_M, PRECISION)  # (queries, keys)
        dropped = p
        if DROPOUT:
            keep = dropout_mask(
                rng_seed,
                (window * HEADS + h + rows * 0)[:, None],
                rows[:, None] % AREA,
                rows[None, :] % AREA,
                threshold,
            )
            dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dropped = tl.trans(dropped.to(qkv.dtype.element_ty))
        dv = add_products(zero_parts((BLOCK_M,), D_PARTS), dropped, grad, 0, PRECISION)  # (keys, D)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if table is not None:
            grad_bias += ds
        rounded = ds.to(qkv.dtype.element_ty)
        dk = add_products(zero_parts((BLOCK_M,), D_PARTS), tl.trans(rounded), queries, 0, PRECISION)
        dq = times(add_products(zero_parts((BLOCK_M,), D_PARTS), rounded, keys, 0, PRECISION), natural)
        if COSINE:  # the temperature scales all scores of a row, so its gradient is queries times dQ
            grad_logit += dot_rows(dq, queries)
        dq = normalised_backward(dq, queries, q_inverse, COSINE)
        dk = normalised_backward(times(dk, natural), keys, k_inverse, COSINE)
        at, stored = row_offset(window, y, x, windows, grad_qkv_strides), inside & real
        scatter(grad_qkv + at_q, dq, at, stored, D, D_PARTS)
        scatter(grad_qkv + at_k, dk, at, stored, D, D_PARTS)
        scatter(grad_qkv + at_v, dv, at, stored, D, D_PARTS)
        if pad is not None:
            grad_pad_k = accumulate_pad(grad_pad_k, dk, inside & ~real)
            grad_pad_v = accumulate_pad(grad_pad_v, dv, inside & ~real)
    if pad is not None:  # (groups, 1, 2, heads, D)
        at = pad_partial + (group * 2 * HEADS + h).to(tl.int64) * D
        store_vectors(at, grad_pad_k, D, D_PARTS)
        store_vectors(at + HEADS * D, grad_pad_v, D, D_PARTS)
    if table is not None:  # (groups, heads, queries, keys)
        at = bias_partial + (group * HEADS + h).to(tl.int64) * ROWS * ROWS + rows[:, None] * ROWS + rows[None, :]
        tl.store(at, grad_bias, mask=(rows[:, None] < ROWS) & (rows[None, :] < ROWS))
    if COSINE:  # (groups, 1, heads)
        tl.store(logit_partial + pid, tl.sum(grad_logit, 0))
