"""Backward kernels of attention. Probabilities are recomputed from the log-sum-exp. Every gradient has one owner, so
there are no atomics.

Kernels whose rows are keys compute transposed scores (keys, queries), so that the products for dK and dV use the
probabilities in the registers they are in.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import (
    LARGE,
    add_bias_and_mask,
    add_products,
    dot,
    dot_parts,
    dot_rows,
    dropout_mask,
    dropout_seed,
    exp2_factor,
    exp2_scores,
    head_rows,
    load_rows,
    sequence,
    span,
    store_rows,
    zero_parts,
)


@triton.jit
def any_large(lse):
    """Whether a row's log-sum-exp is LARGE (infinite ones belong to rows that do not exist). Float32 may then have
    rounded away what was added to the largest score, and probabilities from it would not sum to 1."""
    return tl.max(tl.where(lse < float("inf"), tl.abs(lse), 0.0), 0) > LARGE


@triton.jit
def load_shift(lse, rows, n, scale, RAW: tl.constexpr):
    """The log-sum-exp that is subtracted from scores, changed such that probabilities are 0 in rows past the end and in
    fully masked rows; and whether one of these rows has a LARGE one."""
    value = tl.load(lse + rows, mask=rows < n, other=float("inf"))
    value = tl.where(value == float("-inf"), 0.0, value)
    large = any_large(value)
    if RAW:
        value = value / scale
    return value, large


@triton.jit
def probabilities(s, shift, rest, unit):
    """exp2((s - shift) * unit - rest). For a row with a LARGE log-sum-exp, ``shift`` is the largest score and ``rest``
    the logarithm of the sum of the remaining exponentials; otherwise they are the log-sum-exp and 0."""
    return tl.exp2((s - shift) * unit - rest)


@triton.jit
def log_total(total):
    return tl.where(total == 0.0, 0.0, tl.log2(total))


@triton.jit
def row_delta(out, grad, grad_lse, rows, n, stride, DV: tl.constexpr, DV_PARTS: tl.constexpr):
    """Row sums of out * grad_out minus the gradient of the log-sum-exp; the softmax backward subtracts them from dP."""
    delta = dot_rows(load_rows(out, rows, rows < n, stride, DV, DV_PARTS), grad)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + rows, mask=rows < n, other=0.0)
    return delta


@triton.jit
def tile_scores(
    left,
    right,
    bias,
    bias_strides,
    rows,
    cols,
    n_q,
    n_k,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile (M, N) of scores, as in the forward. left and right are queries and keys, or keys and queries."""
    s = dot_parts(left, right, M, N, PRECISION)
    if not RAW:
        s *= scale
    return add_bias_and_mask(s, bias, rows, cols, n_q, n_k, bias_strides, BIAS, CAUSAL, MASK)


@triton.jit
def score_gradient(
    p,
    grad_left,
    grad_right,
    row_sum,
    rows,
    cols,
    rng_seed,
    head,
    threshold,
    keep_scale,
    M: tl.constexpr,
    N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile (M, N) of probabilities after dropout, and of the gradients of the scores. grad_left and grad_right are
    output gradients and values, or the reverse; row sums and indices broadcast to the tile."""
    dp = dot_parts(grad_left, grad_right, M, N, PRECISION)
    dropped = p
    if DROPOUT:
        keep = dropout_mask(rng_seed, head, rows, cols, threshold)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return dropped, p * (dp - row_sum)


@triton.jit
def exact_shift(
    queries,
    k,
    k_stride,
    bias,
    bias_strides,
    rows,
    q_len,
    k_len,
    end,
    scale,
    unit,
    D: tl.constexpr,
    D_PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The shift and rest of :func:`probabilities` for M rows with LARGE log-sum-exps, from the keys before ``end``, N
    at a time."""
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for start in tl.range(0, end, N, num_stages=1):
        cols = span(start, N)
        keys = load_rows(k, cols, cols < k_len, k_stride, D, D_PARTS)
        s = tile_scores(
            queries, keys, bias, bias_strides, rows[:, None], cols[None, :], q_len, k_len, scale, M, N, BIAS, CAUSAL,
            True, RAW, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * exp2_scores(top, shift, unit) + tl.sum(exp2_scores(s, shift[:, None], unit), 1)
        top = higher
    return tl.where(top == float("-inf"), 0.0, top), log_total(total)


@triton.jit
def key_gradient(
    acc, weights, rows, N: tl.constexpr, PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):
    """acc (None: zero) plus weights^T rows, for weights (M, N) and a tuple of blocks of rows (M, PARTS[i])."""
    out = ()
    for i in tl.static_range(len(rows)):
        if TRANSPOSED:
            product = tl.trans(dot(tl.trans(rows[i]), weights, tl.zeros((PARTS[i], N), tl.float32), PRECISION))
        else:
            product = dot(tl.trans(weights), rows[i], tl.zeros((N, PARTS[i]), tl.float32), PRECISION)
        if acc is not None:
            product += acc[i]
        out = out + (product,)
    return out


@triton.jit
def backward_short(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    shifts,
    rests,
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
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    WIDTHS: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of a head in one program, which keeps all queries and their gradients on chip, in TILES of BLOCK_M,
    and loops over the keys. Five products per tile, instead of seven in separate passes for dQ and for dK and dV, and
    everything is read once."""
    pid = tl.program_id(0)
    b, h = (pid // H).to(tl.int64), (pid % H).to(tl.int64)
    q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
    k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
    q = head_rows(q, q_strides, b, h, q_first, UNIT)
    k = head_rows(k, k_strides, b, h, k_first, UNIT)
    v = head_rows(v, v_strides, b, h, k_first, UNIT)
    out = head_rows(out, out_strides, b, h, q_first, UNIT)
    grad_out = head_rows(grad_out, grad_out_strides, b, h, q_first, UNIT)
    grad_q = head_rows(grad_q, grad_q_strides, b, h, q_first, UNIT)
    grad_k = head_rows(grad_k, grad_k_strides, b, h, k_first, UNIT)
    grad_v = head_rows(grad_v, grad_v_strides, b, h, k_first, UNIT)
    bias += b * bias_strides[0] + h * bias_strides[1]
    row_at = b * lse_strides[0] + h * lse_strides[1] + q_first
    if grad_lse is not None:
        grad_lse += row_at
    rng_seed = dropout_seed(seed, DROPOUT)
    unit = exp2_factor(scale, RAW)

    queries = ()
    grads = ()
    row_sums = ()
    shift = ()
    rest = ()
    dq = ()
    for i in tl.static_range(TILES):
        rows = span(i * BLOCK_M, BLOCK_M)
        valid = rows < q_len
        queries += (load_rows(q, rows, valid, q_strides[2] * UNIT, D, D_PARTS),)
        grads += (load_rows(grad_out, rows, valid, grad_out_strides[2] * UNIT, DV, DV_PARTS),)
        row_sums += (row_delta(out, grads[i], grad_lse, rows, q_len, out_strides[2] * UNIT, DV, DV_PARTS),)
        of_tile, large = load_shift(lse + row_at, rows, q_len, scale, RAW)
        rest_of_tile = tl.zeros((BLOCK_M,), tl.float32)
        if large:
            of_tile, rest_of_tile = exact_shift(
                queries[i], k, k_strides[2] * UNIT, bias, bias_strides, rows, q_len, k_len, k_len, scale, unit, D,
                D_PARTS, BLOCK_M, WIDTHS[1], BIAS, CAUSAL, RAW, PRECISION,
            )  # fmt: skip
        at = row_at + rows  # for the bias gradient
        tl.store(delta + at, row_sums[i], mask=valid)
        tl.store(shifts + at, of_tile, mask=valid)
        tl.store(rests + at, rest_of_tile, mask=valid)
        shift += (of_tile,)
        rest += (rest_of_tile,)
        dq += zero_parts((BLOCK_M,), D_PARTS)
    whole = k_len // WIDTHS[0] * WIDTHS[0]
    for edge in tl.static_range(2):
        for start in range(whole if edge else 0, k_len if edge else whole, WIDTHS[edge]):
            cols = span(start, WIDTHS[edge])
            keys = load_rows(k, cols, cols < k_len if edge == 1 else None, k_strides[2] * UNIT, D, D_PARTS)
            values = load_rows(v, cols, cols < k_len if edge == 1 else None, v_strides[2] * UNIT, DV, DV_PARTS)
            dk = None
            dv = None
            next_dq = ()
            for i in tl.static_range(TILES):
                rows = span(i * BLOCK_M, BLOCK_M)
                s = tile_scores(
                    queries[i], keys, bias, bias_strides, rows[:, None], cols[None, :], q_len, k_len, scale, BLOCK_M,
                    WIDTHS[edge], BIAS, CAUSAL, CAUSAL or edge == 1, RAW, PRECISION,
                )  # fmt: skip
                dropped, ds = score_gradient(
                    probabilities(s, shift[i][:, None], rest[i][:, None], unit), grads[i], values,
                    row_sums[i][:, None], rows[:, None], cols[None, :], rng_seed, pid, threshold, keep_scale, BLOCK_M,
                    WIDTHS[edge], DROPOUT, PRECISION,
                )  # fmt: skip
                dv = key_gradient(dv, dropped.to(v.dtype.element_ty), grads[i], WIDTHS[edge], DV_PARTS, True, PRECISION)
                ds = ds.to(q.dtype.element_ty)
                dk = key_gradient(dk, ds, queries[i], WIDTHS[edge], D_PARTS, True, PRECISION)
                next_dq += add_products(dq, ds, keys, i * len(D_PARTS), PRECISION)
            dq = next_dq
            inside = cols < k_len
            store_rows(grad_k, dk, 0, factor, cols, inside, grad_k_strides[2] * UNIT, D, D_PARTS)
            store_rows(grad_v, dv, 0, 1.0, cols, inside, grad_v_strides[2] * UNIT, DV, DV_PARTS)
    for i in tl.static_range(TILES):
        rows = span(i * BLOCK_M, BLOCK_M)
        store_rows(grad_q, dq, i * len(D_PARTS), factor, rows, rows < q_len, grad_q_strides[2] * UNIT, D, D_PARTS)


@triton.jit
def backward_dq(
    grad_out,
    q,
    k,
    v,
    bias,
    out,
    lse,
    shifts,
    rests,
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
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTHS: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of a tile of queries, in a loop over the keys. Also stores what :func:`backward_dkdv` needs per row: delta,
    and the shift and rest of :func:`probabilities`."""
    blocks = tl.cdiv(n_q, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
    k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
    q = head_rows(q, q_strides, b, h, q_first, UNIT)
    k = head_rows(k, k_strides, b, h // GROUPS, k_first, UNIT)
    v = head_rows(v, v_strides, b, h // GROUPS, k_first, UNIT)
    out = head_rows(out, out_strides, b, h, q_first, UNIT)
    grad_out = head_rows(grad_out, grad_out_strides, b, h, q_first, UNIT)
    grad_q = head_rows(grad_q, grad_q_strides, b, h, q_first, UNIT)
    row_at = b * lse_strides[0] + h * lse_strides[1] + q_first
    bias += b * bias_strides[0] + h * bias_strides[1]
    if grad_lse is not None:
        grad_lse += row_at
    rng_seed = dropout_seed(seed, DROPOUT)
    unit = exp2_factor(scale, RAW)

    first_row = pid % blocks * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < q_len
    queries = load_rows(q, rows, inside, q_strides[2] * UNIT, D, D_PARTS)
    grad = load_rows(grad_out, rows, inside, grad_out_strides[2] * UNIT, DV, DV_PARTS)
    shift, large = load_shift(lse + row_at, rows, q_len, scale, RAW)
    rest = tl.zeros((BLOCK_M,), tl.float32)
    row_sum = row_delta(out, grad, grad_lse, rows, q_len, out_strides[2] * UNIT, DV, DV_PARTS)
    end = k_len
    whole = k_len // WIDTHS[0] * WIDTHS[0]
    if CAUSAL:
        end = tl.minimum(k_len, first_row + BLOCK_M)
        whole = tl.minimum(whole, first_row // WIDTHS[0] * WIDTHS[0])
    if VARLEN:  # tiles past the end of the sequence have nothing to do
        end = tl.where(first_row < q_len, end, 0)
        whole = tl.where(first_row < q_len, whole, 0)
    if large:
        shift, rest = exact_shift(
            queries, k, k_strides[2] * UNIT, bias, bias_strides, rows, q_len, k_len, end, scale, unit, D, D_PARTS,
            BLOCK_M, WIDTHS[1], BIAS, CAUSAL, RAW, PRECISION,
        )  # fmt: skip
    at = row_at + rows
    tl.store(delta + at, row_sum, mask=inside)
    tl.store(shifts + at, shift, mask=inside)
    tl.store(rests + at, rest, mask=inside)
    dq = zero_parts((BLOCK_M,), D_PARTS)
    for edge in tl.static_range(2):
        for start in range(whole if edge else 0, end if edge else whole, WIDTHS[edge]):
            cols = span(start, WIDTHS[edge])
            keys = load_rows(k, cols, cols < k_len if edge == 1 else None, k_strides[2] * UNIT, D, D_PARTS)
            values = load_rows(v, cols, cols < k_len if edge == 1 else None, v_strides[2] * UNIT, DV, DV_PARTS)
            s = tile_scores(
                queries, keys, bias, bias_strides, rows[:, None], cols[None, :], q_len, k_len, scale, BLOCK_M,
                WIDTHS[edge], BIAS, CAUSAL, edge == 1, RAW, PRECISION,
            )  # fmt: skip
            _, ds = score_gradient(
                probabilities(s, shift[:, None], rest[:, None], unit), grad, values, row_sum[:, None], rows[:, None],
                cols[None, :], rng_seed, head, threshold, keep_scale, BLOCK_M, WIDTHS[edge], DROPOUT, PRECISION,
            )  # fmt: skip
            dq = add_products(dq, ds.to(queries[0].dtype), keys, 0, PRECISION)
    store_rows(grad_q, dq, 0, factor, rows, inside, grad_q_strides[2] * UNIT, D, D_PARTS)


@triton.jit
def backward_dkdv(
    grad_out,
    q,
    k,
    v,
    bias,
    shifts,
    rests,
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
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    GROUPED: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of one key head, in a loop over the queries of its group in blocks of BLOCK_M."""
    blocks = tl.cdiv(n_k, BLOCK_N)
    pid = tl.program_id(0)
    kv_heads = H // GROUPS
    head = pid // blocks
    b, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
    k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
    k = head_rows(k, k_strides, b, kv_head, k_first, UNIT)
    v = head_rows(v, v_strides, b, kv_head, k_first, UNIT)
    grad_k = head_rows(grad_k, grad_k_strides, b, kv_head, k_first, UNIT)
    grad_v = head_rows(grad_v, grad_v_strides, b, kv_head, k_first, UNIT)
    rng_seed = dropout_seed(seed, DROPOUT)
    unit = exp2_factor(scale, RAW)

    first_col = pid % blocks * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = cols < k_len
    keys = load_rows(k, cols, inside, k_strides[2] * UNIT, D, D_PARTS)
    values = load_rows(v, cols, inside, v_strides[2] * UNIT, DV, DV_PARTS)
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
        at = head_rows(q, q_strides, b, h, q_first, UNIT)
        queries = load_rows(at, rows, rows < q_len, q_strides[2] * UNIT, D, D_PARTS)
        at = head_rows(grad_out, grad_out_strides, b, h, q_first, UNIT)
        grad = load_rows(at, rows, rows < q_len, grad_out_strides[2] * UNIT, DV, DV_PARTS)
        row_at = b * lse_strides[0] + h * lse_strides[1] + q_first
        shift = tl.load(shifts + row_at + rows, mask=rows < q_len, other=float("inf"))
        rest = tl.load(rests + row_at + rows, mask=rows < q_len, other=0.0)
        row_sum = tl.load(delta + row_at + rows, mask=rows < q_len, other=0.0)
        where = bias + b * bias_strides[0] + h * bias_strides[1]
        # No mask: keys past the end only affect their own rows, which are not stored.
        s = tile_scores(
            keys, queries, where, bias_strides, rows[None, :], cols[:, None], q_len, k_len, scale, BLOCK_N, BLOCK_M,
            BIAS, CAUSAL, CAUSAL, RAW, PRECISION,
        )  # fmt: skip
        dropped, ds = score_gradient(
            probabilities(s, shift[None, :], rest[None, :], unit), values, grad, row_sum[None, :], rows[None, :],
            cols[:, None], rng_seed, b * H + h, threshold, keep_scale, BLOCK_N, BLOCK_M, DROPOUT, PRECISION,
        )  # fmt: skip
        dv = add_products(dv, dropped.to(v.dtype.element_ty), grad, 0, PRECISION)
        dk = add_products(dk, ds.to(q.dtype.element_ty), queries, 0, PRECISION)
    store_rows(grad_k, dk, 0, factor, cols, inside, grad_k_strides[2] * UNIT, D, D_PARTS)
    store_rows(grad_v, dv, 0, 1.0, cols, inside, grad_v_strides[2] * UNIT, DV, DV_PARTS)
