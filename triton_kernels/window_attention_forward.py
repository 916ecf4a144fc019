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
def window_coordinates(
    r, pack_id, size, padded, shift, windows, windows_x, total, WINDOW: tl.constexpr, PACK: tl.constexpr
):
    """For tile rows ``r``: the window, row and column on the map, whether they are inside (not past the windows) and
    real, and the region.

    A tile that is one window has the same window for all rows, so divisions are done once. ``padded`` and ``shift`` are
    None if the map is not padded and not shifted.
    """
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    if PACK == 1:
        t = r
        window = pack_id
        inside = r < AREA
        region = r * 0
    else:
        t = r % AREA
        window = pack_id * PACK + r // AREA
        inside = (r < PACK * AREA) & (window < total)
        region = (r // AREA) * 4
    at = window % windows
    y, x = at // windows_x * WINDOW[0] + t // WINDOW[1], at % windows_x * WINDOW[1] + t % WINDOW[1]
    extent = size if padded is None else padded
    if shift is not None:
        region += tl.where(y >= extent[0] - shift[0], 2, 0) + tl.where(x >= extent[1] - shift[1], 1, 0)
        y, x = y + shift[0], x + shift[1]  # undo the cyclic shift
        y, x = tl.where(y >= extent[0], y - extent[0], y), tl.where(x >= extent[1], x - extent[1], x)
    real = inside if padded is None else inside & (y < size[0]) & (x < size[1])
    return window, y, x, inside, real, region


@triton.jit
def row_offset(window, y, x, windows, strides):
    return (window // windows).to(tl.int64) * strides[0] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]


@triton.jit
def gather(base, pad, first, offset, real, D: tl.constexpr, PARTS: tl.constexpr):
    """Channels from ``first`` on of the tokens, a tuple of blocks. Padding tokens have the channels of ``pad``, or
    zeros without it."""
    loaded = load_rows(base + first, offset, real, 1, D, PARTS)
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
def attending(s, query_region, key_region, allowed, table, padded, shift, PACK: tl.constexpr):
    """Scores of pairs that may attend, -inf elsewhere; the arguments broadcast to the shape of ``s``.

    Keys past the tile's rows are masked by their bias, if there is one.
    """
    if shift is not None or PACK > 1:
        s = tl.where(query_region == key_region, s, float("-inf"))
    if table is None or padded is not None:
        s = tl.where(allowed, s, float("-inf"))
    return s


@triton.jit
def table_position(r, WINDOW: tl.constexpr):
    """For tile rows ``r``: a number whose differences are rows of the table, so that a pair's bias needs one
    subtraction."""
    return r + r // WINDOW[1] * (WINDOW[1] - 1)


@triton.jit
def pair_bias(table_t, i, j, h, WINDOW: tl.constexpr):
    """Bias of queries ``i`` and keys ``j`` (within the window; they broadcast) from the table as (heads, offsets)."""
    OFFSETS: tl.constexpr = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1)
    return tl.load(table_t + h * OFFSETS + OFFSETS // 2 + (table_position(i, WINDOW) - table_position(j, WINDOW)))


@triton.jit
def within_regions(s, query_region, key_region, window, windows, windows_x, shift):
    """-inf for pairs in different regions. Only windows at the far edges of the map have more than one region."""
    if shift is not None:
        at = window % windows
        if (at // windows_x == windows // windows_x - 1) | (at % windows_x == windows_x - 1):
            s = tl.where(query_region == key_region, s, float("-inf"))
    return s


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
    factor = score_factor(logit_scale, scale, h)
    rng_seed = dropout_seed(seed, DROPOUT)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    held = ()
    if table is not None:
        held = bias_parts(table, rows, h, HEADS, KEY_PARTS, WINDOW, PACK)
    for pack_id in range(group * share, tl.minimum(group * share + share, tl.cdiv(total, PACK))):
        window, y, x, inside, real, region = window_coordinates(
            rows, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK
        )
        queries, _ = normalised(
            gather(qkv, pad, at_q, row_offset(window, y, x, windows, qkv_strides), real, D, D_PARTS), COSINE
        )
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        scores, values = (), ()
        first: tl.constexpr = 0
        for j in tl.static_range(len(KEY_PARTS)):
            cols = first + span(0, KEY_PARTS[j])
            key_window, ky, kx, key_inside, key_real, key_region = window_coordinates(
                cols, pack_id, size, padded, shift, windows, windows_x, total, WINDOW, PACK
            )
            offset = row_offset(key_window, ky, kx, windows, qkv_strides)
            keys, _ = normalised(gather(qkv, pad, at_k, offset, key_real, D, D_PARTS), COSINE)
            values = values + (gather(qkv, pad, at_v, offset, key_real, D, D_PARTS),)
            s = dot_parts(queries, keys, BLOCK_M, KEY_PARTS[j], PRECISION) * factor
            if table is not None:
                s += held[j]
            allowed = key_real if pad is None else key_inside
            s = attending(s, region[:, None], key_region[None, :], allowed[None, :], table, padded, shift, PACK)
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
        scatter(
            out + at_q,
            times(acc, (keep_scale / sum_p)[:, None]),
            row_offset(window, y, x, windows, out_strides),
            real,
            D,
            D_PARTS,
        )
        at = lse + (window.to(tl.int64) * HEADS + h) * AREA + rows % AREA
        tl.store(at, tl.where(empty, float("-inf"), top + tl.log2(sum_p) * LN2), mask=inside)


@triton.jit
def key_side(
    queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded, shift, windows, windows_x,
    HEADS, factor, D: tl.constexpr, D_PARTS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    COSINE: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys and values of a window and the queries' scores. With EDGE, some keys may be past the window."""
    AREA: tl.constexpr = WINDOW[0] * WINDOW[1]
    cols = first + tl.arange(0, BLOCK_N)
    near = tl.minimum(cols, AREA - 1) if EDGE else cols
    _, y, x, _, real, key_region = window_coordinates(
        near, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1
    )
    offset = row_offset(window, y, x, windows, qkv_strides)
    keys, _ = normalised(gather(qkv, pad, (HEADS + h) * D, offset, real, D, D_PARTS), COSINE)
    values = gather(qkv, pad, (2 * HEADS + h) * D, offset, real, D, D_PARTS)
    s = dot_parts(queries, keys, rows.shape[0], BLOCK_N, PRECISION) * factor
    if table_t is not None:
        s += pair_bias(table_t, rows[:, None], near[None, :], h, WINDOW)
    s = within_regions(s, region[:, None], key_region[None, :], window, windows, windows_x, shift)
    if padded is not None and pad is None:
        s = tl.where(real[None, :], s, float("-inf"))
    if EDGE:
        s = tl.where((cols < AREA)[None, :], s, float("-inf"))
    return cols, keys, values, s


@triton.jit
def online_softmax_step(
    acc, top, sum_p, queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded, shift,
    windows, windows_x, HEADS, factor, rng_seed, threshold, D: tl.constexpr, D_PARTS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, COSINE: tl.constexpr, EDGE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys."""
    cols, _, values, s = key_side(
        queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded, shift, windows,
        windows_x, HEADS, factor, D, D_PARTS, WINDOW, BLOCK_N, COSINE, EDGE, PRECISION,
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
    table_t,
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
    every = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(every, AREA - 1)  # rows past the window repeat its last row; they are not stored
    _, y, x, _, real, region = window_coordinates(rows, window, size, padded, shift, windows, windows_x, 0, WINDOW, 1)
    queries, _ = normalised(
        gather(qkv, pad, h * D, row_offset(window, y, x, windows, qkv_strides), real, D, D_PARTS), COSINE
    )
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_p = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_parts((BLOCK_M,), D_PARTS)
    for first in range(0, WHOLE, BLOCK_N):
        acc, top, sum_p = online_softmax_step(
            acc, top, sum_p, queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded,
            shift, windows, windows_x, HEADS, factor, rng_seed, threshold, D, D_PARTS, WINDOW, BLOCK_N, COSINE, False,
            DROPOUT, PRECISION,
        )  # fmt: skip
    if AREA > WHOLE:
        for first in range(WHOLE, AREA, EDGE_N):
            acc, top, sum_p = online_softmax_step(
                acc, top, sum_p, queries, first, rows, region, qkv, table_t, pad, qkv_strides, window, h, size, padded,
                shift, windows, windows_x, HEADS, factor, rng_seed, threshold, D, D_PARTS, WINDOW, EDGE_N, COSINE,
                AREA % EDGE_N != 0, DROPOUT, PRECISION,
            )  # fmt: skip
    inside = every < AREA
    empty = sum_p == 0.0
    sum_p = tl.where(empty, 1.0, sum_p)
    at = row_offset(window, y, x, windows, out_strides)
    scatter(out + h * D, times(acc, (keep_scale / sum_p)[:, None]), at, real & inside, D, D_PARTS)
    at = lse + (window.to(tl.int64) * HEADS + h) * AREA + rows
    tl.store(at, tl.where(empty, float("-inf"), top + tl.log2(sum_p) * LN2), mask=inside)
