"""The cost model against the H100's rows: each within 25 %, or it says by which term it fails."""

from __future__ import annotations

import pytest

from benchmarks import gpu_model
from pyvit.dispatch import cost_model


def test_every_row_is_reproduced_or_explained():
    rows = list(gpu_model.compared())
    assert len(rows) == len(gpu_model.FORMER)
    for row in rows:
        assert row.predicted >= max(row.terms.values())
        if abs(row.ratio - 1) > 0.25:
            assert row.verdict.startswith("latency" if row.ratio < 1 else "overlap")
    within = {(row.backend, row.name) for row in rows if row.verdict == "within 25 %"}
    assert within == {
        ("triton", "flash_attention 197x197x64, forward"),
        ("triton", "flash_attention 577x577x64, forward"),
        ("triton", "flash_attention 1025x1025x64, forward"),
        ("triton", "window_attention 7x7x32, forward"),
    }
    assert len(list(gpu_model.table())) == len(rows) + 2


@pytest.mark.parametrize(("window", "floor_us"), [(7, 92), (8, 120), (12, 90), (16, 120), (24, 183)])
def test_floors_of_windows(window, floor_us):
    """Memory up to windows of 16, exponentials at 24."""
    side, width, heads, batch = {7: (56, 96, 3, 128), 8: (64, 96, 3, 128), 16: (64, 96, 3, 128)}.get(
        window, (96, 128, 4, 32)
    )
    cost = cost_model.window_attention(batch, side, side, (window, window), heads, width // heads, gpu_model.BF16)
    assert 1e6 * cost.floor("H100") == pytest.approx(floor_us, rel=0.03)
    assert cost.bound("H100") == ("exponentials" if window == 24 else "memory")
