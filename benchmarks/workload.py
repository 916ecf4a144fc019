"""What the runner times: contenders ready to call, each with its verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cases import Case
from benchmarks.gate import Verdict

OURS = "ours"
#: Providers that must be asked for: they take long to prepare, or come in packages of their own.
PEERS = ("compile", "accelerate", "timm", "transformers", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Contender:
    """One provider on one case.

    ``run`` is the timed call, ``verdict`` computes the comparison with the float64 reference, ``version`` names the
    package behind it, and ``held`` is memory in MiB that the call needs but holds before it starts (a training step's
    weights and optimiser).
    """

    run: Callable[[], object]
    verdict: Callable[[], Verdict]
    version: str = ""
    held: float = 0.0


@dataclass
class Workload:
    """One case on one source of inputs.

    ``flops`` are the useful ones, two per multiply-add (recomputation does not count); ``bytes``: traffic no kernel can
    avoid, where known.
    """

    case: Case
    source: str
    flops: float
    bytes: float = math.nan
    contenders: dict[str, Contender] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def raised(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
