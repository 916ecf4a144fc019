"""Schedules as functions of the step, so that a resumed run needs to remember nothing."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear from 0 over ``warmup`` steps, then half a cosine from ``start`` to ``end`` at the last step."""
    if step < warmup:
        return start * (step + 1) / warmup
    at = (step - warmup) / max(steps - 1 - warmup, 1)
    return end + (start - end) * (1 + math.cos(math.pi * min(at, 1.0))) / 2


def linear(step: int, steps: int, start: float, end: float) -> float:
    """Linear from ``start`` to ``end`` over ``steps`` steps, ``end`` from then on."""
    return start + (end - start) * min(step / max(steps, 1), 1.0)
