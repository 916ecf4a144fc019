"""Matrix products on a CPU by whichever is fastest for the shape, torch's libraries or ``csrc/cpu/product.cpp``: measured once, remembered
for the process.

The ways differ in rounding, so a choice is part of a result's bits. The processes of one group choose alike, the first to measure for all,
and a process that goes on with another's work adopts its choices.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pyvit import library
from pyvit.memory import recycled, scratch
from pyvit.ops import activations

POLICIES = ("auto", "onednn", "pyvit", "torch")
_policy = os.environ.get("PYVIT_LINEAR") or "auto"
if _policy not in POLICIES:
    raise ValueError(f"PYVIT_LINEAR must be one of {', '.join(POLICIES)}, got {_policy!r}")

Way = Callable[..., Tensor]
_PROBE_FLOPS = 1 << 32  # of one timed product at most: most layers' own, for what a way does once per call must not weigh more than there
_PROBE_ROWS, _ROUNDS = 64, 3
_HOPELESS = 2.0  # a way this much slower than another is measured once
#: Chosen up to this factor behind: the measurement, in a warm cache, shows neither the traffic nor the new pages that the way saves.
_CLOSE = {"pyvit": 1.05}

#: What oneDNN applies before the result leaves its registers: attribute, algorithm. Not its relu, which turns NaN into 0.
FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


def _find_onednn() -> Callable[..., Tensor] | None:
    """torch's private operator on oneDNN, if this torch has it and it computes what is expected."""
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        x, w, b = torch.arange(6.0).view(2, 3), torch.arange(-6.0, 6.0).view(4, 3), torch.arange(4.0)
        return op if torch.equal(op(x, w, b, "none", [], ""), F.linear(x, w, b)) else None
    except (AttributeError, RuntimeError):
        return None


_onednn: Callable[..., Tensor] | None = None
_looked = False


def onednn() -> Callable[..., Tensor] | None:
    global _onednn, _looked
    if not _looked:
        _onednn, _looked = _find_onednn(), True
    return _onednn


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights in the dtype of x, and a contiguous bias."""
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return weight if weight.dtype == x.dtype else weight.to(x.dtype), bias


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.linear(x, *_narrow(x, weight, bias))
    return y if activation is None else activations.activate_(y, activation)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = _onednn(x, *_narrow(x, weight, bias), "none", [], "")  # type: ignore[misc]
    return y if activation is None else activations.activate_(y, activation)


def by_onednn_fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    attribute, algorithm = FUSED[activation or ""]
    return _onednn(x, *_narrow(x, weight, bias), attribute, [], algorithm)  # type: ignore[misc]


def _in_float32(product: Callable[..., Tensor]) -> Way:
    """``product`` of float32 copies, rounded: a processor without bfloat16 or float16 products takes ten times as long over them."""

    def way(x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return product(x.float(), *(r.float() if isinstance(r, Tensor) else r for r in rest)).to(x.dtype)

    return way


def _transposed(x: Tensor) -> Tensor:
    """x^T (M, N), until the next call; copied where the library can: oneDNN wants its first operand so, and torch copies it at a tenth of
    the memory's rate."""
    if library.problem() is None and x.is_contiguous() and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = scratch("transposed", x.shape[::-1], x.dtype)
        torch.ops.pyvit.transposed.default(x, out)
        return out
    return x.t()


def _ours(a: Tensor, b: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None, passing: bool = False) -> Tensor:
    """a (N, K) b (K, M) + bias of ``dtype``, a's or float32; a and b contiguous, or transposed views of what is.

    ``passing``: of those that are soon done with, in recycled memory.
    """
    out = (recycled if passing else torch.empty)((a.shape[0], b.shape[1]), dtype=dtype or a.dtype)
    torch.ops.pyvit.product.default(a, b, None if bias is None else bias.contiguous(), out, False)
    return out


def by_pyvit(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = _ours(rows, weight.t(), bias).view(*x.shape[:-1], weight.shape[0])
    return y if activation is None else activations.activate_(y, activation)


#: For each product, its ways in order of preference where nothing is measured.
_FORWARD: Mapping[str, Way] = {
    "onednn, activation fused": by_onednn_fused,
    "onednn": by_onednn,
    "pyvit": by_pyvit,
    "float32 copies": _in_float32(lambda *args: forward(*args)),
    "torch": by_torch,
}
_GRAD_INPUT: Mapping[str, Way] = {
    "onednn": lambda grad, weight: _onednn(grad, weight.to(grad.dtype).t(), None, "none", [], ""),  # type: ignore[misc]
    "pyvit": lambda grad, weight: _ours(grad.contiguous(), weight, passing=True),
    "float32 copies": _in_float32(lambda *args: grad_input(*args)),
    "torch": lambda grad, weight: grad @ weight.to(grad.dtype),
}
_GRAD_WEIGHT: Mapping[str, Way] = {
    "onednn": lambda grad, x, dtype: _onednn(_transposed(grad), x.t(), None, "none", [], "").to(dtype),  # type: ignore[misc]
    "pyvit": lambda grad, x, dtype: _ours(grad.contiguous().t(), x, dtype=dtype),
    "float32 copies": lambda grad, x, dtype: _in_float32(lambda *args: grad_weight(*args))(grad, x).to(dtype),
    "torch": lambda grad, x, dtype: (grad.t() @ x).to(dtype),
}

Key = tuple[Any, ...]
_chosen: dict[Key, tuple[Way, str]] = {}
_adopted: dict[Key, str] = {}
_adoptions = 0


def adoptions() -> int:
    """How often choices were adopted: what was remembered of a choice before is stale."""
    return _adoptions


def choices() -> dict[Key, str]:
    """The way chosen for each class of products so far, for :func:`adopt`."""
    return {key: how.partition(" (")[0] for key, (_, how) in _chosen.items()}


def adopt(choices: Mapping[Key, str]) -> None:
    """Choose as another process did instead of measuring. A way that cannot serve here is measured anew, with a warning."""
    for key, name in choices.items():
        _adopted[key] = name
        _chosen.pop(key, None)
    global _adoptions
    _adoptions += 1


def _key(kind: str, rows: int, *rest: Any) -> Key:
    return (kind, rows.bit_length(), *rest, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def forward_key(rows: int, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Key:
    return _key("forward", rows, weight.shape, weight.is_contiguous(), _dtypes(x.dtype, weight.dtype), activation, bias is None)


def _dtypes(narrow: torch.dtype, wide: torch.dtype) -> Any:
    return narrow if narrow == wide else (narrow, wide)


def chosen(key: Key, ways: Mapping[str, Way], arguments: Callable[[int], tuple[Any, ...]], rows: int, weight: Tensor, x: Tensor) -> Way:
    """The way for ``key`` among ``ways``, by name, one of them "torch"; measured with ``arguments(rows)`` the first time."""
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(key, ways, arguments, rows, weight, x)
    return found[0]


def known(key: Key) -> str | None:
    """What was chosen for ``key``, and how it was found."""
    return _chosen[key][1] if key in _chosen else None


def policy() -> str:
    """The value of PYVIT_LINEAR."""
    return _policy


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x weight^T + bias); x (..., K), weight (M, K); beside a narrower x, weight and bias may be float32, as they are under
    autocast. No gradient is recorded."""
    rows = x.numel() // max(x.shape[-1], 1)
    key = forward_key(rows, x, weight, bias, activation)
    found = _chosen.get(key)
    if found is None:
        ways = {n: w for n, w in _FORWARD.items() if n != "onednn, activation fused" or activation in FUSED}
        few = x if x.dim() < 2 else x.reshape(-1, x.shape[-1])
        found = _chosen[key] = _choose(key, ways, lambda rows: (few[:rows], weight, bias, activation), few.shape[0], weight, x)
    return found[0](x, weight, bias, activation)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (N, M) weight (M, K) -> (N, K), in grad's dtype."""
    key = _key("grad_input", grad.shape[0], weight.shape, weight.is_contiguous(), _dtypes(grad.dtype, weight.dtype))
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(key, _GRAD_INPUT, lambda rows: (grad[:rows], weight), grad.shape[0], weight, grad)
    return found[0](grad, weight)


def grad_weight(grad: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """grad (N, M), x (N, K) -> grad^T x (M, K) in ``dtype``: theirs (the default) or float32."""
    dtype = dtype or grad.dtype
    key = _key("grad_weight", grad.shape[0], grad.shape[1], x.shape[1], _dtypes(grad.dtype, dtype))
    found = _chosen.get(key)
    if found is None:
        shape = torch.empty(grad.shape[1], x.shape[1], device="meta")
        found = _chosen[key] = _choose(key, _GRAD_WEIGHT, lambda rows: (grad[:rows], x[:rows], dtype), grad.shape[0], shape, grad)
    return found[0](grad, x, dtype)


def _choose(
    key: Key, ways: Mapping[str, Way], arguments: Callable[[int], tuple[Any, ...]], rows: int, weight: Tensor, x: Tensor
) -> tuple[Way, str]:
    """The fastest of ``ways`` on the first rows of the call's own tensors, or the one chosen elsewhere, and how it was found."""
    plain = ways["torch"]
    if _policy == "torch":
        return plain, "torch (PYVIT_LINEAR)"
    if (
        x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or x.dim() < 2
        or not x.numel() * weight.numel()
        or not weight.is_contiguous()
    ):
        return plain, "torch (nothing else takes this call)"
    few = arguments(min(rows, _PROBE_ROWS))
    wanted = plain(*few)
    able = {n: way for n, way in ways.items() if way is plain or (_serves(n, x.dtype) and _agrees(way, few, wanted))}
    if len(able) == 1:
        return plain, "torch (nothing else takes this call)"
    name = "pyvit" if _policy == "pyvit" and _policy in able else next(iter(able))
    if _policy != "auto" or torch.are_deterministic_algorithms_enabled():
        return able[name], f"{name} ({'PYVIT_LINEAR' if _policy != 'auto' else 'deterministic algorithms: not measured'})"
    if (name := _adopted.get(key, "")) in able:
        return able[name], f"{name} (as chosen before)"
    if name:
        warnings.warn("a matrix product chosen before is not available here: measured anew, results may differ by rounding", stacklevel=2)
    many = min(rows, max(_PROBE_ROWS, _PROBE_FLOPS // (2 * weight.numel())))
    args = arguments(many)
    best = dict.fromkeys(able, float("inf"))
    for _ in range(_ROUNDS):  # interleaved, so that another process disturbs all alike
        for name, way in able.items():
            if best[name] < float("inf") and best[name] > _HOPELESS * min(best.values()):
                continue
            start = time.perf_counter()
            way(*args)
            best[name] = min(best[name], time.perf_counter() - start)
    fastest = min(best.values())
    name = next((n for n, t in best.items() if n in _CLOSE and t < _CLOSE[n] * fastest), min(best, key=best.__getitem__))
    figures = ", ".join(f"{n} {t * 1e3:.3f} ms" for n, t in best.items())
    if (first := _of_group(key, name)) != name and first in able:
        return able[first], f"{first} (as another process of the group chose; measured on {many} rows: {figures})"
    return able[name], f"{name} (measured on {many} rows: {figures})"


def _serves(name: str, dtype: torch.dtype) -> bool:
    if name.startswith("onednn"):
        return onednn() is not None
    if name == "float32 copies":
        return dtype != torch.float32
    return library.problem() is None


def _of_group(key: Key, name: str) -> str:
    """What the first process of the default group to measure ``key`` chose: ``name`` if it is this one. No process waits for another."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return name
    return dist.distributed_c10d._get_default_store().compare_set(f"pyvit.products/{key}", "", name).decode()


def _agrees(way: Way, args: tuple[Any, ...], wanted: Tensor) -> bool:
    """Whether ``way`` takes the call and gives the result but for rounding."""
    try:
        found = way(*args)
    except RuntimeError:  # oneDNN refuses a dtype or an attribute on this processor
        return False
    eps = max(torch.finfo(dtype).eps for dtype in (wanted.dtype, args[0].dtype))
    tolerance = 64 * eps * float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return found.shape == wanted.shape and bool(((found - wanted).abs().nan_to_num(0.0) <= tolerance).all())


def explain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[str]:
    """What is known of the choice for a call, for :func:`pyvit.explain`; nothing is computed."""
    found = known(forward_key(x.numel() // max(x.shape[-1], 1), x, weight, bias, activation))
    if found is not None:
        return [f"matrix product by {found}"]
    return [f"matrix product not chosen yet: PYVIT_LINEAR={_policy}" + ("; the first call measures" if _policy == "auto" else "")]
