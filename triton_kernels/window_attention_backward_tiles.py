"""Backward kernels of windows that are larger than a tile: a pass for the queries, and one for keys and values; terms
as in :mod:`pyvit.triton_kernels.window_coordinates`. No atomics: sums are kept on chip."""

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
    span,
    zero_parts,
)
from pyvit.triton_kernels.flash_attention_backward import any_large, log_total, probabilities
from pyvit.triton_kernels.window_attention_backward import (
    accumulate_pad,
    query_side,
    store_vectors,
    zero_vector,
    zero_vectors,
)
from pyvit.triton_kernels.window_attention_forward import (
    gather,
    held_bias,
    key_bias,
    key_side,
    normalised,
    normalised_backward,
    scatter,
    score_factor,
    times,
)
from pyvit.triton_kernels.window_coordinates import (
    row_offset,
    window_number,
    window_tokens,
    windows_of_group,
    within_regions,
)


@triton.jit
def add_tile(tiles, at: tl.constexpr, tile):
    """``tiles`` with ``tile`` added to number ``at``."""
    out = ()
    for j in tl.static_range(len(tiles)):
        out = out + (tiles[j] + tile if j == at else tiles[j],)
    return out


@triton.jit
def query_gradient_step(
    dq, queries, grad, row_sum, shift_of, rest, rows, cols, bias, qkv, pad, qkv_strides, window, h, size, padded, shift,
    windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D: tl.constexpr, D_PARTS: tl.constexpr,
    WINDOW: tl.constexpr, COSINE: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the keys ``cols`` contribute to the gradients of a tile of queries, before the factor of the scores;
    also returns the gradients of the scores (queries, keys)."""
    keys, values, s = key_side(
        queries, rows, cols, bias, qkv, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x, 0, HEADS,
        natural, D, D_PARTS, WINDOW, 1, COSINE, MASK, EDGE, PRECISION,
    )  # fmt: skip
    p = probabilities(s, shift_of[:, None], rest[:, None], LOG2E)
    dp = dot_parts(grad, values, rows.shape[0], cols.shape[0], PRECISION)
    if DROPOUT:
        keep = dropout_mask(rng_seed, (window * HEADS + h + rows * 0)[:, None], rows[:, None], cols[None, :], threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - row_sum[:, None])
    return add_products(dq, ds.to(qkv.dtype.element_ty), keys, 0, PRECISION), ds


@triton.jit
def recompute_row_sum(top, total, s):
    """One step over keys of a row's largest score and the sum of exponentials relative to it."""
    higher = tl.maximum(top, tl.max(s, 1))
    against = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * exp2_scores(top, against, LOG2E) + tl.sum(exp2_scores(s, against[:, None], LOG2E), 1)
    return higher, total


@triton.jit
def window_backward_queries(
    grad_out,
    qkv,
    table,
    bands,
    logit_scale,
    pad,
    out,
    lse,
    shifts,
    rests,
    row_sums,
    grad_qkv,
    bias_partial,
    logit_partial,
    seed,
    grad_out_strides,
    qkv_strides,
    out_strides,
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
    KEY_PARTS: tl.constexpr,
    EDGES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of BLOCK_M queries of ``share`` windows that are larger than a tile, tile by tile of the keys. Stores the row
    sums for the other kernels.

    With KEY_PARTS, the widths of the key tiles, the bias of these queries stays on chip, and its gradient is summed
    there over the windows; without, the bias is read in every window and its gradient has a kernel of its own."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    WHOLE: tl.constexpr = AREA // BLOCK_N * BLOCK_N
    COSINE: tl.constexpr = logit_scale is not None
    tiles: tl.constexpr = (AREA + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    h, tile, group = pid % HEADS, pid // HEADS % tiles, pid // HEADS // tiles
    natural = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # those past the window repeat its last one; they are not stored
    inside, near = rows < AREA, tl.minimum(rows, AREA - 1)
    begin, end, wy, wx, wh, ww = windows_of_group(group, share, total, windows, windows_x, EDGES, 1)
    bias = held_bias(
        table, rows, wy * windows_x + wx, h, size, padded, shift, windows, windows_x, pad, HEADS, False, KEY_PARTS,
        WINDOW, 1,
    )  # fmt: skip
    grad_bias = zero_parts((BLOCK_M,), KEY_PARTS)  # (queries, keys)
    grad_logit = zero_vector(BLOCK_M)
    for number in range(begin, end):
        window = window_number(number, wy, wx, wh, ww, windows, windows_x, EDGES)
        _, y, x, real = window_tokens(rows, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
        queries, inverse, grad, _, shift_of, _ = query_side(
            qkv, pad, grad_out, lse, None, None, window, y, x, real, near, near >= 0, h, HEADS, windows, qkv_strides,
            grad_out_strides, padded, D, D_PARTS, AREA, COSINE,
        )  # fmt: skip
        offset = row_offset(window, y, x, windows, out_strides)
        row_sum = dot_rows(load_rows(out + h * D, offset, None if padded is None else real, 1, D, D_PARTS), grad)
        rest = tl.zeros((BLOCK_M,), tl.float32)
        if any_large(shift_of):
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            if len(KEY_PARTS) > 0:
                first: tl.constexpr = 0
                for j in tl.static_range(len(KEY_PARTS)):
                    _keys, _values, s = key_side(
                        queries, rows, first + span(0, KEY_PARTS[j]), bias[j], qkv, pad, qkv_strides, window, h,
                        size, padded, shift, windows, windows_x, 0, HEADS, natural, D, D_PARTS, WINDOW, 1, COSINE,
                        False, False, PRECISION,
                    )  # fmt: skip
                    top, rest = recompute_row_sum(top, rest, s)
                    first = first + KEY_PARTS[j]
            else:
                for first in tl.range(0, AREA, EDGE_N, num_stages=1):
                    cols = first + tl.arange(0, EDGE_N)
                    _keys, _values, s = key_side(
                        queries, rows, cols, key_bias(bands, rows, cols, h, AREA % EDGE_N != 0, WINDOW), qkv, pad,
                        qkv_strides, window, h, size, padded, shift, windows, windows_x, 0, HEADS, natural, D, D_PARTS,
                        WINDOW, 1, COSINE, True, AREA % EDGE_N != 0, PRECISION,
                    )  # fmt: skip
                    top, rest = recompute_row_sum(top, rest, s)
            shift_of = tl.where(top == float("-inf"), 0.0, top)
            rest = log_total(rest)
        at = (window.to(tl.int64) * HEADS + h) * AREA + rows
        tl.store(row_sums + at, row_sum, mask=inside)
        tl.store(shifts + at, shift_of, mask=inside)
        tl.store(rests + at, rest, mask=inside)
        dq = zero_parts((BLOCK_M,), D_PARTS)
        if len(KEY_PARTS) > 0:
            start: tl.constexpr = 0
            for j in tl.static_range(len(KEY_PARTS)):
                cols = start + span(0, KEY_PARTS[j])
                dq, ds = query_gradient_step(
                    dq, queries, grad, row_sum, shift_of, rest, rows, cols, bias[j], qkv, pad, qkv_strides, window, h,
                    size, padded, shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D,
                    D_PARTS, WINDOW, COSINE, False, False, DROPOUT, PRECISION,
                )  # fmt: skip
                if bias_partial is not None:
                    grad_bias = add_tile(grad_bias, j, ds)
                start = start + KEY_PARTS[j]
        else:
            for first in range(0, WHOLE, BLOCK_N):
                cols = first + tl.arange(0, BLOCK_N)
                dq, _ds = query_gradient_step(
                    dq, queries, grad, row_sum, shift_of, rest, rows, cols,
                    key_bias(bands, rows, cols, h, False, WINDOW), qkv, pad, qkv_strides, window, h, size, padded,
                    shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D, D_PARTS, WINDOW,
                    COSINE, True, False, DROPOUT, PRECISION,
                )  # fmt: skip
            if AREA > WHOLE:
                for first in range(WHOLE, AREA, EDGE_N):
                    cols = first + tl.arange(0, EDGE_N)
                    dq, _ds = query_gradient_step(
                        dq, queries, grad, row_sum, shift_of, rest, rows, cols,
                        key_bias(bands, rows, cols, h, AREA % EDGE_N != 0, WINDOW), qkv, pad, qkv_strides, window, h,
                        size, padded, shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D,
                        D_PARTS, WINDOW, COSINE, True, AREA % EDGE_N != 0, DROPOUT, PRECISION,
                    )  # fmt: skip
        dq = times(dq, natural)
        if COSINE:  # the temperature scales all scores of a row, so its gradient is queries times dQ
            grad_logit += tl.where(inside, dot_rows(dq, queries), 0.0)
        at = row_offset(window, y, x, windows, grad_qkv_strides)
        scatter(grad_qkv + h * D, normalised_backward(dq, queries, inverse, COSINE), at, real & inside, D, D_PARTS)
    if COSINE:  # (groups, tiles, heads)
        tl.store(logit_partial + pid, tl.sum(grad_logit, 0))
    if bias_partial is not None:  # (groups, heads, queries, keys)
        at = bias_partial + ((group * HEADS + h).to(tl.int64) * AREA + rows) * AREA
        start: tl.constexpr = 0
        for j in tl.static_range(len(KEY_PARTS)):
            cols = start + span(0, KEY_PARTS[j])
            tl.store(at[:, None] + cols[None, :], grad_bias[j], mask=inside[:, None] & (cols < AREA)[None, :])
            start = start + KEY_PARTS[j]


@triton.jit
def key_gradient_step(
    dk, dv, keys, values, rows, cols, bias, qkv, pad, grad_out, shifts, rests, row_sums, window, h, HEADS, size, padded,
    shift, windows, windows_x, qkv_strides, grad_out_strides, natural, rng_seed, threshold, keep_scale, D: tl.constexpr,
    D_PARTS: tl.constexpr, WINDOW: tl.constexpr, COSINE: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the queries ``rows`` contribute to the gradients of the keys and values ``cols``, before the factor of
    the scores. Scores are transposed, (keys, queries)."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    _, y, x, real = window_tokens(rows, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
    queries, _inverse, grad, row_sum, shift_of, rest = query_side(
        qkv, pad, grad_out, shifts, rests, row_sums, window, y, x, real, rows, rows < AREA, h, HEADS, windows,
        qkv_strides, grad_out_strides, padded, D, D_PARTS, AREA, COSINE,
    )  # fmt: skip
    # No mask for keys past the window: they only affect their own rows, which are not stored.
    s = dot_parts(keys, queries, cols.shape[0], rows.shape[0], PRECISION) * natural  # (keys, queries)
    if bias is not None:
        s += bias
    if MASK:
        s = within_regions(
            s, rows[None, :], cols[:, None], window, size, padded, shift, windows, windows_x, pad, WINDOW, 1
        )
    p = probabilities(s, shift_of[None, :], rest[None, :], LOG2E)
    dp = dot_parts(values, grad, cols.shape[0], rows.shape[0], PRECISION)
    dropped = p
    if DROPOUT:
        keep = dropout_mask(rng_seed, (window * HEADS + h + rows * 0)[None, :], rows[None, :], cols[:, None], threshold)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dv = add_products(dv, dropped.to(qkv.dtype.element_ty), grad, 0, PRECISION)
    dk = add_products(dk, (p * (dp - row_sum[None, :])).to(qkv.dtype.element_ty), queries, 0, PRECISION)
    return dk, dv


@triton.jit
def window_backward_keys(
    grad_out,
    qkv,
    table,
    bands,
    logit_scale,
    pad,
    shifts,
    rests,
    row_sums,
    grad_qkv,
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
    QUERY_PARTS: tl.constexpr,
    EDGES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_M keys of ``share`` windows that are larger than a tile, from the queries' ``row_sums``. The
    padding's gradient is summed on chip over the windows. With QUERY_PARTS, the widths of the query tiles, so is the
    bias of these keys kept."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    COSINE: tl.constexpr = logit_scale is not None
    tiles: tl.constexpr = (AREA + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    h, tile, group = pid % HEADS, pid // HEADS % tiles, pid // HEADS // tiles
    at_k, at_v = (HEADS + h) * D, (2 * HEADS + h) * D
    natural = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = cols < AREA
    begin, end, wy, wx, wh, ww = windows_of_group(group, share, total, windows, windows_x, EDGES, 1)
    bias = held_bias(
        table, cols, wy * windows_x + wx, h, size, padded, shift, windows, windows_x, pad, HEADS, True, QUERY_PARTS,
        WINDOW, 1,
    )  # fmt: skip
    grad_pad_k, grad_pad_v = zero_vectors(D_PARTS), zero_vectors(D_PARTS)
    for number in range(begin, end):
        window = window_number(number, wy, wx, wh, ww, windows, windows_x, EDGES)
        _, y, x, real = window_tokens(cols, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
        offset = row_offset(window, y, x, windows, qkv_strides)
        keys, key_inverse = normalised(gather(qkv, pad, at_k, offset, real, padded, D, D_PARTS), COSINE)
        values = gather(qkv, pad, at_v, offset, real, padded, D, D_PARTS)
        dk, dv = zero_parts((BLOCK_M,), D_PARTS), zero_parts((BLOCK_M,), D_PARTS)
        if len(QUERY_PARTS) > 0:
            start: tl.constexpr = 0
            for j in tl.static_range(len(QUERY_PARTS)):
                dk, dv = key_gradient_step(
                    dk, dv, keys, values, start + span(0, QUERY_PARTS[j]), cols, bias[j], qkv, pad, grad_out, shifts,
                    rests, row_sums, window, h, HEADS, size, padded, shift, windows, windows_x, qkv_strides,
                    grad_out_strides, natural, rng_seed, threshold, keep_scale, D, D_PARTS, WINDOW, COSINE, False,
                    DROPOUT, PRECISION,
                )  # fmt: skip
                start = start + QUERY_PARTS[j]
        else:
            for first in range(0, AREA, BLOCK_N):
                rows = first + tl.arange(0, BLOCK_N)
                tile_bias = key_bias(bands, cols, rows, h, AREA % BLOCK_N != 0, WINDOW)
                dk, dv = key_gradient_step(
                    dk, dv, keys, values, rows, cols, tile_bias, qkv, pad, grad_out, shifts, rests, row_sums, window, h,
                    HEADS, size, padded, shift, windows, windows_x, qkv_strides, grad_out_strides, natural, rng_seed,
                    threshold, keep_scale, D, D_PARTS, WINDOW, COSINE, True, DROPOUT, PRECISION,
                )  # fmt: skip
        dk = normalised_backward(times(dk, natural), keys, key_inverse, COSINE)
        at = row_offset(window, y, x, windows, grad_qkv_strides)
        scatter(grad_qkv + at_k, dk, at, inside & real, D, D_PARTS)
        scatter(grad_qkv + at_v, dv, at, inside & real, D, D_PARTS)
        if pad is not None:
            grad_pad_k = accumulate_pad(grad_pad_k, dk, inside & ~real)
            grad_pad_v = accumulate_pad(grad_pad_v, dv, inside & ~real)
    if pad is not None:  # (groups, tiles, 2, heads, D)
        at = pad_partial + ((group * tiles + tile) * 2 * HEADS + h).to(tl.int64) * D
        store_vectors(at, grad_pad_k, D, D_PARTS)
        store_vectors(at + HEADS * D, grad_pad_v, D, D_PARTS)
