"""What the runner times: contenders ready to call, each with its verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cases import Case
from benchmarks.gate import Verdict

OURS = "ours"
#: Providers that must be asked for: they take long to prepare, or come in packages of their own.
PEERS = ("compile", "timm", "transformers", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Contender:
    """``run`` is the timed call, ``verdict`` computes the comparison with the float64 reference, ``version`` names the package behind it."""

    run: Callable[[], object]
    verdict: Callable[[], Verdict]
    version: str = ""


@dataclass
class Workload:
    """One case on one source of inputs. ``flops`` are the useful ones, two per multiply-add; recomputation does not count."""

    case: Case
    source: str
    flops: float
    contenders: dict[str, Contender] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
