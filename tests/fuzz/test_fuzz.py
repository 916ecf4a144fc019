"""Random calls of every operator, forward and backward, under the numerics rule, and a rounding of the largest values.

The latter because Hypothesis looks for what fails, and finds sums that cancel: their error is relative to what was
added. Hypothesis draws the calls and makes a failing one small; what failed is kept in build/hypothesis and tried
first the next time. PYVIT_FUZZ_CASES is the number of cases per operator, backend and dtype: ``make fuzz`` has 2000.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from torch import Tensor

from pyvit import ops
from pyvit.testing import Served, served
from tests.fuzz import draws

CASES = int(os.environ.get("PYVIT_FUZZ_CASES", "100"))
_DATABASE = DirectoryBasedExampleDatabase(Path(__file__).parents[2] / "build" / "hypothesis")


CHECKED = [  # in float64 there is no finer reference
    (op, on) for op in draws.DRAWS for on in served(op.partition(",")[0]) if on.dtype != torch.float64
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "on"), CHECKED, ids=lambda x: str(x))
def test_fuzz(op: str, on: Served, seeded: int) -> None:
    cases = CASES if on.backend != "reference" else max(CASES // 5, 1)

    @seed(seeded)
    @settings(max_examples=cases, deadline=None, database=_DATABASE, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def run(r: random.Random) -> None:
        draws.call(op, on, r, say=note)

    run()


def _last_key_dropped(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None, **options: Any) -> Any:
        if backend != "reference" and "bias" not in options:
            k, v = k[:, :, :-1], v[:, :, :-1]
        return op(q, k, v, backend=backend, **options)

    return call


def _residual_added_twice(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(backend: str | None = None, **given: Any) -> Any:
        out = op(backend=backend, **given)
        return out if backend == "reference" or given.get("residual") is None else out + given["residual"]

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "defect"),
    [("flash_attention", _last_key_dropped), ("linear", _residual_added_twice)],
    ids=["key", "residual"],
)
def test_defects_are_found(
    op: str, defect: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bounds are not so wide that wrong results pass."""
    on = next((on for on in served(op) if on.backend == "cpu" and on.dtype == dtype), None)
    if on is None:
        pytest.skip("the kernels of the CPU are not there")
    monkeypatch.setattr(ops, op, defect(getattr(ops, op)))
    found = 0
    for case in range(40):
        try:
            draws.call(op, on, random.Random(case))
        except AssertionError:
            found += 1
    assert found >= 10, found  # of the calls with more than one key and no bias, or with a residual
