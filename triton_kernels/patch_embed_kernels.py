"""Kernels of patch embedding: matrix products whose left operand is gathered from the image by index arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import dot


@triton.jit
def pixel_column(start, N: tl.constexpr, strides, PATCH: tl.constexpr):
    """For weight columns ``start`` to ``start + N`` (channel, row, column of the patch), ``start`` a multiple of N: the
    columns (N,), their channels (1, N), or one channel if N divides its pixels, and their image offsets (N,)."""
    AREA: tl.constexpr = PATCH[0] * PATCH[1]
    k = start + tl.arange(0, N)
    if AREA % N == 0:
        c = start // AREA
        inner = k - c * AREA
        offset = (tl.zeros((N,), tl.int64) + c) * strides[1]
    else:
        c = (k // AREA)[None, :]
        inner = k % AREA
        offset = (k // AREA).to(tl.int64) * strides[1]
    y = inner // PATCH[1]
    return k, c, offset + y.to(tl.int64) * strides[2] + (inner - y * PATCH[1]).to(tl.int64) * strides[3]


@triton.jit
def token_rows(row, kept, keep, keep_stride):
    """For rows ``row`` = b * kept + slot: the image, the slot, and the index of the patch."""
    b = row // kept
    slot, b = (row - b * kept).to(tl.int32), b.to(tl.int64)
    patch = slot
    if keep is not None:
        patch = tl.load(keep + b * keep_stride + slot).to(tl.int32)
    return b, slot, patch


@triton.jit
def patch_corner(b, patch, strides, grid_w, STEP: tl.constexpr):
    """Offsets of the patches' first pixels."""
    y = patch // grid_w
    x = patch - y * grid_w
    return b * strides[0] + (y * STEP[0]).to(tl.int64) * strides[2] + (x * STEP[1]).to(tl.int64) * strides[3]


@triton.jit
def normalisation(mean, std, c, dtype: tl.constexpr, CHANNELS: tl.constexpr, BYTES: tl.constexpr):
    """``centre``, ``factor`` and ``rest`` of channels ``c``: a normalised pixel is (x - centre) * factor + rest.

    The centre of bytes in float32 is 255 mean, rounded to an integer: the difference is exact, so the error is relative
    to the normalised pixel. In 16 bits it is zero: float32 rounding does not matter there.
    """
    centre, factor, rest = 0.0, 1.0 / 255.0 if BYTES else 1.0, 0.0
    if mean is not None:
        m = tl.load(mean + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
        factor = 1.0 / tl.load(std + c, mask=c < CHANNELS, other=1.0).to(tl.float32)
        if not BYTES:
            centre = m
        else:
            rest = -m * factor
            factor = factor / 255.0
            if dtype == tl.float32:
                centre = tl.minimum(tl.maximum(tl.floor(255.0 * m + 0.5), 0.0), 255.0)
                rest = (centre - 256.0 * m + m) * factor  # 256 m is exact, and so is the first difference
    return centre, factor, rest


@triton.jit
def load_pixels(
    images, at, offset, k, c, rows, mean, std, dtype: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    EDGE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Pixels (rows, k), normalised in float32 and rounded once to the dtype of the product. Columns past DEPTH and rows
    outside ``rows`` (None: all are inside) are finite: the other operand is zero there, or the result not stored."""
    where = images + at[:, None] + offset[None, :]
    if rows is not None:
        x = tl.load(where, mask=rows[:, None] & (k < DEPTH)[None, :], other=0)
    else:
        x = tl.load(where, mask=(k < DEPTH)[None, :], other=0) if EDGE else tl.load(where)
    if BYTES or mean is not None:
        centre, factor, rest = normalisation(mean, std, c, dtype, CHANNELS, BYTES)
        x = (x.to(tl.float32) - centre) * factor + rest
    return x.to(dtype)


@triton.jit
def patch_forward(
    images,
    weight,
    bias,
    pos_embed,
    keep,
    mean,
    std,
    out,
    image_strides,
    weight_stride,
    keep_stride,
    rows_total,
    kept,
    n_prefix,
    grid_w,
    WIDTH,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M patches by BLOCK_N channels of the result: the product plus bias and position."""
    DEPTH: tl.constexpr = CHANNELS * PATCH[0] * PATCH[1]
    EDGE: tl.constexpr = DEPTH % BLOCK_K != 0
    tiles = tl.cdiv(WIDTH, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // tiles + 0 * rows_total) * BLOCK_M + tl.arange(0, BLOCK_M)  # 64 bits only if their number needs them
    col = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    b, slot, patch = token_rows(tl.minimum(row, rows_total - 1), kept, keep, keep_stride)
    at = patch_corner(b, patch, image_strides, grid_w, STEP)
    mask = (row < rows_total)[:, None] & (col < WIDTH)[None, :]  # (BLOCK_M, BLOCK_N)
    channel = tl.minimum(col, WIDTH - 1).to(tl.int64)  # those past the weight are not stored
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if pos_embed is not None:  # (BLOCK_M, BLOCK_N)
        position = pos_embed + (patch.to(tl.int64) * WIDTH)[:, None] + col[None, :]
        acc += tl.load(position, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
    for start in range(0, DEPTH, BLOCK_K):
        k, c, offset = pixel_column(start, BLOCK_K, image_strides, PATCH)
        x = load_pixels(
            images, at, offset, k, c, None, mean, std, weight.dtype.element_ty, CHANNELS, DEPTH, EDGE, BYTES
        )  # (BLOCK_M, BLOCK_K)
        where = weight + channel[None, :] * weight_stride + k[:, None]  # (BLOCK_K, BLOCK_N)
        w = tl.load(where, mask=k[:, None] < DEPTH, other=0.0) if EDGE else tl.load(where)
        acc = dot(x, w, acc, PRECISION)
    token = b * (n_prefix + kept) + n_prefix + slot
    tl.store(out + (token * WIDTH)[:, None] + col[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def patch_weight_gradient(
    grad_out,
    images,
    keep,
    mean,
    std,
    partial,
    grad_strides,
    image_strides,
    keep_stride,
    rows_total,
    kept,
    grid_w,
    share,
    WIDTH,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M channels by BLOCK_N pixels of dW from ``share`` patches (BLOCK_K at a time), to this share's copy,
    (shares, D, depth)."""
    DEPTH: tl.constexpr = CHANNELS * PATCH[0] * PATCH[1]
    EDGE: tl.constexpr = DEPTH % BLOCK_N != 0
    across, down = tl.cdiv(DEPTH, BLOCK_N), tl.cdiv(WIDTH, BLOCK_M)
    pid = tl.program_id(0)
    split = pid // (across * down)
    channel = pid // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    k, c, offset = pixel_column(pid % across * BLOCK_N, BLOCK_N, image_strides, PATCH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = (split + 0 * rows_total) * share
    for start in range(first, tl.minimum(first + share, rows_total), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        valid = row < tl.minimum(first + share, rows_total)
        b, slot, patch = token_rows(tl.minimum(row, rows_total - 1), kept, keep, keep_stride)
        at = patch_corner(b, patch, image_strides, grid_w, STEP)
        finite = None if BYTES else valid  # bytes are, also of rows of another share
        x = load_pixels(
            images, at, offset, k, c, finite, mean, std, grad_out.dtype.element_ty, CHANNELS, DEPTH, EDGE, BYTES
        )  # (BLOCK_K, BLOCK_N)
        where = grad_out + b * grad_strides[0] + slot * grad_strides[1]
        g = tl.load(where[None, :] + channel[:, None], mask=valid[None, :] & (channel < WIDTH)[:, None], other=0.0)
        acc = dot(g, x, acc, PRECISION)
    at = partial + (split.to(tl.int64) * WIDTH + channel)[:, None] * DEPTH + k[None, :]
    tl.store(at, acc, mask=(channel < WIDTH)[:, None] & (k < DEPTH)[None, :])


@triton.jit
def patch_image_gradient(
    grad_tokens,
    weight,
    std,
    grad_images,
    grad_strides,
    weight_stride,
    rows_total,
    size,
    cells_h,
    cells_w,
    grid_h,
    grid_w,
    WIDTH,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pixels of BLOCK_M cells of one stride each (b, row, column), summed over the patches that contain them. Each
    pixel has one owner."""
    CELL: tl.constexpr = STEP[0] * STEP[1]
    across = tl.cdiv(CHANNELS * CELL, BLOCK_N)
    pid = tl.program_id(0)
    cell = (pid // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = cell < rows_total
    b, cy, cx = cell // (cells_h * cells_w), cell // cells_w % cells_h, cell % cells_w
    n = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    c, ry, rx = n // CELL, n % CELL // STEP[1], n % STEP[1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for back in range(((PATCH[0] + STEP[0] - 1) // STEP[0]) * ((PATCH[1] + STEP[1] - 1) // STEP[1])):
        down, right = back // ((PATCH[1] + STEP[1] - 1) // STEP[1]), back % ((PATCH[1] + STEP[1] - 1) // STEP[1])
        py, px = down * STEP[0] + ry, right * STEP[1] + rx
        gy, gx = cy - down, cx - right
        covered = valid & (gy >= 0) & (gx >= 0) & (gy < grid_h) & (gx < grid_w)
        within = (n < CHANNELS * CELL) & (py < PATCH[0]) & (px < PATCH[1])
        where = grad_tokens + b * grad_strides[0] + (gy * grid_w + gx) * grad_strides[1]
        pixel = weight + (c * PATCH[0] + py) * PATCH[1] + px
        for start in range(0, WIDTH, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            g = tl.load(where[:, None] + k[None, :], mask=covered[:, None] & (k < WIDTH)[None, :], other=0.0)
            w = tl.load(
                pixel[None, :] + k.to(tl.int64)[:, None] * weight_stride,
                mask=within[None, :] & (k < WIDTH)[:, None],
                other=0.0,
            )
            acc = dot(g, w, acc, PRECISION)
    if std is not None:
        acc = acc / tl.load(std + c, mask=n < CHANNELS * CELL, other=1.0)[None, :]
    y, x = cy[:, None] * STEP[0] + ry[None, :], cx[:, None] * STEP[1] + rx[None, :]
    at = grad_images + ((b[:, None] * CHANNELS + c[None, :]) * size[0] + y) * size[1] + x
    mask = valid[:, None] & (n < CHANNELS * CELL)[None, :] & (y < size[0]) & (x < size[1])
    tl.store(at, acc.to(grad_images.dtype.element_ty), mask=mask)


@triton.jit
def spread_tokens(
    grad_out,
    keep,
    out,
    grad_strides,
    keep_stride,
    batch,
    patches,
    kept,
    WIDTH,
    EACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scatter kept tokens to their patches, as a product with the 0/1 matrix keep == patch: out (B, N, D) with EACH,
    else its sum over B.

    A patch that was kept twice gets both gradients, a patch that was not kept zero. The order of the sums is fixed.
    """
    across, down = tl.cdiv(WIDTH, BLOCK_N), tl.cdiv(patches, BLOCK_M)
    pid = tl.program_id(0)
    image = (pid // (across * down)).to(tl.int64)
    patch = pid // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    col = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, last = image, image + 1
    if not EACH:
        last = first + batch
    for b in range(first, last):
        for start in range(0, kept, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at = tl.load(keep + b * keep_stride + k, mask=k < kept, other=-1)
            chosen = at[None, :] == patch[:, None]
            where = grad_out + b * grad_strides[0] + k.to(tl.int64) * grad_strides[1]
            g = tl.load(where[:, None] + col[None, :], mask=(k < kept)[:, None] & (col < WIDTH)[None, :], other=0.0)
            acc = dot(tl.where(chosen, 1.0, 0.0).to(g.dtype), g, acc, PRECISION)
    at = out + (image * patches + patch)[:, None] * WIDTH + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(patch < patches)[:, None] & (col < WIDTH)[None, :])
