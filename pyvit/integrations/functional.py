"""Modules whose forward calls ``F.scaled_dot_product_attention``: their own code runs with pyvit's attention
instead."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.integrations import originals
from pyvit.integrations.common import usable
from pyvit.integrations.forwards import Replacement, servable
from pyvit.ops import flash_attention

_NAME = "scaled_dot_product_attention"
_WIDEST = 256  # largest head dimension of the kernels


def calls_sdpa(kind: type) -> bool:
    """Whether a class's own forward calls the function by name."""
    forward = getattr(kind, "forward", None)
    if (
        not isinstance(forward, types.FunctionType)
        or hasattr(forward, "__wrapped__")
        or _NAME not in forward.__code__.co_names
    ):
        return False
    return originals.record(kind).foreign is None


def sdpa(module: nn.Module) -> Iterator[Replacement]:
    yield Replacement(module, in_its_own_code, "flash_attention, in its own code")


def in_its_own_code(module: Any, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    if torch.compiler.is_compiling():  # torch.compile reads the class's source, and has its own attention
        return forward(module, *args, **kwargs)
    # A new dictionary for each call: other global names may have changed.
    names = {**forward.__globals__, **_other_names(forward)}
    ours = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours(module, *args, **kwargs)


@functools.lru_cache(maxsize=256)
def _other_names(forward: types.FunctionType) -> dict[str, Any]:
    """The global names through which ``forward`` reaches torch's function, bound to pyvit's."""
    functional = _Namespace(F, **{_NAME: _attention})
    inner = _Namespace(nn, functional=functional)
    ours = {
        id(F): functional,
        id(nn): inner,
        id(torch): _Namespace(torch, nn=inner),
        id(F.scaled_dot_product_attention): _attention,
    }
    return {name: ours[id(value)] for name, value in forward.__globals__.items() if id(value) in ours}


class _Namespace:
    """A module with some of its attributes replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``: pyvit's kernels if they support the call, else torch's."""
    if (
        query.dim() == key.dim() == value.dim() == 5
        and attn_mask is None
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
    ):
        q, k, v = (t.flatten(0, 1) for t in (query, key, value))
        return _attention(q, k, v, None, dropout_p, is_causal, scale, enable_gqa).unflatten(0, query.shape[:2])
    if (
        query.dim() == key.dim() == value.dim() == 3
        and not enable_gqa
        and (attn_mask is None or attn_mask.dim() in (2, 3))
    ):
        q, k, v = (t.unsqueeze(1) for t in (query, key, value))
        mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        return _attention(q, k, v, mask, dropout_p, is_causal, scale).squeeze(1)
    alike = all(
        servable(t) and t.dim() == 4 and t.dtype == query.dtype and 0 < t.shape[-1] <= _WIDEST
        for t in (query, key, value)
    )
    alike = alike and query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3]
    alike = alike and (query.shape[1] == key.shape[1] or enable_gqa)
    masked = attn_mask is None or (usable(attn_mask) and not is_causal and 2 <= attn_mask.dim() <= 4)
    if not alike or not masked or not 0.0 <= dropout_p < 1.0 or isinstance(scale, Tensor):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    options = {
        "bias": attn_mask,
        "is_causal": is_causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "enable_gqa": enable_gqa,
    }
    return flash_attention(query, key, value, **options)  # type: ignore[arg-type, return-value]
