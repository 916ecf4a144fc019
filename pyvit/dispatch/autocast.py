"""``torch.autocast`` for operators: operands in its dtype, and formulas without it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor


def _enabled(device: str) -> bool:
    # Of the devices with kernels it is known that they have it, and some releases' compilers cannot trace the question.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def autocast(device: str, *tensors: Any) -> Any:
    """Under ``torch.autocast`` for ``device``, the floating tensors in its dtype; otherwise as they are. None stays
    None."""
    if not _enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def no_autocast(*tensors: Any) -> contextlib.AbstractContextManager[Any]:
    """The context of formulas whose operands were cast already: autocast is off for the device of the first of
    ``tensors`` that is one."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), None)
    if device is None or not _enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def without_autocast(backward: _Backward) -> _Backward:
    """``backward`` with autocast off, under which its caller may be: the forward's operands were cast, or were left
    wide on purpose."""

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return backward(ctx, *grads)
        with no_autocast(*grads):
            return backward(ctx, *grads)

    return cast(_Backward, call)
