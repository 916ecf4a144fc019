"""The numerics rule, shared by the tests, the fuzzer and the benchmarks.

An operator passes if ``max|op - ref64| <= factor * max|naive - ref64| + floor``: its error may be twice the error of
the naive form in the same dtype (three times for gradients), plus a rounding tolerance. ``ref64`` is the naive form in
float64.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch.capabilities import BACKENDS, CAPABILITIES

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0

#: Tolerance in units of the largest value's rounding: float32 results are sums of rounded products, 16-bit results are
#: rounded at the end.
FLOOR = {torch.float64: 16.0, torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}


class NumericsError(AssertionError):
    """An output is further from the float64 reference than the rule allows. The message lists every comparison."""


@dataclass(frozen=True)
class Comparison:
    """One tensor under the rule. ``error`` and ``naive_error`` are the largest absolute differences from the float64
    reference.
    """

    name: str
    error: float
    naive_error: float
    limit: float
    magnitude: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        figures = (
            f"error {self.error:.2e}, limit {self.limit:.2e}, naive {self.naive_error:.2e}, largest value "
            f"{self.magnitude:.2e}"
        )
        return f"{verdict} {self.name}: {figures}{self.note}"


def _peak(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _error(got: Tensor, ref: Tensor) -> tuple[float, str]:
    """Largest |got - ref| and its position; infinite unless the same values are not finite."""
    if not got.numel():
        return 0.0, ""
    wide = got.detach().double()
    same = (wide == ref) | (wide.isnan() & ref.isnan())
    difference = torch.where(same, 0.0, (wide - ref).abs())
    difference = torch.where(difference.isnan(), math.inf, difference)
    at = int(difference.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), difference.shape))
    return float(difference.flatten()[at]), f", worst at {where}: {float(wide[where]):.6g} for {float(ref[where]):.6g}"


def compare(
    name: str,
    op_outputs: Tensor | Sequence[Tensor],
    naive_outputs: Tensor | Sequence[Tensor],
    ref64_outputs: Tensor | Sequence[Tensor],
    factor: float = FORWARD_FACTOR,
    *,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    scores: float = 0.0,
    magnitudes: Sequence[float] | None = None,
    raises: bool = True,
) -> list[Comparison]:
    """Check an operator's outputs (or gradients) by the rule.

    Args:
        name: starts every line of the report.
        op_outputs, naive_outputs, ref64_outputs: a tensor or a sequence: the operator's, the naive form's in the same
            dtype, and the naive form's in float64.
        factor: 2 for outputs, 3 for gradients.
        labels: names of the tensors in a sequence.
        dtype: of the arithmetic, which sets the tolerance; by default the coarsest among the outputs.
        scores: largest magnitude of the exponents of a softmax with float32 statistics: exp turns their absolute error
            into a relative one.
        magnitudes: of the summands of each tensor, if sums may cancel; at least the tensor's own largest value is used.
        raises: raise :class:`NumericsError` if a tensor fails.

    Shapes, dtypes and values that are not finite must agree exactly (the naive form may overflow where the operator
    does not). A tensor that is zero in exact arithmetic is compared relative to the largest of the sequence, which its
    rounding comes from.
    """
    ops, naives, refs = ([t] if isinstance(t, Tensor) else list(t) for t in (op_outputs, naive_outputs, ref64_outputs))
    labels = labels or ([""] if len(ops) == 1 else [str(i) for i in range(len(ops))])
    if not len(ops) == len(naives) == len(refs) == len(labels):
        raise ValueError(
            f"{name}: {len(ops)} outputs, {len(naives)} naive, {len(refs)} reference, {len(labels)} labels"
        )
    coarse = dtype or max((t.dtype for t in ops), key=lambda d: torch.finfo(d).eps, default=torch.float32)
    refs = [r.detach().to(o.device).double() for r, o in zip(refs, ops, strict=True)]
    peaks = [_peak(r.where(r.isfinite(), 0.0)) for r in refs]
    found = []
    least = magnitudes or [max(peaks) if p <= 1e-9 * max(peaks) else p for p in peaks]
    for label, op, naive, ref, peak, scale in zip(labels, ops, naives, refs, peaks, least, strict=True):
        full = f"{name} {label}".rstrip()
        if op.shape != ref.shape or op.dtype != naive.dtype:
            note = f", got {op.dtype} {tuple(op.shape)}, wanted {naive.dtype} {tuple(ref.shape)}"
            found.append(Comparison(full, math.inf, 0.0, 0.0, peak, note))
            continue
        error, note = _error(op, ref)
        sound = naive.detach().double()
        naive_error = _peak(torch.where(sound.isfinite() & ref.isfinite(), sound - ref, 0.0))
        floor = FLOOR[coarse] * torch.finfo(coarse).eps + scores * torch.finfo(torch.float32).eps
        floor = floor * max(scale, peak) + torch.finfo(coarse).tiny
        limit = factor * naive_error + floor
        found.append(Comparison(full, error, naive_error, limit, peak, "" if error <= limit else note))
    if raises and not all(c.passed for c in found):
        raise NumericsError("\n".join(map(str, found)))
    return found


_M_PERTURB = (
    -6
)  # glibc's mallopt: new memory is filled with the complement of the value's low byte, when the value is not zero


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN in this context: that of torch.empty on any device, and with glibc that of C++ kernels."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    mallopt(_M_PERTURB, 0x100)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


#: Layouts of a tensor in memory, for :func:`layout`.
LAYOUTS = ("contiguous", "transposed", "permuted", "sliced", "stepped", "shifted", "expanded")


def layout(t: Tensor, how: str) -> Tensor:
    """The values of ``t`` with other strides. The memory between them is NaN, so that reading past a row is noticed.

    transposed: last two dimensions swapped in memory; permuted: the middle two; sliced: a corner of a larger tensor;
    stepped: every second element; shifted: misaligned by one element; expanded: stride 0 in the first dimension, with
    the values of the first slice; far: rows more than 2**31 elements apart, in memory that is hardly touched.
    """
    if how == "contiguous" or not t.dim():
        return t.contiguous()
    if how == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if how == "permuted":
        return t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() > 2 else t
    if how == "expanded":
        return t[:1].expand(t.shape) if len(t) else t
    filler = math.nan if t.is_floating_point() else 1
    if how == "far":
        rows = t.movedim(-2, 0).contiguous()
        apart = 2**31 + 8
        view = (
            t.new_empty(apart * (len(rows) - 1) + rows[0].numel())
            .as_strided(rows.shape, (apart, *rows.stride()[1:]))
            .movedim(0, -2)
        )
    elif how == "shifted":
        storage = t.new_full((t.numel() + 1,), filler)
        view = storage[1:].view(t.shape)
    elif how == "sliced":
        storage = t.new_full([n + 2 for n in t.shape], filler)
        view = storage[tuple(slice(1, n + 1) for n in t.shape)]
    elif how == "stepped":
        storage = t.new_full([2 * n for n in t.shape], filler)
        view = storage[tuple(slice(None, None, 2) for _ in t.shape)]
    else:
        raise ValueError(f"layout: how must be one of {', '.join(LAYOUTS)}, got {how!r}")
    view.copy_(t)
    return view


class Served(NamedTuple):
    """A backend, a device type and a dtype to test an operator with."""

    backend: str
    device: str
    dtype: torch.dtype

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal random numbers of this dtype on this device."""
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}" + (
            "" if self.device == "cpu" else f"-{self.device}"
        )


def served(op: str, *features: str, head_dims: Sequence[int] = ()) -> list[Served]:
    """Every (backend, device, dtype) of this machine that supports ``op`` with ``features``, from the capabilities that
    dispatch uses.

    ``reference`` is listed in float32 and float16, the dtypes that it serves if there is no kernel; ``torch``, which
    returns less than the contract, not at all.
    """
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = []
    for device in present:
        for backend in BACKENDS:
            capability = CAPABILITIES[op].get(backend)
            if capability is None or backend == "torch":
                continue
            dtypes = (torch.float32, torch.float16) if backend == "reference" else capability.dtypes
            calls = [dispatch.Call(op, device, dtype, tuple(features), tuple(head_dims)) for dtype in dtypes]
            found += [Served(backend, device, call.dtype) for call in calls if not dispatch.reasons(call, backend)]
    return found


def run(
    op: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    grads: Sequence[str],
    cotangents: Sequence[Tensor] | None,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``op(**tensors, **options)`` and, with ``cotangents`` (gradients of the outputs), the gradients of the
    tensors named in ``grads``.
    """
    leaves = {
        name: t.detach().requires_grad_() if cotangents is not None and name in grads else t
        for name, t in tensors.items()
    }
    outputs = op(**leaves, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if cotangents is None or not grads:
        return [o.detach() for o in outputs], []
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [leaves[n] for n in grads], [c for _, c in pairs], allow_unused=True
    )
    return [o.detach() for o in outputs], [
        torch.zeros_like(tensors[n]) if g is None else g for n, g in zip(grads, found, strict=True)
    ]


def _gradient_magnitudes(
    naive: Callable[..., Any],
    wide: Mapping[str, Tensor],
    grads: Sequence[str],
    want: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    broadcast: Mapping[str, Sequence[int]],
    options: Mapping[str, Any],
) -> list[float]:
    """The magnitudes that the rounding of each gradient is proportional to.

    A gradient through a softmax is a difference of two numbers of the size of the other gradients; with few keys it is
    small or zero. A gradient that is summed over broadcast dimensions has the rounding of its terms, which add like
    random numbers.
    """
    peaks = [_peak(g) for g in want]
    group = max(peaks, default=0.0)
    found = [
        8 * group if p <= 1e-9 * group else max(p, min(group, 4 * p)) for p in peaks
    ]  # nothing is left of sums over the channels
    for key, shape in broadcast.items():
        if key in grads:
            _, (terms,) = run(naive, {**wide, key: wide[key].expand(*shape)}, (key,), cotangents, **options)
            at = list(grads).index(key)
            found[at] = max(found[at], _peak(terms.square().sum_to_size(want[at].shape).sqrt()))
    return found


def check_op(
    op: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    *,
    backend: str,
    grads: Sequence[str] | None = None,
    naive: Callable[..., Any] | None = None,
    dtype: torch.dtype | None = None,
    scores: float = 0.0,
    broadcast: Mapping[str, Sequence[int]] | None = None,
    store: str = "contiguous",
    store_grad: str = "contiguous",
    name: str = "",
    raises: bool = True,
    **options: Any,
) -> list[Comparison]:
    """Run an operator forward and backward in NaN-filled memory, and check outputs and all gradients by the rule.

    Args:
        op: called as ``op(**tensors, **options, backend=backend)``; returns out or (out, lse).
        tensors: inputs that are converted to float64 for the reference; arguments that keep their dtype belong in
            ``options``.
        grads: names of the tensors to differentiate, by default all floating-point ones; () checks only the forward.
        naive: the naive form, by default ``op`` with ``backend="reference"``.
        dtype: of the arithmetic, for the tolerance; by default the coarsest among the floating-point tensors.
        scores: see :func:`compare`.
        broadcast: the full shape of tensors that the operator broadcasts; their gradients are sums that may cancel.
        store, store_grad: strides of the tensors and of the outputs' gradients, see :func:`layout`.
    """
    naive = naive or (lambda **kw: op(**kw, backend="reference"))
    tensors = {key: layout(t, store) for key, t in tensors.items()}
    floating = [key for key, t in tensors.items() if t.is_floating_point()]
    grads = floating if grads is None else list(grads)
    dtype = dtype or max((tensors[key].dtype for key in floating), key=lambda d: torch.finfo(d).eps)
    wide = {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
    shapes, _ = run(naive, tensors, (), None, **options)
    cotangents = [layout(torch.randn_like(o.contiguous()), store_grad) for o in shapes] if grads else None
    want, want_grads = run(naive, wide, grads, cotangents, **options)
    same, same_grads = run(naive, tensors, grads, cotangents, **options)
    with poisoned():
        got, got_grads = run(op, tensors, grads, cotangents, backend=backend, **options)
    name = name or getattr(op, "__name__", "op")
    rule = functools.partial(compare, name, dtype=dtype, scores=scores, raises=False)
    found = rule(got, same, want, FORWARD_FACTOR, labels=["out", "lse"][: len(got)])
    magnitudes = _gradient_magnitudes(naive, wide, grads, want_grads, cotangents, broadcast or {}, options)
    found += rule(
        got_grads,
        same_grads,
        want_grads,
        GRADIENT_FACTOR,
        labels=[f"grad_{key}" for key in grads],
        magnitudes=magnitudes,
    )
    if raises and not all(c.passed for c in found):
        raise NumericsError("\n".join(map(str, found)))
    return found
