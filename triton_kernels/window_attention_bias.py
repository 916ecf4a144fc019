"""Gradient of the relative-position bias of shifted windows; terms as in
:mod:`pyvit.triton_kernels.window_coordinates`."""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import LOG2E, dot_parts, dropout_mask, dropout_seed, zeros_of
from pyvit.triton_kernels.flash_attention_backward import probabilities
from pyvit.triton_kernels.window_attention_backward import query_side
from pyvit.triton_kernels.window_attention_forward import (
    gather,
    normalised,
    pair_bias,
    score_factor,
)
from pyvit.triton_kernels.window_coordinates import (
    row_offset,
    window_tokens,
    within_regions,
)


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
