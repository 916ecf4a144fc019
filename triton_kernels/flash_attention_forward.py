"""Forward kernels of attention, after Dao et al., "FlashAttention-2" (2023).

Both compute the softmax in base 2 and store only the output and the log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import (
    LN2,
    add_bias_and_mask,
    add_products,
    dot_parts,
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
def load_blocks(base, n, stride, D: tl.constexpr, PARTS: tl.constexpr, ROW_PARTS: tl.constexpr):
    """All ``n`` rows as a tuple over ROW_PARTS of tuples over PARTS."""
    out = ()
    start: tl.constexpr = 0
    for j in tl.static_range(len(ROW_PARTS)):
        rows = start + tl.arange(0, ROW_PARTS[j])
        out = out + (load_rows(base, rows, rows < n, stride, D, PARTS),)
        start = start + ROW_PARTS[j]
    return out


#: Exponents are one multiply-add, score * unit - round(top * unit), where all subtracted numbers of a tile are at most
#: this large: their rounding, below 2^-8, then changes all exponentials of a row by the same factor, and cancels. Else
#: the largest score is subtracted first.
FUSED_LIMIT = tl.constexpr(65536.0)


@triton.jit
def log_sum_exp(top, total, scale, RAW: tl.constexpr):
    if RAW:
        top = top * scale
    return top + tl.log2(total) * LN2


@triton.jit
def short_tile(
    queries,
    keys,
    values,
    bias,
    out,
    lse,
    rows,
    q_len,
    k_len,
    bias_strides,
    out_stride,
    scale,
    unit,
    rng_seed,
    head,
    threshold,
    keep_scale,
    DV: tl.constexpr,
    DV_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_M queries, from all keys and values of their head: one softmax over whole rows,
    without rescaling."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    scores = ()
    first: tl.constexpr = 0
    for j in tl.static_range(len(KEY_PARTS)):
        cols = first + tl.arange(0, KEY_PARTS[j])
        s = dot_parts(queries, keys[j], BLOCK_M, KEY_PARTS[j], PRECISION)
        if not RAW:
            s *= scale
        # Batched input: every part but the last is full.
        s = add_bias_and_mask(
            s, bias, rows[:, None], cols[None, :], q_len, k_len, bias_strides, BIAS, CAUSAL,
            VARLEN or CAUSAL or j == len(KEY_PARTS) - 1,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(s, 1))
        scores = scores + (s,)
        first = first + KEY_PARTS[j]
    top = tl.where(top == float("-inf"), 0.0, top)
    subtracted = top * unit
    if len(KEY_PARTS) == 1:  # the comparison would cost more than it saves
        exact: tl.constexpr = True
    else:
        exact = tl.max(tl.abs(subtracted), 0) > FUSED_LIMIT
    if exact:
        differences = ()
        for j in tl.static_range(len(KEY_PARTS)):
            differences = differences + (scores[j] - top[:, None],)
        scores = differences
        subtracted = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_parts((BLOCK_M,), DV_PARTS)
    start: tl.constexpr = 0
    for j in tl.static_range(len(KEY_PARTS)):
        p = tl.exp2(scores[j] * unit - subtracted[:, None])
        total += tl.sum(p, 1)
        if DROPOUT:
            cols = start + tl.arange(0, KEY_PARTS[j])
            p = tl.where(dropout_mask(rng_seed, head, rows[:, None], cols[None, :], threshold), p, 0.0)
        start = start + KEY_PARTS[j]
        acc = add_products(acc, p.to(values[0][0].dtype), values[j], 0, PRECISION)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    factor = keep_scale / total
    store_rows(out, acc, 0, factor[:, None], rows, rows < q_len, out_stride, DV, DV_PARTS)
    tl.store(lse + rows, tl.where(empty, float("-inf"), log_sum_exp(top, total, scale, RAW)), mask=rows < q_len)


@triton.jit
def forward_short(
    q,
    k,
    v,
    bias,
    out,
    lse,
    cu_q,
    cu_k,
    seed,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    lse_strides,
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
    KEY_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """GROUP tiles of queries of one head, with all its keys and values on chip."""
    blocks = tl.cdiv(n_q, BLOCK_M * GROUP)
    pid = tl.program_id(0)
    head = pid // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
    k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
    q = head_rows(q, q_strides, b, h, q_first, UNIT)
    k = head_rows(k, k_strides, b, h // GROUPS, k_first, UNIT)
    v = head_rows(v, v_strides, b, h // GROUPS, k_first, UNIT)
    out = head_rows(out, out_strides, b, h, q_first, UNIT)
    lse += b * lse_strides[0] + h * lse_strides[1] + q_first
    bias += b * bias_strides[0] + h * bias_strides[1]
    rng_seed = dropout_seed(seed, DROPOUT)

    unit = exp2_factor(scale, RAW)
    keys = load_blocks(k, k_len, k_strides[2] * UNIT, D, D_PARTS, KEY_PARTS)
    values = load_blocks(v, k_len, v_strides[2] * UNIT, DV, DV_PARTS, KEY_PARTS)
    for tile in range(GROUP):
        rows = (pid % blocks * GROUP + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        queries = load_rows(q, rows, rows < q_len, q_strides[2] * UNIT, D, D_PARTS)
        short_tile(
            queries, keys, values, bias, out, lse, rows, q_len, k_len, bias_strides, out_strides[2] * UNIT, scale, unit,
            rng_seed, head, threshold, keep_scale, DV, DV_PARTS, KEY_PARTS, BLOCK_M, BIAS, CAUSAL, DROPOUT, VARLEN, RAW,
            PRECISION,
        )  # fmt: skip


@triton.jit
def forward_persistent(
    q,
    k,
    v,
    bias,
    out,
    lse,
    cu_q,
    cu_k,
    seed,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    lse_strides,
    H,
    heads,
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
    KEY_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All queries of a head, of one head after another: while a head is computed, the next one's queries, keys and
    values are loaded."""
    rng_seed = dropout_seed(seed, DROPOUT)
    unit = exp2_factor(scale, RAW)
    for head in tl.range(tl.program_id(0), heads, tl.num_programs(0), num_stages=STAGES):
        b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
        q_first, q_len = sequence(cu_q, b, n_q, VARLEN)
        k_first, k_len = sequence(cu_k, b, n_k, VARLEN)
        at = head_rows(k, k_strides, b, h // GROUPS, k_first, UNIT)
        keys = load_blocks(at, k_len, k_strides[2] * UNIT, D, D_PARTS, KEY_PARTS)
        at = head_rows(v, v_strides, b, h // GROUPS, k_first, UNIT)
        values = load_blocks(at, k_len, v_strides[2] * UNIT, DV, DV_PARTS, KEY_PARTS)
        for tile in tl.static_range(TILES):
            rows = span(tile * BLOCK_M, BLOCK_M)
            at = head_rows(q, q_strides, b, h, q_first, UNIT)
            queries = load_rows(at, rows, rows < q_len, q_strides[2] * UNIT, D, D_PARTS)
            out_at = head_rows(out, out_strides, b, h, q_first, UNIT)
            lse_at = lse + b * lse_strides[0] + h * lse_strides[1] + q_first
            bias_at = bias + b * bias_strides[0] + h * bias_strides[1]
            short_tile(
                queries, keys, values, bias_at, out_at, lse_at, rows, q_len, k_len, bias_strides, out_strides[2] * UNIT,
                scale, unit, rng_seed, head, threshold, keep_scale, DV, DV_PARTS, KEY_PARTS, BLOCK_M, BIAS, CAUSAL,
                DROPOUT, VARLEN, RAW, PRECISION,
            )  # fmt: skip


@triton.jit
def online_softmax(
    queries,
    k,
    v,
    bias,
    rows,
    q_len,
    k_len,
    whole,
    end,
    k_stride,
    v_stride,
    bias_strides,
    scale,
    unit,
    rng_seed,
    head,
    threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PARTS: tl.constexpr,
    DV_PARTS: tl.constexpr,
    M: tl.constexpr,
    WIDTHS: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
):
    """The loop over the keys, in blocks of WIDTHS[0] up to ``whole`` and of WIDTHS[1] up to ``end``: the largest score
    of each row, the largest magnitude subtracted from its exponents (FUSED, to be compared with FUSED_LIMIT), the sum
    of its exponentials, and its output before the division by the sum."""
    top = tl.full((M,), float("-inf"), tl.float32)
    before = top
    worst = tl.zeros((M,), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = zero_parts((M,), DV_PARTS)
    for edge in tl.static_range(2):  # full blocks first, then narrower ones for the keys that need a mask
        for start in range(whole if edge else 0, end if edge else whole, WIDTHS[edge]):
            cols = span(start, WIDTHS[edge])
            keys = load_rows(k, cols, cols < k_len if edge == 1 else None, k_stride, D, D_PARTS)
            s = dot_parts(queries, keys, M, WIDTHS[edge], PRECISION)
            if not RAW:
                s *= scale
            s = add_bias_and_mask(
                s, bias, rows[:, None], cols[None, :], q_len, k_len, bias_strides, BIAS, CAUSAL, edge == 1
            )
            higher = tl.maximum(top, tl.max(s, 1))
            against = tl.where(higher == float("-inf"), 0.0, higher)
            if FUSED:
                against *= unit
                worst = tl.maximum(worst, tl.abs(against))
                p = tl.exp2(s * unit - against[:, None])
                shrink = tl.exp2(before - against)  # not top * unit, which has been rounded before
                before = tl.where(higher == float("-inf"), higher, against)
            else:
                p = exp2_scores(s, against[:, None], unit)
                shrink = exp2_scores(top, against, unit)
            total = total * shrink + tl.sum(p, 1)
            top = higher
            if DROPOUT:
                p = tl.where(dropout_mask(rng_seed, head, rows[:, None], cols[None, :], threshold), p, 0.0)
            values = load_rows(v, cols, cols < k_len if edge == 1 else None, v_stride, DV, DV_PARTS)
            shrunk = ()
            for i in tl.static_range(len(DV_PARTS)):
                shrunk = shrunk + (acc[i] * shrink[:, None],)
            acc = add_products(shrunk, p.to(v.dtype.element_ty), values, 0, PRECISION)
    return top, worst, total, acc


@triton.jit
def forward_long(
    q,
    k,
    v,
    bias,
    out,
    lse,
    cu_q,
    cu_k,
    seed,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    out_strides,
    lse_strides,
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
    WIDTHS: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of one head, in a loop over the keys with an online softmax (Milakov and Gimelshein, 2018)."""
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
    lse += b * lse_strides[0] + h * lse_strides[1] + q_first
    bias += b * bias_strides[0] + h * bias_strides[1]
    rng_seed = dropout_seed(seed, DROPOUT)

    unit = exp2_factor(scale, RAW)
    first_row = pid % blocks * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    queries = load_rows(q, rows, rows < q_len, q_strides[2] * UNIT, D, D_PARTS)
    end = k_len
    whole = k_len // WIDTHS[0] * WIDTHS[0]
    if CAUSAL:
        end = tl.minimum(k_len, first_row + BLOCK_M)
        whole = tl.minimum(whole, first_row // WIDTHS[0] * WIDTHS[0])
    if VARLEN:  # tiles past the end of the sequence have nothing to do
        end = tl.where(first_row < q_len, end, 0)
        whole = tl.where(first_row < q_len, whole, 0)
    top, worst, total, acc = online_softmax(
        queries, k, v, bias, rows, q_len, k_len, whole, end, k_strides[2] * UNIT, v_strides[2] * UNIT, bias_strides,
        scale, unit, rng_seed, head, threshold, D, DV, D_PARTS, DV_PARTS, BLOCK_M, WIDTHS, BIAS, CAUSAL, DROPOUT, RAW,
        PRECISION, True,
    )  # fmt: skip
    if tl.max(worst, 0) > FUSED_LIMIT:
        top, worst, total, acc = online_softmax(
            queries, k, v, bias, rows, q_len, k_len, 0, end, k_strides[2] * UNIT, v_strides[2] * UNIT, bias_strides,
            scale, unit, rng_seed, head, threshold, D, DV, D_PARTS, DV_PARTS, BLOCK_M, WIDTHS, BIAS, CAUSAL, DROPOUT,
            RAW, PRECISION, False,
        )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    factor = keep_scale / total
    store_rows(out, acc, 0, factor[:, None], rows, rows < q_len, out_strides[2] * UNIT, DV, DV_PARTS)
    tl.store(lse + rows, tl.where(empty, float("-inf"), log_sum_exp(top, total, scale, RAW)), mask=rows < q_len)
