"""The cost model of GPU kernels: the least that a call can cost, and what each backend's kernels do beyond that.

The floor (:class:`Cost`) is the longest of four times: of the bytes, each input and output counted once, which no
fusion avoids; of the matrix products without recomputation; of one exponential per score in the special-function units;
and of issuing the fewest instructions that a softmax takes per score. A kernel's share of the roofline is ``floor /
measured``. The rates of GPUs are the dense figures of their data sheets.

A prediction (:meth:`Plan.terms`) adds the time of the bytes, of the products, of the softmax and of the launches, as if
none overlapped; the softmax takes the longer of its exponentials and its instructions. It knows tile padding,
recomputed products, second passes over the tensors, whether a tile is tall enough (64 rows) for the tensor-core
instructions of four warps, and how many instructions each kernel issues per score. It does not know latency: spills,
occupancy, bank conflicts and caches. ``python -m benchmarks.gpu_model`` sets it against an H100.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyvit.triton_kernels.tiles import (
    backward_short_fits,
    choose,
    forward_persistent_fits,
    forward_short_fits,
    parts,
    window_bias_fits,
)


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU of architecture ``arch`` (:data:`pyvit.dispatch.devices.PARTS`): bytes per second, dense
    flops per second by element size in bytes, multiprocessors, their clock in Hz, and seconds to start one kernel.

    ``warp_share`` is the fraction of the tensor cores' rate that instructions of a single warp (``mma.sync``) reach;
    the rest takes ``wgmma`` or ``tcgen05``. ``special`` is the number of exponentials per multiprocessor and clock.
    """

    name: str
    arch: str
    bandwidth: float
    flops_16: float
    flops_32: float
    processors: int
    clock: float
    launch: float = 2e-6
    warp_share: float = 1.0
    special: int = 16

    def exponentials(self) -> float:
        """Per second."""
        return self.processors * self.clock * self.special

    def lanes(self) -> float:
        """Instructions of single threads per second: four warps of 32 per multiprocessor and clock."""
        return self.processors * self.clock * 128

    def rate(self, dtype: torch.dtype) -> float:
        """Flops per second of matrix products. float32 on NVIDIA is three TF32 products, so a third of TF32's rate."""
        return self.flops_32 if dtype == torch.float32 else self.flops_16


#: Hopper's mma.sync reaches 62.9 % of the peak on average (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper
#: GPU Architecture via Microbenchmarking", 2024). B200 by HGX B200's data sheet, an eighth of it; its mma.sync is
#: assumed to do per processor and clock what Hopper's does, which 148 processors against 132 turn into 0.31 of 2250
#: TF/s.
GPUS = {
    "A100": Gpu("A100-80GB", "sm_80", 2.04e12, 312e12, 156e12 / 3, 108, 1.41e9),
    "H100": Gpu("H100-SXM", "sm_90", 3.35e12, 989e12, 495e12 / 3, 132, 1.755e9, warp_share=0.63),
    "H200": Gpu("H200", "sm_90", 4.8e12, 989e12, 495e12 / 3, 132, 1.755e9, warp_share=0.63),
    "B200": Gpu("HGX-B200", "sm_100", 7.7e12, 2250e12, 1125e12 / 3, 148, 1.85e9, warp_share=0.31),
    "B300": Gpu("HGX-B300", "sm_103", 7.7e12, 2250e12, 1125e12 / 3, 148, 1.85e9, warp_share=0.31, special=32),
    "RTX3090": Gpu("GeForce RTX 3090", "sm_86", 0.936e12, 71e12, 35.6e12 / 3, 82, 1.695e9),
    "RTX4090": Gpu("GeForce RTX 4090", "sm_89", 1.008e12, 165e12, 82.6e12 / 3, 128, 2.52e9),
    "RTX5090": Gpu("GeForce RTX 5090", "sm_120", 1.792e12, 209.5e12, 104.8e12 / 3, 170, 2.407e9),
    "L4": Gpu("L4", "sm_89", 0.3e12, 121e12, 60e12 / 3, 58, 2.04e9),
    "MI300X": Gpu("MI300X", "gfx942", 5.3e12, 1307e12, 163e12, 304, 2.1e9),
}

#: Instructions per score that a softmax takes at least: the maximum, a multiply-add, the exponential, the sum, and half
#: an instruction to round to 16 bits.
SOFTMAX = 4.5


@dataclass(frozen=True)
class Cost:
    """Bytes, flops and scores of one call; a score is an exponential."""

    bytes: float
    flops: float
    dtype: torch.dtype
    scores: float = 0.0

    def times(self, gpu: Gpu | str) -> dict[str, float]:
        """Seconds of each of the four floors."""
        p = gpu_named(gpu) if isinstance(gpu, str) else gpu
        return {
            "memory": self.bytes / p.bandwidth,
            "compute": self.flops / p.rate(self.dtype),
            "exponentials": self.scores / p.exponentials(),
            "issue": SOFTMAX * self.scores / p.lanes(),
        }

    def floor(self, gpu: Gpu | str) -> float:
        """Seconds below which the call cannot finish on ``gpu``."""
        return max(self.times(gpu).values())

    def bound(self, gpu: Gpu | str) -> str:
        """ "memory", "compute", "exponentials" or "issue": which of them sets the floor."""
        times = self.times(gpu)
        return max(times, key=lambda name: times[name])


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
        return Cost(2 * (queries + keys) * size + 4 * rows + bias * bias_itemsize, 4.0 * pairs * d, dtype, pairs)
    # q, out, grad_out, grad_q; k, v and their gradients; lse
    moved = 4 * (queries + keys) * size + 4 * rows + bias * bias_itemsize * (2 if bias_grad else 1)
    return Cost(moved, 10.0 * pairs * d, dtype, pairs)


def attention_map(
    batch: int, heads: int, rows: int, n_k: int, d: int, dtype: torch.dtype, *, kv_heads: int | None = None
) -> Cost:
    """One call of attention_map: the chosen queries, every key, the probabilities."""
    size = dtype.itemsize
    moved = (
        batch * heads * rows * d + batch * (kv_heads or heads) * n_k * d + batch * heads * rows * n_k
    ) * size + 8 * batch * rows
    return Cost(moved, 2.0 * batch * heads * rows * n_k * d, dtype, batch * heads * rows * n_k)


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
    rows, scores = 4 * windows * area * heads, windows * heads * area * area
    if not backward:  # qkv, out
        return Cost(4 * tokens * channels * size + rows + table, 4.0 * scores * d, dtype, scores)
    # qkv, its gradient and grad_out
    return Cost(7 * tokens * channels * size + rows + 2 * table, 10.0 * scores * d, dtype, scores)


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


#: Instructions that kernels issue per score, padding included, in 16-bit types on sm_90. Triton's as counted by the PTX
#: interpreter for attention of 197 to 1025 tokens of 64 channels and windows of 7 to 24 (docs/gpu-status.md). CUDA's
#: forwards by their loops in machine code; its backwards are estimates by their products.
INSTRUCTIONS = {
    "triton": {
        "forward_persistent": 10.1,
        "forward_short": 12.8,
        "forward_long": 10.2,
        "backward_short": 22.0,
        "backward_dq": 15.7,
        "backward_dkdv": 15.7,
        "bias_grad": 15.7,
        "window_forward": 17.0,
        "window_forward_long": 19.0,
        "window_backward": 28.0,
        "window_backward_keys": 23.0,
        "window_backward_queries": 19.0,
        "window_backward_bias": 18.0,
    },
    "cuda": {"forward": 21.0, "backward": 40.0, "window_forward": 34.0, "window_backward": 60.0},
}


@dataclass(frozen=True)
class Plan:
    """One pass of a backend: bytes, flops and scores relative to the floor's, launches, whether it uses instructions of
    four warps, and the instructions it issues for each of the floor's scores."""

    bytes: float
    flops: float
    launches: int
    warpgroup: bool = False
    scores: float = 1.0
    instructions: float = 0.0

    def terms(self, floor: Cost, gpu: Gpu) -> dict[str, float]:
        """Seconds of each part; the softmax takes the longer of exponentials and issue."""
        rate = gpu.rate(floor.dtype) * (1.0 if self.warpgroup else gpu.warp_share)
        return {
            "memory": floor.bytes * self.bytes / gpu.bandwidth,
            "compute": floor.flops * self.flops / rate,
            "exponentials": floor.scores * self.scores / gpu.exponentials(),
            "issue": floor.scores * self.instructions / gpu.lanes(),
            "launch": self.launches * gpu.launch,
        }

    def seconds(self, floor: Cost, gpu: Gpu) -> float:
        t = self.terms(floor, gpu)
        return t["memory"] + t["compute"] + max(t["exponentials"], t["issue"]) + t["launch"]


def round_up(n: int, step: int) -> int:
    """``n`` rounded up to a multiple of ``step``."""
    return -(-n // step) * step


def _attention_plan(
    backend: str,
    kernels: Sequence[str],
    tensors: float,
    products: float,
    *,
    padding: float,
    width: float,
    launches: int,
    warpgroup: bool,
    itemsize: int,
    least: tuple[int, int],
) -> Plan:
    """A plan from the kernels that run, reads and writes of (tokens, channels) tensors and products over all pairs,
    each beside the floor's, ``least``, and padding of pairs and of channels. float32 multiplies three times, and issues
    as many instructions more."""
    issued = sum(INSTRUCTIONS[backend][kernel] for kernel in kernels) * (3 if itemsize == 4 else 1)
    return Plan(
        tensors / least[0],
        products / least[1] * padding * width,
        launches,
        warpgroup,
        len(kernels) * padding,
        issued * padding,
    )


#: (tensors, products) of the floors: forward, and backward of attention and of windows.
_FORWARD, _BACKWARD, _WINDOW_BACKWARD = (4, 2), (8, 5), (7, 5)


def cuda_attention(n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias_grad: bool) -> Plan:
    """Warps of 16 rows over 16-wide pieces of the keys; backward is the queries' pass, the keys' pass, and the
    bias's."""
    padding = round_up(n_q, 16) * round_up(n_k, 16) / (n_q * n_k)
    plan = functools.partial(
        _attention_plan,
        "cuda",
        padding=padding,
        width=next(w for w in HEAD_DIMS[itemsize] if w >= d) / d,
        warpgroup=False,
        itemsize=itemsize,
    )
    if not backward:
        return plan(["forward"], 4, 2, launches=1, least=_FORWARD)
    kernels = ["backward", "backward"] + ["backward"] * bias_grad
    return plan(kernels, 12 + 4 * bias_grad, 7 + 2 * bias_grad, launches=2 + 2 * bias_grad, least=_BACKWARD)


def triton_attention(
    n_q: int, n_k: int, d: int, itemsize: int, backward: bool, bias: bool, bias_grad: bool, arch: str, grouped: bool
) -> Plan:
    """The keys of a short sequence in one piece; a head's gradients from one program while they fit, else two
    passes."""
    pairs = n_q * n_k
    plan = functools.partial(_attention_plan, "triton", width=sum(parts(d)) / d, itemsize=itemsize)
    if not backward:
        short = forward_short_fits(arch, itemsize, (d, d), n_k, bias)
        kernel = "forward_short" if short else "forward_long"
        if short and not bias and forward_persistent_fits(arch, itemsize, (d, d), n_q, n_k):
            kernel = "forward_persistent"
        c = choose(kernel, arch, itemsize, d, n_k)
        keys = sum(parts(n_k)) if short else n_k // c.block_n * c.block_n + round_up(n_k % c.block_n, c.edge_n)
        padding = round_up(n_q, c.block_m) * keys / pairs
        return plan([kernel], 4, 2, padding=padding, launches=1, warpgroup=c.block_m >= 64, least=_FORWARD)
    if not grouped and backward_short_fits(arch, itemsize, (d, d), n_q, n_k, bias, False):
        c = choose("backward_short", arch, itemsize, d, n_q)
        kernels, rows, tensors, products = ["backward_short"], c.block_m, 8, 5
        padded = round_up(n_q, rows) * (n_k // c.block_n * c.block_n + round_up(n_k % c.block_n, c.edge_n))
    else:
        c = choose("backward_dkdv", arch, itemsize, d, n_k)
        kernels, rows, tensors, products = ["backward_dq", "backward_dkdv"], c.block_m, 12, 7
        padded = round_up(n_q, c.block_n) * round_up(n_k, c.block_m)
    launches = len(kernels)
    if bias_grad:
        kernels, tensors, products, launches = [*kernels, "bias_grad"], tensors + 4, products + 2, launches + 2
    return plan(
        kernels,
        tensors,
        products,
        padding=padded / pairs,
        launches=launches,
        warpgroup=rows >= 64,
        least=_BACKWARD,
    )


#: Bytes of shared memory that a block may have, unless a caller says what its GPU gives: an A100's.
SHARED_LIMIT = 163 << 10


def cuda_window(
    area: int, d: int, itemsize: int, backward: bool, table_grad: bool, shared_limit: int = SHARED_LIMIT
) -> Plan:
    """As attention, a window at a time; backward in one pass where a block holds the window, up to 64 tokens without
    reading the output; beyond, the table's gradient takes a pass of its own only where its sums do not fit beside the
    queries."""
    width = next(w for w in WINDOW_HEAD_DIMS if w >= d)
    plan = functools.partial(
        _attention_plan,
        "cuda",
        padding=(round_up(area, 16) / area) ** 2,
        width=width / d,
        warpgroup=False,
        itemsize=itemsize,
    )
    if not backward:
        return plan(["window_forward"], 4, 2, launches=1, least=_FORWARD)
    if cuda_one_pass_fits(area, width, itemsize, shared_limit):
        tensors = 7 if area <= 64 else 8
        return plan(["window_backward"], tensors, 5, launches=1 + table_grad, least=_WINDOW_BACKWARD)
    own_pass = table_grad and not cuda_table_sums_fit(area, width, itemsize, shared_limit)
    kernels = ["window_backward"] * (2 + own_pass)
    return plan(
        kernels, 12 + 4 * own_pass, 7 + 2 * own_pass, launches=2 + table_grad + own_pass, least=_WINDOW_BACKWARD
    )


def cuda_window_fits(area: int, d: int, itemsize: int, shared_limit: int = SHARED_LIMIT) -> bool:
    """Of a square window: whether a block holds what every pass keeps, 32 rows and the window's tokens and table
    (passes_bytes in csrc/cuda/window_attention_backward.cu)."""
    width = next(w for w in WINDOW_HEAD_DIMS if w >= d)
    return _window_tiles(32, width, itemsize) + _window_scratch(area, 1) <= shared_limit


def cuda_one_pass_fits(area: int, width: int, itemsize: int, shared_limit: int = SHARED_LIMIT) -> bool:
    """Of a square window: whether one block computes all its gradients (one_pass_columns in
    csrc/cuda/window_attention_backward.cu)."""
    rows, columns = round_up(area, 16), 64 if area <= 64 else 144
    if area > (144 if itemsize == 2 and width <= 32 else 64):
        return False
    tiles = 4 * rows * width * itemsize + 2 * rows * columns * itemsize + 2 * rows * 4
    return tiles + _window_scratch(area, 2) <= shared_limit


def cuda_table_sums_fit(area: int, width: int, itemsize: int, shared_limit: int = SHARED_LIMIT) -> bool:
    """Of a square window: whether 64 queries' sums of the table's gradient fit (QueryPass in
    csrc/cuda/window_attention_backward.cu)."""
    sums = 64 * round_up(area, 8) * 4
    bytes_needed = _window_tiles(64, width, itemsize) + _window_scratch(area, 1) + sums
    return bytes_needed <= min(112 << 10, shared_limit)


def _window_tiles(rows: int, width: int, itemsize: int) -> int:
    """Two tiles of a pass's own rows, two stages of two tiles of the others, and their numbers."""
    columns = 64 if itemsize == 2 and width <= 64 else 32
    return (2 * rows + 4 * columns) * width * itemsize + (rows + 8 * columns) * 4


def _window_scratch(area: int, buffers: int) -> int:
    """The tokens of one window or two, and the table of one head."""
    return buffers * round_up(area, 16) * 24 + round_up(round((2 * area**0.5 - 1) ** 2), 4) * 4


def triton_window(area: int, d: int, itemsize: int, backward: bool, table_grad: bool, arch: str) -> Plan:
    """Small windows side by side in a tile of 64 rows, large ones tile by tile; all gradients in one pass where a tile
    holds the window, and the table's in the queries' pass where that holds the bias."""
    rows = (64 // area if area <= 32 else 1) * area
    plan = functools.partial(_attention_plan, "triton", width=sum(parts(d)) / d, itemsize=itemsize)
    held = window_bias_fits(arch, itemsize, d, area)
    if not backward and rows > 64 and not held:
        c = choose("window_forward_long", arch, itemsize, d, rows)
        keys = area // c.block_n * c.block_n + round_up(area % c.block_n, c.edge_n)
        padding, tall = round_up(area, c.block_m) * keys / area**2, c.block_m >= 64
        return plan(["window_forward_long"], 4, 2, padding=padding, launches=1, warpgroup=tall, least=_FORWARD)
    kernel = "window_forward" if not backward else "window_backward" if rows <= 64 else "window_backward_keys"
    c = choose(kernel, arch, itemsize, d, rows)
    if backward and rows > c.block_m:
        rows = max(1, c.block_m // area) * area
    padding, tall = round_up(rows, c.block_m) * sum(parts(rows)) / (rows * area), c.block_m >= 64
    if not backward:
        return plan(["window_forward"], 4, 2, padding=padding, launches=1, warpgroup=tall, least=_FORWARD)
    whole = rows <= c.block_m
    kernels = [kernel] if whole else [kernel, "window_backward_queries"]
    tensors, products = (8, 5) if whole else (12, 7)
    if (
        table_grad and not whole and not held
    ):  # a pass of its own, which reads queries, keys, values and the output's gradient again
        kernels, tensors, products = [*kernels, "window_backward_bias"], tensors + 4, products + 2
    launches = len(kernels) + 2 * table_grad
    return plan(kernels, tensors, products, padding=padding, launches=launches, warpgroup=tall, least=_WINDOW_BACKWARD)


def patch_plan(rows: int, width: int, launches: int, warpgroup: bool) -> Plan:
    """Both backends multiply tiles of 128 x 128; ``rows`` are the patches of the batch."""
    return Plan(1, round_up(rows, 128) * round_up(width, 128) / (rows * width), launches, warpgroup)
