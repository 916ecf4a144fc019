"""What the kernels of each backend do beyond the floor of :mod:`pyvit.triton_kernels.cost`, so that one can be held
against the other.

A prediction adds the time of the bytes, of the products and of the launches, as if none overlapped. It knows tile
padding, recomputed products, second passes over the tensors, and whether a tile is tall enough (64 rows) for the
tensor-core instructions of four warps. It does not know spills, occupancy, bank conflicts or caches: it orders two
plans, and is no forecast of either.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyvit.triton_kernels.cost import Cost, Part
from pyvit.triton_kernels.tiles import backward_short_fits, choose, forward_short_fits, one_tile, parts

#: Head dimensions that the CUDA kernels are compiled for, by bytes per element (with_head_dim and with_window_dim in
#: csrc/cuda).
HEAD_DIMS = {2: (32, 64, 80, 96, 128), 4: (64, 128)}
WINDOW_HEAD_DIMS = (32, 64)


@dataclass(frozen=True)
class Plan:
    """One pass of a backend: bytes and flops relative to the floor's, launches, and whether it uses instructions of
    four warps."""

    bytes: float
    flops: float
    launches: int
    warpgroup: bool = False

    def seconds(self, floor: Cost, part: Part) -> float:
        rate = part.rate(floor.dtype) * (1.0 if self.warpgroup else part.warp_share)
        return floor.bytes * self.bytes / part.bandwidth + floor.flops * self.flops / rate + self.launches * part.launch


def up(n: int, step: int) -> int:
    """``n`` rounded up to a multiple of ``step``."""
    return -(-n // step) * step


def _attention(tensors: float, products: float, padding: float, launches: int, warpgroup: bool, backward: bool) -> Plan:
    """From reads and writes of (tokens, channels) tensors and products over all pairs: the floor is 4 and 2, backward 8
    and 5."""
    floor = (8, 5) if backward else (4, 2)
    return Plan(tensors / floor[0], products / floor[1] * padding, launches, warpgroup)


def cuda_attention(n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias_grad: bool) -> Plan:
    """Warps of 16 rows over 16-wide pieces of the keys; backward is the queries' pass, the keys' pass, and the
    bias's."""
    padding = up(n_q, 16) * up(n_k, 16) / (n_q * n_k) * next(w for w in HEAD_DIMS[itemsize] if w >= d) / d
    if not backward:
        return _attention(4, 2, padding, 1, False, False)
    return _attention(12 + 4 * bias_grad, 7 + 2 * bias_grad, padding, 2 + 2 * bias_grad, False, True)


def triton_attention(
    n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias: bool, bias_grad: bool, arch: str, grouped: bool
) -> Plan:
    """The keys of a short sequence in one piece; a head's gradients from one program while they fit, else two
    passes."""
    width, pairs = sum(parts(d)) / d, n_q * n_k
    if not backward:
        short = forward_short_fits(arch, itemsize, (d, d), n_k)
        c = choose("forward_short" if short else "forward_long", arch, itemsize, d, n_k)
        keys = sum(parts(n_k)) if short else n_k // c.block_n * c.block_n + up(n_k % c.block_n, c.edge_n)
        return _attention(4, 2, up(n_q, c.block_m) * keys / pairs * width, 1, c.block_m >= 64, False)
    if not grouped and backward_short_fits(itemsize, d, n_q, n_k):
        c = choose("backward_short", arch, itemsize, d, n_k)
        rows = c.block_m if not bias else max(16, c.block_m // 2)
        tensors, products, launches = 8, 5, 1
        padded = up(n_q, rows) * one_tile(n_k)
    else:
        c = choose("backward_dkdv", arch, itemsize, d, n_k)
        rows, tensors, products, launches = c.block_m, 12, 7, 2
        padded = up(n_q, c.block_n) * up(n_k, c.block_m)
    if bias_grad:
        tensors, products, launches = tensors + 4, products + 2, launches + 2
    return _attention(tensors, products, padded / pairs * width, launches, rows >= 64, True)


def cuda_window(area: int, d: int, itemsize: int, backward: bool, table_grad: bool) -> Plan:
    """As attention, a window at a time; backward in one pass while a block holds the window, up to 64 tokens without
    reading the output; beyond, the table's gradient takes a pass of its own only where its sums do not fit beside the
    queries."""
    width = next(w for w in WINDOW_HEAD_DIMS if w >= d)
    padding = (up(area, 16) / area) ** 2 * width / d
    if not backward:
        return _attention(4, 2, padding, 1, False, False)
    if area <= 64 or (area <= 144 and itemsize == 2 and d <= 32):
        return _attention(7 if area <= 64 else 8, 5, padding, 1 + table_grad, False, True)
    own_pass = table_grad and not cuda_table_sums_fit(area, width, itemsize)
    return _attention(12 + 4 * own_pass, 7 + 2 * own_pass, padding, 2 + table_grad + own_pass, False, True)


def cuda_table_sums_fit(area: int, width: int, itemsize: int) -> bool:
    """Of a square window: whether 64 queries' sums of the table's gradient fit (QueryPass in
    csrc/cuda/window_attention_backward.cu)."""
    columns = 64 if itemsize == 2 else 32
    tiles = (2 * 64 + 4 * columns) * width * itemsize + (64 + 6 * columns) * 4
    table = (2 * area**0.5 - 1) ** 2 * 4
    return tiles + up(area, 16) * 24 + table + 64 * up(area, 8) * 4 <= 112 << 10


def triton_window(area: int, d: int, itemsize: int, backward: bool, table_grad: bool, arch: str) -> Plan:
    """Small windows side by side in a tile of 64 rows, large ones tile by tile; all gradients in one pass where a tile
    holds the window."""
    rows, width = (64 // area if area <= 32 else 1) * area, sum(parts(d)) / d
    if not backward and rows > 64:
        c = choose("window_forward_long", arch, itemsize, d, rows)
        keys = area // c.block_n * c.block_n + up(area % c.block_n, c.edge_n)
        return _attention(4, 2, up(area, c.block_m) * keys / area**2 * width, 1, c.block_m >= 64, False)
    c = choose("window_backward_keys" if backward else "window_forward", arch, itemsize, d, rows)
    if backward and rows > c.block_m:
        rows = max(1, c.block_m // area) * area
    padding = up(rows, c.block_m) * sum(parts(rows)) / (rows * area) * width
    if not backward:
        return _attention(4, 2, padding, 1, c.block_m >= 64, False)
    whole = rows <= c.block_m
    tensors, products, launches = (8, 5, 1) if whole else (12, 7, 2)
    if table_grad and not whole:  # a pass of its own, which reads queries, keys, values and the output's gradient again
        tensors, products, launches = tensors + 4, products + 2, launches + 1
    return _attention(tensors, products, padding, launches + 2 * table_grad, c.block_m >= 64, True)


def patches(rows: int, width: int, launches: int, warpgroup: bool) -> Plan:
    """Both backends multiply tiles of 128 x 128; ``rows`` are the patches of the batch."""
    return Plan(1, up(rows, 128) * up(width, 128) / (rows * width), launches, warpgroup)
