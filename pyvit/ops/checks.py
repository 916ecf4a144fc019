"""Argument checks shared by the operators: every message names the argument, what was seen and what was wanted."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyvit.torch_private import FAKE_TENSORS

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(op: str, argument: str, wanted: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {wanted}, got {got}")


def shape(t: Tensor) -> str:
    return "shape (" + ", ".join(map(str, t.shape)) + ")"


def tensor(op: str, argument: str, t: Any, wanted: str, dims: int) -> None:
    """``t`` must be a dense tensor of ``dims`` dimensions; ``wanted`` spells the shape."""
    dense(op, argument, t, f" of shape {wanted}")
    if t.dim() != dims:
        fail(op, argument, f"of shape {wanted}", shape(t))


def dense(op: str, argument: str, t: Any, more: str = "") -> None:
    """``t`` must be a tensor whose elements lie in memory by strides."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor{more}, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        hint = "convert it with to_dense()"
        if t.is_nested:
            hint = (
                "flash_attention takes nested q, k and v, and flash_attention_varlen their values(); elsewhere, "
                "give values() or pad"
            )
        layout = "nested" if t.is_nested else str(t.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{op}: {argument} must be a dense Tensor{more}, got a {layout} one; {hint}")


def beside(op: str, argument: str, t: Any, other: str, like: Tensor) -> None:
    """``t`` must be a dense tensor of real numbers, on the device of the argument ``other``."""
    dense(op, argument, t)
    floating(op, argument, t)
    same(op, argument, t, other, like, dtype=False)


def device(op: str, argument: str, t: Any) -> str:
    """The type of the device of ``t``, which must be a dense tensor; the first thing an operator looks at."""
    dense(op, argument, t)
    return t.device.type


def number(op: str, argument: str, value: Any) -> float:
    """``value`` must be a number. As in torch, a tensor without dimensions is one, but not where it would lack its
    gradient."""
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, Tensor):
        bad = value.is_complex() or value.dtype == torch.bool or (value.is_meta and not is_fake(value))
        if value.dim() or value.requires_grad or bad:
            what = (
                "one that requires a gradient, and there is none for it"
                if value.requires_grad
                else f"{value.dtype} of {shape(value)} on {value.device}"
            )
            raise TypeError(
                f"{op}: {argument} must be a number or a tensor of no dimensions without a gradient, got {what}"
            )
        return value.item()
    if not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {argument} must be a number, got {type(value).__name__}")
    return value if isinstance(value, (torch.SymFloat, torch.SymInt)) else float(value)  # type: ignore[return-value]


def positive(op: str, argument: str, value: Any) -> float:
    value = number(op, argument, value)
    if not 0 < value < math.inf:
        fail(op, argument, "positive and finite", value)
    return value


def whole(op: str, argument: str, value: Any, least: int | None = None) -> int:
    """``value`` must be an integer, at least ``least``; a tensor or array of one is one."""
    if type(value) is not int:
        if isinstance(value, bool) or not (hasattr(value, "__index__") or isinstance(value, torch.SymInt)):
            raise TypeError(f"{op}: {argument} must be an int, got {type(value).__name__}")
        if not isinstance(value, torch.SymInt):
            try:
                value = operator.index(value)
            except TypeError as error:
                raise TypeError(f"{op}: {argument} must be an int, got {value!r}") from error
    if least is not None and value < least:
        fail(op, argument, f"at least {least}", value)
    return value


def flag(op: str, argument: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{op}: {argument} must be a bool, got {type(value).__name__}")


def no_gradient(op: str, **tensors: Tensor | None) -> None:
    """Tensors that have no gradient must not ask for one."""
    for argument, t in tensors.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{op}: {argument} must not require a gradient, since it gets none, got a tensor that does; detach it"
            )


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


def with_leading(op: str, bias: Tensor | None) -> Tensor | None:
    """An attention bias with its leading dimensions, 4 in all."""
    if bias is None:
        return None
    dense(op, "bias", bias)
    return bias if bias.dim() >= 4 else bias[(None,) * (4 - bias.dim())]


def scale(op: str, value: Any, channels: int) -> float:
    """The factor on attention's scores, by default 1/sqrt(channels)."""
    return max(channels, 1) ** -0.5 if value is None else number(op, "scale", value)


def dropout(op: str, p: Any) -> float:
    """A probability of dropping, in [0, 1)."""
    p = number(op, "dropout_p", p)
    if not 0.0 <= p < 1.0:
        fail(op, "dropout_p", "in [0, 1)", p)
    return p


def pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least ``least``, as a pair."""
    values = (
        (value, value)
        if isinstance(value, (int, torch.SymInt))
        else tuple(value)
        if isinstance(value, Sequence)
        else ()
    )
    if len(values) != 2 or not all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{op}: {argument} must be an int or a pair of ints, got {value!r}")
    if min(values) < least:
        fail(op, argument, f"at least {least} in each direction", values)
    return values


def exactly(op: str, argument: str, t: Any, wanted: Sequence[int], dtype: torch.dtype, like: Tensor) -> None:
    """``t`` must be of this shape and dtype, and on the device of ``like``: what an operator computed, given to its
    backward."""
    tensor(op, argument, t, str(tuple(wanted)), len(wanted))
    if t.shape != tuple(wanted):
        fail(op, argument, f"of shape {tuple(wanted)}", shape(t))
    if t.dtype != dtype:
        raise TypeError(f"{op}: {argument} must be {dtype}, got {t.dtype}")
    same(op, argument, t, "the other arguments", like, dtype=False)


def is_fake(t: Tensor) -> bool:
    """Whether ``t`` has no values to look at."""
    return isinstance(t, FAKE_TENSORS)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that softmax statistics are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropout_seed(p: float, like: Tensor) -> Tensor | None:
    """A fresh seed from torch's generator of that device (so torch.manual_seed and CUDA graphs govern it), or None
    without dropout."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=like.device) if p > 0 else None


def seed(op: str, t: Any, p: float, like: Tensor) -> None:
    """Dropout's, as :func:`dropout_seed` makes it."""
    if p:
        exactly(op, "seed", t, (1,), torch.int64, like)
