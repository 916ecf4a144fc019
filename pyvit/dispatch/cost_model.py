"""The cost model of GPU kernels: the least that a call can cost, and what each backend's kernels do beyond that.

The floor (:class:`Cost`) counts each input and output once, which no fusion avoids, and the flops of the matrix
products without recomputation. A kernel's share of the roofline is ``floor / measured``. The rates of GPUs are the
dense figures of their data sheets.

A prediction (:meth:`Plan.seconds`) adds the time of the bytes, of the products and of the launches, as if none
overlapped. It knows tile padding, recomputed products, second passes over the tensors, and whether a tile is tall
enough (64 rows) for the tensor-core instructions of four warps. It does not know spills, occupancy, bank conflicts or
caches: it orders two plans, and is no forecast of either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyvit.triton_kernels.tiles import backward_short_fits, choose, forward_short_fits, parts


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU: bytes per second, dense flops per second by element size in bytes, and seconds to start one
    kernel.

    ``warp_share`` is the fraction of the tensor cores' rate that instructions of a single warp (``mma.sync``) reach;
    the rest takes ``wgmma`` or ``tcgen05``.
    """

    name: str
    bandwidth: float
    flops_16: float
    flops_32: float
    launch: float = 2e-6
    warp_share: float = 1.0

    def rate(self, dtype: torch.dtype) -> float:
        """Flops per second of matrix products. float32 on NVIDIA is three TF32 products, so a third of TF32's rate."""
        return self.flops_32 if dtype == torch.float32 else self.flops_16


#: Hopper's mma.sync reaches 62.9 % of the peak on average (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper
#: GPU Architecture via Microbenchmarking", 2024). B200 by HGX B200's data sheet, an eighth of it; its mma.sync is
#: assumed to do per processor and clock what Hopper's does, which 148 processors against 132 turn into 0.31 of 2250
#: TF/s.
GPUS = {
    "A100": Gpu("A100-80GB", 2.04e12, 312e12, 156e12 / 3),
    "H100": Gpu("H100-SXM", 3.35e12, 989e12, 495e12 / 3, warp_share=0.63),
    "H200": Gpu("H200", 4.8e12, 989e12, 495e12 / 3, warp_share=0.63),
    "B200": Gpu("HGX-B200", 7.7e12, 2250e12, 1125e12 / 3, warp_share=0.31),
    "MI300X": Gpu("MI300X", 5.3e12, 1307e12, 163e12),
}


@dataclass(frozen=True)
class Cost:
    """Bytes and flops of one call."""

    bytes: float
    flops: float
    dtype: torch.dtype

    def floor(self, gpu: Gpu | str) -> float:
        """Seconds below which the call cannot finish on ``gpu``: the larger of its memory time and its arithmetic
        time."""
        p = gpu_named(gpu) if isinstance(gpu, str) else gpu
        return max(self.bytes / p.bandwidth, self.flops / p.rate(self.dtype))

    def bound(self, gpu: Gpu | str) -> str:
        """ "memory" or "compute": which of the two sets the floor."""
        p = gpu_named(gpu) if isinstance(gpu, str) else gpu
        return "memory" if self.bytes / p.bandwidth >= self.flops / p.rate(self.dtype) else "compute"


def gpu_named(name: str) -> Gpu:
    """The GPU whose key occurs in a device name ("NVIDIA H200" -> H200). Raises KeyError with the names known."""
    for key in sorted(GPUS, key=len, reverse=True):
        if key.lower() in name.lower().replace(" ", ""):
            return GPUS[key]
    raise KeyError(f"cost_model: no rates for {name!r}; known are {', '.join(GPUS)}")


def attention(
    batch: int,
    heads: int,
    n_q: int,
    n_k: int,
    d: int,
    dtype: torch.dtype,
    *,
    kv_heads: int | None = None,
    bias: int = 0,
    bias_itemsize: int = 4,
    bias_grad: bool = True,
    causal: bool = False,
    backward: bool = False,
) -> Cost:
    """One call of flash_attention, forward or (``backward``) its gradients alone. ``bias``: elements of the bias as
    given, unexpanded."""
    size, kv = dtype.itemsize, kv_heads or heads
    queries, keys, rows = batch * heads * n_q * d, batch * kv * n_k * d, batch * heads * n_q
    pairs = batch * heads * (sum(min(i + 1, n_k) for i in range(n_q)) if causal else n_q * n_k)
    if not backward:  # q, k, v, out; lse
        return Cost(2 * (queries + keys) * size + 4 * rows + bias * bias_itemsize, 4.0 * pairs * d, dtype)
    # q, out, grad_out, grad_q; k, v and their gradients; lse
    moved = 4 * (queries + keys) * size + 4 * rows + bias * bias_itemsize * (2 if bias_grad else 1)
    return Cost(moved, 10.0 * pairs * d, dtype)


def attention_map(
    batch: int, heads: int, rows: int, n_k: int, d: int, dtype: torch.dtype, *, kv_heads: int | None = None
) -> Cost:
    """One call of attention_map: the chosen queries, every key, the probabilities."""
    size = dtype.itemsize
    moved = (
        batch * heads * rows * d + batch * (kv_heads or heads) * n_k * d + batch * heads * rows * n_k
    ) * size + 8 * batch * rows
    return Cost(moved, 2.0 * batch * heads * rows * n_k * d, dtype)


def window_attention(
    batch: int,
    height: int,
    width: int,
    window: tuple[int, int],
    heads: int,
    d: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
) -> Cost:
    """One call of window_attention on a (height, width) map, padding included in the flops but not in the bytes."""
    area = window[0] * window[1]
    windows = batch * -(-height // window[0]) * -(-width // window[1])
    tokens, channels, size = batch * height * width, heads * d, dtype.itemsize
    table = (2 * window[0] - 1) * (2 * window[1] - 1) * heads * 4
    rows = 4 * windows * area * heads
    if not backward:  # qkv, out
        return Cost(4 * tokens * channels * size + rows + table, 4.0 * windows * heads * area * area * d, dtype)
    # qkv and its gradient, grad_out, and out, which a kernel that holds whole rows of scores can do without
    return Cost(8 * tokens * channels * size + rows + 2 * table, 10.0 * windows * heads * area * area * d, dtype)


def patch_embed(
    batch: int,
    channels: int,
    patch: tuple[int, int],
    patches: int,
    width: int,
    dtype: torch.dtype,
    *,
    prefix: int = 0,
    pixel_bytes: int | None = None,
    images_grad: bool = False,
    backward: bool = False,
) -> Cost:
    """One call of patch_embed for ``patches`` patches of each image (those kept), not overlapping. ``pixel_bytes``: 1
    for uint8."""
    depth, size = channels * patch[0] * patch[1], dtype.itemsize
    pixels = batch * patches * depth * (pixel_bytes or size)
    weight, tokens = width * depth * size, batch * (patches + prefix) * width * size
    product = 2.0 * batch * patches * depth * width
    if not backward:
        return Cost(pixels + weight + tokens + patches * width * size, product, dtype)
    moved = pixels + tokens + weight + patches * width * size
    if images_grad:
        return Cost(moved + pixels + weight, 2 * product, dtype)
    return Cost(moved, product, dtype)


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

    def seconds(self, floor: Cost, gpu: Gpu) -> float:
        rate = gpu.rate(floor.dtype) * (1.0 if self.warpgroup else gpu.warp_share)
        return floor.bytes * self.bytes / gpu.bandwidth + floor.flops * self.flops / rate + self.launches * gpu.launch


def round_up(n: int, step: int) -> int:
    """``n`` rounded up to a multiple of ``step``."""
    return -(-n // step) * step


def _attention_plan(
    tensors: float, products: float, padding: float, launches: int, warpgroup: bool, backward: bool
) -> Plan:
    """From reads and writes of (tokens, channels) tensors and products over all pairs: the floor is 4 and 2, backward 8
    and 5."""
    floor = (8, 5) if backward else (4, 2)
    return Plan(tensors / floor[0], products / floor[1] * padding, launches, warpgroup)


def cuda_attention(n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias_grad: bool) -> Plan:
    """Warps of 16 rows over 16-wide pieces of the keys; backward is the queries' pass, the keys' pass, and the
    bias's."""
    padding = round_up(n_q, 16) * round_up(n_k, 16) / (n_q * n_k) * next(w for w in HEAD_DIMS[itemsize] if w >= d) / d
    if not backward:
        return _attention_plan(4, 2, padding, 1, False, False)
    return _attention_plan(12 + 4 * bias_grad, 7 + 2 * bias_grad, padding, 2 + 2 * bias_grad, False, True)


def triton_attention(
    n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias: bool, bias_grad: bool, arch: str, grouped: bool
) -> Plan:
    """The keys of a short sequence in one piece; a head's gradients from one program while they fit, else two
    passes."""
    width, pairs = sum(parts(d)) / d, n_q * n_k
    if not backward:
        short = forward_short_fits(arch, itemsize, (d, d), n_k, bias)
        c = choose("forward_short" if short else "forward_long", arch, itemsize, d, n_k)
        keys = sum(parts(n_k)) if short else n_k // c.block_n * c.block_n + round_up(n_k % c.block_n, c.edge_n)
        return _attention_plan(4, 2, round_up(n_q, c.block_m) * keys / pairs * width, 1, c.block_m >= 64, False)
    if not grouped and backward_short_fits(arch, itemsize, (d, d), n_q, n_k, bias, False):
        c = choose("backward_short", arch, itemsize, d, n_q)
        rows, tensors, products, launches = c.block_m, 8, 5, 1
        padded = round_up(n_q, rows) * (n_k // c.block_n * c.block_n + round_up(n_k % c.block_n, c.edge_n))
    else:
        c = choose("backward_dkdv", arch, itemsize, d, n_k)
        rows, tensors, products, launches = c.block_m, 12, 7, 2
        padded = round_up(n_q, c.block_n) * round_up(n_k, c.block_m)
    if bias_grad:
        tensors, products, launches = tensors + 4, products + 2, launches + 2
    return _attention_plan(tensors, products, padded / pairs * width, launches, rows >= 64, True)


def cuda_window(area: int, d: int, itemsize: int, backward: bool, table_grad: bool) -> Plan:
    """As attention, a window at a time; backward in one pass while a block holds the window, up to 64 tokens without
    reading the output; beyond, the table's gradient takes a pass of its own only where its sums do not fit beside the
    queries."""
    width = next(w for w in WINDOW_HEAD_DIMS if w >= d)
    padding = (round_up(area, 16) / area) ** 2 * width / d
    if not backward:
        return _attention_plan(4, 2, padding, 1, False, False)
    if area <= 64 or (area <= 144 and itemsize == 2 and d <= 32):
        return _attention_plan(7 if area <= 64 else 8, 5, padding, 1 + table_grad, False, True)
    own_pass = table_grad and not cuda_table_sums_fit(area, width, itemsize)
    return _attention_plan(12 + 4 * own_pass, 7 + 2 * own_pass, padding, 2 + table_grad + own_pass, False, True)


def cuda_table_sums_fit(area: int, width: int, itemsize: int) -> bool:
    """Of a square window: whether 64 queries' sums of the table's gradient fit (QueryPass in
    csrc/cuda/window_attention_backward.cu)."""
    columns = 64 if itemsize == 2 else 32
    tiles = (2 * 64 + 4 * columns) * width * itemsize + (64 + 6 * columns) * 4
    table = (2 * area**0.5 - 1) ** 2 * 4
    return tiles + round_up(area, 16) * 24 + table + 64 * round_up(area, 8) * 4 <= 112 << 10


def triton_window(area: int, d: int, itemsize: int, backward: bool, table_grad: bool, arch: str) -> Plan:
    """Small windows side by side in a tile of 64 rows, large ones tile by tile; all gradients in one pass where a tile
    holds the window."""
    rows, width = (64 // area if area <= 32 else 1) * area, sum(parts(d)) / d
    if not backward and rows > 64:
        c = choose("window_forward_long", arch, itemsize, d, rows)
        keys = area // c.block_n * c.block_n + round_up(area % c.block_n, c.edge_n)
        return _attention_plan(4, 2, round_up(area, c.block_m) * keys / area**2 * width, 1, c.block_m >= 64, False)
    c = choose("window_backward_keys" if backward else "window_forward", arch, itemsize, d, rows)
    if backward and rows > c.block_m:
        rows = max(1, c.block_m // area) * area
    padding = round_up(rows, c.block_m) * sum(parts(rows)) / (rows * area) * width
    if not backward:
        return _attention_plan(4, 2, padding, 1, c.block_m >= 64, False)
    whole = rows <= c.block_m
    tensors, products, launches = (8, 5, 1) if whole else (12, 7, 2)
    if table_grad and not whole:  # a pass of its own, which reads queries, keys, values and the output's gradient again
        tensors, products, launches = tensors + 4, products + 2, launches + 1
    return _attention_plan(tensors, products, padding, launches + 2 * table_grad, c.block_m >= 64, True)


def patch_plan(rows: int, width: int, launches: int, warpgroup: bool) -> Plan:
    """Both backends multiply tiles of 128 x 128; ``rows`` are the patches of the batch."""
    return Plan(1, round_up(rows, 128) * round_up(width, 128) / (rows * width), launches, warpgroup)
