"""Tile sizes as data: by kernel, architecture, element size, head dimension and length.

An entry says how it was chosen: a measurement, or "unmeasured" for one derived from register and shared-memory counts.
A tuning run (:mod:`pyvit.triton_kernels.tools.tune`) writes entries for its GPU to a file that has priority. Nothing is
tuned at run time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

#: Longest key sequence that the single-pass kernels keep on chip.
SHORT = 288


@dataclass(frozen=True)
class Config:
    """``block_m``: rows of the side that a program owns; ``block_n``: rows of the side it loops over; ``edge_n``: the
    narrower block where a mask is needed; ``group``: work items (query tiles, windows) per program."""

    block_m: int = 64
    block_n: int = 64
    edge_n: int = 32
    group: int = 1
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Entry:
    """Tile sizes for calls of ``kernel`` on ``arch`` (a prefix) with at most these bytes per element, head dimension
    and length."""

    kernel: str
    config: Config
    arch: str = ""
    itemsize: int = 4
    head_dim: int = 256
    length: int = 1 << 30
    measured: str = "unmeasured"

    def serves(self, kernel: str, arch: str, itemsize: int, head_dim: int, length: int) -> bool:
        return (
            kernel == self.kernel
            and arch.startswith(self.arch)
            and itemsize <= self.itemsize
            and head_dim <= self.head_dim
            and length <= self.length
        )


#: The first match is used. A warp computes 16 rows of a product at a time. With more warps, several of them issue the
#: same instructions, up to twice as many per score (``python -m tests.ptx.count`` counts them).
TABLE = (
    Entry("forward_short", Config(block_m=64, group=2, warps=4), itemsize=2, head_dim=64),
    Entry("forward_short", Config(block_m=64, group=2, warps=4), itemsize=2),
    Entry("forward_short", Config(block_m=64, group=2, warps=4), arch="sm_90"),
    Entry("forward_short", Config(block_m=32, group=2, warps=4)),
    Entry("forward_long", Config(block_m=128, block_n=64, edge_n=16, warps=4, stages=3), itemsize=2, head_dim=64),
    Entry("forward_long", Config(block_m=128, block_n=64, edge_n=16, warps=8, stages=2), itemsize=2, head_dim=128),
    Entry("forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=2)),
    Entry("backward_short", Config(block_m=64, warps=4, stages=1), itemsize=2, length=64),
    Entry("backward_short", Config(block_m=64, warps=8, stages=1)),
    Entry(
        "backward_dq",
        Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=3),
        "sm_90",
        2,
        64,
        640,
        "attention N=577 d=64 forward and backward on NVIDIA H100 80GB HBM3: 1.227 ms, 1.300 before, 19 candidates",
    ),
    Entry("backward_dq", Config(block_m=64, block_n=64, edge_n=16, warps=4), itemsize=2, head_dim=128),
    Entry("backward_dq", Config(block_m=32, block_n=32, edge_n=16, warps=4), head_dim=64),
    Entry("backward_dq", Config(block_m=32, block_n=16, edge_n=16, warps=4)),
    Entry(
        "backward_dkdv",
        Config(block_m=128, block_n=32, warps=4, stages=3),
        "sm_90",
        2,
        64,
        640,
        "attention N=577 d=64 forward and backward on NVIDIA H100 80GB HBM3: 1.220 ms, 1.310 before, 17 candidates",
    ),
    Entry("backward_dkdv", Config(block_m=64, block_n=64, warps=4), itemsize=2, head_dim=64),
    Entry("backward_dkdv", Config(block_m=64, block_n=32, warps=4), itemsize=2, head_dim=128),
    Entry("backward_dkdv", Config(block_m=32, block_n=32, warps=4), head_dim=64),
    Entry("backward_dkdv", Config(block_m=32, block_n=16, warps=4)),
    Entry("bias_grad", Config(block_m=64, block_n=64, warps=4, stages=1), itemsize=2, head_dim=128),
    Entry("bias_grad", Config(block_m=32, block_n=32, warps=4, stages=1)),
    Entry("attention_map", Config(block_m=16, block_n=64, warps=4, stages=2), head_dim=128),
    Entry("attention_map", Config(block_m=16, block_n=32, warps=4, stages=1)),
    # Patch embedding: "length" is the rows of the result, edge_n the block of the summed dimension.
    # On sm_90 two programs of four warps share a processor: one converts pixels while the other multiplies.
    Entry("patch_forward", Config(block_m=128, block_n=128, edge_n=64, warps=4, stages=3), "sm_90", 2),
    Entry("patch_forward", Config(block_m=128, block_n=128, edge_n=64, warps=8, stages=2), itemsize=2),
    Entry("patch_forward", Config(block_m=64, block_n=64, edge_n=32, warps=4, stages=2)),
    Entry("patch_weight_gradient", Config(block_m=128, block_n=128, edge_n=64, warps=8, stages=2), "sm_90", 2),
    Entry("patch_weight_gradient", Config(block_m=128, block_n=128, edge_n=64, warps=8, stages=2), "sm_100", 2),
    Entry("patch_weight_gradient", Config(block_m=128, block_n=64, edge_n=64, warps=8, stages=2), itemsize=2),
    Entry("patch_weight_gradient", Config(block_m=64, block_n=64, edge_n=32, warps=4, stages=2)),
    Entry("patch_image_gradient", Config(block_m=64, block_n=64, edge_n=64, warps=4, stages=2), itemsize=2),
    Entry("patch_image_gradient", Config(block_m=64, block_n=64, edge_n=32, warps=4, stages=2)),
    Entry("spread_tokens", Config(block_m=64, block_n=64, edge_n=64, warps=4, stages=2)),
    # Pairwise losses: "head_dim" is the width of the embeddings, edge_n its block, "group" the 128-wide blocks of a
    # gradient that are kept on chip.
    Entry("pair_sums", Config(block_m=128, block_n=128, edge_n=64, warps=8, stages=3), itemsize=2, head_dim=1 << 30),
    Entry("pair_sums", Config(block_m=64, block_n=64, edge_n=32, warps=4, stages=2), head_dim=1 << 30),
    # Accumulators on sm_100 are in tensor memory: four blocks of 128 columns fill its 512 columns and leave no room for
    # the 64 columns of scores.
    Entry(
        "pair_gradient",
        Config(block_m=128, block_n=64, edge_n=64, group=2, warps=8),
        arch="sm_100",
        itemsize=2,
        head_dim=1 << 30,
    ),
    Entry(
        "pair_gradient",
        Config(block_m=64, block_n=64, edge_n=64, group=4, warps=8, stages=2),
        itemsize=2,
        head_dim=1 << 30,
    ),
    Entry("pair_gradient", Config(block_m=64, block_n=32, edge_n=32, group=2, warps=8, stages=2), head_dim=1 << 30),
    # Windows: "length" is the number of rows of a tile, "group" the programs per processor.
    Entry("window_forward", Config(block_m=64, group=8, warps=4, stages=2), itemsize=2, length=64),
    Entry("window_forward", Config(block_m=64, group=4, warps=4, stages=1)),
    Entry("window_forward_long", Config(block_m=64, block_n=64, edge_n=16, warps=4, stages=2), itemsize=2),
    Entry("window_forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=1)),
    Entry("window_backward", Config(block_m=64, group=4, warps=4, stages=1), itemsize=2),
    # In float32, a tile of 64 tokens does not fit into registers: larger windows than this have a kernel per gradient.
    Entry("window_backward", Config(block_m=32, group=4, warps=4, stages=1)),
    Entry("window_backward_keys", Config(block_m=32, block_n=32, group=4, warps=4, stages=1), length=64),
    Entry("window_backward_keys", Config(block_m=64, block_n=32, group=8, warps=4, stages=1)),
    Entry("window_backward_queries", Config(block_m=64, block_n=64, edge_n=16, warps=4, stages=2), itemsize=2),
    Entry("window_backward_queries", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=1)),
    Entry("window_backward_bias", Config(block_m=32, block_n=32, group=8, warps=2, stages=1), itemsize=2, length=160),
    Entry("window_backward_bias", Config(block_m=64, block_n=64, group=8, warps=4, stages=1), itemsize=2),
    Entry("window_backward_bias", Config(block_m=32, block_n=32, group=8, warps=2, stages=1), length=160),
    Entry("window_backward_bias", Config(block_m=64, block_n=64, group=8, warps=4, stages=1)),
)


def overrides_path() -> Path:
    """Path of the tuning file: ``PYVIT_TILES``, or a file in the user's cache directory."""
    if path := os.environ.get("PYVIT_TILES"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pyvit" / "tiles.json"


@functools.cache
def tuned() -> tuple[Entry, ...]:
    """Entries of the tuning file, if there is one. Read once per process."""
    path = overrides_path()
    if not path.exists():
        return ()
    try:
        return tuple(Entry(**{**e, "config": Config(**e["config"])}) for e in json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a tuning file of this version ({error}); remove it or tune again") from error


def save(entries: tuple[Entry, ...]) -> Path:
    """Write ``entries`` as the tuning file, most specific first, and use them from now on."""
    path = overrides_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(entries, key=lambda e: (e.kernel, e.arch, e.itemsize, e.head_dim, e.length))
    path.write_text(json.dumps([asdict(e) for e in ordered], indent=1) + "\n")
    tuned.cache_clear()
    _look_up.cache_clear()
    return path


_forced: dict[str, Config] = {}
_asked: list[tuple[str, str, int, int, int]] | None = None


def force(kernel: str, config: Config | None) -> None:
    """Use ``config`` for every launch of ``kernel`` (a tuning candidate, a test), until it is set to None."""
    if config is None:
        _forced.pop(kernel, None)
    else:
        _forced[kernel] = config


@contextlib.contextmanager
def asking() -> Iterator[list[tuple[str, str, int, int, int]]]:
    """Record the arguments of every :func:`choose` within the block."""
    global _asked
    previous, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = previous


def choose(kernel: str, arch: str, itemsize: int, head_dim: int, length: int) -> Config:
    """The configuration for one launch. Raises KeyError if no entry matches."""
    if _asked is not None:
        _asked.append((kernel, arch, itemsize, head_dim, length))
    return _forced.get(kernel) or _look_up(kernel, arch, itemsize, head_dim, length)


@functools.lru_cache(maxsize=4096)
def _look_up(kernel: str, arch: str, itemsize: int, head_dim: int, length: int) -> Config:
    for entry in (*tuned(), *TABLE):
        if entry.serves(kernel, arch, itemsize, head_dim, length):
            return entry.config
    raise KeyError(
        f"tiles: no entry serves {kernel} on {arch} with {itemsize}-byte elements, head dimension {head_dim}, "
        f"length {length}"
    )


@functools.cache
def parts(n: int, most: int = 128) -> tuple[int, ...]:
    """``n``, rounded up to a multiple of 16, as descending powers of two up to ``most``: 197 -> (128, 64, 16). At most
    two of them are below ``most``."""
    whole, rest = divmod(-(-max(n, 1) // 16) * 16, most)
    tail: tuple[int, ...] = ()
    if rest:
        power = 1 << (rest.bit_length() - 1)
        left = rest - power
        if left == 0:
            tail = (power,)
        elif 1 << (left - 1).bit_length() < power:
            tail = (power, 1 << (left - 1).bit_length())
        else:
            tail = (2 * power,)
    return (most,) * whole + tail


def one_tile(n: int) -> int:
    """Rows of a single tile for ``n`` rows: a power of two that matrix products support."""
    return max(16, 1 << (n - 1).bit_length())


def forward_short_fits(arch: str, itemsize: int, head_dims: tuple[int, int], n_k: int) -> bool:
    """Whether keys and values of a head fit into shared memory."""
    width, rows = sum(sum(parts(d)) for d in head_dims), sum(parts(n_k))
    return 0 < n_k <= SHORT and rows * width * itemsize <= (48 << 10 if arch.startswith("gfx") else 80 << 10)


def backward_short_fits(itemsize: int, head_dim: int, n_q: int, n_k: int) -> bool:
    """Whether one program can compute all gradients of a head: its keys fit into one tile, and their gradients into
    registers.

    Two tiles with dQ summed in memory were slower than two passes on an H100: 762 and 716 us at N = 197 (256 x 12 heads
    of 64, bfloat16), 976 and 773 at 257. Not in float32: compiled by Triton 3.6, the kernel gave wrong gradients and
    read out of bounds.
    """
    return itemsize <= 2 and 0 < n_q <= SHORT and 0 < n_k <= 128 and head_dim <= 64
