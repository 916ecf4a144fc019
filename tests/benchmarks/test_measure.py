"""Timing, memory measurement and inputs of the benchmarks."""

from __future__ import annotations

import math
import time

import pytest
import torch

from benchmarks import inputs, measure


def sleeper(seconds: float):
    return lambda: time.sleep(seconds)


def test_interleave_orders_and_ratio():
    timings = measure.interleave(
        {"slow": sleeper(0.004), "fast": sleeper(0.001)}, seconds=0.1, rounds=(7, 7), sample_ms=0.1
    )
    assert len(timings["slow"].samples) == len(timings["fast"].samples) == 7
    assert 2.0 < measure.ratio(timings["slow"], timings["fast"]) < 4.5
    assert timings["slow"].quantile(0.2) <= timings["slow"].median <= timings["slow"].quantile(0.8)


def test_ratio_is_taken_within_rounds():
    # The machine slows down to half its speed: a ratio of medians would be wrong.
    base, ours = measure.Timing((2.0, 4.0, 8.0)), measure.Timing((1.0, 2.0, 4.0))
    assert measure.ratio(base, ours) == 2.0
    assert measure.ratio(base, base) == 1.0


def test_every_contender_runs_in_every_round():
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    measure.interleave(contenders, seconds=0.0, rounds=(4, 4), sample_ms=0.0)
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]  # two calls each to warm up
    assert len(rounds) == 4
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({r[0] for r in rounds}) > 1, "the order never changes"


def test_peak_memory_sees_a_temporary():
    kept = []
    run = lambda: kept.append(torch.ones(12 * 2**20).sum())  # noqa: E731
    used = measure.peak_memory(run)
    assert math.isnan(used) or 40 < used < 120


@pytest.mark.parametrize("source", inputs.SOURCES)
def test_inputs_are_tokens(source):
    x = inputs.tokens(source, 2, 7, 64)
    assert x.shape == (2, 49, 64)
    assert torch.isfinite(x).all()
    assert 0.5 < x.std() < 2.0
    assert inputs.pixels(source, 3, 448).shape == (3, 3, 448, 448)
    if source == "photos":  # neighbouring patches of a photograph are similar, unlike noise
        assert torch.nn.functional.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1).mean() > 0.1
