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
    gather,
    inside_windows,
    key_side,
    normalised,
    normalised_backward,
    pair_bias,
    row_offset,
    scatter,
    score_factor,
    table_bias,
    times,
    window_tokens,
    within_regions,
)


@triton.jit
def query_side(
    qkv, pad, grad_out, shifts, rests, row_sums, window, y, x, real, rows, inside, h, HEADS, windows, qkv_strides,
    grad_out_strides, padded, D: tl.constexpr, D_PARTS: tl.constexpr, AREA: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """For queries at given coordinates: their rows and 1 / norm, the gradients of their outputs, their row sums and
    rests if given, and the shift subtracted from their scores: infinite past the windows, finite in fully masked rows,
    so that their probabilities are 0."""
    offset = row_offset(window, y, x, windows, qkv_strides)
    queries, inverse = normalised(gather(qkv, pad, h * D, offset, real, padded, D, D_PARTS), COSINE)  # (queries, D)
    offset = row_offset(window, y, x, windows, grad_out_strides)
    grad = load_rows(grad_out + h * D, offset, None if padded is None else real, 1, D, D_PARTS)  # (queries, D)
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
            qkv, pad, grad_out, lse, None, None, window, y, x, real, rows, inside, h, HEADS, windows, qkv_strides,
            grad_out_strides, padded, D, D_PARTS, AREA, COSINE,
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


@triton.jit
def window_backward_keys(
    grad_out,
    qkv,
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
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_M keys of ``share`` windows that are larger than a tile, from the queries' ``row_sums``.

    Scores are transposed, (keys, queries). The padding's gradient is summed on chip over the windows.
    """
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
    grad_pad_k, grad_pad_v = zero_vectors(D_PARTS), zero_vectors(D_PARTS)
    for pack_id in range(group * share, tl.minimum(group * share + share, total)):
        window, y, x, real = window_tokens(cols, pack_id, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
        offset = row_offset(window, y, x, windows, qkv_strides)
        keys, key_inverse = normalised(gather(qkv, pad, at_k, offset, real, padded, D, D_PARTS), COSINE)
        values = gather(qkv, pad, at_v, offset, real, padded, D, D_PARTS)
        dk, dv = zero_parts((BLOCK_M,), D_PARTS), zero_parts((BLOCK_M,), D_PARTS)
        for first in range(0, AREA, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            _, qy, qx, q_real = window_tokens(rows, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
            queries, _inverse, grad, row_sum, shift_of, rest = query_side(
                qkv, pad, grad_out, shifts, rests, row_sums, window, qy, qx, q_real, rows, rows < AREA, h, HEADS,
                windows, qkv_strides, grad_out_strides, padded, D, D_PARTS, AREA, COSINE,
            )  # fmt: skip
            # No mask for keys past the window: they only affect their own rows, which are not stored.
            s = dot_parts(keys, queries, BLOCK_M, BLOCK_N, PRECISION) * natural  # (keys, queries)
            if bands is not None:
                s += pair_bias(bands, cols[:, None], rows[None, :], h, AREA % BLOCK_N != 0, WINDOW)
            s = within_regions(
                s, rows[None, :], cols[:, None], window, size, padded, shift, windows, windows_x, pad, WINDOW, 1
            )
            p = probabilities(s, shift_of[None, :], rest[None, :], LOG2E)
            dp = dot_parts(values, grad, BLOCK_M, BLOCK_N, PRECISION)
            dropped = p
            if DROPOUT:
                keep = dropout_mask(
                    rng_seed, (window * HEADS + h + rows * 0)[None, :], rows[None, :], cols[:, None], threshold
                )
                dropped = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = add_products(dv, dropped.to(qkv.dtype.element_ty), grad, 0, PRECISION)
            dk = add_products(dk, (p * (dp - row_sum[None, :])).to(qkv.dtype.element_ty), queries, 0, PRECISION)
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


@triton.jit
def query_gradient_step(
    dq, queries, grad, row_sum, shift_of, rest, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded,
    shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D: tl.constexpr,
    D_PARTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, COSINE: tl.constexpr, EDGE: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of the gradients of a tile of queries that BLOCK_N keys contribute, before the factor of the scores."""
    cols, keys, values, s = key_side(
        queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x, HEADS,
        natural, D, D_PARTS, WINDOW, BLOCK_N, COSINE, EDGE, PRECISION,
    )  # fmt: skip
    p = probabilities(s, shift_of[:, None], rest[:, None], LOG2E)
    dp = dot_parts(grad, values, rows.shape[0], BLOCK_N, PRECISION)
    if DROPOUT:
        keep = dropout_mask(rng_seed, (window * HEADS + h + rows * 0)[:, None], rows[:, None], cols[None, :], threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return add_products(dq, (p * (dp - row_sum[:, None])).to(qkv.dtype.element_ty), keys, 0, PRECISION)


@triton.jit
def recompute_row_sum(
    top, total, queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift, windows,
    windows_x, HEADS, natural, D: tl.constexpr, D_PARTS: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, COSINE: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step over BLOCK_N keys of a row's largest score and the sum of exponentials relative to it."""
    _, _, _, s = key_side(
        queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x, HEADS,
        natural, D, D_PARTS, WINDOW, BLOCK_N, COSINE, EDGE, PRECISION,
    )  # fmt: skip
    higher = tl.maximum(top, tl.max(s, 1))
    against = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * exp2_scores(top, against, LOG2E) + tl.sum(exp2_scores(s, against[:, None], LOG2E), 1)
    return higher, total


@triton.jit
def window_backward_queries(
    grad_out,
    qkv,
    bands,
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
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # those past the window repeat its last one; they are not stored
    inside, near = rows < AREA, tl.minimum(rows, AREA - 1)
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
        for first in tl.range(0, AREA, EDGE_N, num_stages=1):
            top, rest = recompute_row_sum(
                top, rest, queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift,
                windows, windows_x, HEADS, natural, D, D_PARTS, WINDOW, EDGE_N, COSINE, AREA % EDGE_N != 0,
                PRECISION,
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
            dq, queries, grad, row_sum, shift_of, rest, first, rows, qkv, bands, pad, qkv_strides, window, h, size,
            padded, shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D, D_PARTS,
            WINDOW, BLOCK_N, COSINE, False, DROPOUT, PRECISION,
        )  # fmt: skip
    if AREA > WHOLE:
        for first in range(WHOLE, AREA, EDGE_N):
            dq = query_gradient_step(
                dq, queries, grad, row_sum, shift_of, rest, first, rows, qkv, bands, pad, qkv_strides, window, h,
                size, padded, shift, windows, windows_x, HEADS, natural, rng_seed, threshold, keep_scale, D,
                D_PARTS, WINDOW, EDGE_N, COSINE, AREA % EDGE_N != 0, DROPOUT, PRECISION,
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
    bands,
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
    rows, cols = tile * BLOCK_M + tl.arange(0, BLOCK_M), key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = pair_bias(bands, rows[:, None], cols[None, :], h, AREA % BLOCK_N != 0, WINDOW)  # (BLOCK_M, BLOCK_N)
    grad_bias = zeros_of(BLOCK_M, BLOCK_N)
    for pack_id in range(group * share, tl.minimum(group * share + share, total)):
        window, y, x, real = window_tokens(rows, pack_id, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
        _, ky, kx, key_real = window_tokens(cols, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
        queries, _, grad, row_sum, shift_of, rest = query_side(
            qkv, pad, grad_out, shifts, rests, row_sums, window, y, x, real, rows, rows < AREA, h, HEADS, windows,
            qkv_strides, grad_out_strides, padded, D, D_PARTS, AREA, COSINE,
        )  # fmt: skip
        offset = row_offset(window, ky, kx, windows, qkv_strides)
        keys, _ = normalised(gather(qkv, pad, (HEADS + h) * D, offset, key_real, padded, D, D_PARTS), COSINE)
        values = gather(qkv, pad, (2 * HEADS + h) * D, offset, key_real, padded, D, D_PARTS)
        s = dot_parts(queries, keys, BLOCK_M, BLOCK_N, PRECISION) * natural + bias
        s = within_regions(
            s, rows[:, None], cols[None, :], window, size, padded, shift, windows, windows_x, pad, WINDOW, 1
        )
        p = probabilities(s, shift_of[:, None], rest[:, None], LOG2E)
        dp = dot_parts(grad, values, BLOCK_M, BLOCK_N, PRECISION)
        if DROPOUT:
            keep = dropout_mask(
                rng_seed, (window * HEADS + h + rows * 0)[:, None], rows[:, None], cols[None, :], threshold
            )
            dp = tl.where(keep, dp * keep_scale, 0.0)
        grad_bias += p * (dp - row_sum[:, None])
    at = bias_partial + (group * HEADS + h).to(tl.int64) * AREA * AREA + rows[:, None] * AREA + cols[None, :]
    tl.store(at, grad_bias, mask=(rows[:, None] < AREA) & (cols[None, :] < AREA))


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
