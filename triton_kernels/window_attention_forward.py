"""Forward kernels of shifted-window attention. Each program processes one head and several windows, directly from the
feature map.

A tile's rows are the tokens of a window, or of PACK small windows, between which the mask prevents attention as it does
between regions of a shifted map. Coordinates and terms: :mod:`pyvit.triton_kernels.window_coordinates`.

The bias, and a large window's masks, stay on chip for all windows of a program where they fit into its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import (
    LN2,
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
from pyvit.triton_kernels.window_coordinates import (
    inside_windows,
    regions_agree,
    row_offset,
    window_number,
    window_tokens,
    windows_of_group,
    within_regions,
)

LN100 = tl.constexpr(4.605170185988092)
NORM_EPS = tl.constexpr(1e-12)


@triton.jit
def gather(base, pad, first, offset, real, padded, D: tl.constexpr, PARTS: tl.constexpr):
    """Channels from ``first`` on of the tokens, a tuple of blocks. Padding tokens have the channels of ``pad``, or
    zeros without it."""
    loaded = load_rows(base + first, offset, None if padded is None else real, 1, D, PARTS)
    if pad is None:
        out = loaded
    else:
        out = ()
        start: tl.constexpr = 0
        for i in tl.static_range(len(PARTS)):
            cols = start + tl.arange(0, PARTS[i])
            fill = tl.load(pad + first + cols, mask=cols < D, other=0.0).to(loaded[i].dtype)
            out = out + (tl.where(real[:, None], loaded[i], fill[None, :]),)
            start = start + PARTS[i]
    return out


@triton.jit
def scatter(base, values, offset, real, D: tl.constexpr, PARTS: tl.constexpr):
    start: tl.constexpr = 0
    for i in tl.static_range(len(PARTS)):
        cols = start + tl.arange(0, PARTS[i])
        at = base + offset[:, None] + cols[None, :]
        tl.store(at, values[i].to(base.dtype.element_ty), mask=real[:, None] & (cols[None, :] < D))
        start = start + PARTS[i]


@triton.jit
def times(values, factor):
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (values[i] * factor,)
    return out


@triton.jit
def normalised(values, COSINE: tl.constexpr):
    """Unit rows and 1 / norm, as F.normalize; without COSINE the unchanged rows. Float32 rows are divided by their
    norm: a product with the inverse would lose digits that temperatures of up to 100 and short rows magnify."""
    if COSINE:
        norm = tl.maximum(tl.sqrt(dot_rows(values, values)), NORM_EPS)
        inverse = 1.0 / norm
        unit = ()
        for i in tl.static_range(len(values)):
            if values[i].dtype == tl.float32:
                unit = unit + (tl.math.div_rn(values[i], norm[:, None]),)
            else:
                unit = unit + ((values[i].to(tl.float32) * inverse[:, None]).to(values[i].dtype),)
    else:
        unit = values
        inverse = tl.zeros((values[0].shape[0],), tl.float32)
    return unit, inverse


@triton.jit
def normalised_backward(grads, unit, inverse, COSINE: tl.constexpr):
    """Gradient of the rows from the gradient of the unit rows."""
    if COSINE:
        along = tl.where(inverse < 1.0 / NORM_EPS, dot_rows(grads, unit), 0.0)  # a clamped norm is constant
        out = ()
        for i in tl.static_range(len(grads)):
            out = out + ((grads[i] - unit[i].to(tl.float32) * along[:, None]) * inverse[:, None],)
    else:
        out = grads
    return out


@triton.jit
def table_row(t, WINDOW: tl.constexpr):
    """Row of the bias table of query ``t`` and key 0, relative to that of equal tokens."""
    t = t % (WINDOW[0] * WINDOW[1])
    return t // WINDOW[1] * (2 * WINDOW[1] - 1) + t % WINDOW[1]


@triton.jit
def table_bias(table, i, j, h, HEADS, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """Relative-position bias (zero without a table) of queries ``i`` and keys ``j`` (they broadcast); -inf past the
    tile's rows."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    inside = (i < PACK * AREA) & (j < PACK * AREA)
    if table is not None:
        of_i, of_j = table_row(i, WINDOW) * HEADS, table_row(j, WINDOW) * HEADS
        center = table + table_row(AREA - 1, WINDOW) * HEADS + h
        bias = tl.load(center + (of_i - of_j), mask=inside, other=float("-inf")).to(tl.float32)
    else:
        bias = tl.where(inside, 0.0, float("-inf"))
    return bias


@triton.jit
def pair_bias(bands, outer, inner, h, EDGE: tl.constexpr, WINDOW: tl.constexpr):
    """Bias of pairs (they broadcast) from the table as ``_Map.bias_bands`` expands it, where the biases of tokens
    ``inner`` are adjacent, for keys as ``inner`` and queries as ``outer``, or the reverse. With EDGE, tokens of
    ``inner`` may be past the window."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    W: tl.constexpr = WINDOW[1]
    outer = tl.minimum(outer, AREA - 1)
    # Differences of rows start at -(WINDOW[0] - 1); columns of ``outer`` are in descending order.
    at = (outer // W + WINDOW[0] - 1) * W + (W - 1) - outer % W
    where = bands + (h * (2 * WINDOW[0] - 1) * W + at) * W + (inner % W - inner // W * (W * W))
    return tl.load(where, mask=inner < AREA, other=0.0) if EDGE else tl.load(where)


@triton.jit
def key_bias(bands, rows, cols, h, EDGE: tl.constexpr, WINDOW: tl.constexpr):
    """Bias of the pairs of queries ``rows`` and keys ``cols``; None without bands."""
    bias = None
    if bands is not None:
        bias = pair_bias(bands, rows[:, None], cols[None, :], h, EDGE, WINDOW)
    return bias


@triton.jit
def held_bias(
    table, rows, like, h, size, padded, shift, windows, windows_x, pad, HEADS, KEYS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The bias of ``rows`` (queries, or with KEYS keys) and all tokens of a tile (keys or queries), as a tuple of tiles
    of PARTS columns: -inf past the windows and, if a tile is one window, between the regions of window ``like``."""
    out = ()
    first: tl.constexpr = 0
    for part in tl.static_range(len(PARTS)):
        i, j = rows[:, None], (first + span(0, PARTS[part]))[None, :]
        if KEYS:
            i, j = j, i
        tile = table_bias(table, i, j, h, HEADS, WINDOW, PACK)
        if PACK == 1 and (shift is not None or (padded is not None and pad is None)):
            agree = regions_agree(i, j, like, size, padded, shift, windows, windows_x, pad, WINDOW, PACK)
            tile = tl.where(agree, tile, float("-inf"))
        out = out + (tile,)
        first = first + PARTS[part]
    return out


@triton.jit
def score_factor(logit_scale, scale, h):
    """The factor of q k^T: ``scale``, or Swin V2's clamped temperature."""
    if logit_scale is not None:
        scale = tl.exp(tl.minimum(tl.load(logit_scale + h).to(tl.float32), LN100))
    return scale


@triton.jit
def key_side(
    queries, rows, cols, bias, qkv, pad, qkv_strides, pack_id, h, size, padded, shift, windows, windows_x, total, HEADS,
    factor, D: tl.constexpr, D_PARTS: tl.constexpr, WINDOW: tl.constexpr, PACK: tl.constexpr,
    COSINE: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys and values of ``cols`` and the scores of the queries ``rows``. ``bias``: (queries, keys) or None. With MASK,
    regions are masked; with EDGE, some keys may be past the window."""
    window, y, x, real = window_tokens(cols, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK)
    offset = row_offset(window, y, x, windows, qkv_strides)
    keys, _ = normalised(gather(qkv, pad, (HEADS + h) * D, offset, real, padded, D, D_PARTS), COSINE)  # (keys, D)
    values = gather(qkv, pad, (2 * HEADS + h) * D, offset, real, padded, D, D_PARTS)
    s = dot_parts(queries, keys, rows.shape[0], cols.shape[0], PRECISION) * factor  # (queries, keys)
    if bias is not None:
        s += bias
    if MASK:
        s = within_regions(
            s, rows[:, None], cols[None, :], pack_id, size, padded, shift, windows, windows_x, pad, WINDOW, PACK
        )
    if EDGE:
        s = tl.where((cols < WINDOW[0] * WINDOW[1])[None, :], s, float("-inf"))
    return keys, values, s


@triton.jit
def online_softmax_step(
    acc, top, sum_p, s, values, rng_seed, head, rows, cols, threshold, FIRST: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: scores (queries, keys) and values (keys, D). ``head``, ``rows`` and ``cols``
    choose what dropout keeps. The FIRST step has nothing to rescale."""
    new_top = tl.maximum(top, tl.max(s, 1))
    shown = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = exp2_scores(s, shown[:, None], LOG2E)
    if FIRST:
        sum_p = tl.sum(p, 1)
    else:
        decay = exp2_scores(top, shown, LOG2E)
        sum_p = sum_p * decay + tl.sum(p, 1)
        acc = times(acc, decay[:, None])
    if DROPOUT:
        p = tl.where(dropout_mask(rng_seed, head[:, None], rows[:, None], cols[None, :], threshold), p, 0.0)
    return add_products(acc, p.to(values[0].dtype), values, 0, PRECISION), new_top, sum_p


@triton.jit
def window_forward(
    qkv,
    table,
    logit_scale,
    pad,
    out,
    lse,
    seed,
    qkv_strides,
    out_strides,
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
    WINDOW: tl.constexpr,
    PACK: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``share`` packs of PACK windows, for BLOCK_M of their queries. The bias is read once and kept on chip."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    COSINE: tl.constexpr = logit_scale is not None
    tiles = tl.cdiv(PACK * AREA, BLOCK_M)
    pid = tl.program_id(0)
    h, tile, group = pid % HEADS, pid // HEADS % tiles, pid // HEADS // tiles
    at_q = h * D
    rng_seed = dropout_seed(seed, DROPOUT)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = score_factor(logit_scale, scale, h)
    begin, end, wy, wx, wh, ww = windows_of_group(group, share, total, windows, windows_x, EDGES, PACK)
    bias = held_bias(
        table, rows, wy * windows_x + wx, h, size, padded, shift, windows, windows_x, pad, HEADS, False, KEY_PARTS,
        WINDOW, PACK,
    )  # fmt: skip
    for at in range(begin, end):
        pack_id = window_number(at, wy, wx, wh, ww, windows, windows_x, EDGES)
        window, y, x, real = window_tokens(rows, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK)
        offset = row_offset(window, y, x, windows, qkv_strides)
        queries, _ = normalised(gather(qkv, pad, at_q, offset, real, padded, D, D_PARTS), COSINE)  # (BLOCK_M, D)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        sum_p = tl.zeros((BLOCK_M,), tl.float32)
        acc = zero_parts((BLOCK_M,), D_PARTS)
        first: tl.constexpr = 0
        for j in tl.static_range(len(KEY_PARTS)):
            cols = first + span(0, KEY_PARTS[j])
            _keys, values, s = key_side(
                queries, rows, cols, bias[j], qkv, pad, qkv_strides, pack_id, h, size, padded, shift, windows,
                windows_x, total, HEADS, factor, D, D_PARTS, WINDOW, PACK, COSINE, PACK > 1, False, PRECISION,
            )  # fmt: skip
            acc, top, sum_p = online_softmax_step(
                acc, top, sum_p, s, values, rng_seed, window * HEADS + h + rows * 0, rows % AREA, cols % AREA,
                threshold, j == 0, DROPOUT, PRECISION,
            )  # fmt: skip
            first = first + KEY_PARTS[j]
        empty = sum_p == 0.0
        sum_p = tl.where(empty, 1.0, sum_p)
        inside = inside_windows(rows, pack_id, total, WINDOW, PACK)
        offset = row_offset(window, y, x, windows, out_strides)
        scatter(out + at_q, times(acc, (keep_scale / sum_p)[:, None]), offset, inside & real, D, D_PARTS)
        where = lse + (window.to(tl.int64) * HEADS + h) * AREA + (rows if PACK == 1 else rows % AREA)
        tl.store(where, tl.where(empty, float("-inf"), top + tl.log2(sum_p) * LN2), mask=inside)


@triton.jit
def window_forward_long(
    qkv,
    bands,
    logit_scale,
    pad,
    out,
    lse,
    seed,
    qkv_strides,
    out_strides,
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
    """BLOCK_M queries of a window that is larger than a tile, in a loop over tiles of keys. Masks are applied only in
    windows that have any."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    WHOLE: tl.constexpr = AREA // BLOCK_N * BLOCK_N
    COSINE: tl.constexpr = logit_scale is not None
    tiles: tl.constexpr = (AREA + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    tile, h, window = pid % tiles, pid // tiles % HEADS, pid // tiles // HEADS
    factor = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # those past the window repeat its last one; they are not stored
    _, y, x, real = window_tokens(rows, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
    queries, _ = normalised(
        gather(qkv, pad, h * D, row_offset(window, y, x, windows, qkv_strides), real, padded, D, D_PARTS), COSINE
    )
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_p = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_parts((BLOCK_M,), D_PARTS)
    for first in range(0, WHOLE, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        bias = key_bias(bands, rows, cols, h, False, WINDOW)
        _keys, values, s = key_side(
            queries, rows, cols, bias, qkv, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x, 0,
            HEADS, factor, D, D_PARTS, WINDOW, 1, COSINE, True, False, PRECISION,
        )  # fmt: skip
        acc, top, sum_p = online_softmax_step(
            acc, top, sum_p, s, values, rng_seed, window * HEADS + h + rows * 0, rows, cols, threshold, False, DROPOUT,
            PRECISION,
        )  # fmt: skip
    if AREA > WHOLE:
        for first in range(WHOLE, AREA, EDGE_N):
            cols = first + tl.arange(0, EDGE_N)
            bias = key_bias(bands, rows, cols, h, AREA % EDGE_N != 0, WINDOW)
            _keys, values, s = key_side(
                queries, rows, cols, bias, qkv, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x,
                0, HEADS, factor, D, D_PARTS, WINDOW, 1, COSINE, True, AREA % EDGE_N != 0, PRECISION,
            )  # fmt: skip
            acc, top, sum_p = online_softmax_step(
                acc, top, sum_p, s, values, rng_seed, window * HEADS + h + rows * 0, rows, cols, threshold, False,
                DROPOUT, PRECISION,
            )  # fmt: skip
    empty = sum_p == 0.0
    sum_p = tl.where(empty, 1.0, sum_p)
    inside = rows < AREA
    at = row_offset(window, y, x, windows, out_strides)
    scatter(out + h * D, times(acc, (keep_scale / sum_p)[:, None]), at, real & inside, D, D_PARTS)
    at = lse + (window.to(tl.int64) * HEADS + h) * AREA + rows
    tl.store(at, tl.where(empty, float("-inf"), top + tl.log2(sum_p) * LN2), mask=inside)
