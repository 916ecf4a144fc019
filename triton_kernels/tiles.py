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
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pyvit.triton_kernels import digests

#: Longest sequence that the single-pass kernels keep on chip: of keys in the forward, of queries in the backward.
SHORT = 288

#: Bytes of shared memory that a program may use: the GPUs' opt-in limits.
SHARED_LIMIT: dict[str, int] = {
    "sm_75": 64 << 10,
    **dict.fromkeys(("sm_80", "sm_87"), 163 << 10),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99 << 10),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_110"), 227 << 10),
    **dict.fromkeys(("gfx90a", "gfx942", "gfx1100", "gfx1101", "gfx1200", "gfx1201"), 64 << 10),
    "gfx950": 160 << 10,
}


def family(arch: str) -> str:
    """The instruction of an architecture's matrix products, which Triton's code for architectures of the same family
    shares: "wgmma" (sm_90), "tcgen05" (sm_100, sm_103, sm_110), "mma" (other NVIDIA GPUs), "mfma" (gfx9), "wmma"
    (gfx11, gfx12); "" for the interpreter."""
    if arch.startswith("sm_"):
        return {"9": "wgmma", "10": "tcgen05", "11": "tcgen05"}.get(arch[3:-1], "mma")
    if arch.startswith("gfx"):
        return "mfma" if arch.startswith("gfx9") else "wmma"
    return ""


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
    """Tile sizes for calls of ``kernel`` on ``archs`` (architectures and families; empty: all) with at most these bytes
    per element, head dimension and length. Measured ones say of which version of the kernel
    (:mod:`pyvit.triton_kernels.digests`) and by which Triton."""

    kernel: str
    config: Config
    archs: tuple[str, ...] = ()
    itemsize: int = 4
    head_dim: int = 256
    length: int = 1 << 30
    measured: str = "unmeasured"
    digest: str = ""
    triton: str = ""

    def stale(self) -> str | None:
        """Why the measurement does not describe the kernel at hand, or None."""
        try:
            now = digests.kernel(self.kernel)
        except KeyError:
            return "there is no such kernel"
        if self.digest != now:
            return "the kernel has changed" if self.digest else "it does not say which version of the kernel it is of"
        return None if self.triton == triton_version() else f"measured with Triton {self.triton or '?'}"

    def serves(self, kernel: str, arch: str, itemsize: int, head_dim: int, length: int) -> bool:
        return (
            kernel == self.kernel
            and (not self.archs or arch in self.archs or family(arch) in self.archs)
            and itemsize <= self.itemsize
            and head_dim <= self.head_dim
            and length <= self.length
        )


#: NVIDIA GPUs with mma.sync and less shared memory than an A100.
_LITTLE = tuple(arch for arch, limit in SHARED_LIMIT.items() if family(arch) == "mma" and limit < 163 << 10)

#: The first match is used. A warp computes 16 rows of a product at a time. With more warps, several of them issue the
#: same instructions, up to twice as many per score (``python -m tests.ptx.count`` counts them). RDNA's 32 threads of a
#: wave hold whole operands of 16-bit products in registers: with "wmma", more warps and narrower blocks.
TABLE = (
    Entry("forward_short", Config(block_m=64, group=2, warps=8), ("wmma",), itemsize=2),
    Entry("forward_short", Config(block_m=64, group=2, warps=4), itemsize=2, head_dim=64),
    Entry("forward_short", Config(block_m=64, group=2, warps=4), itemsize=2),
    Entry("forward_short", Config(block_m=64, group=2, warps=4), archs=("wgmma",)),
    Entry("forward_short", Config(block_m=32, group=2, warps=4)),
    Entry("forward_persistent", Config(block_m=128, warps=8, stages=2)),
    Entry("forward_long", Config(block_m=128, block_n=64, edge_n=16, warps=8), ("wmma",), itemsize=2, head_dim=128),
    # A bias is staged too.
    Entry("forward_long", Config(block_m=128, block_n=64, edge_n=16, warps=4), _LITTLE, itemsize=2, head_dim=64),
    # On an H100, no other candidate was faster at 577 tokens. 1025 tokens are 8 blocks of 128 and one of 16.
    Entry("forward_long", Config(block_m=128, block_n=64, edge_n=16, warps=4, stages=3), ("wgmma",), 2, 64, 640),
    Entry("forward_long", Config(block_m=128, block_n=128, edge_n=16, warps=8, stages=2), ("wgmma",), 2, 64),
    Entry("forward_long", Config(block_m=128, block_n=64, edge_n=16, warps=4, stages=3), itemsize=2, head_dim=64),
    Entry("forward_long", Config(block_m=128, block_n=64, edge_n=16, warps=8, stages=2), itemsize=2, head_dim=128),
    Entry("forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=2), itemsize=2),
    Entry("forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=2), head_dim=96),
    Entry("forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=1), _LITTLE, head_dim=128),
    Entry("forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=2), head_dim=128),
    Entry("forward_long", Config(block_m=32, block_n=16, edge_n=16, warps=4, stages=1), ("mma", "mfma")),
    Entry("forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=1)),
    # "length" is the number of queries, of which a program holds all.
    Entry("backward_short", Config(block_m=64, block_n=32, edge_n=16, warps=16, stages=1), ("wmma",)),
    Entry("backward_short", Config(block_m=64, block_n=64, edge_n=64, warps=4, stages=1), length=64),
    Entry("backward_short", Config(block_m=128, block_n=64, edge_n=16, warps=8), ("wgmma",), length=256),
    Entry("backward_short", Config(block_m=128, block_n=32, edge_n=16, warps=8, stages=1)),
    Entry(
        "backward_dq",
        Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=3),
        ("sm_90",),
        2,
        64,
        640,
        "attention N=577 d=64 forward and backward on NVIDIA H100 80GB HBM3: 1.227 ms, 1.300 before, 19 candidates",
    ),
    Entry("backward_dq", Config(block_m=64, block_n=32, edge_n=16, warps=8), ("wmma",), itemsize=2, head_dim=128),
    Entry("backward_dq", Config(block_m=64, block_n=64, edge_n=16, warps=4), itemsize=2, head_dim=128),
    Entry("backward_dq", Config(block_m=32, block_n=32, edge_n=16, warps=4), head_dim=64),
    Entry("backward_dq", Config(block_m=32, block_n=16, edge_n=16, warps=4), itemsize=2),
    Entry("backward_dq", Config(block_m=32, block_n=16, edge_n=16, warps=4), head_dim=128),
    Entry("backward_dq", Config(block_m=16, block_n=16, edge_n=16, warps=4, stages=1), _LITTLE),
    Entry("backward_dq", Config(block_m=32, block_n=16, edge_n=16, warps=4)),
    Entry(
        "backward_dkdv",
        Config(block_m=128, block_n=32, warps=4, stages=3),
        ("sm_90",),
        2,
        64,
        640,
        "attention N=577 d=64 forward and backward on NVIDIA H100 80GB HBM3: 1.220 ms, 1.310 before, 17 candidates",
    ),
    Entry("backward_dkdv", Config(block_m=64, block_n=32, warps=8, stages=1), ("wmma",), itemsize=2, head_dim=64),
    Entry("backward_dkdv", Config(block_m=64, block_n=64, warps=4), itemsize=2, head_dim=64),
    Entry("backward_dkdv", Config(block_m=64, block_n=32, warps=4), itemsize=2, head_dim=128),
    Entry("backward_dkdv", Config(block_m=32, block_n=32, warps=4), head_dim=64),
    Entry("backward_dkdv", Config(block_m=32, block_n=16, warps=4), itemsize=2),
    Entry("backward_dkdv", Config(block_m=32, block_n=16, warps=4), head_dim=128),
    Entry("backward_dkdv", Config(block_m=16, block_n=16, warps=4, stages=1), _LITTLE),
    Entry("backward_dkdv", Config(block_m=32, block_n=16, warps=4)),
    Entry("bias_grad", Config(block_m=64, block_n=64, warps=4, stages=1), itemsize=2, head_dim=128),
    Entry("bias_grad", Config(block_m=32, block_n=32, warps=4, stages=1)),
    Entry("attention_map", Config(block_m=16, block_n=64, warps=4, stages=2), head_dim=128),
    Entry("attention_map", Config(block_m=16, block_n=32, warps=4, stages=1)),
    # Patch embedding: "length" is the rows of the result, edge_n the block of the summed dimension.
    # On sm_90 two programs of four warps share a processor: one converts pixels while the other multiplies.
    Entry("patch_forward", Config(block_m=128, block_n=128, edge_n=64, warps=4, stages=3), ("wgmma",), 2),
    Entry("patch_forward", Config(block_m=128, block_n=128, edge_n=64, warps=8, stages=2), itemsize=2),
    Entry("patch_forward", Config(block_m=64, block_n=64, edge_n=32, warps=4, stages=2)),
    Entry(
        "patch_weight_gradient",
        Config(block_m=128, block_n=128, edge_n=64, warps=8, stages=2),
        ("wgmma", "tcgen05"),
        itemsize=2,
    ),
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
        archs=("tcgen05",),
        itemsize=2,
        head_dim=1 << 30,
    ),
    Entry(
        "pair_gradient",
        Config(block_m=64, block_n=64, edge_n=64, group=2, warps=8),
        archs=("wmma",),
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
    # With up to 160 rows, block_n is the width of the tiles of keys, or of queries, whose bias stays on chip.
    Entry("window_forward", Config(block_m=64, block_n=64, group=8, warps=4, stages=2), ("tcgen05",), 2, length=160),
    Entry("window_forward", Config(block_m=32, block_n=64, group=8, warps=2, stages=2), itemsize=2, length=160),
    Entry("window_forward", Config(block_m=64, group=4, warps=4, stages=1), itemsize=2),
    Entry("window_forward", Config(block_m=64, group=4, warps=4, stages=1), head_dim=64),
    Entry("window_forward", Config(block_m=16, group=4, warps=4, stages=1), _LITTLE),
    Entry("window_forward", Config(block_m=64, group=4, warps=4, stages=1)),
    Entry("window_forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=2), ("wmma",), itemsize=2),
    Entry("window_forward_long", Config(block_m=64, block_n=64, edge_n=16, warps=4, stages=2), itemsize=2),
    Entry("window_forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=1), head_dim=64),
    Entry("window_forward_long", Config(block_m=32, block_n=32, edge_n=16, warps=4, stages=1), _LITTLE),
    Entry("window_forward_long", Config(block_m=64, block_n=32, edge_n=16, warps=4, stages=1)),
    Entry("window_backward", Config(block_m=64, group=4, warps=8, stages=1), ("wmma",), itemsize=2),
    Entry("window_backward", Config(block_m=64, group=4, warps=4, stages=1), itemsize=2),
    # In float32, a tile of 64 tokens does not fit into registers: larger windows than this have a kernel per gradient.
    Entry("window_backward", Config(block_m=32, group=4, warps=4, stages=1)),
    Entry("window_backward_keys", Config(block_m=64, block_n=32, group=8, warps=4, stages=1), itemsize=2),
    Entry("window_backward_keys", Config(block_m=32, block_n=32, group=4, warps=4, stages=1), head_dim=64, length=64),
    Entry("window_backward_keys", Config(block_m=64, block_n=32, group=8, warps=4, stages=1), head_dim=64),
    Entry("window_backward_keys", Config(block_m=32, block_n=16, group=8, warps=4, stages=1), ("mma",)),
    Entry("window_backward_keys", Config(block_m=32, block_n=32, group=4, warps=4, stages=1), length=64),
    Entry("window_backward_keys", Config(block_m=64, block_n=32, group=8, warps=4, stages=1)),
    Entry("window_backward_queries", Config(block_m=64, block_n=32, edge_n=16, group=8, warps=4), ("wmma",), 2),
    # Each group of programs stores a sum of the bias's gradient; two programs fit on a processor.
    Entry("window_backward_queries", Config(64, 32, 16, 4, warps=4, stages=1), ("mma", "wgmma", "tcgen05"), 2, 32, 160),
    Entry(
        "window_backward_queries", Config(block_m=64, block_n=64, edge_n=16, group=8, warps=4), itemsize=2, head_dim=64
    ),
    Entry(
        "window_backward_queries",
        Config(block_m=64, block_n=64, edge_n=16, group=8, warps=4, stages=1),
        _LITTLE,
        itemsize=2,
    ),
    Entry("window_backward_queries", Config(block_m=64, block_n=64, edge_n=16, group=8, warps=4, stages=2), itemsize=2),
    Entry(
        "window_backward_queries", Config(block_m=64, block_n=32, edge_n=16, group=8, warps=4, stages=1), head_dim=64
    ),
    Entry(
        "window_backward_queries",
        Config(block_m=32, block_n=16, edge_n=16, group=8, warps=4, stages=1),
        ("mma", "mfma", "wmma"),
    ),
    Entry("window_backward_queries", Config(block_m=64, block_n=32, edge_n=16, group=8, warps=4, stages=1)),
    Entry("window_backward_bias", Config(block_m=32, block_n=32, group=8, warps=2, stages=1), itemsize=2, length=160),
    Entry("window_backward_bias", Config(block_m=64, block_n=64, group=8, warps=4, stages=1), itemsize=2),
    Entry("window_backward_bias", Config(block_m=32, block_n=32, group=8, warps=2, stages=1), length=160),
    Entry("window_backward_bias", Config(block_m=64, block_n=64, group=8, warps=4, stages=1), head_dim=64),
    Entry("window_backward_bias", Config(block_m=32, block_n=32, group=8, warps=2, stages=1), _LITTLE),
    Entry("window_backward_bias", Config(block_m=64, block_n=64, group=8, warps=4, stages=1)),
)


def overrides_path() -> Path:
    """Path of the tuning file: ``PYVIT_TILES``, or a file in the user's cache directory."""
    if path := os.environ.get("PYVIT_TILES"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pyvit" / "tiles.json"


def triton_version() -> str:
    """Of the Triton at hand, empty without one."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


@functools.cache
def tuned() -> tuple[Entry, ...]:
    """Entries of the tuning file, if there is one, without those of other versions of a kernel or of Triton, which a
    warning lists. Read once per process."""
    path = overrides_path()
    if not path.exists():
        return ()
    try:
        found = [
            Entry(**{**e, "config": Config(**e["config"]), "archs": tuple(e["archs"])})
            for e in json.loads(path.read_text())
        ]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a tuning file of this version ({error}); remove it or tune again") from error
    stale = {e: why for e in found if (why := e.stale()) is not None}
    if stale:
        reasons = dict.fromkeys(f"{e.kernel}: {why}" for e, why in stale.items())
        warnings.warn(
            f"{path}: {len(stale)} of {len(found)} entries are ignored ({'; '.join(reasons)}); tune again with "
            "'python -m pyvit.triton_kernels.tools.tune'",
            stacklevel=2,
        )
    return tuple(e for e in found if e not in stale)


def save(entries: tuple[Entry, ...]) -> Path:
    """Write ``entries`` as the tuning file, most specific first, and use them from now on."""
    path = overrides_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(entries, key=lambda e: (e.kernel, e.archs, e.itemsize, e.head_dim, e.length))
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(json.dumps([asdict(e) for e in ordered], indent=1) + "\n")
    written.replace(path)  # a process that ends in the middle leaves the file as it was
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
    return _find(kernel, arch, itemsize, head_dim, length)


def _find(kernel: str, arch: str, itemsize: int, head_dim: int, length: int) -> Config:
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


def _shared_limit(arch: str) -> int:
    """Bytes of shared memory that a program may use; the smallest limit for a GPU that is not listed."""
    return 1 << 30 if arch == "interpreter" else SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))


def forward_short_shared(arch: str, itemsize: int, head_dims: tuple[int, int], n_k: int, bias: bool) -> int:
    """Bytes of shared memory of ``forward_short``, at most: keys and values, two tiles of queries and of the bias, and
    scratch. Float32 products need copies, except by ``wgmma``."""
    c = _find("forward_short", arch, itemsize, max(head_dims), n_k)
    widths, rows = [sum(parts(d)) for d in head_dims], sum(parts(n_k))
    copies = 2 if itemsize == 4 and arch.startswith("sm_") and not arch.startswith("sm_90") else 1
    tiles = (2 if copies == 1 else 5) * c.block_m * widths[0]
    return (copies * rows * sum(widths) + tiles) * itemsize + bias * c.block_m * rows * 4 + (8 << 10)


def forward_short_fits(arch: str, itemsize: int, head_dims: tuple[int, int], n_k: int, bias: bool) -> bool:
    """Whether keys and values of a head fit into shared memory and a row of scores into registers. With a bias, whole
    rows of more than 128 keys take more instructions than the loop over the keys, and spill up to 1104 bytes."""
    if not 0 < n_k <= (128 if bias else SHORT):
        return False
    keys_and_values = sum(parts(n_k)) * sum(sum(parts(d)) for d in head_dims) * itemsize
    if keys_and_values > 80 << 10:
        return False
    return forward_short_shared(arch, itemsize, head_dims, n_k, bias) <= _shared_limit(arch)


def forward_persistent_fits(arch: str, itemsize: int, head_dims: tuple[int, int], n_q: int, n_k: int) -> bool:
    """Whether queries, keys and values of two heads fit into shared memory, and rows of scores into registers. Only
    with ``wgmma``: with ``mma.sync`` their operands need registers too, and tensor memory holds two tiles of scores."""
    c = _find("forward_persistent", arch, itemsize, max(head_dims), n_k)
    widths, rows = [sum(parts(d)) for d in head_dims], -(-n_q // c.block_m) * c.block_m
    if not arch.startswith("sm_90") or itemsize > 2 or not 64 < n_q <= 256 or n_k > 208:
        return False
    head = rows * widths[0] + sum(parts(n_k)) * sum(widths)
    return (c.stages * head + c.block_m * widths[1]) * itemsize <= _shared_limit(arch)


def window_bias_fits(arch: str, itemsize: int, head_dim: int, tokens: int) -> bool:
    """Whether programs hold, for a tile of queries and all keys of a window that is larger than a tile, the bias and
    its gradient in registers: each takes 72 of a thread's at 144 tokens. In float32 that spills 760 bytes. Not tried on
    AMD."""
    return 64 < tokens <= 160 and itemsize <= 2 and head_dim <= 32 and not arch.startswith("gfx")


def backward_short_shared(arch: str, itemsize: int, head_dims: tuple[int, int], n_q: int, bias: bool) -> int:
    """Bytes of shared memory of ``backward_short``, at most: queries and output gradients, a block of keys and values
    per stage, a tile of probabilities and the bias's tiles. Products by ``mma.sync`` need a second, transposed copy of
    queries and output gradients."""
    c = _find("backward_short", arch, itemsize, max(head_dims), n_q)
    widths = [part for d in head_dims for part in parts(d)]
    once = arch.startswith("gfx") or (family(arch) in ("wgmma", "tcgen05") and min(widths) >= 64)
    tiles, row = -(-n_q // c.block_m), sum(widths) * itemsize
    tile = c.block_m * c.block_n
    bias_tiles = bias * (tiles if c.stages > 1 else 1)
    rows = tiles * c.block_m * (1 if once else 2) + c.stages * c.block_n
    return rows * row + tile * itemsize + bias_tiles * tile * 4 + 1024  # 1024: sm_100's barriers


def backward_short_fits(
    arch: str, itemsize: int, head_dims: tuple[int, int], n_q: int, n_k: int, bias: bool, dropout: bool
) -> bool:
    """Whether one program can compute all gradients of a head: in 16 bits, queries, output gradients and one block of
    keys fit into shared memory, and dQ into registers.

    Registers per thread, d = 64, 16 rows per warp: 32 for each tile of dQ, as many for scores and for their gradients
    of 64 keys, 16 each for dK and dV. Compiled for sm_90 that spills 240 bytes at 197 queries and 224 at 257 (with
    blocks of 32 keys). A second tile with dropout spills 584 bytes, a third one with a bias 912 (sm_100), a second one
    on RDNA 2.2 KB: two passes.

    Not in float32: an earlier version, compiled by Triton 3.6, gave wrong gradients and read out of bounds on an H100.
    """
    most = 64 if family(arch) == "wmma" else 128 if dropout else 256 if bias else SHORT
    if itemsize > 2 or not 0 < n_q <= most or n_k == 0 or max(head_dims) > 64:
        return False
    return backward_short_shared(arch, itemsize, head_dims, n_q, bias) <= _shared_limit(arch)
