"""The range of dropout and stochastic depth."""

from __future__ import annotations


def check_rate(name: str, value: float, one: bool = False) -> None:
    """Raise ValueError unless ``value`` is in [0, 1), or [0, 1] with ``one``; NaN is in neither."""
    if not 0.0 <= value <= 1.0 or (value == 1.0 and not one):
        raise ValueError(f"{name} must be in [0, {'1]' if one else '1)'}, got {value}")
