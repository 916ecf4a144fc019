"""Choosing a backend, and registering operators so that every way of calling them runs the same kernels.

A public function in :mod:`pyvit.ops` checks its arguments, describes the call (:class:`Call`), asks :func:`select` for
a backend and calls an :class:`Operator`. The same Operator stands behind ``torch.ops.pyvit.<name>``, so the compiler,
export and C++ callers see no other code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from pyvit import gpu_choice, library, torch_private
from pyvit.backends import BACKENDS, CAPABILITIES, absent, preference


class BackendError(RuntimeError):
    """An explicitly requested backend cannot serve the call; the message carries every reason."""


class Call(NamedTuple):
    """What a backend must know of a call to accept or refuse it."""

    op: str
    device: str
    dtype: torch.dtype
    features: tuple[str, ...]
    head_dims: tuple[int, ...] = ()
    #: For :mod:`pyvit.gpu_choice`; see :func:`sizes`.
    sizes: tuple[int, ...] = ()


def reasons(call: Call, backend: str) -> list[str]:
    """Why ``backend`` cannot serve ``call``; empty when it can."""
    missing = absent(call.op, backend, call.device)
    if missing is not None:
        return [missing]
    capability = CAPABILITIES[call.op].get(backend)
    if capability is None:
        return [f"has no kernel for {call.op}"]
    found = []
    if call.dtype not in capability.dtypes:
        found.append(f"dtype {_short(call.dtype)} is not among {', '.join(map(_short, capability.dtypes))}")
    low, high, multiple = capability.head_dim
    for d in call.head_dims:
        if not low <= d <= high or d % multiple:
            found.append(
                f"head dimension {d} is not in {low}..{high}" + (f" in steps of {multiple}" if multiple > 1 else "")
            )
    found += [f"does not support {name}" for name in call.features if name not in capability.features]
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_override: str | None = _checked(os.environ.get("PYVIT_BACKEND") or None, "PYVIT_BACKEND")
_choices: dict[tuple[Call, str | None], str] = {}


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
    if (
        torch.compiler.is_compiling()
    ):  # the choice is made while tracing; a cache here would be a side effect of the graph
        return _select(call, wanted)
    return _chosen(call, wanted)


def _chosen(call: Call, wanted: str | None) -> str:
    key = (call, wanted)
    chosen = _choices.get(key)
    if chosen is None:
        if len(_choices) >= 4096:  # lengths that change with every batch
            _choices.clear()
        chosen = _choices[key] = _select(call, wanted)
    return chosen


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
    """Backends in the order to ask them: as preferred, with the faster of two kernels first where the sizes say
    which."""
    order = preference(call.op)
    if call.sizes and not reasons(call, "cuda") and not reasons(call, "triton"):
        faster = gpu_choice.first(call.op, call.dtype, call.features, call.sizes)
        if faster is not None:
            return [faster, *(name for name in order if name != faster)]
    return order


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
            verdict = "chosen" if name == self.chosen else "; ".join(self.refusals[name]) or "able, lower preference"
            lines.append(f"  {name:<10} {verdict}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    __repr__ = __str__


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve ``op(*args, **kwargs)``, and why each other would not; nothing is computed.

    ``op`` is a function of :mod:`pyvit.ops` or its name. Raises what the call itself would raise for bad arguments.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _describers:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_describers))}, got {name!r}")
    function = getattr(importlib.import_module("pyvit.ops"), name)
    inspect.signature(function).bind(*args, **kwargs)  # an argument the operator does not have is an error here too
    call, notes = _describers[name](*args, **kwargs)
    chosen = select(call, kwargs.get("backend"))
    refusals = {b: reasons(call, b) for b in BACKENDS}
    if not refusals["cuda"] and not refusals["triton"]:
        notes = [*notes, f"between cuda and triton: {_between(call)}"]
    return Explanation(call, chosen, refusals, notes)


def _between(call: Call) -> str:
    """Why of two GPU backends that are able one comes first."""
    if CAPABILITIES[call.op]["cuda"].pure:
        return "a tile loop in Python comes last"
    part = gpu_choice.part_at_hand()
    if part is None or not call.sizes or not all(call.sizes):
        return "declared order, for want of " + ("a GPU to predict for" if part is None else "sizes")
    return str(gpu_choice.compare(call.op, call.dtype, call.features, call.sizes, part))


_describers: dict[str, Callable[..., tuple[Call, list[str]]]] = {}


def describes(name: str) -> Callable[[Callable[..., tuple[Call, list[str]]]], Callable[..., tuple[Call, list[str]]]]:
    """Register the function that turns the public arguments of ``name`` into a :class:`Call` and notes for
    :func:`explain`."""

    def register(describe: Callable[..., tuple[Call, list[str]]]) -> Callable[..., tuple[Call, list[str]]]:
        _describers[name] = describe
        return describe

    return register


def copy_notes(**tensors: Tensor | None) -> list[str]:
    """Notes on arguments that a kernel must copy because their last dimension is not contiguous."""
    return [
        f"{name} has stride {t.stride(-1)} in its last dimension and will be copied"
        for name, t in tensors.items()
        if t is not None and t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1
    ]


def autocast(device: str, *tensors: Any) -> Any:
    """Under ``torch.autocast`` for ``device``, the floating tensors in its dtype; otherwise as they are. None stays
    None."""
    # Of the devices with kernels it is known, and some releases' compilers cannot trace the question.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
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
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def without_autocast(backward: _Backward) -> _Backward:
    """``backward`` with autocast off, under which its caller may be: the forward's operands were cast, or were left
    wide on purpose."""

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        with no_autocast(*grads):
            return backward(ctx, *grads)

    return cast(_Backward, call)


def _is_dual(a: Any) -> bool:
    """Whether ``a`` carries a forward-mode tangent, which a kernel would drop."""
    return isinstance(a, Tensor) and torch.autograd.forward_ad.unpack_dual(a).tangent is not None


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake`` for tensors of one device; with one meta tensor among others the dispatcher would ask it too."""

    def call(*args: Any) -> Any:
        devices = {a.device for a in args if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{name}: tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
        return fake(*args)

    return call


class Operator:
    """One dispatcher operator of :data:`pyvit.schemas.SCHEMAS`, with its fake kernel, gradient and kernels per backend.

    Calling it takes the shortest way to the kernel: in eager mode straight to the backend's function, through one
    :class:`torch.autograd.Function` when a gradient is needed; while traced or under a functorch transform, through the
    dispatcher.

    Args:
        name: key into SCHEMAS.
        reference: the naive form, same arguments less the trailing ``backend``.
        fake: shapes, dtypes and strides of the outputs, same arguments as the schema.
        check: the contract for those who call torch.ops: the schema's arguments less ``backend`` to the call they are,
            or an error.
        setup_context, backward: as for ``torch.library.register_autograd``.
        autocast_args: positions of the tensors cast under autocast.
        kernels: per backend, "module:function" imported at first use, or None for the dispatcher's own C++ kernel.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., Call],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        autocast_args: Sequence[int] = (),
        kernels: dict[str, str] | None = None,
    ) -> None:
        self.name, self._reference, self._check, self._autocast_args = name, reference, check, tuple(autocast_args)
        self._kernels: dict[str, Callable[..., Any]] = {"reference": lambda *args: reference(*args[:-1])}
        self._paths = kernels or {}
        self._of_gradients = name.endswith("_backward")
        self._op = getattr(torch.ops.pyvit, name).default
        qualified = f"pyvit::{name}"
        torch.library.register_fake(qualified, _on_one_device(name, fake))
        self._function: type[torch.autograd.Function] | None = None
        self._transformed: type[torch.autograd.Function] | None = None
        if backward is not None:
            assert setup_context is not None
            backward = without_autocast(backward)
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            self._function = self._make_function(setup_context, backward)
            self._transformed = self._make_transformed(setup_context, backward)
        if library.problem() is not None or "cpu" in self._paths:
            library.FRAGMENT.impl(name, self.run, "CPU")
        library.FRAGMENT.impl(name, self.run, "CUDA")
        if self._autocast_args:
            for device in ("CPU", "CUDA"):
                library.FRAGMENT.impl(name, self._autocast(device), f"Autocast{device}")

    def kernel(self, backend: str) -> Callable[..., Any]:
        """The function that computes this operator on ``backend``, taking the schema's arguments."""
        found = self._kernels.get(backend)
        if found is None:
            if backend == "auto" or (backend == "cpu" and "cpu" not in self._paths):
                found = self._op
            elif backend == "cuda" and "cuda" not in self._paths:
                found = getattr(torch.ops.pyvit_cuda, self.name).default
            else:
                module, _, function = self._paths[backend].partition(":")
                found = getattr(importlib.import_module(module), function)
            self._kernels[backend] = found
        return found

    def run(self, *args: Any) -> Any:
        """Kernel of the dispatcher where the library has none of its own: checks the arguments, resolves ``backend``,
        the last of them."""
        *given, backend = args
        return self.kernel(_chosen(self._check(*given), None if backend == "auto" else backend))(*given, backend)

    def __call__(self, *args: Any) -> Any:
        if args[-1] == "reference":  # plain PyTorch, which autograd and the compiler see through
            return self.kernel("reference")(*args)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._op(*args)
        watched = (
            torch_private.dispatch_modes() > 0
        )  # fake tensors, recorders, counters: they see what goes through the dispatcher
        if watched:
            importlib.import_module("pyvit.ops.flops").register()
        if torch_private.transforms_active():
            return self._op(*args) if self._transformed is None else self._transformed.apply(*args)
        if watched:
            return self._op(*args)
        if self._of_gradients and any(isinstance(a, Tensor) and torch_private.is_batched(a) for a in args[:2]):
            return self._op(*args)  # the dispatcher takes them one by one
        if torch_private.forward_mode() and any(_is_dual(a) for a in args):
            raise NotImplementedError(
                f"{self.name}: forward-mode differentiation needs backend='reference', got {args[-1]!r}"
            )
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self._function.apply(*args) if self._function is not None else self._op(*args)
        with torch_private.below_autograd():
            return self.kernel(args[-1])(*args)

    def _make_function(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        operator = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with torch_private.below_autograd():
                    output = operator.kernel(args[-1])(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return backward(ctx, *grads)

        Function.__name__ = Function.__qualname__ = self.name
        return Function

    def _make_transformed(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        """The form that torch.func sees: grad and vjp as in eager mode, vmap as a loop; jvp is refused by PyTorch,
        having no rule."""
        operator = self

        class Transformed(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return operator.kernel(args[-1])(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return backward(ctx, *grads)

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
                def at(i: int) -> list[Any]:
                    return [
                        a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a
                        for a, dim in zip(args, in_dims, strict=True)
                    ]

                calls = [operator(*at(i)) for i in range(info.batch_size)]
                if isinstance(calls[0], Tensor):
                    return torch.stack(calls), 0
                return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

        Transformed.__name__ = Transformed.__qualname__ = self.name
        return Transformed

    def _autocast(self, device: str) -> Callable[..., Any]:
        def cast(*args: Any) -> Any:
            listed = list(args)
            for at in self._autocast_args:
                (listed[at],) = autocast(device.lower(), args[at])
            with torch_private.without_autocast_layer(device):
                return self._op(*listed)

        return cast


def reference_backward(
    reference: Callable[..., Any],
    grads: Sequence[Tensor | None],
    args: Sequence[Any],
    inputs: Sequence[int],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of ``reference(*args)`` with respect to the tensors at positions ``inputs``, by autograd.

    Kernels run below the dispatcher's autograd layer; this puts it back in force.
    """
    if not inputs:
        return []
    with torch_private.above_autograd(), torch.enable_grad():
        if (
            torch_private.transforms_active()
        ):  # a transform's tensors are no leaves, and autograd.grad does not see through it
            return _pulled_back(
                reference,
                grads,
                [a.detach() if isinstance(a, Tensor) and not create_graph else a for a in args],
                inputs,
            )
        leaves = {i: args[i].detach().requires_grad_() if not create_graph else args[i] for i in inputs}
        outputs = reference(*[leaves.get(i, a) for i, a in enumerate(args)])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=False) if g is not None and o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [leaves[i] for i in inputs],
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        if create_graph:
            return list(found)
        return [torch.zeros_like(leaves[i]) if g is None else g for i, g in zip(inputs, found, strict=True)]


def _pulled_back(
    reference: Callable[..., Any], grads: Sequence[Tensor | None], args: Sequence[Any], inputs: Sequence[int]
) -> list[Tensor | None]:
    """:func:`reference_backward` by torch.func, inside of its transforms."""

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(inputs, given, strict=True))
        outputs = reference(*[replaced.get(i, a) for i, a in enumerate(args)])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(o for o, g in zip(outputs, grads, strict=False) if g is not None)

    outputs: tuple[Tensor, ...]
    outputs, pull = torch.func.vjp(function, *[args[i] for i in inputs])  # type: ignore[misc]
    wanted = [g for g in grads if g is not None]
    return list(pull(tuple(g.to(o.dtype) for o, g in zip(outputs, wanted, strict=True))))


def formula_gradients(
    formula: Callable[..., Any], inputs: Sequence[Tensor | None], needs: Sequence[bool], *grads: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``formula(*inputs)`` that can be differentiated again, for those of ``inputs`` that need one, None
    for the others."""
    given = [t for t, need in zip(inputs, needs, strict=False) if need and t is not None]
    with no_autocast(*grads):
        found = iter(torch.autograd.grad(formula(*inputs), given, grads, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def double_backward(
    reference: Callable[..., Any], n_grads: int, n_skipped: int, inputs: Sequence[int]
) -> dict[str, Any]:
    """Gradient of a ``*_backward`` operator by differentiating the reference formula twice.

    The operator's arguments are ``n_grads`` output gradients, ``n_skipped`` saved values, then the forward's,
    ``backend`` last; ``inputs`` are the forward positions whose gradients it returns, in order.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        tensors = [a if isinstance(a, Tensor) else None for a in inputs]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(a, Tensor) else a for a in inputs]

    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        with torch.enable_grad():
            args = [
                (t.detach().requires_grad_(t.is_floating_point()) if t is not None else o)
                for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)
            ]
            forward = args[n_grads + n_skipped : -1]
            present = [i for i in inputs if isinstance(forward[i], Tensor) and forward[i].is_floating_point()]
            firsts = dict(
                zip(
                    present,
                    reference_backward(reference, args[:n_grads], forward, present, create_graph=True),
                    strict=True,
                )
            )
            pairs = []
            for i, g in zip(inputs, second, strict=True):
                first = firsts.get(i)
                if first is not None and first.requires_grad and g is not None and g.numel():
                    pairs.append((first, g.to(first.dtype)))
            wrt = [g for g in args[:n_grads] if g is not None] + [forward[i] for i in present]
            found: Sequence[Tensor | None] = [None] * len(wrt)
            if pairs:
                found = torch.autograd.grad([f for f, _ in pairs], wrt, [g for _, g in pairs], allow_unused=True)
        answer: list[Any] = [None] * len(args)
        results = iter(found)
        for i in range(n_grads):
            if args[i] is not None:
                answer[i] = next(results)
        for i in present:
            answer[n_grads + n_skipped + i] = next(results)
        return tuple(answer)

    return {"setup_context": setup_context, "backward": backward}
