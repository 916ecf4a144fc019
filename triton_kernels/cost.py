"""Lower bounds for a call: bytes moved, flops, and the resulting time.

Bytes count each input and output once; flops are those of the matrix products without recomputation. A kernel's share
of the roofline is ``floor / measured``. Rates are the dense figures of data sheets. :mod:`pyvit.triton_kernels.plans`
describes what a backend's kernels do beyond the lower bound (padding, recomputation, second passes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """Peak rates of a GPU: bytes per second, dense flops per second by element size in bytes, and seconds to launch a
    kernel. ``warp_share`` is the share of the tensor cores' rate that single-warp instructions (``mma.sync``) reach;
    the full rate needs ``wgmma`` or ``tcgen05``.
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
PARTS = {
    "A100": Part("A100-80GB", 2.04e12, 312e12, 156e12 / 3),
    "H100": Part("H100-SXM", 3.35e12, 989e12, 495e12 / 3, warp_share=0.63),
    "H200": Part("H200", 4.8e12, 989e12, 495e12 / 3, warp_share=0.63),
    "B200": Part("HGX-B200", 7.7e12, 2250e12, 1125e12 / 3, warp_share=0.31),
    "MI300X": Part("MI300X", 5.3e12, 1307e12, 163e12),
}


@dataclass(frozen=True)
class Cost:
    """Bytes and flops of one call."""

    bytes: float
    flops: float
    dtype: torch.dtype

    def floor(self, part: Part | str) -> float:
        """A lower bound for the call's time on ``part`` in seconds: the larger of its memory time and its arithmetic
        time.
        """
        p = part_named(part) if isinstance(part, str) else part
        return max(self.bytes / p.bandwidth, self.flops / p.rate(self.dtype))

    def bound(self, part: Part | str) -> str:
        """ "memory" or "compute": which of the two is larger."""
        p = part_named(part) if isinstance(part, str) else part
        return "memory" if self.bytes / p.bandwidth >= self.flops / p.rate(self.dtype) else "compute"


def part_named(name: str) -> Part:
    """The GPU whose key is in a device name ("NVIDIA H200" -> H200). Raises KeyError with the known GPUs."""
    for key in sorted(PARTS, key=len, reverse=True):
        if key.lower() in name.lower().replace(" ", ""):
            return PARTS[key]
    raise KeyError(f"cost: no rates for {name!r}; known are {', '.join(PARTS)}")


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
    """A call of flash_attention: forward, or (``backward``) only its gradients. ``bias``: elements of the bias as
    given, not expanded.
    """
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
    """A call of attention_map: the chosen queries, all keys, the probabilities."""
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
    """A call of window_attention on a (height, width) map. Padding counts in the flops, not in the bytes."""
    area = window[0] * window[1]
    windows = batch * -(-height // window[0]) * -(-width // window[1])
    tokens, channels, size = batch * height * width, heads * d, dtype.itemsize
    table = (2 * window[0] - 1) * (2 * window[1] - 1) * heads * 4
    rows = 4 * windows * area * heads
    if not backward:  # qkv, out
        return Cost(4 * tokens * channels * size + rows + table, 4.0 * windows * heads * area * area * d, dtype)
    # qkv and its gradient, grad_out, and out, which a kernel with whole rows of scores does not need
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
    """A call of patch_embed for ``patches`` (kept) patches per image without overlap. ``pixel_bytes``: 1 for uint8."""
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


def useful_fraction(n: int, covered: int) -> float:
    """Share of a tiled extent that is not padding: 197 rows in 4 tiles of 64 use 77 %. The tuner tries tilings with
    least padding first.
    """
    return n / covered if covered else 1.0
