"""Attention probabilities of chosen queries: two passes over the keys; only the result is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pyvit.triton_kernels.common import (
    BOOL_BIAS,
    FLOAT_BIAS,
    NO_BIAS,
    arch_of,
    dot_parts,
    exp2_factor,
    exp2_scores,
    head_rows,
    in_units,
    launch,
    load_rows,
    precision,
    rows_unit,
)
from pyvit.triton_kernels.tiles import choose, parts
from torch import Tensor


@triton.jit
def map_scores(
    queries,
    k,
    bias,
    at,
    valid,
    cols,
    n_k,
    stride,
    bias_strides,
    scale,
    D: tl.constexpr,
    D_PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the gathered queries; ``at`` are their rows of the bias."""
    keys = load_rows(k, cols, cols < n_k, stride, D, D_PARTS)
    s = dot_parts(queries, keys, M, N, PRECISION)
    if not RAW:
        s *= scale
    if BIAS != NO_BIAS:
        where = bias + at[:, None] * bias_strides[2] + cols.to(tl.int64)[None, :] * bias_strides[3]
        loaded = tl.load(where, mask=valid[:, None] & (cols < n_k)[None, :], other=0)
        if BIAS == BOOL_BIAS:
            s = tl.where(loaded != 0, s, float("-inf"))
        else:
            s += loaded.to(tl.float32)
    return tl.where((cols < n_k)[None, :], s, float("-inf"))


@triton.jit
def map_rows(
    q,
    k,
    rows,
    bias,
    out,
    q_strides,
    k_strides,
    rows_stride,
    bias_strides,
    H,
    GROUPS,
    n_rows,
    n_k,
    scale,
    D: tl.constexpr,
    D_PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Probabilities of BLOCK_M chosen queries of one head. The first pass over the keys computes the log-sum-exp, the
    second the probabilities."""
    blocks = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    b, h = (pid // blocks // H).to(tl.int64), (pid // blocks % H).to(tl.int64)
    r = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = r < n_rows
    at = tl.load(rows + b * rows_stride + r, mask=valid, other=0)
    queries = load_rows(head_rows(q, q_strides, b, h, 0, UNIT), at, valid, q_strides[2] * UNIT, D, D_PARTS)
    k = head_rows(k, k_strides, b, h // GROUPS, 0, UNIT)
    bias += b * bias_strides[0] + h * bias_strides[1]
    unit = exp2_factor(scale, RAW)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, n_k, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        s = map_scores(
            queries,
            k,
            bias,
            at,
            valid,
            cols,
            n_k,
            k_strides[2] * UNIT,
            bias_strides,
            scale,
            D,
            D_PARTS,
            BLOCK_M,
            BLOCK_N,
            BIAS,
            RAW,
            PRECISION,
        )
        higher = tl.maximum(top, tl.max(s, 1))
        against = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * exp2_scores(top, against, unit) + tl.sum(exp2_scores(s, against[:, None], unit), 1)
        top = higher
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)
    out += ((b * H + h) * n_rows + r.to(tl.int64))[:, None] * n_k
    for start in range(0, n_k, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        s = map_scores(
            queries,
            k,
            bias,
            at,
            valid,
            cols,
            n_k,
            k_strides[2] * UNIT,
            bias_strides,
            scale,
            D,
            D_PARTS,
            BLOCK_M,
            BLOCK_N,
            BIAS,
            RAW,
            PRECISION,
        )
        p = exp2_scores(s, top[:, None], unit) / total[:, None]
        tl.store(out + cols[None, :], p.to(out.dtype.element_ty), mask=valid[:, None] & (cols < n_k)[None, :])


def attention_map(
    q: Tensor, k: Tensor, rows: Tensor, bias: Tensor | None, scale: float, backend: str = "triton"
) -> Tensor:
    """Probabilities (B, H, R, Nk) of the queries ``rows`` (B, R), as :func:`pyvit.ops.attention_map` states them."""
    q, k, rows = rows_unit(q), rows_unit(k), rows_unit(rows)
    (batch, heads, _, d), n_k, n_rows = q.shape, k.shape[2], rows.shape[1]
    out = q.new_empty(batch, heads, n_rows, n_k)
    c = choose("attention_map", arch_of(q), q.element_size(), d, n_k)
    args = {
        "q": q,
        "k": k,
        "rows": rows,
        "bias": q if bias is None else bias,  # not read without a bias
        "out": out,
        "q_strides": q.stride()[:3],
        "k_strides": k.stride()[:3],
        "rows_stride": rows.stride(0),
        "bias_strides": (0, 0, 0, 0)
        if bias is None
        else tuple(s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape, strict=True)),
        "H": heads,
        "GROUPS": heads // max(k.shape[1], 1),
        "n_rows": n_rows,
        "n_k": n_k,
        "scale": float(scale),
        "D": d,
        "D_PARTS": parts(d),
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BIAS": (NO_BIAS if bias is None else BOOL_BIAS if bias.dtype == torch.bool else FLOAT_BIAS).value,
        "RAW": (bias is None or bias.dtype == torch.bool) and scale > 0,
        "PRECISION": precision(q),
    }
    grid = -(-n_rows // c.block_m) * heads * batch if n_k else 0
    launch(map_rows, grid, in_units(args, "q_strides", "k_strides"), c.warps, c.stages)
    return out
