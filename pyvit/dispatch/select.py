"""Choosing the backend of a call, and explaining the choice."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit import torch_private
from pyvit.dispatch import choice, cost_model, devices
from pyvit.dispatch.capabilities import BACKENDS, CAPABILITIES, CPU_ONLY, absent, preference


class BackendError(RuntimeError):
    """An explicitly requested backend cannot serve the call; the message carries every reason."""


class Call(NamedTuple):
    """What a backend must know of a call to accept or refuse it."""

    op: str
    device: str
    dtype: torch.dtype
    features: tuple[str, ...]
    head_dims: tuple[int, ...] = ()
    #: For :mod:`pyvit.dispatch.choice`; see :func:`sizes`.
    sizes: tuple[int, ...] = ()


def reasons(call: Call, backend: str) -> list[str]:
    """Why ``backend`` cannot serve ``call``; empty when it can."""
    missing = absent(call.op, backend, call.device)
    if missing is not None:
        return [missing]
    capability = CAPABILITIES[call.op].get(backend)
    if capability is None:
        return [f"has no kernel for {call.op}"]
    if call.device == "cuda" and not capability.pure and (refused := devices.refused(backend, call.dtype)) is not None:
        return [refused]
    found = []
    if call.dtype not in capability.dtypes:
        found.append(f"dtype {_short(call.dtype)} is not among {', '.join(map(_short, capability.dtypes))}")
    low, high, multiple = capability.head_dim
    for d in call.head_dims:
        if not low <= d <= high or d % multiple:
            found.append(
                f"head dimension {d} is not in {low}..{high}" + (f" in steps of {multiple}" if multiple > 1 else "")
            )
    if backend == "cuda" and call.op == "window_attention" and call.sizes and (large := _too_large(call)) is not None:
        found.append(large)
    found += [f"does not support {name}" for name in call.features if name not in capability.features]
    return found


def _too_large(call: Call) -> str | None:
    """Why a window's tokens do not fit into the shared memory of a block of the CUDA kernels, None where they do."""
    _, _, _, height, width, _, d = call.sizes
    for gpu in devices.present():
        if not cost_model.cuda_window_fits(height * width, d, call.dtype.itemsize, gpu.shared):
            kib = gpu.shared >> 10
            return f"windows of {height} x {width} tokens need more than the {kib} KiB of shared memory of {gpu.name}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_override: str | None = _checked(os.environ.get("PYVIT_BACKEND") or None, "PYVIT_BACKEND")
_choices: dict[tuple[Call, str | None], str] = {}


def requested_backend() -> str | None:
    """The backend of :class:`use_backend` or ``PYVIT_BACKEND``, None for the automatic choice."""
    return _override


class use_backend:
    """Send every following call to one backend, process-wide; as a context manager, until the block ends.

    ``None`` restores the automatic choice. A call the backend cannot serve raises :class:`BackendError`.

    >>> with pyvit.use_backend("reference"):
    ...     out = model(images)
    """

    def __init__(self, name: str | None) -> None:
        global _override
        self._previous, _override = _override, _checked(name, "use_backend: name")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _override
        _override = self._previous


def select(call: Call, backend: str | None = None) -> str:
    """The backend that serves ``call``: the requested one, else that of :class:`use_backend` or ``PYVIT_BACKEND``, else
    the first able.

    Raises :class:`BackendError` when a requested backend refuses, ValueError when there is none of that name.
    """
    wanted = backend if backend is not None else _override
    if wanted is not backend and wanted in ("cuda", "triton") and call.op in CPU_ONLY:
        wanted = None
    if torch.compiler.is_compiling():  # made while tracing, where a cache would be a side effect of the graph
        return _select(call, wanted)
    return cached_choice(call, wanted)


def cached_choice(call: Call, wanted: str | None) -> str:
    """The backend that serves ``call``: ``wanted``, or with None the first able."""
    key = (call, wanted)
    chosen = _choices.get(key)
    if chosen is None:
        if len(_choices) >= 4096:  # lengths that change with every batch
            _choices.clear()
        chosen = _choices[key] = _select(call, wanted)
    return chosen


def used_backends() -> dict[str, set[str]]:
    """The backends that have served each operator in this process."""
    found: dict[str, set[str]] = {}
    for (call, _), backend in _choices.items():
        found.setdefault(call.op, set()).add(backend)
    return found


def _select(call: Call, wanted: str | None) -> str:
    if wanted is None:
        for name in _order(call):
            if not reasons(call, name):
                return name
        refusals = "; ".join(f"{name}: {', '.join(reasons(call, name))}" for name in BACKENDS)
        raise BackendError(f"{call.op}: no backend serves this call ({refusals})")
    _checked(wanted, "backend")
    refused = reasons(call, wanted)
    if refused:
        raise BackendError(f"{call.op}: backend {wanted!r} cannot serve this call: {'; '.join(refused)}")
    return wanted


def _order(call: Call) -> list[str]:
    """Backends in the order to ask them: as preferred, with the faster first where it is known which."""
    order, found = preference(call.op), _first(call)
    return order if found is None else [found.backend, *(name for name in order if name != found.backend)]


def _first(call: Call) -> choice.Choice | None:
    """Which of the backends that can serve ``call`` comes first, and why; None where their declared order stands."""
    table = CAPABILITIES[call.op]
    able = [b for b in BACKENDS if b != "reference" and b in table and not table[b].pure and not reasons(call, b)]
    return choice.first(*call[:4], call.sizes, tuple(able)) if len(able) > 1 else None


def sizes(device: str, *values: int) -> tuple[int, ...]:
    """``values`` for :attr:`Call.sizes` of a GPU call; none where one is symbolic, since one graph then serves them
    all."""
    if device != "cuda":
        return ()
    if torch.compiler.is_compiling() or torch_private.is_traced():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return values if all(has_static_value(v) for v in values) else ()
    return values


@dataclass(frozen=True)
class Explanation:
    """The report of :func:`explain`: the chosen backend, and for every other the reasons it was not."""

    call: Call
    chosen: str
    refusals: dict[str, list[str]]
    notes: list[str]

    def __str__(self) -> str:
        features = ", ".join(self.call.features) or "plain"
        lines = [f"{self.call.op} on {self.call.device}, {_short(self.call.dtype)} ({features}) -> {self.chosen}"]
        for name in BACKENDS:
            verdict = "chosen" if name == self.chosen else "; ".join(self.refusals[name]) or "able, comes later"
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    __repr__ = __str__


#: A describer turns the public arguments of an operator into its :class:`Call` and notes for :func:`explain`.
_Describer = Callable[..., tuple[Call, list[str]]]

#: By name: the public function, and its describer.
_described: dict[str, tuple[Callable[..., Any], _Describer]] = {}


def describes(function: Callable[..., Any] | str) -> Callable[[_Describer], _Describer]:
    """Register the describer of a public function, given itself or by its name in the describer's module.

    The describer is called with every argument of the function by name, defaults included.
    """

    def register(describe: _Describer) -> _Describer:
        public = describe.__globals__[function] if isinstance(function, str) else function
        _described[public.__name__] = public, describe
        return describe

    return register


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve ``op(*args, **kwargs)``, and why each other would not; nothing is computed.

    ``op`` is a function of :mod:`pyvit.ops` or its name. Raises what the call itself would raise for bad arguments.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _described:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_described))}, got {name!r}")
    function, describe = _described[name]
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    call, notes = describe(**given.arguments)
    chosen = select(call, given.arguments.get("backend"))
    refusals = {b: reasons(call, b) for b in BACKENDS}
    if (found := _first(call)) is not None:
        notes = [*notes, f"{found.backend} first, {found.why}"]
    return Explanation(call, chosen, refusals, notes)


def copy_notes(**tensors: Tensor | None) -> list[str]:
    """Notes on arguments that a kernel must copy because their last dimension is not contiguous."""
    return [
        f"{name} has stride {t.stride(-1)} in its last dimension and will be copied"
        for name, t in tensors.items()
        if t is not None and t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1
    ]
