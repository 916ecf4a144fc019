"""What became faster or slower between two runs: ``pyvit bench --compare BASE``. Only significant changes are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from benchmarks.runner import Row
from benchmarks.workload import uses_pyvit

#: The chance that any row of a comparison without changes is reported.
ERROR = 0.05
#: A change must be more than this, and more than its uncertainty.
MARGIN = 0.01
#: Rounds that a row needs in both runs.
ROUNDS = 8
_RESAMPLES = 1000

Key = tuple[str, str, str, str, str, int, str]


@dataclass(frozen=True)
class Change:
    """Of a row's time: new / base, and the bounds of its confidence interval. ``against``: the provider of the same
    rounds that both times were divided by, or empty if none was."""

    row: Row
    ratio: float
    low: float
    high: float
    against: str

    @property
    def significant(self) -> bool:
        return (self.low > 1 or self.high < 1) and abs(math.log(self.ratio)) > math.log1p(MARGIN)

    def __str__(self) -> str:
        row, percent = self.row, 100 * (self.ratio - 1)
        where = f"{row.op} {row.case} {row.dtype} {row.mode}, {row.provider}"
        how = f"relative to {self.against}" if self.against else "in time"
        return f"{percent:+.1f} % [{100 * (self.low - 1):+.1f}, {100 * (self.high - 1):+.1f}] {how}: {where}"


def _key(row: Row) -> Key:
    return row.op, row.case, row.dtype, row.mode, row.data, row.threads, row.provider


def log_median(samples: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The logarithm of the median and its standard error by a bootstrap over rounds. Blocks of successive rounds are
    drawn, because a disturbance of the machine lasts longer than one."""
    rng, n = np.random.default_rng(seed), len(samples)
    length = max(1, round(n ** (1 / 3)))
    starts = rng.integers(0, n, (_RESAMPLES, math.ceil(n / length), 1))
    drawn = ((starts + np.arange(length)) % n).reshape(_RESAMPLES, -1)[:, :n]
    medians = np.log(np.median(samples[drawn], axis=1))
    return float(np.log(np.median(samples))), float(medians.std())


def _relative(row: Row, rows: dict[Key, Row]) -> tuple[np.ndarray, str]:
    """The row's time in every round over that of its baseline in the same round, and the baseline: a drift of the
    machine's speed cancels. The plain times if there is no other baseline."""
    base = rows.get((*_key(row)[:-1], row.baseline))
    if base is None or row.provider == row.baseline or len(base.samples) != len(row.samples):
        return np.array(row.samples), ""
    return np.array(row.samples) / np.array(base.samples), row.baseline


def changes(base: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Of every row that both runs timed, with enough rounds."""
    before, after = ({_key(row): row for row in rows if row.timed} for rows in (base, new))
    common = [key for key in after if key in before]
    common = [key for key in common if min(len(rows[key].samples) for rows in (before, after)) >= ROUNDS]
    z = NormalDist().inv_cdf(1 - ERROR / 2 / max(1, len(common)))  # for all rows together
    found = []
    for key in common:
        old, against = _relative(before[key], before)
        now, now_against = _relative(after[key], after)
        if against != now_against or _versions(before, key, against) != _versions(after, key, against):
            old, now, against = np.array(before[key].samples), np.array(after[key].samples), ""
        (a, error_a), (b, error_b) = log_median(old), log_median(now, 1)
        reach = z * math.hypot(error_a, error_b)
        found.append(Change(after[key], *(math.exp(b - a + d) for d in (0, -reach, reach)), against))
    return found


def _versions(rows: dict[Key, Row], key: Key, provider: str) -> str:
    """Of the library that a provider runs; pyvit's own does not matter to a baseline without pyvit."""
    row = rows.get((*key[:-1], provider))
    return row.versions.partition("; ")[2] if row else ""


def report(base: Sequence[Row], new: Sequence[Row]) -> tuple[list[str], bool]:
    """Lines to print, the largest changes first, and whether anything that runs pyvit became slower."""
    compared = changes(base, new)
    if not compared:
        return [f"nothing to compare: no row has {ROUNDS} rounds or more in both runs (results.json has them)"], False
    found = sorted((c for c in compared if c.significant), key=lambda c: -abs(math.log(c.ratio)))
    slower = [c for c in found if c.ratio > 1]
    lines = [
        f"{len(compared)} rows compared: {len(slower)} slower, {len(found) - len(slower)} faster (time, new / base)"
    ]
    return lines + [f"  {change}" for change in found], any(uses_pyvit(change.row.provider) for change in slower)
