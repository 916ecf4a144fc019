"""Random calls of every operator, forward and backward, under the numerics rule, and a rounding of the largest values.

The latter because Hypothesis looks for what fails, and finds sums that cancel: their error is relative to what was
added. Hypothesis draws the calls and makes a failing one small; what failed is kept in build/hypothesis and tried
first the next time. PYVIT_FUZZ_CASES is the number of cases per operator, backend and dtype: ``make fuzz`` has 2000.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

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
