"""Backward kernels of shifted windows; terms as in :mod:`pyvit.triton_kernels.window_attention_forward`. No atomics:
sums are kept on chip."""

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
    attending,
    gather,
    key_side,
    normalised,
    normalised_backward,
    pair_bias,
    row_offset,
    scatter,
    score_factor,
    table_bias,
    times,
    window_coordinates,
    within_regions,
)


@triton.jit
def query_side(
    qkv,
    pad,
    grad_out,
    shifts,
    rests,
    row_sums,
    window,
    y,
    x,
    rows,
    inside,
    real,
    h,
    HEADS,
    windows,
    qkv_strides,
    grad_out_strides,
    D: tl.constexpr,
    D_PARTS: tl.constexpr,
    AREA: tl.constexpr,
    COSINE: tl.constexpr,
):
    """For queries at given coordinates: their rows and 1 / norm, the gradients of their outputs, their row sums and
    rests if given, and the shift subtracted from their scores: infinite past the windows, finite in fully masked rows,
    so that their probabilities are 0."""
    first = h * D
    queries, inverse = normalised(
        gather(qkv, pad, first, row_offset(window, y, x, windows, qkv_strides), real, D, D_PARTS), COSINE
    )
    grad = load_rows(grad_out + first, row_offset(window, y, x, windows, grad_out_strides), real, 1, D, D_PARTS)
    at = (window.to(tl.int64) * HEADS + h) * AREA + rows % AREA
    row_sum, rest = 0.0, 0.0
    if row_sums is not None:
        row_sum = tl.load(row_sums + at, mask=inside, other=0.0)
        rest = tl.load(rests + at, mask=inside, other=0.0)
    shift = tl.load(shifts + at, mask=inside, other=float("inf"))
    return queries, inverse, grad, row_sum, tl.where(shift == float("-inf"), 0.0, shift), rest


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
def window_backward_keys(
    grad_out,
    qkv,
    table,
    table_t,
    logit_scale,
    pad,
    shifts,
    rests,
    row_sums,
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
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WHOLE_WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_M keys of ``share`` packs. With WHOLE_WINDOW, where one tile holds the pack: also dQ, dBias
    and dScale. Otherwise PACK is 1 and ``row_sums`` come from window_backward_queries.

    Scores are transposed, (keys, queries). dBias, dScale and the pad's gradient are summed on chip over the windows;
    each program stores its sum.
    """
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    ROWS: tl.constexpr = PACK * AREA
    COSINE: tl.constexpr = logit_scale is not None
    tiles = tl.cdiv(ROWS, BLOCK_M)
    pid = tl.program_id(0)
    h, tile, group = pid % HEADS, pid // HEADS % tiles, pid // HEADS // tiles
    at_q, at_k, at_v = h * D, (HEADS + h) * D, (2 * HEADS + h) * D
    natural = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    held = zeros_of(BLOCK_M, BLOCK_N)
    if table is not None and WHOLE_WINDOW:
        held = table_bias(table, tl.arange(0, BLOCK_N)[None, :], cols[:, None], h, HEADS, WINDOW, PACK)
    grad_bias = zeros_of(BLOCK_M, BLOCK_N)
    grad_logit = zero_vector(BLOCK_M)
    grad_pad_k, grad_pad_v = zero_vectors(D_PARTS), zero_vectors(D_PARTS)
    for pack_id in range(group * share, tl.minimum(group * share + share, tl.cdiv(total, PACK))):
        window, y, x, inside, real, region = window_coordinates(
            cols, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK
        )
        offset = row_offset(window, y, x, windows, qkv_strides)
        keys, key_inverse = normalised(gather(qkv, pad, at_k, offset, real, D, D_PARTS), COSINE)
        values = gather(qkv, pad, at_v, offset, real, D, D_PARTS)
        allowed = real if pad is None else inside
        dk, dv = zero_parts((BLOCK_M,), D_PARTS), zero_parts((BLOCK_M,), D_PARTS)
        for first in range(0, ROWS, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            q_window, qy, qx, q_inside, q_real, q_region = window_coordinates(
                rows, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK
            )
            queries, q_inverse, grad, row_sum, shift_of, rest = query_side(
                qkv, pad, grad_out, shifts, rests, row_sums, q_window, qy, qx, rows, q_inside, q_real, h, HEADS,
                windows, qkv_strides, grad_out_strides, D, D_PARTS, AREA, COSINE,
            )  # fmt: skip
            raw = dot_parts(keys, queries, BLOCK_M, BLOCK_N, PRECISION) * natural
            s = raw
            if WHOLE_WINDOW:
                if table is not None:
                    s += held
                s = attending(s, q_region[None, :], region[:, None], allowed[:, None], table, padded, shift, PACK)
                rest = tl.zeros((BLOCK_N,), tl.float32)
                if any_large(shift_of):
                    top = tl.max(s, 0)
                    shift_of = tl.where(top == float("-inf"), 0.0, top)
                    rest = log_total(tl.sum(exp2_scores(s, shift_of[None, :], LOG2E), 0))
                p = probabilities(s, shift_of[None, :], rest[None, :], LOG2E)
                if (
                    qkv.dtype.element_ty == tl.float32
                ):  # whole rows are on chip: correct the rounding of the log-sum-exp
                    total_p = tl.sum(p, 0)
                    p = p / tl.where(total_p == 0.0, 1.0, total_p)[None, :]
            else:  # no mask: keys outside only affect their own rows, which are not stored
                if table_t is not None:
                    near, near_keys = tl.minimum(rows, ROWS - 1), tl.minimum(cols, ROWS - 1)
                    s += pair_bias(table_t, near[None, :], near_keys[:, None], h, WINDOW)
                s = within_regions(s, q_region[None, :], region[:, None], pack_id, windows, windows_x, shift)
                p = probabilities(s, shift_of[None, :], rest[None, :], LOG2E)
            dp = dot_parts(values, grad, BLOCK_M, BLOCK_N, PRECISION)
            dropped = p
            if DROPOUT:
                keep = dropout_mask(
                    rng_seed,
                    (q_window * HEADS + h + rows * 0)[None, :],
                    rows[None, :] % AREA,
                    cols[:, None] % AREA,
                    threshold,
                )
                dropped = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = add_products(dv, dropped.to(qkv.dtype.element_ty), grad, 0, PRECISION)
            if WHOLE_WINDOW:  # whole rows are on chip: their sums do not need the rounded output
                row_sum = tl.sum(p * dp, 0)
            ds = p * (dp - row_sum[None, :])
            rounded = ds.to(qkv.dtype.element_ty)
            dk = add_products(dk, rounded, queries, 0, PRECISION)
            if WHOLE_WINDOW:
                if table is not None:
                    grad_bias += ds
                if COSINE:
                    grad_logit += tl.sum(ds * raw, 1)
                dq = times(
                    add_products(zero_parts((BLOCK_N,), D_PARTS), tl.trans(rounded), keys, 0, PRECISION), natural
                )
                at = row_offset(q_window, qy, qx, windows, grad_qkv_strides)
                scatter(grad_qkv + at_q, normalised_backward(dq, queries, q_inverse, COSINE), at, q_real, D, D_PARTS)
        dk = normalised_backward(times(dk, natural), keys, key_inverse, COSINE)
        at = row_offset(window, y, x, windows, grad_qkv_strides)
        scatter(grad_qkv + at_k, dk, at, real, D, D_PARTS)
        scatter(grad_qkv + at_v, dv, at, real, D, D_PARTS)
        if pad is not None:
            grad_pad_k = accumulate_pad(grad_pad_k, dk, inside & ~real)
            grad_pad_v = accumulate_pad(grad_pad_v, dv, inside & ~real)
    if pad is not None:  # (groups, tiles, 2, heads, D)
        at = pad_partial + ((group * tiles + tile) * 2 * HEADS + h).to(tl.int64) * D
        store_vectors(at, grad_pad_k, D, D_PARTS)
        store_vectors(at + HEADS * D, grad_pad_v, D, D_PARTS)
    if WHOLE_WINDOW:
        if table is not None:  # (groups, heads, queries, keys)
            rows = tl.arange(0, BLOCK_N)
            at = bias_partial + (group * HEADS + h).to(tl.int64) * ROWS * ROWS + rows[None, :] * ROWS + cols[:, None]
            tl.store(at, grad_bias, mask=(rows[None, :] < ROWS) & (cols[:, None] < ROWS))
        if COSINE:  # (groups, tiles, heads)
            tl.store(logit_partial + pid, tl.sum(grad_logit, 0))


@triton.jit
def query_gradient_step(
    dq, queries, grad, row_sum, shift_of, rest, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size,
    padded, shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D: tl.constexpr,
    D_PARTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, COSINE: tl.constexpr, EDGE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of the gradients of a tile of queries that BLOCK_N keys contribute, before the factor of the scores."""
    cols, keys, values, s = key_side(
        queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded, shift, windows,
        windows_x, HEADS, natural, D, D_PARTS, WINDOW, BLOCK_N, COSINE, EDGE, PRECISION,
    )  # fmt: skip
    p = probabilities(s, shift_of[:, None], rest[:, None], LOG2E)
    dp = dot_parts(grad, values, rows.shape[0], BLOCK_N, PRECISION)
    if DROPOUT:
        keep = dropout_mask(rng_seed, (window * HEADS + h + rows * 0)[:, None], rows[:, None], cols[None, :], threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return add_products(dq, (p * (dp - row_sum[:, None])).to(qkv.dtype.element_ty), keys, 0, PRECISION)


@triton.jit
def recompute_row_sum(
    top, total, queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded, shift, windows,
    windows_x, HEADS, natural, D: tl.constexpr, D_PARTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    COSINE: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step over BLOCK_N keys of a row's largest score and the sum of exponentials relative to it."""
    _, _, _, s = key_side(
        queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded, shift, windows,
        windows_x, HEADS, natural, D, D_PARTS, WINDOW, BLOCK_N, COSINE, EDGE, PRECISION,
    )  # fmt: skip
    higher = tl.maximum(top, tl.max(s, 1))
    against = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * exp2_scores(top, against, LOG2E) + tl.sum(exp2_scores(s, against[:, None], LOG2E), 1)


@triton.jit
def window_backward_queries(
    grad_out,
    qkv,
    table_t,
    logit_scale,
    pad,
    out,
    lse,
    shifts,
    rests,
    row_sums,
    grad_qkv,
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
    HEADS,
    scale,
    threshold,
    keep_scale,
    D: tl.constexpr,
    D_PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of BLOCK_M queries of a window that is larger than a tile, in a loop over tiles of keys. Stores the row sums
    for the other kernels."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    WHOLE: tl.constexpr = AREA // BLOCK_N * BLOCK_N
    COSINE: tl.constexpr = logit_scale is not None
    tiles: tl.constexpr = (AREA + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    tile, h, window = pid % tiles, pid // tiles % HEADS, pid // tiles // HEADS
    natural = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    every = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = every < AREA
    rows = tl.minimum(every, AREA - 1)  # rows past the window repeat its last row; they are not stored
    _, y, x, _, real, region = window_coordinates(rows, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
    queries, inverse, grad, _, shift_of, _ = query_side(
        qkv, pad, grad_out, lse, None, None, window, y, x, rows, rows < AREA, real, h, HEADS, windows, qkv_strides,
        grad_out_strides, D, D_PARTS, AREA, COSINE,
    )  # fmt: skip
    row_sum = dot_rows(
        load_rows(out + h * D, row_offset(window, y, x, windows, out_strides), real, 1, D, D_PARTS), grad
    )
    rest = tl.zeros((BLOCK_M,), tl.float32)
    if any_large(shift_of):
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for first in tl.range(0, AREA, EDGE_N, num_stages=1):
            top, rest = recompute_row_sum(
                top, rest, queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded, shift,
                windows, windows_x, HEADS, natural, D, D_PARTS, WINDOW, EDGE_N, COSINE, AREA % EDGE_N != 0, PRECISION,
            )  # fmt: skip
        shift_of = tl.where(top == float("-inf"), 0.0, top)
        rest = log_total(rest)
    at = (window.to(tl.int64) * HEADS + h) * AREA + rows
    tl.store(row_sums + at, row_sum, mask=inside)
    tl.store(shifts + at, shift_of, mask=inside)
    tl.store(rests + at, rest, mask=inside)
    dq = zero_parts((BLOCK_M,), D_PARTS)
    for first in range(0, WHOLE, BLOCK_N):
        dq = query_gradient_step(
            dq, queries, grad, row_sum, shift_of, rest, first, rows, region, qkv, table_t, pad, qkv_strides, window, h,
            size, padded, shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D, D_PARTS,
            WINDOW, BLOCK_N, COSINE, False, DROPOUT, PRECISION,
        )  # fmt: skip
    if AREA > WHOLE:
        for first in range(WHOLE, AREA, EDGE_N):
            dq = query_gradient_step(
                dq, queries, grad, row_sum, shift_of, rest, first, rows, region, qkv, table_t, pad, qkv_strides, window,
                h, size, padded, shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D, D_PARTS,
                WINDOW, EDGE_N, COSINE, AREA % EDGE_N != 0, DROPOUT, PRECISION,
            )  # fmt: skip
    dq = times(dq, natural)
    if (
        COSINE
    ):  # (windows, tiles, heads): the temperature scales all scores of a row, so its gradient is queries times dQ
        tl.store(
            logit_partial + (window * tiles + tile) * HEADS + h, tl.sum(tl.where(inside, dot_rows(dq, queries), 0.0), 0)
        )
    at = row_offset(window, y, x, windows, grad_qkv_strides)
    scatter(grad_qkv + h * D, normalised_backward(dq, queries, inverse, COSINE), at, real & inside, D, D_PARTS)


@triton.jit
def window_backward_bias(
    grad_out,
    qkv,
    table_t,
    logit_scale,
    pad,
    shifts,
    rests,
    row_sums,
    bias_partial,
    seed,
    grad_out_strides,
    qkv_strides,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M x BLOCK_N of dBias, summed on chip over ``share`` windows. Products are recomputed; the bias is read
    once."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    COSINE: tl.constexpr = logit_scale is not None
    tiles: tl.constexpr = (AREA + BLOCK_M - 1) // BLOCK_M
    key_tiles: tl.constexpr = (AREA + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    h, key_tile = pid % HEADS, pid // HEADS % key_tiles
    tile, group = pid // HEADS // key_tiles % tiles, pid // HEADS // key_tiles // tiles
    natural = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    every, every_key = tile * BLOCK_M + tl.arange(0, BLOCK_M), key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = tl.minimum(every, AREA - 1), tl.minimum(every_key, AREA - 1)
    bias = pair_bias(table_t, rows[:, None], cols[None, :], h, WINDOW)
    grad_bias = zeros_of(BLOCK_M, BLOCK_N)
    for pack_id in range(group * share, tl.minimum(group * share + share, total)):
        window, y, x, inside, real, region = window_coordinates(
            rows, pack_id, size, padded, shift, windows, windows_x, 0, WINDOW, 1
        )
        _, ky, kx, _, key_real, key_region = window_coordinates(
            cols, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1
        )
        queries, _, grad, row_sum, shift_of, rest = query_side(
            qkv, pad, grad_out, shifts, rests, row_sums, window, y, x, rows, inside, real, h, HEADS, windows,
            qkv_strides, grad_out_strides, D, D_PARTS, AREA, COSINE,
        )  # fmt: skip
        offset = row_offset(window, ky, kx, windows, qkv_strides)
        keys, _ = normalised(gather(qkv, pad, (HEADS + h) * D, offset, key_real, D, D_PARTS), COSINE)
        values = gather(qkv, pad, (2 * HEADS + h) * D, offset, key_real, D, D_PARTS)
        s = dot_parts(queries, keys, BLOCK_M, BLOCK_N, PRECISION) * natural + bias
        s = within_regions(s, region[:, None], key_region[None, :], window, windows, windows_x, shift)
        if padded is not None and pad is None:
            s = tl.where(key_real[None, :], s, float("-inf"))
        p = probabilities(s, shift_of[:, None], rest[:, None], LOG2E)
        dp = dot_parts(grad, values, BLOCK_M, BLOCK_N, PRECISION)
        if DROPOUT:
            keep = dropout_mask(
                rng_seed, (window * HEADS + h + rows * 0)[:, None], rows[:, None], cols[None, :], threshold
            )
            dp = tl.where(keep, dp * keep_scale, 0.0)
        grad_bias += p * (dp - row_sum[:, None])
    at = bias_partial + (group * HEADS + h).to(tl.int64) * AREA * AREA + every[:, None] * AREA + every_key[None, :]
    tl.store(at, grad_bias, mask=(every[:, None] < AREA) & (every_key[None, :] < AREA))


@triton.jit
def table_gradient(
    grad_bias, grad_table, HEADS, WINDOW: tl.constexpr, PACK: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """ENTRIES rows of the table's gradient for one head: dBias (heads, queries, keys) summed in order over the pairs at
    each offset."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    ROWS: tl.constexpr = PACK * AREA
    pid = tl.program_id(0)
    h = pid % HEADS
    row = pid // HEADS * ENTRIES + tl.arange(0, ENTRIES)[:, None]
    dy, dx = row // (2 * WINDOW[1] - 1) - WINDOW[0] + 1, row % (2 * WINDOW[1] - 1) - WINDOW[1] + 1
    i = tl.arange(0, BLOCK)[None, :]
    y, x = i % AREA // WINDOW[1] - dy, i % WINDOW[1] - dx  # AREA is a multiple of the width
    inside = row < (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1)
    valid = inside & (i < ROWS) & (y >= 0) & (y < WINDOW[0]) & (x >= 0) & (x < WINDOW[1])
    at = grad_bias + h.to(tl.int64) * ROWS * ROWS + i * ROWS + i - (dy * WINDOW[1] + dx)
    total = tl.sum(tl.load(at, mask=valid, other=0.0), 1)[:, None]
    tl.store(grad_table + row * HEADS + h, total.to(grad_table.dtype.element_ty), mask=inside)
