"""Forward kernels of shifted-window attention. Each program processes one head and several windows, directly from the
feature map.

A tile's rows are the tokens of a window, or of PACK small windows, between which the mask prevents attention as it does
between regions of a shifted map. Names: ``window`` counts over the batch; ``pack_id`` counts packs of PACK windows; a
token attends within its ``region``; ``real`` tokens are on the unpadded map.
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

LN100 = tl.constexpr(4.605170185988092)
NORM_EPS = tl.constexpr(1e-12)


@triton.jit
def window_tokens(r, pack_id, size, padded, shift, windows, windows_x, total, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """For tile rows ``r``: the window, row and column on the map, and whether they are real.

    Rows past the windows repeat a token, so that loads need no mask. A tile that is one window has the same window for
    all rows, so divisions are done once. ``padded`` and ``shift`` are None if the map is not padded and not shifted.
    """
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    if PACK == 1:
        t = tl.minimum(r, AREA - 1)
        window = pack_id
    else:
        t = r % AREA
        window = tl.minimum(pack_id * PACK + r // AREA, total - 1)
    at = window % windows
    i, wy = t // WINDOW[1], at // windows_x
    y, x = wy * WINDOW[0] + i, (at - wy * windows_x) * WINDOW[1] + (t - i * WINDOW[1])
    if shift is not None:  # undo the cyclic shift
        extent = size if padded is None else padded
        y, x = y + shift[0], x + shift[1]
        y, x = tl.where(y >= extent[0], y - extent[0], y), tl.where(x >= extent[1], x - extent[1], x)
    return window, y, x, (y < size[0]) & (x < size[1])


@triton.jit
def inside_windows(r, pack_id, total, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """Which tile rows are tokens of a window."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    inside = r < PACK * AREA
    if PACK > 1:
        inside = inside & (pack_id * PACK + r // AREA < total)
    return inside


@triton.jit
def token_region(
    r, pack_id, size, padded, shift, windows, windows_x, KEYS: tl.constexpr, WINDOW: tl.constexpr, PACK: tl.constexpr
):
    """The region of tile rows ``r``: tokens attend within it. That of padding KEYS is -1: nothing attends to them."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    if PACK == 1:
        t = r
        window = pack_id
        region = r * 0
    else:
        t = r % AREA
        window = pack_id * PACK + r // AREA
        region = r // AREA * 4
    at = window % windows
    i, wy = t // WINDOW[1], at // windows_x
    y, x = wy * WINDOW[0] + i, (at - wy * windows_x) * WINDOW[1] + (t - i * WINDOW[1])
    extent = size if padded is None else padded
    if shift is not None:
        # Sign bits: with comparisons, LLVM's SLP vectorizer (Triton 3.9) confused some with their negations.
        region += (((extent[0] - shift[0] - 1 - y) >> 31) & 2) + (((extent[1] - shift[1] - 1 - x) >> 31) & 1)
        y, x = y + shift[0], x + shift[1]
        y, x = tl.where(y >= extent[0], y - extent[0], y), tl.where(x >= extent[1], x - extent[1], x)
    if KEYS:
        region = tl.where((y < size[0]) & (x < size[1]), region, -1)
    return region


@triton.jit
def regions_agree(
    rows, cols, pack_id, size, padded, shift, windows, windows_x, pad, WINDOW: tl.constexpr, PACK: tl.constexpr
):
    KEYS: tl.constexpr = padded is not None and pad is None
    queries = token_region(rows, pack_id, size, padded, shift, windows, windows_x, False, WINDOW, PACK)
    return queries == token_region(cols, pack_id, size, padded, shift, windows, windows_x, KEYS, WINDOW, PACK)


@triton.jit
def within_regions(
    s, rows, cols, pack_id, size, padded, shift, windows, windows_x, pad, WINDOW: tl.constexpr, PACK: tl.constexpr
):
    """Scores of queries ``rows`` and keys ``cols`` (they broadcast to the shape of ``s``) of the same region, -inf
    elsewhere. Only packs of windows, and windows at the far edges of the map, have more than one region."""
    if PACK > 1:
        agree = regions_agree(rows, cols, pack_id, size, padded, shift, windows, windows_x, pad, WINDOW, PACK)
        s = tl.where(agree, s, float("-inf"))
    elif shift is not None or (padded is not None and pad is None):
        at = pack_id % windows
        wy = at // windows_x
        y, x = (wy + 1) * WINDOW[0], (at - wy * windows_x + 1) * WINDOW[1]
        if shift is not None:
            y, x = y + shift[0], x + shift[1]
        if (y > size[0]) | (x > size[1]):
            agree = regions_agree(rows, cols, pack_id, size, padded, shift, windows, windows_x, pad, WINDOW, PACK)
            s = tl.where(agree, s, float("-inf"))
    return s


@triton.jit
def row_offset(window, y, x, windows, strides):
    """Offset of the tokens; the last of ``strides`` makes those within an image 64 bits wide where they must be, see
    ``_strides``."""
    wide = strides[3] * 0
    return (window // windows).to(tl.int64) * strides[0] + ((y + wide) * strides[1] + (x + wide) * strides[2])


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
def table_bias(table, i, j, h, HEADS, WINDOW: tl.constexpr, PACK: tl.constexpr):
    """Relative-position bias of queries ``i`` and keys ``j`` (they broadcast); -inf past the tile's rows."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    ti, tj = i % AREA, j % AREA
    dy, dx = ti // WINDOW[1] - tj // WINDOW[1], ti % WINDOW[1] - tj % WINDOW[1]
    row = (dy + WINDOW[0] - 1) * (2 * WINDOW[1] - 1) + dx + WINDOW[1] - 1
    return tl.load(table + row * HEADS + h, mask=(i < PACK * AREA) & (j < PACK * AREA), other=float("-inf")).to(
        tl.float32
    )


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
def bias_parts(table, rows, h, HEADS, KEY_PARTS: tl.constexpr, WINDOW: tl.constexpr, PACK: tl.constexpr):
    out = ()
    first: tl.constexpr = 0
    for j in tl.static_range(len(KEY_PARTS)):
        out = out + (
            table_bias(table, rows[:, None], (first + span(0, KEY_PARTS[j]))[None, :], h, HEADS, WINDOW, PACK),
        )
        first = first + KEY_PARTS[j]
    return out


@triton.jit
def score_factor(logit_scale, scale, h):
    """The factor of q k^T: ``scale``, or Swin V2's clamped temperature."""
    if logit_scale is not None:
        scale = tl.exp(tl.minimum(tl.load(logit_scale + h).to(tl.float32), LN100))
    return scale


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
    BLOCK_M: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``share`` packs of PACK windows, for BLOCK_M of their queries. The bias is read once and kept on chip; the
    softmax is single-pass."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    COSINE: tl.constexpr = logit_scale is not None
    tiles = tl.cdiv(PACK * AREA, BLOCK_M)
    pid = tl.program_id(0)
    h, tile, group = pid % HEADS, pid // HEADS % tiles, pid // HEADS // tiles
    at_q, at_k, at_v = h * D, (HEADS + h) * D, (2 * HEADS + h) * D
    rng_seed = dropout_seed(seed, DROPOUT)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = score_factor(logit_scale, scale, h)
    bias = ()
    if table is not None:
        bias = bias_parts(table, rows, h, HEADS, KEY_PARTS, WINDOW, PACK)
    for pack_id in range(group * share, tl.minimum(group * share + share, tl.cdiv(total, PACK))):
        window, y, x, real = window_tokens(rows, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK)
        offset = row_offset(window, y, x, windows, qkv_strides)
        queries, _ = normalised(gather(qkv, pad, at_q, offset, real, padded, D, D_PARTS), COSINE)  # (BLOCK_M, D)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        scores, values = (), ()
        first: tl.constexpr = 0
        for j in tl.static_range(len(KEY_PARTS)):
            cols = first + span(0, KEY_PARTS[j])
            key_window, ky, kx, key_real = window_tokens(
                cols, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK
            )
            offset = row_offset(key_window, ky, kx, windows, qkv_strides)
            keys, _ = normalised(gather(qkv, pad, at_k, offset, key_real, padded, D, D_PARTS), COSINE)  # (keys, D)
            values = values + (gather(qkv, pad, at_v, offset, key_real, padded, D, D_PARTS),)
            s = dot_parts(queries, keys, BLOCK_M, KEY_PARTS[j], PRECISION) * factor  # (BLOCK_M, keys)
            if table is not None:
                s += bias[j]
            elif first + KEY_PARTS[j] > PACK * AREA:
                s = tl.where(cols[None, :] < PACK * AREA, s, float("-inf"))
            s = within_regions(
                s, rows[:, None], cols[None, :], pack_id, size, padded, shift, windows, windows_x, pad, WINDOW, PACK
            )
            top = tl.maximum(top, tl.max(s, 1))
            scores = scores + (s,)
            first = first + KEY_PARTS[j]
        top = tl.where(top == float("-inf"), 0.0, top)
        sum_p = tl.zeros((BLOCK_M,), tl.float32)
        acc = zero_parts((BLOCK_M,), D_PARTS)
        start: tl.constexpr = 0
        for j in tl.static_range(len(KEY_PARTS)):
            p = exp2_scores(scores[j], top[:, None], LOG2E)
            sum_p += tl.sum(p, 1)
            if DROPOUT:
                cols = start + span(0, KEY_PARTS[j])
                p = tl.where(
                    dropout_mask(
                        rng_seed,
                        (window * HEADS + h + rows * 0)[:, None],
                        rows[:, None] % AREA,
                        cols[None, :] % AREA,
                        threshold,
                    ),
                    p,
                    0.0,
                )
            start = start + KEY_PARTS[j]
            acc = add_products(acc, p.to(qkv.dtype.element_ty), values[j], 0, PRECISION)
        empty = sum_p == 0.0
        sum_p = tl.where(empty, 1.0, sum_p)
        inside = inside_windows(rows, pack_id, total, WINDOW, PACK)
        at = row_offset(window, y, x, windows, out_strides)
        scatter(out + at_q, times(acc, (keep_scale / sum_p)[:, None]), at, inside & real, D, D_PARTS)
        at = lse + (window.to(tl.int64) * HEADS + h) * AREA + rows % AREA
        tl.store(at, tl.where(empty, float("-inf"), top + tl.log2(sum_p) * LN2), mask=inside)


@triton.jit
def key_side(
    queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x, HEADS,
    factor, D: tl.constexpr, D_PARTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    COSINE: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys and values of a window and the queries' scores. With EDGE, some keys may be past the window."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    cols = first + tl.arange(0, BLOCK_N)
    _, y, x, real = window_tokens(cols, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
    offset = row_offset(window, y, x, windows, qkv_strides)
    keys, _ = normalised(gather(qkv, pad, (HEADS + h) * D, offset, real, padded, D, D_PARTS), COSINE)  # (BLOCK_N, D)
    values = gather(qkv, pad, (2 * HEADS + h) * D, offset, real, padded, D, D_PARTS)
    s = dot_parts(queries, keys, rows.shape[0], BLOCK_N, PRECISION) * factor  # (queries, BLOCK_N)
    if bands is not None:
        s += pair_bias(bands, rows[:, None], cols[None, :], h, EDGE, WINDOW)
    s = within_regions(s, rows[:, None], cols[None, :], window, size, padded, shift, windows, windows_x, pad, WINDOW, 1)
    if EDGE:
        s = tl.where((cols < AREA)[None, :], s, float("-inf"))
    return cols, keys, values, s


@triton.jit
def online_softmax_step(
    acc, top, sum_p, queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift, windows,
    windows_x, HEADS, factor, rng_seed, threshold, D: tl.constexpr, D_PARTS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, COSINE: tl.constexpr, EDGE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys."""
    cols, _, values, s = key_side(
        queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x, HEADS,
        factor, D, D_PARTS, WINDOW, BLOCK_N, COSINE, EDGE, PRECISION,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(s, 1))
    shown = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = exp2_scores(s, shown[:, None], LOG2E)
    decay = exp2_scores(top, shown, LOG2E)
    sum_p = sum_p * decay + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(
            dropout_mask(rng_seed, (window * HEADS + h + rows * 0)[:, None], rows[:, None], cols[None, :], threshold),
            p,
            0.0,
        )
    acc = add_products(times(acc, decay[:, None]), p.to(qkv.dtype.element_ty), values, 0, PRECISION)
    return acc, new_top, sum_p


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
        acc, top, sum_p = online_softmax_step(
            acc, top, sum_p, queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift,
            windows, windows_x, HEADS, factor, rng_seed, threshold, D, D_PARTS, WINDOW, BLOCK_N, COSINE, False,
            DROPOUT, PRECISION,
        )  # fmt: skip
    if AREA > WHOLE:
        for first in range(WHOLE, AREA, EDGE_N):
            acc, top, sum_p = online_softmax_step(
                acc, top, sum_p, queries, first, rows, qkv, bands, pad, qkv_strides, window, h, size, padded, shift,
                windows, windows_x, HEADS, factor, rng_seed, threshold, D, D_PARTS, WINDOW, EDGE_N, COSINE,
                AREA % EDGE_N != 0, DROPOUT, PRECISION,
            )  # fmt: skip
    empty = sum_p == 0.0
    sum_p = tl.where(empty, 1.0, sum_p)
    inside = rows < AREA
    at = row_offset(window, y, x, windows, out_strides)
    scatter(out + h * D, times(acc, (keep_scale / sum_p)[:, None]), at, real & inside, D, D_PARTS)
    at = lse + (window.to(tl.int64) * HEADS + h) * AREA + rows
    tl.store(at, tl.where(empty, float("-inf"), top + tl.log2(sum_p) * LN2), mask=inside)
