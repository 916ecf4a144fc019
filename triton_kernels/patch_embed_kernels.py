"""Kernels of patch embedding: matrix products whose left operand is gathered from the image by index arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from pyvit.triton_kernels.common import dot


@triton.jit
def pixel_column(k, strides, CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """Channel and image offset of weight columns ``k`` (channel, row, column of the patch)."""
    c, inner = k // (PATCH[0] * PATCH[1]), k % (PATCH[0] * PATCH[1])
    offset = (
        c.to(tl.int64) * strides[1]
        + (inner // PATCH[1]).to(tl.int64) * strides[2]
        + (inner % PATCH[1]).to(tl.int64) * strides[3]
    )
    return c, offset


@triton.jit
def token_rows(row, valid, tokens, prefix, keep, keep_stride):
    """For output rows ``row`` = b * tokens + t: the image, the position after the prefix (negative within it), and the
    index of the patch."""
    b, slot = row // tokens, row % tokens - prefix
    patch = slot
    if keep is not None:
        patch = tl.load(keep + b.to(tl.int64) * keep_stride + slot, mask=valid & (slot >= 0), other=0).to(tl.int32)
    return b, slot, patch


@triton.jit
def load_pixels(images, at, offset, c, rows, cols, mean, std, dtype: tl.constexpr, BYTES: tl.constexpr):
    """Pixels (rows, cols), normalised in float32 and rounded once to the dtype of the product."""
    mask = rows[:, None] & cols[None, :]
    x = tl.load(images + at[:, None] + offset[None, :], mask=mask, other=0).to(tl.float32)
    if BYTES:
        x = x / 255.0
    if mean is not None:
        m = tl.load(mean + c, mask=cols, other=0.0)
        x = (x - m[None, :]) / tl.load(std + c, mask=cols, other=1.0)[None, :]
    return tl.where(mask, x, 0.0).to(dtype)


@triton.jit
def patch_forward(
    images,
    weight,
    bias,
    pos_embed,
    prefix,
    keep,
    mean,
    std,
    out,
    image_strides,
    weight_stride,
    keep_stride,
    rows_total,
    tokens,
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
    """BLOCK_M tokens by BLOCK_N channels of the result: the product plus bias and position; prefix tokens in their
    rows."""
    DEPTH: tl.constexpr = CHANNELS * PATCH[0] * PATCH[1]
    tiles = tl.cdiv(WIDTH, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < rows_total
    b, slot, patch = token_rows(row, valid, tokens, n_prefix, keep, keep_stride)
    is_patch = valid & (slot >= 0)
    at = (
        b * image_strides[0]
        + patch // grid_w * STEP[0] * image_strides[2]
        + patch % grid_w * STEP[1] * image_strides[3]
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        c, offset = pixel_column(k, image_strides, CHANNELS, PATCH)
        x = load_pixels(images, at, offset, c, is_patch, k < DEPTH, mean, std, weight.dtype.element_ty, BYTES)
        w = tl.load(
            weight + col.to(tl.int64)[None, :] * weight_stride + k[:, None],
            mask=(k[:, None] < DEPTH) & (col[None, :] < WIDTH),
            other=0.0,
        )
        acc = dot(x, w, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + col, mask=col < WIDTH, other=0.0).to(tl.float32)[None, :]
    mask = is_patch[:, None] & (col < WIDTH)[None, :]
    if pos_embed is not None:
        acc += tl.load(pos_embed + patch.to(tl.int64)[:, None] * WIDTH + col[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    if prefix is not None:
        within = (valid & (slot < 0))[:, None] & (col < WIDTH)[None, :]
        token = tl.load(prefix + (slot + n_prefix)[:, None] * WIDTH + col[None, :], mask=within, other=0.0).to(
            tl.float32
        )
        acc = tl.where(within, token, acc)
        mask = mask | within
    tl.store(out + row[:, None] * WIDTH + col[None, :], acc.to(out.dtype.element_ty), mask=mask)


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
    tokens,
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
    across, down = tl.cdiv(DEPTH, BLOCK_N), tl.cdiv(WIDTH, BLOCK_M)
    pid = tl.program_id(0)
    split = pid // (across * down)
    channel = pid // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    c, offset = pixel_column(k, image_strides, CHANNELS, PATCH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split.to(tl.int64) * share
    for start in range(first, tl.minimum(first + share, rows_total), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        valid = row < tl.minimum(first + share, rows_total)
        b, slot, patch = token_rows(row, valid, tokens, 0, keep, keep_stride)
        at = (
            b * image_strides[0]
            + patch // grid_w * STEP[0] * image_strides[2]
            + patch % grid_w * STEP[1] * image_strides[3]
        )
        x = load_pixels(images, at, offset, c, valid, k < DEPTH, mean, std, grad_out.dtype.element_ty, BYTES)
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
