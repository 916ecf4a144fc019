"""Backward kernels of attention: probabilities are computed again from the log-sum-exp, and every gradient has one owner, so no atomics.

Where keys are rows (scores transposed, (keys, queries)), the products for dK and dV take the probabilities as they lie in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import (
    LOG2E,
    add_products,
    biased,
    dot_parts,
    dot_rows,
    draw_of,
    kept,
    load_rows,
    sequence,
    span,
    store_rows,
    zero_parts,
)


@triton.jit
def load_lse(lse, rows, n):
    """Log-sum-exp in powers of two, such that exp2(score - it) is 0 in rows past the end and in rows that may attend to nothing."""
    value = tl.load(lse + rows, mask=rows < n, other=float("inf")) * LOG2E
    return tl.where(value == float("-inf"), 0.0, value)


@triton.jit
def row_delta(out, grad, grad_lse, rows, n, stride, DV: tl.constexpr, DV_PARTS: tl.constexpr):
    """Row sums of out * grad_out, less the gradient of the log-sum-exp: what softmax's backward subtracts from dP."""
    delta = dot_rows(load_rows(out, rows, rows < n, stride, DV, DV_PARTS), grad)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + rows, mask=rows < n, other=0.0)
    return delta


@triton.jit
def score_gradient(
    left,
    right,
    grad_left,
    grad_right,
    log_sum,
    row_sum,
    bias,
    bias_strides,
    rows,
    cols,
    n_q,
    n_k,
    scale,
    draw,
    head,
    threshold,
    keep_scale,
    M: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile (M, N) of probabilities after dropout, and of the gradients of the scores: left and right are queries and keys, grad_left and
    grad_right output gradients and values, or the other way round; row statistics and indices broadcast to the tile."""
    s = dot_parts(left, right, M, N, PRECISION) * scale
    s = biased(s, bias, rows, cols, n_q, n_k, bias_strides, BIAS, CAUSAL, MASK)
    p = tl.exp2(s - log_sum)
    dp = dot_parts(grad_left, grad_right, M, N, PRECISION)
    dropped = p
    if DROPOUT:
        keep = kept(draw, head, rows, cols, threshold)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return dropped, p * (dp - row_sum)


@triton.jit
def backward_short(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    delta,
    grad_lse,
    grad_q,
    grad_k,
    grad_v,
    cu_q,
    cu_k,
    seed,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    lse_strides,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    H,
    n_q,
    n_k,
    scale,
    factor,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PARTS: tl.constexpr,
    DV_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one head by one program, which holds all its keys: five products per tile of queries, where a pass for dQ and
    another for dK and dV take seven, and nothing is read twice."""
    pid = tl.program_id(0)
    b, h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
    k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
    q += b * q_strides[0] + h * q_strides[1] + q_first * q_strides[2]
    k += b * k_strides[0] + h * k_strides[1] + k_first * k_strides[2]
    v += b * v_strides[0] + h * v_strides[1] + k_first * v_strides[2]
    out += b * out_strides[0] + h * out_strides[1] + q_first * out_strides[2]
    grad_out += b * grad_out_strides[0] + h * grad_out_strides[1] + q_first * grad_out_strides[2]
    grad_q += b * grad_q_strides[0] + h * grad_q_strides[1] + q_first * grad_q_strides[2]
    grad_k += b * grad_k_strides[0] + h * grad_k_strides[1] + k_first * grad_k_strides[2]
    grad_v += b * grad_v_strides[0] + h * grad_v_strides[1] + k_first * grad_v_strides[2]
    bias += b * bias_strides[0] + h * bias_strides[1]
    row_at = b * lse_strides[0] + h * lse_strides[1] + q_first
    if grad_lse is not None:
        grad_lse += row_at
    draw = draw_of(seed, DROPOUT)

    cols = tl.arange(0, BLOCK_N)
    inside = cols < k_len
    keys = load_rows(k, cols, inside, k_strides[2], D, D_PARTS)
    values = load_rows(v, cols, inside, v_strides[2], DV, DV_PARTS)
    dk = zero_parts((BLOCK_N,), D_PARTS)
    dv = zero_parts((BLOCK_N,), DV_PARTS)
    # Not pipelined: Triton 3.6 to 3.9 would copy the next gradients over those that a wgmma still reads.
    for tile in tl.range(tl.cdiv(q_len, BLOCK_M), num_stages=1):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = rows < q_len
        queries = load_rows(q, rows, valid, q_strides[2], D, D_PARTS)
        grad = load_rows(grad_out, rows, valid, grad_out_strides[2], DV, DV_PARTS)
        row_sum = row_delta(out, grad, grad_lse, rows, q_len, out_strides[2], DV, DV_PARTS)
        tl.store(delta + row_at + rows, row_sum, mask=valid)  # for the bias gradient
        log_sum = load_lse(lse + row_at, rows, q_len)
        dropped, ds = score_gradient(
            keys, queries, values, grad, log_sum[None, :], row_sum[None, :], bias, bias_strides, rows[None, :], cols[:, None],
            q_len, k_len, scale, draw, pid, threshold, keep_scale, BLOCK_N, BLOCK_M, BIAS, CAUSAL, True, DROPOUT, PRECISION,
        )  # fmt: skip
        dv = add_products(dv, dropped.to(v.dtype.element_ty), grad, 0, PRECISION)
        ds = ds.to(q.dtype.element_ty)
        dk = add_products(dk, ds, queries, 0, PRECISION)
        dq = add_products(zero_parts((BLOCK_M,), D_PARTS), tl.trans(ds), keys, 0, PRECISION)
        store_rows(grad_q, dq, 0, factor, rows, valid, grad_q_strides[2], D, D_PARTS)
    store_rows(grad_k, dk, 0, factor, cols, inside, grad_k_strides[2], D, D_PARTS)
    store_rows(grad_v, dv, 0, 1.0, cols, inside, grad_v_strides[2], DV, DV_PARTS)


@triton.jit
def backward_dq(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    log_sums,
    delta,
    grad_lse,
    grad_q,
    cu_q,
    cu_k,
    seed,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    lse_strides,
    grad_q_strides,
    H,
    GROUPS,
    n_q,
    n_k,
    scale,
    factor,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PARTS: tl.constexpr,
    DV_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTHS: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of one query tile, walking the keys; also writes what :func:`backward_dkdv` reads of each row: its sum (delta), and its
    log-sum-exp as probabilities take it."""
    blocks = tl.cdiv(n_q, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
    k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
    q += b * q_strides[0] + h * q_strides[1] + q_first * q_strides[2]
    k += b * k_strides[0] + h // GROUPS * k_strides[1] + k_first * k_strides[2]
    v += b * v_strides[0] + h // GROUPS * v_strides[1] + k_first * v_strides[2]
    out += b * out_strides[0] + h * out_strides[1] + q_first * out_strides[2]
    grad_out += b * grad_out_strides[0] + h * grad_out_strides[1] + q_first * grad_out_strides[2]
    grad_q += b * grad_q_strides[0] + h * grad_q_strides[1] + q_first * grad_q_strides[2]
    row_at = b * lse_strides[0] + h * lse_strides[1] + q_first
    bias += b * bias_strides[0] + h * bias_strides[1]
    if grad_lse is not None:
        grad_lse += row_at
    draw = draw_of(seed, DROPOUT)

    first_row = pid % blocks * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < q_len
    queries = load_rows(q, rows, inside, q_strides[2], D, D_PARTS)
    grad = load_rows(grad_out, rows, inside, grad_out_strides[2], DV, DV_PARTS)
    log_sum = load_lse(lse + row_at, rows, q_len)
    row_sum = row_delta(out, grad, grad_lse, rows, q_len, out_strides[2], DV, DV_PARTS)
    tl.store(delta + row_at + rows, row_sum, mask=inside)
    tl.store(log_sums + row_at + rows, log_sum, mask=inside)
    dq = zero_parts((BLOCK_M,), D_PARTS)
    end = k_len
    whole = k_len // WIDTHS[0] * WIDTHS[0]
    if CAUSAL:
        end = tl.minimum(k_len, first_row + BLOCK_M)
        whole = tl.minimum(whole, first_row // WIDTHS[0] * WIDTHS[0])
    if VARLEN:  # tiles past the sequence's end walk nothing
        end = tl.where(first_row < q_len, end, 0)
        whole = tl.where(first_row < q_len, whole, 0)
    for edge in tl.static_range(2):
        for start in range(whole if edge else 0, end if edge else whole, WIDTHS[edge]):
            cols = span(start, WIDTHS[edge])
            keys = load_rows(k, cols, cols < k_len if edge == 1 else None, k_strides[2], D, D_PARTS)
            values = load_rows(v, cols, cols < k_len if edge == 1 else None, v_strides[2], DV, DV_PARTS)
            _, ds = score_gradient(
                queries, keys, grad, values, log_sum[:, None], row_sum[:, None], bias, bias_strides, rows[:, None], cols[None, :],
                q_len, k_len, scale, draw, head, threshold, keep_scale, BLOCK_M, WIDTHS[edge], BIAS, CAUSAL, edge == 1, DROPOUT, PRECISION,
            )  # fmt: skip
            dq = add_products(dq, ds.to(queries[0].dtype), keys, 0, PRECISION)
    store_rows(grad_q, dq, 0, factor, rows, inside, grad_q_strides[2], D, D_PARTS)


@triton.jit
def backward_dkdv(
    grad_out,
    q,
    k,
    v,
    bias,
    log_sums,
    delta,
    grad_k,
    grad_v,
    cu_q,
    cu_k,
    seed,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    lse_strides,
    grad_k_strides,
    grad_v_strides,
    H,
    GROUPS,
    n_q,
    n_k,
    scale,
    factor,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PARTS: tl.constexpr,
    DV_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of one key head, walking the queries of its group in blocks of BLOCK_M."""
    blocks = tl.cdiv(n_k, BLOCK_N)
    pid = tl.program_id(0)
    kv_heads = H // GROUPS
    head = pid // blocks
    b, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
    k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
    k += b * k_strides[0] + kv_head * k_strides[1] + k_first * k_strides[2]
    v += b * v_strides[0] + kv_head * v_strides[1] + k_first * v_strides[2]
    grad_k += b * grad_k_strides[0] + kv_head * grad_k_strides[1] + k_first * grad_k_strides[2]
    grad_v += b * grad_v_strides[0] + kv_head * grad_v_strides[1] + k_first * grad_v_strides[2]
    draw = draw_of(seed, DROPOUT)

    first_col = pid % blocks * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = cols < k_len
    keys = load_rows(k, cols, inside, k_strides[2], D, D_PARTS)
    values = load_rows(v, cols, inside, v_strides[2], DV, DV_PARTS)
    dk = zero_parts((BLOCK_N,), D_PARTS)
    dv = zero_parts((BLOCK_N,), DV_PARTS)
    from_row = 0
    if CAUSAL:
        from_row = first_col // BLOCK_M * BLOCK_M
    steps = tl.maximum(tl.cdiv(q_len - from_row, BLOCK_M), 0)
    if VARLEN:
        steps = tl.where(first_col < k_len, steps, 0)
    for step in range(GROUPS * steps):
        h, tile = kv_head, step
        if GROUPED:
            h, tile = kv_head * GROUPS + step // steps, step % steps
        rows = from_row + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at = q + b * q_strides[0] + h * q_strides[1] + q_first * q_strides[2]
        queries = load_rows(at, rows, rows < q_len, q_strides[2], D, D_PARTS)
        at = grad_out + b * grad_out_strides[0] + h * grad_out_strides[1] + q_first * grad_out_strides[2]
        grad = load_rows(at, rows, rows < q_len, grad_out_strides[2], DV, DV_PARTS)
        row_at = b * lse_strides[0] + h * lse_strides[1] + q_first
        log_sum = tl.load(log_sums + row_at + rows, mask=rows < q_len, other=float("inf"))
        row_sum = tl.load(delta + row_at + rows, mask=rows < q_len, other=0.0)
        where = bias + b * bias_strides[0] + h * bias_strides[1]
        # Keys past the end spoil their own rows alone, which are not stored: no mask.
        dropped, ds = score_gradient(
            keys, queries, values, grad, log_sum[None, :], row_sum[None, :], where, bias_strides, rows[None, :], cols[:, None],
            q_len, k_len, scale, draw, b * H + h, threshold, keep_scale, BLOCK_N, BLOCK_M, BIAS, CAUSAL, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
        dv = add_products(dv, dropped.to(v.dtype.element_ty), grad, 0, PRECISION)
        dk = add_products(dk, ds.to(q.dtype.element_ty), queries, 0, PRECISION)
    store_rows(grad_k, dk, 0, factor, cols, inside, grad_k_strides[2], D, D_PARTS)
    store_rows(grad_v, dv, 0, 1.0, cols, inside, grad_v_strides[2], DV, DV_PARTS)
