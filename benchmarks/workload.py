"""What the runner times: contenders that are ready to call, each with its correctness check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cases import Case
from benchmarks.gate import Verdict

OURS = "ours"
#: Attention kernels of other libraries: see :mod:`benchmarks.attention_peers`.
ATTENTION_PEERS = ("sdpa", "flex", "flash-attn", "xformers", "natten")
#: Providers that only run on request: they take long to prepare, or need other packages.
PEERS = (
    *("compile", "max-autotune", "accelerate", "timm", "transformers", "torchvision", "open_clip"),
    *("onnxruntime", "openvino", "torchao", *ATTENTION_PEERS),
)


def uses_pyvit(provider: str) -> bool:
    """Whether a provider runs pyvit's kernels: ours, compiled or not, or another library's model after accelerate."""
    return provider.startswith(OURS) or provider.endswith("accelerate")


@dataclass(frozen=True)
class Contender:
    """A provider for a case.

    ``run`` is the timed call, ``verdict`` computes the comparison with the float64 reference, ``version`` names its
    package, and ``held`` is memory in MiB that it holds before the call (a training step's weights and optimizer
    state). ``unchecked``: why it is timed without a comparison; only for peers.
    """

    run: Callable[[], object]
    verdict: Callable[[], Verdict]
    version: str = ""
    held: float = 0.0
    unchecked: str = ""


@dataclass
class Workload:
    """A case with one source of inputs.

    ``flops`` are useful ones, two per multiply-add, without recomputation. ``bytes``: memory traffic that every kernel
    needs, if known.
    """

    case: Case
    source: str
    flops: float
    bytes: float = math.nan
    contenders: dict[str, Contender] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def raised(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
