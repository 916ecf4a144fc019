"""Matrix products on a CPU by whichever of torch's libraries is faster for the shape: measured once, remembered for the process.

The ways differ in rounding, so a choice is part of a result's bits. The processes of one group choose alike, the first to measure for all,
and a process that goes on with another's work adopts its choices.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pyvit import library
from pyvit.memory import scratch
from pyvit.ops import activations

POLICIES = ("auto", "onednn", "torch")
_policy = os.environ.get("PYVIT_LINEAR") or "auto"
if _policy not in POLICIES:
    raise ValueError(f"PYVIT_LINEAR must be one of {', '.join(POLICIES)}, got {_policy!r}")

Way = Callable[..., Tensor]
_PROBE_FLOPS = 1 << 27  # of one timed product: about a millisecond of one core
_PROBE_ROWS, _ROUNDS = 64, 3

#: What oneDNN applies before the result leaves its registers: attribute, algorithm. Not its relu, which turns NaN into 0.
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


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


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if activation is None else activations.activate_(y, activation)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = _onednn(x, weight, bias, "none", [], "")  # type: ignore[misc]
    return y if activation is None else activations.activate_(y, activation)


def _by_onednn_fused(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    attribute, algorithm = _FUSED[activation or ""]
    return _onednn(x, weight, bias, attribute, [], algorithm)  # type: ignore[misc]


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


#: For each product, its ways in order of preference where nothing is measured.
_FORWARD: Mapping[str, Way] = {
    "onednn, activation fused": _by_onednn_fused,
    "onednn": _by_onednn,
    "float32 copies": _in_float32(lambda *args: forward(*args)),
    "torch": _by_torch,
}
_GRAD_INPUT: Mapping[str, Way] = {
    "onednn": lambda grad, weight: _onednn(grad, weight.t(), None, "none", [], ""),  # type: ignore[misc]
    "float32 copies": _in_float32(lambda *args: grad_input(*args)),
    "torch": lambda grad, weight: grad @ weight,
}
_GRAD_WEIGHT: Mapping[str, Way] = {
    "onednn": lambda grad, x: _onednn(_transposed(grad), x.t(), None, "none", [], ""),  # type: ignore[misc]
    "float32 copies": _in_float32(lambda *args: grad_weight(*args)),
    "torch": lambda grad, x: grad.t() @ x,
}

Key = tuple[Any, ...]
_chosen: dict[Key, tuple[Way, str]] = {}
_adopted: dict[Key, str] = {}


def choices() -> dict[Key, str]:
    """The way chosen for each class of products so far, for :func:`adopt`."""
    return {key: how.partition(" (")[0] for key, (_, how) in _chosen.items()}


def adopt(choices: Mapping[Key, str]) -> None:
    """Choose as another process did instead of measuring. A way that cannot serve here is measured anew, with a warning."""
    for key, name in choices.items():
        _adopted[key] = name
        _chosen.pop(key, None)
    for pack in _packs.values():
        pack.ways.clear()


def _key(kind: str, rows: int, *rest: Any) -> Key:
    return (kind, rows.bit_length(), *rest, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def _forward_key(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Key:
    return _key("forward", x.numel() // max(x.shape[-1], 1), weight.shape, weight.is_contiguous(), x.dtype, activation, bias is None)


class _Pack:
    """A weight in the order oneDNN multiplies it in, which a plain weight is brought into by every call; the ways calls like it went."""

    def __init__(self, weight: Tensor) -> None:
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: _packs.pop(key, None))
        self.packed: Tensor | None = None
        self.of: tuple[Any, ...] = ()
        self.ways: dict[tuple[Any, ...], Way] = {}

    def of_weight(self, weight: Tensor, rows: int) -> Tensor:
        of = (weight._version, weight.data_ptr(), weight.dtype)
        if self.packed is None or self.of != of:
            self.packed, self.of = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows), of
            self.ways.clear()
        return self.packed


_packs: dict[int, _Pack] = {}  # by the weight's id: a dictionary of weak references takes microseconds to ask


def _pack_of(weight: Tensor) -> _Pack | None:
    pack = _packs.get(id(weight))
    return pack if pack is not None and pack.weight() is weight else None


@functools.cache
def _packs_dtype(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of ``dtype`` on this processor: it refuses bfloat16 without AVX-512."""
    if onednn() is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), 16)
    except RuntimeError:
        return False
    return True


def keep_packed(weight: Tensor) -> bool:
    """Keep a packed copy of ``weight`` from the next product without a gradient on; False where oneDNN cannot take it."""
    able = _policy != "torch" and weight.dim() == 2 and weight.is_contiguous() and weight.numel() > 0 and weight.device.type == "cpu"
    if able and not weight.is_inference() and _packs_dtype(weight.dtype):
        _packs[id(weight)] = _Pack(weight)
        return True
    return False


def drop_packed(weight: Tensor) -> None:
    if _pack_of(weight) is not None:
        del _packs[id(weight)]


def _forward_packed(pack: _Pack, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor | None:
    """The product with the packed weight, or None where it is not the faster one."""
    few = x if x.dim() < 2 else x.reshape(-1, x.shape[-1])
    packed = pack.of_weight(weight, few.shape[0])
    key = ("packed", *_forward_key(x, weight, bias, activation))
    if key not in _chosen:
        ways: dict[str, Way] = {"onednn, activation fused": _by_onednn_fused} if activation in _FUSED else {}
        ways |= {"onednn": _by_onednn, "torch": lambda x, _, bias, activation: _by_torch(x, weight, bias, activation)}
        way, name = _choose(key, ways, lambda rows: (few[:rows], packed, bias, activation), few.shape[0], weight, x)
        _chosen[key] = (way, f"{name}, weight kept packed") if way in (_by_onednn, _by_onednn_fused) else (_by_torch, name)
    way = _chosen[key][0]
    if way is _by_torch:
        return None
    if len(pack.ways) >= 64:  # lengths, or biases, that change with every call
        pack.ways.clear()
    pack.ways[_call(x, bias, activation)] = way
    return way(x, packed, bias, activation)


def _call(x: Tensor, bias: Tensor | None, activation: str | None) -> tuple[Any, ...]:
    """What, the weight being the same, a way was chosen for."""
    return (x.shape, x.dtype, activation, id(bias), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def again(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor | None:
    """:func:`forward` with a packed weight as in an earlier call like this one, asking no more than that; None where there was none.

    No gradient may be wanted, and nothing may be watching.
    """
    pack = _packs.get(id(weight))
    if pack is None or pack.of != (weight._version, weight.data_ptr(), x.dtype) or not x.is_cpu:
        return None
    way = pack.ways.get(_call(x, bias, activation))
    if way is None or pack.weight() is not weight or (bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1])):
        return None
    return way(x, pack.packed, bias, activation)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x weight^T + bias); x (..., K), weight (M, K). No gradient is recorded."""
    if _packs and not torch.is_grad_enabled() and (pack := _pack_of(weight)) is not None:
        out = _forward_packed(pack, x, weight, bias, activation)
        if out is not None:
            return out
    key = _forward_key(x, weight, bias, activation)
    found = _chosen.get(key)
    if found is None:
        ways = {n: w for n, w in _FORWARD.items() if n != "onednn, activation fused" or activation in _FUSED}
        few = x if x.dim() < 2 else x.reshape(-1, x.shape[-1])
        found = _chosen[key] = _choose(key, ways, lambda rows: (few[:rows], weight, bias, activation), few.shape[0], weight, x)
    return found[0](x, weight, bias, activation)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (N, M) weight (M, K) -> (N, K)."""
    key = _key("grad_input", grad.shape[0], weight.shape, weight.is_contiguous(), grad.dtype)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(key, _GRAD_INPUT, lambda rows: (grad[:rows], weight), grad.shape[0], weight, grad)
    return found[0](grad, weight)


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad (N, M), x (N, K) -> grad^T x (M, K)."""
    key = _key("grad_weight", grad.shape[0], grad.shape[1], x.shape[1], grad.dtype)
    found = _chosen.get(key)
    if found is None:
        shape = torch.empty(grad.shape[1], x.shape[1], device="meta")
        found = _chosen[key] = _choose(key, _GRAD_WEIGHT, lambda rows: (grad[:rows], x[:rows]), grad.shape[0], shape, grad)
    return found[0](grad, x)


def _choose(
    key: Key, ways: Mapping[str, Way], arguments: Callable[[int], tuple[Any, ...]], rows: int, weight: Tensor, x: Tensor
) -> tuple[Way, str]:
    """The fastest of ``ways`` on the first rows of the call's own tensors, or the one chosen elsewhere, and how it was found."""
    plain = ways["torch"]
    if _policy == "torch":
        return plain, "torch (PYVIT_LINEAR)"
    if (
        onednn() is None
        or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or x.dim() < 2
        or not x.numel() * weight.numel()
        or not weight.is_contiguous()
    ):
        return plain, "torch (oneDNN cannot take this call)"
    few = min(rows, max(_PROBE_ROWS, _PROBE_FLOPS // (2 * weight.numel())))
    args = arguments(few)
    wanted = plain(*args)
    wide = x.dtype == torch.float32
    able = {n: way for n, way in ways.items() if way is plain or (not (wide and n == "float32 copies") and _agrees(way, args, wanted))}
    if len(able) == 1:
        return plain, "torch (oneDNN cannot take this call)"
    name = next(iter(able))
    if _policy == "onednn" or torch.are_deterministic_algorithms_enabled():
        return able[name], f"{name} ({'PYVIT_LINEAR' if _policy == 'onednn' else 'deterministic algorithms: not measured'})"
    if (name := _adopted.get(key, "")) in able:
        return able[name], f"{name} (as chosen before)"
    if name:
        warnings.warn("a matrix product chosen before is not available here: measured anew, results may differ by rounding", stacklevel=2)
    best = dict.fromkeys(able, float("inf"))
    for _ in range(_ROUNDS):  # interleaved, so that another process disturbs all alike
        for name, way in able.items():
            start = time.perf_counter()
            way(*args)
            best[name] = min(best[name], time.perf_counter() - start)
    name = min(best, key=best.__getitem__)
    figures = ", ".join(f"{n} {t * 1e3:.3f} ms" for n, t in best.items())
    if (first := _of_group(key, name)) != name and first in able:
        return able[first], f"{first} (as another process of the group chose; measured on {few} rows: {figures})"
    return able[name], f"{name} (measured on {few} rows: {figures})"


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
    tolerance = 64 * torch.finfo(wanted.dtype).eps * float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return found.shape == wanted.shape and bool(((found - wanted).abs().nan_to_num(0.0) <= tolerance).all())


def explain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[str]:
    """What is known of the choice for a call, for :func:`pyvit.explain`; nothing is computed."""
    key = _forward_key(x, weight, bias, activation)
    found = (_chosen.get(("packed", *key)) if _pack_of(weight) else None) or _chosen.get(key)
    if found is not None:
        return [f"matrix product by {found[1]}"]
    return [f"matrix product not chosen yet: PYVIT_LINEAR={_policy}" + ("; the first call measures" if _policy == "auto" else "")]
