"""Biases with large finite numbers, as masks are often written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The values of each row of :func:`extreme_bias`; numbers beyond the dtype's range become its largest or smallest.
ROWS = 16


def extreme_bias(cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(ROWS, cols): rows masked completely by one finite number or by several, masked partly, masked by -inf; and rows
    with large positive numbers."""
    info = torch.finfo(dtype)
    bias = torch.randn(ROWS, cols, dtype=torch.float64)
    at = torch.arange(cols)
    for row, value in (
        (1, -1e9),
        (2, -1e30),
        (3, info.min),
        (4, info.max),
        (5, 1e9),
        (6, -1e5),
        (7, -1e3),
        (8, -math.inf),
    ):
        bias[row] = value
    bias[9, at % 2 == 0] = info.min  # half of a row is left
    bias[10] = torch.where(at % 2 == 0, -1e9, -1e30)
    bias[11] = torch.where(at % 3 == 0, -math.inf, info.min)
    bias[12] = -1e9 + 64 * (at % 3)  # neighbours in float32, which times log2(e) would round to fewer
    bias[13] = torch.where(at == cols - 1, info.max, info.min)
    bias[14] = torch.where(at % 2 == 0, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float16).min)
    finite = bias.isfinite()
    return torch.where(finite, bias.clamp(info.min, info.max), bias).to(dtype)


def extreme_table(offsets: int) -> Tensor:
    """(offsets, ROWS): a bias table with such rows in every window, for that many heads."""
    return extreme_bias(offsets).t().contiguous()
