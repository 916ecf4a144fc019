"""The comparison of two runs finds a real change and no other."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import compare, records
from benchmarks.runner import Row


def run(seed: int, factors: list[float], rounds: int = 40, noise: float = 0.015) -> list[Row]:
    """A run of as many cases as ``factors``, in each a baseline and ours, ``factor`` times as slow as it was. The
    machine's speed drifts by 20 %, noise is correlated from round to round, and one sample in 20 is disturbed."""
    rng, rows = np.random.default_rng(seed), []
    for i, factor in enumerate(factors):
        drift = np.exp(rng.normal(0, 0.2) + np.linspace(0, rng.normal(0, 0.1), rounds))
        for provider, ms in (("ours", 2.0 * factor), ("sdpa", 3.0)):
            shocks = rng.normal(0, noise, rounds)
            correlated = np.array([0.9 * a + 0.4 * b for a, b in zip(shocks, np.roll(shocks, 1), strict=True)])
            spikes = np.where(rng.random(rounds) < 0.05, 1.5, 1.0)
            samples = tuple(ms * drift * np.exp(correlated) * spikes)
            row = Row("op", f"case {i}", provider, "fp32", "forward", 2, float(np.median(samples)), baseline="sdpa")
            row.samples, row.versions = samples, "pyvit 0.1; torch 2.13"
            rows.append(row)
    return rows


def ours(changes: list[compare.Change]) -> list[compare.Change]:
    return [change for change in changes if change.row.provider == "ours"]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_change(seed: int) -> None:
    found = ours(compare.changes(run(seed, [1.0] * 40), run(seed + 100, [1.0] * 40)))
    assert len(found) == 40
    assert not [change for change in found if change.significant]


def test_a_change_of_three_per_cent_is_found() -> None:
    base, new = run(1, [1.0] * 12, rounds=101), run(2, [1.03, 1.0, 1 / 1.03] * 4, rounds=101)
    found = ours(compare.changes(base, new))
    assert [change.significant for change in found] == [True, False, True] * 4
    assert all(change.against == "sdpa" for change in found)
    for change, factor in zip(found, [1.03, 1.0, 1 / 1.03] * 4, strict=True):
        assert change.low < factor < change.high
    lines, slower = compare.report(base, new)
    assert slower
    assert any("case 0 " in line and line.startswith("  +") for line in lines)
    assert not any("case 1 fp32 forward, ours" in line for line in lines)
    assert not compare.report(base, run(3, [1.0] * 12, rounds=101))[1]


def test_another_version_of_the_baseline_is_no_yardstick() -> None:
    base, new = run(1, [1.0]), run(2, [1.0])
    new[1].versions = "pyvit 0.1; torch 2.14"
    assert ours(compare.changes(base, new))[0].against == ""


def test_few_rounds_are_not_compared() -> None:
    lines, slower = compare.report(run(1, [1.0], rounds=5), run(2, [2.0], rounds=5))
    assert "nothing to compare" in lines[0]
    assert not slower


def test_results_json_keeps_what_a_comparison_needs(tmp_path) -> None:
    rows = run(1, [1.0, 1.1])
    records.write_json(rows, {"processor": "x"}, tmp_path / "results.json")
    about, back = records.read(tmp_path)
    assert about == {"processor": "x"}
    assert [row.op for row in back] == [row.op for row in rows]
    assert np.allclose(back[0].samples, rows[0].samples, rtol=1e-4)
    assert np.isnan(back[0].p20)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="format"):
        records.read(tmp_path / "other.json")
