"""Schedules as functions of the step, so that resuming needs no saved state."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear warm-up from 0 to ``start`` over ``warmup`` steps, then a half cosine from ``start`` to ``end`` at the
    last step."""
    if step < warmup:
        return start * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def dino(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """The schedule of DINO and DINOv2: linear from 0 at the first step to ``start`` at the last of ``warmup`` steps,
    then a half cosine from ``start``, which would reach ``end`` one step after the last."""
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def warmup_cosine(step: int, steps: int, peak: float, end: float, warmup: int = 0, first: float = 0.0) -> float:
    """Linear from ``first`` at step 0 to ``peak`` at step ``warmup``, then a half cosine to ``end`` at ``steps``, which
    is after the last step: MAE, SimCLR and Swin."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def linear(step: int, steps: int, start: float, end: float) -> float:
    """Linear from ``start`` to ``end`` over ``steps`` steps, then constant."""
    return start + (end - start) * min(step / max(steps, 1), 1.0)
