"""Kernels of the losses over all pairs of rows of x and y. Inner products are reduced tile by tile and never stored.

Two kernels serve every loss. ``pair_sums`` reduces each row of the score matrix; ``pair_gradient`` recomputes its
tiles, converts scores to weights and multiplies them with rows of ``values``, as in attention. Programs own whole rows.
Sums and gradients of columns come from a second launch with x and y exchanged, so no two programs add to the same
element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import LN2, LOG2E, add_products, dot, zero_parts

#: How scores become weights: a softmax, or a sigmoid of each.
SOFTMAX, SIGMOID = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def pair_products(
    x,
    y,
    rows,
    cols,
    n_rows,
    n_cols,
    x_stride,
    y_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T for BLOCK_M rows and BLOCK_N columns, BLOCK_K channels at a time; zero past the last row, column and
    channel."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_at, y_at = x + rows.to(tl.int64)[:, None] * x_stride, y + cols.to(tl.int64)[None, :] * y_stride
    x_mask, y_mask = (rows < n_rows)[:, None], (cols < n_cols)[None, :]
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if D % BLOCK_K:
            a = tl.load(x_at + k[None, :], mask=x_mask & (k < D)[None, :], other=0.0)
            b = tl.load(y_at + k[:, None], mask=y_mask & (k < D)[:, None], other=0.0)
        else:
            a = tl.load(x_at + k[None, :], mask=x_mask, other=0.0)
            b = tl.load(y_at + k[:, None], mask=y_mask, other=0.0)
        products = dot(a, b, products, PRECISION)
    return products


@triton.jit
def pair_scores(products, rows, cols, n_rows, n_cols, scale, bias, x_offset, y_offset, EXCLUDE: tl.constexpr):
    """Scores (products - offsets) * scale + bias; -inf past the last row or column and, with EXCLUDE, on the diagonal.

    They are scaled to base 2 only after a log-sum-exp is subtracted, so that a single dominating score has a
    probability of exactly 1.
    """
    if x_offset is not None:
        products -= tl.load(x_offset + rows, mask=rows < n_rows, other=0.0)[:, None]
    if y_offset is not None:
        products -= tl.load(y_offset + cols, mask=cols < n_cols, other=0.0)[None, :]
    s = products * scale
    if bias is not None:
        s += tl.load(bias)
    valid = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    if EXCLUDE:
        valid = valid & (rows[:, None] != cols[None, :])
    return tl.where(valid, s, float("-inf"))


@triton.jit
def softplus(s):
    """log(1 + e^s). For small e^-|s| a series keeps the digits that 1 + e would lose."""
    e = tl.exp2(-tl.abs(s) * LOG2E)
    rest = tl.where(e < 0.015625, e * (1.0 - e * (0.5 - e * (0.33333333 - e * 0.25))), tl.log2(1.0 + e) * LN2)
    return tl.maximum(s, 0.0) + rest


@triton.jit
def pair_sums(
    x,
    y,
    scale,
    bias,
    y_offset,
    sums,
    positives,
    x_stride,
    y_stride,
    n_rows,
    n_cols,
    share,
    partner,
    KIND: tl.constexpr,
    EXCLUDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For BLOCK_M rows and ``share`` columns: log-sum-exp (SOFTMAX) or sum of softplus (SIGMOID), and the score of the
    pair whose indices differ by ``partner``. Results are (splits of the columns, rows)."""
    blocks = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    first_col = pid // blocks * share
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = tl.load(scale)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    positive = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(first_col, tl.minimum(first_col + share, n_cols), BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        products = pair_products(
            x, y, rows, cols, n_rows, n_cols, x_stride, y_stride, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        s = pair_scores(products, rows, cols, n_rows, n_cols, factor, bias, None, y_offset, EXCLUDE)
        if positives is not None:
            pair = (tl.abs(cols[None, :] - rows[:, None]) == partner) & (cols < n_cols)[None, :]
            positive += tl.sum(tl.where(pair, s, 0.0), 1)
        if KIND == SOFTMAX:
            higher = tl.maximum(top, tl.max(s, 1))
            against = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2((top - against) * LOG2E) + tl.sum(tl.exp2((s - against[:, None]) * LOG2E), 1)
            top = higher
        else:
            total += tl.sum(softplus(s), 1)
    if KIND == SOFTMAX:
        total = tl.where(total == 0.0, float("-inf"), top + tl.log2(total) * LN2)
    at = (pid // blocks).to(tl.int64) * n_rows + rows
    tl.store(sums + at, total, mask=rows < n_rows)
    if positives is not None:
        tl.store(positives + at, positive, mask=rows < n_rows)


@triton.jit
def pair_weights(s, rows, cols, n_rows, n_cols, x_lse, y_lse, y_weight, partner, pull, KIND: tl.constexpr):
    """Derivative of the loss with respect to the scores: softmax over columns, over rows, or both, or a sigmoid; minus
    ``pull`` at the positives."""
    if KIND == SIGMOID:
        w = 1.0 / (1.0 + tl.exp2(-s * LOG2E))
    else:
        w = tl.zeros_like(s)
        if x_lse is not None:
            w += tl.exp2((s - tl.load(x_lse + rows, mask=rows < n_rows, other=float("inf"))[:, None]) * LOG2E)
        if y_lse is not None:
            w += tl.exp2((s - tl.load(y_lse + cols, mask=cols < n_cols, other=float("inf"))[None, :]) * LOG2E)
        if y_weight is not None:
            w *= tl.load(y_weight + cols, mask=cols < n_cols, other=0.0)[None, :]
    return tl.where(tl.abs(cols[None, :] - rows[:, None]) == partner, w - pull, w)


@triton.jit
def load_slice(base, rows, n_rows, begin, stride, D: tl.constexpr, PARTS: tl.constexpr):
    """Channels from ``begin`` of rows of ``base`` (n_rows, D), as a tuple of blocks."""
    at = base + rows.to(tl.int64)[:, None] * stride
    out = ()
    start: tl.constexpr = 0
    for i in tl.static_range(len(PARTS)):
        cols = begin + start + tl.arange(0, PARTS[i])
        out = out + (tl.load(at + cols[None, :], mask=(rows < n_rows)[:, None] & (cols < D)[None, :], other=0.0),)
        start = start + PARTS[i]
    return out


@triton.jit
def pair_gradient(
    x,
    y,
    values,
    scale,
    bias,
    x_offset,
    y_offset,
    x_lse,
    y_lse,
    y_weight,
    factor,
    out,
    by_scale,
    by_bias,
    x_stride,
    y_stride,
    values_stride,
    n_rows,
    n_cols,
    share,
    partner,
    pull,
    KIND: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BOOST: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """WIDE channels of ``factor`` * weights values for BLOCK_M rows and ``share`` columns, to (splits, rows, DV).

    The programs of the first channels also store, per row, the sums of weight times product and of weights, (splits,
    rows): the derivatives with respect to scale and bias. BOOST scales the weights, at most 2, out of float16's
    subnormal range.
    """
    blocks, slices = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(DV, WIDE)
    pid = tl.program_id(0)
    split, begin = pid // (blocks * slices), pid // blocks % slices * WIDE
    first_col = split * share
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    score_factor = tl.load(scale)
    acc = zero_parts((BLOCK_M,), PARTS)
    scale_sum = tl.zeros((BLOCK_M,), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(first_col, tl.minimum(first_col + share, n_cols), BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        products = pair_products(
            x, y, rows, cols, n_rows, n_cols, x_stride, y_stride, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        s = pair_scores(products, rows, cols, n_rows, n_cols, score_factor, bias, x_offset, y_offset, EXCLUDE)
        w = pair_weights(s, rows, cols, n_rows, n_cols, x_lse, y_lse, y_weight, partner, pull, KIND)
        if by_scale is not None:
            scale_sum += tl.sum(w * products, 1)
        if by_bias is not None:
            bias_sum += tl.sum(w, 1)
        v = load_slice(values, cols, n_cols, begin, values_stride, DV, PARTS)
        acc = add_products(acc, (w * BOOST).to(values.dtype.element_ty), v, 0, PRECISION)
    scaled = tl.load(factor) / BOOST
    at = split.to(tl.int64) * n_rows + rows
    start: tl.constexpr = 0
    for i in tl.static_range(len(PARTS)):
        channel = begin + start + tl.arange(0, PARTS[i])
        mask = (rows < n_rows)[:, None] & (channel < DV)[None, :]
        tl.store(out + at[:, None] * DV + channel[None, :], (acc[i] * scaled).to(out.dtype.element_ty), mask=mask)
        start = start + PARTS[i]
    own = rows < tl.where(begin == 0, n_rows, 0)
    if by_scale is not None:
        tl.store(by_scale + at, scale_sum, mask=own)
    if by_bias is not None:
        tl.store(by_bias + at, bias_sum, mask=own)
