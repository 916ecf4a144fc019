"""Matrix products on a CPU: the candidates, and which of them multiplies a shape.

The candidates are torch's libraries and ``csrc/cpu/product.cpp``. They differ in rounding, so a choice is part of a
result's bits. By default the rules of :mod:`pyvit.ops.matmul_rules` decide, the same in every process.
``PYVIT_LINEAR=measure`` times the candidates instead, once per class of shapes and process, and gives that up.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit import library, torch_private
from pyvit.dispatch.devices import cpu_isa
from pyvit.memory import recycled, scratch
from pyvit.ops import activations, matmul_rules
from pyvit.ops.tracing import transformed

POLICIES = ("auto", "measure", "onednn", "pyvit", "torch")
_policy = os.environ.get("PYVIT_LINEAR") or "auto"
if _policy not in POLICIES:
    raise ValueError(f"PYVIT_LINEAR must be one of {', '.join(POLICIES)}, got {_policy!r}")

Algorithm = Callable[..., Tensor]
#: Of one timed product at most. Most layers have less: what a candidate does once per call then weighs what it weighs
#: there.
_PROBE_FLOPS = 1 << 32
_PROBE_ROWS, _ROUNDS = 64, 3
_HOPELESS = 2.0  # an algorithm this much slower than another is measured once
#: Chosen up to this factor behind: the measurement, in a warm cache, shows neither the traffic nor the new pages that
#: the algorithm saves.
_CLOSE = {"pyvit": 1.05}

#: What oneDNN applies before the result leaves its registers: attribute, algorithm. Not its relu, which turns NaN into
#: 0.
FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}


@functools.cache
def onednn() -> Callable[..., Tensor] | None:
    """torch's private operator on oneDNN, if this torch has it."""
    try:
        return torch.ops.mkldnn._linear_pointwise.default  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):
        return None


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights in the dtype of x, and a contiguous bias."""
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return weight if weight.dtype == x.dtype else weight.to(x.dtype), bias


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.linear(x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), *_narrow(x, weight, bias))
    if x.dim() != 2:  # F.linear would return a view, which autograd does not allow to be changed in place
        y = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))
    return y if activation is None else activations.activate_(y, activation)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """With its own activation, where it has it."""
    attribute, algorithm = FUSED.get(activation or "", ("none", ""))
    y = onednn()(x, *_narrow(x, weight, bias), attribute, [], algorithm)  # type: ignore[misc]
    return y if activation is None or activation in FUSED else activations.activate_(y, activation)


def _in_float32(product: Callable[..., Tensor]) -> Algorithm:
    """``product`` of float32 copies, rounded: a processor without bfloat16 or float16 products takes ten times as long
    over them."""

    def algorithm(x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return product(x.float(), *(r.float() if isinstance(r, Tensor) else r for r in rest)).to(x.dtype)

    return algorithm


def _transposed(x: Tensor) -> Tensor:
    """x^T (M, N), until the next call; copied where the library can: oneDNN wants its first operand so, and torch
    copies it at a tenth of the memory's rate."""
    if library.problem() is None and x.is_contiguous() and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = scratch("transposed", x.shape[::-1], x.dtype)
        torch.ops.pyvit.transposed.default(x, out)
        return out
    return x.t()


def _ours(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (N, K) b (K, M) + bias in ``out``, of a's dtype or float32; a and b contiguous, or transposed views of what
    is."""
    torch.ops.pyvit.product.default(a, b, None if bias is None else bias.contiguous(), out, False)
    return out


def by_pyvit(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = torch.empty(
        (*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="cpu"
    )  # the result itself, not a view of rows
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    _ours(rows, weight.t(), y.view(rows.shape[0], weight.shape[0]), bias)
    return y if activation is None else activations.activate_(y, activation)


def _grad_weight_by_pyvit(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return _ours(grad.contiguous().t(), x, torch.empty(grad.shape[1], x.shape[1], dtype=dtype, device="cpu"))


#: For each product, its candidates by name.
FORWARD: Mapping[str, Algorithm] = {
    "onednn": by_onednn,
    "pyvit": by_pyvit,
    "float32 copies": _in_float32(lambda *args: forward(*args)),
    "torch": by_torch,
}
GRAD_INPUT: Mapping[str, Algorithm] = {
    "onednn": lambda grad, weight: onednn()(grad, weight.to(grad.dtype).t(), None, "none", [], ""),  # type: ignore[misc]
    "pyvit": lambda grad, weight: _ours(
        grad.contiguous(), weight, recycled((grad.shape[0], weight.shape[1]), grad.dtype)
    ),
    "float32 copies": _in_float32(lambda *args: grad_input(*args)),
    "torch": lambda grad, weight: grad @ weight.to(grad.dtype),
}
GRAD_WEIGHT: Mapping[str, Algorithm] = {
    "onednn": lambda grad, x, dtype: onednn()(_transposed(grad), x.t(), None, "none", [], "").to(dtype),  # type: ignore[misc]
    "pyvit": _grad_weight_by_pyvit,
    "float32 copies": lambda grad, x, dtype: _in_float32(lambda *args: grad_weight(*args))(grad, x).to(dtype),
    "torch": lambda grad, x, dtype: (grad.t() @ x).to(dtype),
}

Key = tuple[Any, ...]
_chosen: dict[Key, tuple[Algorithm, str]] = {}


def rows_class(rows: int) -> int:
    """Rows that are multiplied alike: the least power of two that is larger."""
    return 1 << rows.bit_length()


def _key(kind: str, rows: int, *rest: Any) -> Key:
    key = (kind, rows_class(rows), *rest)
    return (
        (*key, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) if _policy == "measure" else key
    )


def forward_key(rows: int, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Key:
    return _key(
        "forward", rows, weight.shape, weight.is_contiguous(), _dtypes(x.dtype, weight.dtype), activation, bias is None
    )


def _dtypes(narrow: torch.dtype, wide: torch.dtype) -> Any:
    return narrow if narrow == wide else (narrow, wide)


def known(key: Key) -> str | None:
    """What was chosen for ``key``, and why."""
    return _chosen[key][1] if key in _chosen else None


def policy() -> str:
    """The value of PYVIT_LINEAR."""
    return _policy


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x weight^T + bias); x (..., K), weight (M, K); beside a narrower x, weight and bias may be float32, as
    they are under autocast. No gradient is recorded."""
    rows = x.numel() // max(x.shape[-1], 1)
    key = forward_key(rows, x, weight, bias, activation)
    found = _chosen.get(key)
    if found is None:
        few = x.reshape(-1, x.shape[-1]) if x.numel() else x
        plain = weight.is_contiguous()
        candidates = forward_candidates(x.dtype, weight.dtype, activation) if plain else {"torch": by_torch}
        found = choose(
            key, "forward", candidates, lambda n: (few[:n], weight, bias, activation), rows, weight.shape, x.dtype
        )
    return found[0](x, weight, bias, activation)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (N, M) weight (M, K) -> (N, K), in grad's dtype."""
    if transformed(grad):  # batched gradients, counters of operations
        return GRAD_INPUT["torch"](grad, weight)
    key = _key("grad_input", grad.shape[0], weight.shape, weight.is_contiguous(), _dtypes(grad.dtype, weight.dtype))
    found = _chosen.get(key)
    if found is None:
        candidates = (
            grad_input_candidates(grad.dtype, weight.dtype)
            if weight.is_contiguous()
            else {"torch": GRAD_INPUT["torch"]}
        )
        found = choose(
            key, "grad_input", candidates, lambda n: (grad[:n], weight), grad.shape[0], weight.shape, grad.dtype
        )
    return found[0](grad, weight)


def grad_weight(grad: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """grad (N, M), x (N, K) -> grad^T x (M, K) in ``dtype``: theirs (the default) or float32."""
    dtype = dtype or grad.dtype
    if transformed(grad):
        return GRAD_WEIGHT["torch"](grad, x, dtype)
    key = _key("grad_weight", grad.shape[0], grad.shape[1], x.shape[1], _dtypes(grad.dtype, dtype))
    found = _chosen.get(key)
    if found is None:
        candidates, shape = grad_weight_candidates(grad.dtype, dtype), (grad.shape[1], x.shape[1])
        found = choose(
            key, "grad_weight", candidates, lambda n: (grad[:n], x[:n], dtype), grad.shape[0], shape, grad.dtype
        )
    return found[0](grad, x, dtype)


def choose(
    key: Key,
    kind: str,
    candidates: Mapping[str, Algorithm],
    arguments: Callable[[int], tuple[Any, ...]],
    rows: int,
    weight: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[Algorithm, str]:
    """Chooses the algorithm for ``key`` among ``candidates``, one of which is "torch", and says why.

    PYVIT_LINEAR decides, or the rules. ``PYVIT_LINEAR=measure`` times ``arguments(n)``: the call's own arguments, cut
    to n rows.
    """
    name, why = _choice(kind, candidates, arguments, rows, weight, dtype)
    _chosen[key] = candidates[name], f"{name} ({why})"
    return _chosen[key]


def _choice(
    kind: str,
    candidates: Mapping[str, Algorithm],
    arguments: Callable[[int], tuple[Any, ...]],
    rows: int,
    weight: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[str, str]:
    out, inner = weight
    if len(candidates) == 1 or not rows * out * inner:
        return "torch", "nothing else takes this call"
    if _policy in candidates:
        return _policy, "PYVIT_LINEAR"
    if _policy == "measure" and not torch.are_deterministic_algorithms_enabled():
        return _measured(candidates, arguments, rows, out * inner)
    return by_rule(kind, candidates, rows, weight, dtype), f"by rule for {cpu_isa(dtype)}"


def by_rule(kind: str, candidates: Collection[str], rows: int, weight: tuple[int, ...], dtype: torch.dtype) -> str:
    """Of ``candidates`` the one that the rules want for ``rows`` and a weight of that shape."""
    shape = matmul_rules.Shape(rows_class(rows), *weight)
    return next((name for name in matmul_rules.preference(kind, dtype, shape) if name in candidates), "torch")


def _measured(
    candidates: Mapping[str, Algorithm], arguments: Callable[[int], tuple[Any, ...]], rows: int, weight: int
) -> tuple[str, str]:
    many = min(rows, max(_PROBE_ROWS, _PROBE_FLOPS // (2 * weight)))
    args = arguments(many)
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(_ROUNDS):  # interleaved, so that another process disturbs all alike
        for name, algorithm in candidates.items():
            if best[name] < float("inf") and best[name] > _HOPELESS * min(best.values()):
                continue
            start = time.perf_counter()
            algorithm(*args)
            best[name] = min(best[name], time.perf_counter() - start)
    fastest = min(best.values())
    name = next(
        (n for n, t in best.items() if n in _CLOSE and t < _CLOSE[n] * fastest), min(best, key=best.__getitem__)
    )
    return name, f"measured on {many} rows: {', '.join(f'{n} {t * 1e3:.3f} ms' for n, t in best.items())}"


@functools.cache
def forward_candidates(narrow: torch.dtype, wide: torch.dtype, activation: str | None) -> dict[str, Algorithm]:
    """The candidates of :func:`forward` that serve an x of ``narrow`` and a weight of ``wide`` on this machine."""
    return _serving(FORWARD, _numbers((5, 24), narrow), _numbers((9, 24), wide), _numbers((9,), wide), activation)


@functools.cache
def grad_input_candidates(narrow: torch.dtype, wide: torch.dtype) -> dict[str, Algorithm]:
    return _serving(GRAD_INPUT, _numbers((5, 9), narrow), _numbers((9, 24), wide))


@functools.cache
def grad_weight_candidates(narrow: torch.dtype, wide: torch.dtype) -> dict[str, Algorithm]:
    return _serving(GRAD_WEIGHT, _numbers((5, 9), narrow), _numbers((5, 24), narrow), wide)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    n = torch.Size(shape).numel()
    return (torch.arange(n, dtype=torch.float32, device="cpu") * 5 % 7 - 3).view(shape).to(dtype) / 2


def _serving(candidates: Mapping[str, Algorithm], *args: Any) -> dict[str, Algorithm]:
    """Those of ``candidates`` that take a small call and give its result: a library may refuse a dtype or an activation
    on this processor."""
    dtype = args[0].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return {"torch": candidates["torch"]}
    there = {
        "onednn": onednn() is not None,
        "pyvit": library.problem() is None,
        "float32 copies": dtype != torch.float32,
        "torch": True,
    }
    with torch_private.without_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        wanted = candidates["torch"](*args)
        return {
            name: algorithm
            for name, algorithm in candidates.items()
            if there[name] and (name == "torch" or agrees(algorithm, args, wanted))
        }


def agrees(algorithm: Algorithm, args: tuple[Any, ...], wanted: Tensor) -> bool:
    """Whether ``algorithm`` takes the call and gives the result but for rounding."""
    try:
        found = algorithm(*args)
    except RuntimeError:  # oneDNN refuses a dtype or an attribute on this processor
        return False
    eps = max(torch.finfo(dtype).eps for dtype in (wanted.dtype, args[0].dtype))
    tolerance = 64 * eps * float(wanted.abs().max())
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= tolerance).all())


def expected(
    kind: str, candidates: Mapping[str, Algorithm], rows: int, weight: tuple[int, ...], dtype: torch.dtype
) -> str:
    """What a call that nothing is remembered of will choose, and why."""
    if _policy == "measure" and not torch.are_deterministic_algorithms_enabled():
        return "the fastest that the first call measures (PYVIT_LINEAR=measure)"
    return "{} ({})".format(*_choice(kind, candidates, lambda _: (), rows, weight, dtype))


def explain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> list[str]:
    """Which product a call takes, for :func:`pyvit.explain`; nothing of it is computed."""
    rows = x.numel() // max(x.shape[-1], 1)
    candidates = (
        forward_candidates(x.dtype, weight.dtype, activation) if weight.is_contiguous() else {"torch": by_torch}
    )
    found = known(forward_key(rows, x, weight, bias, activation))
    return [f"matrix product by {found or expected('forward', candidates, rows, tuple(weight.shape), x.dtype)}"]
