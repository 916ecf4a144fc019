"""Argument checks shared by the operators: every message names the argument, what was seen and what was wanted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(op: str, argument: str, wanted: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {wanted}, got {got}")


def shape(t: Tensor) -> str:
    return "shape (" + ", ".join(map(str, t.shape)) + ")"


def tensor(op: str, argument: str, t: Any, wanted: str, dims: int) -> None:
    """``t`` must be a tensor of ``dims`` dimensions; ``wanted`` spells the shape."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor of shape {wanted}, got {type(t).__name__}")
    if t.dim() != dims:
        fail(op, argument, f"of shape {wanted}", shape(t))


def device(op: str, argument: str, t: Any) -> str:
    """The type of the device of ``t``, which must be a tensor; the first thing an operator looks at."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor, got {type(t).__name__}")
    return t.device.type


def floating(op: str, argument: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {argument} must be float32, float16, bfloat16 or float64, got {t.dtype}")


def same(op: str, argument: str, t: Tensor, other: str, like: Tensor, dtype: bool = True) -> None:
    """``t`` must be on the device (and of the dtype) of the argument ``other``."""
    if dtype and t.dtype != like.dtype:
        raise TypeError(f"{op}: {argument} must have the dtype of {other}, {like.dtype}, got {t.dtype}")
    if t.device != like.device:
        fail(op, argument, f"on the device of {other}, {like.device}", t.device)


def bias(op: str, t: Tensor, q: Tensor, wanted: tuple[int, int, int, int]) -> None:
    """An attention bias: 4-D, broadcastable to ``wanted``, bool, float32 or of q's dtype."""
    if t.dim() != 4 or any(have not in (1, want) for have, want in zip(t.shape, wanted, strict=True)):
        fail(op, "bias", f"broadcastable to {wanted}", shape(t))
    if t.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"{op}: bias must be bool, float32 or of the dtype of q, {q.dtype}, got {t.dtype}")
    same(op, "bias", t, "q", q, dtype=False)


def probability(op: str, argument: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        fail(op, argument, "in [0, 1)", p)


def pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least ``least``, as a pair."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{op}: {argument} must be an int or a pair of ints, got {value!r}")
    if min(values) < least:
        fail(op, argument, f"at least {least} in each direction", values)
    return values


def is_fake(t: Tensor) -> bool:
    """Whether ``t`` has no values to look at."""
    return isinstance(t, torch._subclasses.FakeTensor)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that softmax statistics are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropout_seed(p: float, like: Tensor) -> Tensor | None:
    """A fresh seed from torch's generator of that device (so torch.manual_seed and CUDA graphs govern it), or None without dropout."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=like.device) if p > 0 else None
