"""The gradient of attention's bias: the gradients of the scores, summed over all broadcast dimensions."""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import LOG2E, dropout_seed, head_rows, load_rows, sequence
from pyvit.triton_kernels.flash_attention_backward import probabilities, score_gradient, tile_scores


@triton.jit
def bias_gradient(
    grad_out,
    q,
    k,
    v,
    bias,
    shifts,
    rests,
    delta,
    grad_bias,
    cu_q,
    cu_k,
    seed,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    lse_strides,
    bias_shape,
    reduced,
    splits,
    steps,
    H,
    GROUPS,
    n_q,
    n_k,
    scale,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PARTS: tl.constexpr,
    DV_PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the bias gradient: dS summed over ``reduced`` = (batch, heads, row tiles, column tiles), the broadcast
    dimensions.

    With ``splits`` > 1 each program sums a part of the ``steps`` and writes to its own copy, (splits, *bias_shape).
    """
    row_tiles = tl.cdiv(n_q, BLOCK_M) if ROWS else 1
    col_tiles = tl.cdiv(n_k, BLOCK_N) if COLS else 1
    pid = tl.program_id(0)
    split, tile = pid % splits, pid // splits
    col_tile, tile = tile % col_tiles, tile // col_tiles
    row_tile, tile = tile % row_tiles, tile // row_tiles
    bias_h, bias_b = tile % bias_shape[1], tile // bias_shape[1]
    rng_seed = dropout_seed(seed, DROPOUT)
    share = tl.cdiv(steps, splits)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        rest = step // reduced[3]
        i = row_tile + rest % reduced[2]
        j = col_tile + step % reduced[3]
        rest = rest // reduced[2]
        h = (bias_h + rest % reduced[1]).to(tl.int64)
        b = (bias_b + rest // reduced[1]).to(tl.int64)
        q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
        k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
        rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
        at = head_rows(q, q_strides, b, h, q_first, UNIT)
        queries = load_rows(at, rows, rows < q_len, q_strides[2] * UNIT, D, D_PARTS)
        at = head_rows(k, k_strides, b, h // GROUPS, k_first, UNIT)
        keys = load_rows(at, cols, cols < k_len, k_strides[2] * UNIT, D, D_PARTS)
        at = head_rows(grad_out, grad_out_strides, b, h, q_first, UNIT)
        grad = load_rows(at, rows, rows < q_len, grad_out_strides[2] * UNIT, DV, DV_PARTS)
        at = head_rows(v, v_strides, b, h // GROUPS, k_first, UNIT)
        values = load_rows(at, cols, cols < k_len, v_strides[2] * UNIT, DV, DV_PARTS)
        row_at = b * lse_strides[0] + h * lse_strides[1] + q_first
        shift = tl.load(shifts + row_at + rows, mask=rows < q_len, other=float("inf"))
        rest = tl.load(rests + row_at + rows, mask=rows < q_len, other=0.0)
        row_sum = tl.load(delta + row_at + rows, mask=rows < q_len, other=0.0)
        where = bias + b * bias_strides[0] + h * bias_strides[1]
        s = tile_scores(
            queries, keys, where, bias_strides, rows[:, None], cols[None, :], q_len, k_len, scale, BLOCK_M, BLOCK_N,
            BIAS, CAUSAL, True, False, PRECISION,
        )  # fmt: skip
        _, ds = score_gradient(
            probabilities(s, shift[:, None], rest[:, None], LOG2E), grad, values, row_sum[:, None], rows[:, None],
            cols[None, :], rng_seed, b * H + h, threshold, keep_scale, BLOCK_M, BLOCK_N, DROPOUT, PRECISION,
        )  # fmt: skip
        acc += ds
    plane = (split * bias_shape[0] + bias_b).to(tl.int64) * bias_shape[1] + bias_h
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    base = grad_bias + plane * bias_shape[2] * bias_shape[3]
    if ROWS and COLS:
        at = base + rows.to(tl.int64)[:, None] * n_k + cols[None, :]
        tl.store(at, acc, mask=(rows[:, None] < n_q) & (cols[None, :] < n_k))
    elif ROWS:
        tl.store(base + rows, tl.sum(acc, 1), mask=rows < n_q)
    elif COLS:
        tl.store(base + cols, tl.sum(acc, 0), mask=cols < n_k)
    else:
        tl.store(base, tl.sum(tl.sum(acc, 1), 0))
