"""Coordinates of window tokens on the feature map, and the regions that they attend within.

Names: ``window`` counts over the batch; ``pack_id`` counts packs of PACK windows, which share a tile; a token attends
within its ``region``; ``real`` tokens are on the unpadded map.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def edge_class(n, at: tl.constexpr, EDGES: tl.constexpr):
    """First and number of the ``n`` windows along an axis that are of class ``at``: 0 are all but the last EDGES, each
    of which is a class."""
    if at == 0:
        first = n * 0
        count = tl.maximum(n - EDGES, 0)
    else:
        first = tl.maximum(n - EDGES + at - 1, 0)
        count = tl.minimum(tl.maximum(n - EDGES + at, 0), 1)
    return first, count


@triton.jit
def windows_of_group(group, share, total, windows, windows_x, EDGES: tl.constexpr, PACK: tl.constexpr):
    """The windows (or packs) of a group, at most ``share``: the first and the end of their numbers within a class, and
    the class's rectangle of windows (first row, first column, rows, columns) of every image.

    Windows of one class have the same regions. Only the last EDGES windows of an axis have any, so all others are one
    class."""
    windows_y = windows // windows_x
    if EDGES == 0:
        first = group * share
        end = tl.minimum(first + share, tl.cdiv(total, PACK))
        y, x, rows, columns = windows * 0, windows * 0, windows_y, windows_x
    else:
        first, end, y, x, rows, columns = group * 0, group * 0, group * 0, group * 0, group * 0, group * 0
        before = group * 0
        for a in tl.static_range(EDGES + 1):
            for b in tl.static_range(EDGES + 1):
                own_y, own_rows = edge_class(windows_y, a, EDGES)
                own_x, own_columns = edge_class(windows_x, b, EDGES)
                number = total // windows * own_rows * own_columns
                groups = tl.cdiv(number, share)
                if (group >= before) & (group < before + groups):
                    first = (group - before) * share
                    end = tl.minimum(first + share, number)
                    y, x, rows, columns = own_y, own_x, own_rows, own_columns
                before += groups
    return first, end, y, x, rows, columns


@triton.jit
def window_number(at, y, x, rows, columns, windows, windows_x, EDGES: tl.constexpr):
    """The number over the batch of window ``at`` of a class, see ``windows_of_group``."""
    if EDGES == 0:
        number = at
    else:
        image, within = at // (rows * columns), at % (rows * columns)
        number = image * windows + (y + within // columns) * windows_x + x + within % columns
    return number


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
