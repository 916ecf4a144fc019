"""What each backend's kernels do beyond the lower bound of :mod:`pyvit.triton_kernels.cost`, to compare backends.

A prediction adds the times of bytes, products and launches, without overlap. It includes tile padding, recomputed
products, second passes over tensors, and whether a tile is tall enough (64 rows) for four-warp tensor-core
instructions. It ignores spills, occupancy, bank conflicts and caches. Use it to order two plans, not to forecast times.
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
    """A pass of a backend: bytes and flops relative to the lower bound, launches, and whether it uses four-warp
    instructions.
    """

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
    """A plan from the number of (tokens, channels) tensors that are read or written and of products over all pairs. The
    lower bounds are 4 and 2, backward 8 and 5.
    """
    floor = (8, 5) if backward else (4, 2)
    return Plan(tensors / floor[0], products / floor[1] * padding, launches, warpgroup)


def cuda_attention(n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias_grad: bool) -> Plan:
    """Warps of 16 rows, keys in blocks of 16. The backward has passes over queries, keys and, if needed, the bias."""
    padding = up(n_q, 16) * up(n_k, 16) / (n_q * n_k) * next(w for w in HEAD_DIMS[itemsize] if w >= d) / d
    if not backward:
        return _attention(4, 2, padding, 1, False, False)
    return _attention(12 + 4 * bias_grad, 7 + 2 * bias_grad, padding, 2 + 2 * bias_grad, False, True)


def triton_attention(
    n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias: bool, bias_grad: bool, arch: str, grouped: bool
) -> Plan:
    """Short sequences keep all keys on chip. The backward is one pass if a head's gradients fit, else two."""
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
    """As attention, one window at a time. The backward is one pass while a block can hold the window, and does not read
    the output up to 64 tokens. For larger windows the gradient of the table needs a pass only if its sums do not fit
    beside the queries.
    """
    width = next(w for w in WINDOW_HEAD_DIMS if w >= d)
    padding = (up(area, 16) / area) ** 2 * width / d
    if not backward:
        return _attention(4, 2, padding, 1, False, False)
    if area <= 64 or (area <= 144 and itemsize == 2 and d <= 32):
        return _attention(7 if area <= 64 else 8, 5, padding, 1 + table_grad, False, True)
    own_pass = table_grad and not cuda_table_sums_fit(area, width, itemsize)
    return _attention(12 + 4 * own_pass, 7 + 2 * own_pass, padding, 2 + table_grad + own_pass, False, True)


def cuda_table_sums_fit(area: int, width: int, itemsize: int) -> bool:
    """For a square window: whether the sums of the table's gradient for 64 queries fit (QueryPass in
    csrc/cuda/window_attention_backward.cu).
    """
    columns = 64 if itemsize == 2 else 32
    tiles = (2 * 64 + 4 * columns) * width * itemsize + (64 + 6 * columns) * 4
    table = (2 * area**0.5 - 1) ** 2 * 4
    return tiles + up(area, 16) * 24 + table + 64 * up(area, 8) * 4 <= 112 << 10


def triton_window(area: int, d: int, itemsize: int, backward: bool, table_grad: bool, arch: str) -> Plan:
    """Small windows share a tile of 64 rows, large ones are tiled. All gradients are computed in one pass if a tile
    holds the window.
    """
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
    if table_grad and not whole:  # a separate pass, which reads queries, keys, values and the output's gradient again
        tensors, products, launches = tensors + 4, products + 2, launches + 1
    return _attention(tensors, products, padding, launches + 2 * table_grad, c.block_m >= 64, True)


def patches(rows: int, width: int, launches: int, warpgroup: bool) -> Plan:
    """Both backends use tiles of 128 x 128; ``rows`` are the patches of the batch."""
    return Plan(1, up(rows, 128) * up(width, 128) / (rows * width), launches, warpgroup)
