"""``pytest benchmarks``: the cases of ``python -m benchmarks`` through pytest-benchmark, checked before they are timed.

``pytest benchmarks -k "window_attention and bf16"`` selects cases. PYVIT_BENCH_LEVEL is quick, default or full;
PYVIT_BENCH_PEERS as ``--peers``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import block_specs, cases, loss_specs, providers
from benchmarks.cases import Case
from benchmarks.workload import OURS, PEERS, Workload

LEVEL = os.environ.get("PYVIT_BENCH_LEVEL", "default")
_ASKED = os.environ.get("PYVIT_BENCH_PEERS", "none")
ASKED = PEERS if _ASKED == "all" else tuple(name for name in _ASKED.split(",") if name != "none")
#: Providers; one that does not support a case is skipped with its reason.
EVERY = (
    OURS,
    f"{OURS}, packed weights",
    "naive",
    "sdpa",
    "apart",
    "timm path",
    "timm path, SDPA",
    "conv2d",
    "reshape + linear",
    "F.linear",
    "F.layer_norm",
    "F.rms_norm",
    "eager SDPA",
    "eager naive",
    *ASKED,
)


@functools.lru_cache(maxsize=1)
def workload(case_id: str, source: str) -> Workload:
    case = next(case for case in CASES if case.id == case_id)
    if case.op in providers.SPECS:
        return providers.build(case, source, ASKED)
    from benchmarks import models

    return models.build(case, source, ASKED)


CASES = cases.select(tuple(cases.SUITES), LEVEL)


def _parameters() -> Iterator[Any]:
    relevant = {
        "flash_attention": ("naive", "sdpa", "compile"),
        "flash_attention_varlen": ("naive", "sdpa"),
        "rope_attention": ("naive", "apart"),
        "decomposed_attention": ("naive", "SDPA with the bias", "as channels"),
        "window_attention": ("timm path", "timm path, SDPA", "compile"),
        "patch_embed": ("conv2d", "reshape + linear", "compile"),
        "linear": ("F.linear", "compile"),
        "gated_mlp": (f"{OURS}, packed weights", "naive", "compile"),
        "layer_norm": ("F.layer_norm", "compile"),
        "rms_norm": ("F.rms_norm", "compile"),
        **dict.fromkeys(loss_specs.SPECS, ("naive", "compile")),
        **dict.fromkeys(block_specs.SPECS, ("naive", "sdpa", "compile")),
    }
    for case in CASES:
        for name in (OURS, *relevant.get(case.op, ("eager SDPA", "eager naive", *PEERS))):
            if name in EVERY:
                yield pytest.param(case, name, id=f"{case.id} {name}".replace(" ", "-"))


@pytest.mark.parametrize(("case", "provider"), list(_parameters()))
def test_benchmark(benchmark: Any, case: Case, provider: str) -> None:
    work = workload(case.id, case.sources[0])
    if provider not in work.contenders:
        pytest.skip(work.unavailable.get(provider, f"{provider} does not serve this case"))
    contender = work.contenders[provider]
    verdict = contender.verdict()
    assert verdict.passed or (provider != OURS and not verdict.wrong), verdict.detail
    benchmark.group = case.id
    benchmark.extra_info.update(max_err=verdict.error, allowed_err=verdict.allowed, flops=work.flops)
    slow = case.mode in ("inference", "train")
    benchmark.pedantic(contender.run, rounds=3 if slow else 10, warmup_rounds=1, iterations=1)
