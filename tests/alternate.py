"""Every other combination of a test's independent parameters, where all of them would take too long."""

from __future__ import annotations

import pytest


def parity(item: pytest.Item) -> int | None:
    """0 or 1 in turn over the combinations of a test's ``parametrize`` marks, so that every value of every parameter
    occurs with both; None if there are fewer than two marks, whose values are all needed."""
    numbers = []
    for mark in item.iter_markers("parametrize"):
        names, values = mark.args
        given = [item.callspec.params[name.strip()] for name in (names.split(",") if isinstance(names, str) else names)]
        numbers.append(list(values).index(given[0] if len(given) == 1 else tuple(given)))
    return sum(numbers) % 2 if len(numbers) > 1 else None


def deselect(config: pytest.Config, items: list[pytest.Item], left_out: list[pytest.Item]) -> None:
    """Remove ``left_out`` from ``items``."""
    config.hook.pytest_deselected(items=left_out)
    ids = {id(item) for item in left_out}
    items[:] = [item for item in items if id(item) not in ids]
