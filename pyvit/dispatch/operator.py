"""Operators: one contract, registered with torch so that every way of calling it runs the same kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvit import library, torch_private
from pyvit.dispatch import gradients
from pyvit.dispatch.autocast import autocast as cast_tensors
from pyvit.dispatch.autocast import without_autocast
from pyvit.dispatch.capabilities import PLAIN
from pyvit.dispatch.gradients import Derivative, reference_backward, stored_as
from pyvit.dispatch.schema import schema_of
from pyvit.dispatch.select import Call, cached_choice

#: The name under which this package was imported: the package for the Hub has another (packaging/hub.py).
_PACKAGE = __name__.removesuffix(".dispatch.operator")

_before_modes: list[Callable[[], None]] = []


def before_modes(prepare: Callable[[], None]) -> Callable[[], None]:
    """Call ``prepare`` before each operator that runs under a dispatch mode."""
    _before_modes.append(prepare)
    return prepare


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
    """One dispatcher operator of :mod:`pyvit.schemas`, with its fake kernel, gradient and kernels per backend.

    Calling it takes the shortest way to the kernel: in eager mode straight to the backend's function, through one
    :class:`torch.autograd.Function` when a gradient is needed; while traced or under a functorch transform, through the
    dispatcher.

    Args:
        name: key into SCHEMAS or PYTHON_SCHEMAS.
        reference: the naive form, same arguments less the trailing ``backend``.
        fake: shapes, dtypes and strides of the outputs, same arguments as the schema.
        check: the contract for those who call torch.ops: the schema's arguments less ``backend`` to the call they are,
            or an error.
        gradient: the operator that computes the gradients.
        differentiable: without ``gradient``, names of the arguments that are differentiated through ``reference``.
        autocast: names of the tensors cast under autocast.
        function: for calls in eager mode that need a gradient, where other tensors than the operator's outputs are
            kept for it; takes the schema's arguments.
        kernels: per backend, "module:function" imported at first use. A backend that has a kernel and is not listed has
            it in the library: "cpu" under ``torch.ops.pyvit``, "cuda" under ``torch.ops.pyvit_cuda``.
        plain: the kernel of the backend "torch", which takes the schema's arguments; by default the reference.
        inference: per backend, the function of :meth:`eager` without a gradient, where it is another: it may give None
            for outputs that only the backward reads.
    """

    #: Positions of gradients among the arguments.
    grads: tuple[int, ...] = ()
    _function: type[torch.autograd.Function] | None
    _inference: Mapping[str, Callable[..., Any]] = {}

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., Call],
        gradient: Gradient | None = None,
        differentiable: Sequence[str] = (),
        autocast: Sequence[str] = (),
        function: type[torch.autograd.Function] | None = None,
        kernels: dict[str, str] | None = None,
        inference: dict[str, Callable[..., Any]] | None = None,
        plain: Callable[..., Any] | None = None,
    ) -> None:
        self.schema, self.gradient, self._inference = schema_of(name), gradient, inference or {}
        if gradient is not None:
            gradient.forward = self
            derivative: Derivative | None = gradients.by_operator(self.schema, gradient)
        else:
            derivative = gradients.by_formula(self.schema, reference, differentiable) if differentiable else None
        self._register(name, reference, fake, check, derivative, autocast, kernels or {})
        self._kernels["torch"] = plain or self._kernels["reference"]
        if function is not None:
            self._function = function

    def _register(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., Call],
        derivative: Derivative | None,
        autocast: Sequence[str],
        kernels: dict[str, str],
    ) -> None:
        self.name, self.reference, self.fake, self.check = name, reference, fake, check
        self._kernels: dict[str, Callable[..., Any]] = {"reference": lambda *args: reference(*args[:-1])}
        self._paths = kernels
        self._op = getattr(torch.ops.pyvit, name).default
        qualified = f"pyvit::{name}"
        torch.library.register_fake(qualified, _on_one_device(name, fake))
        self._function = None
        self._transformed: type[torch.autograd.Function] | None = None
        if derivative is not None:
            setup_context, backward = derivative.setup_context, without_autocast(derivative.backward)
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            self._function = self._make_function(setup_context, backward)
            self._transformed = self._make_transformed(setup_context, backward)
        if library.problem() is not None or "cpu" in self._paths:
            library.FRAGMENT.impl(name, self.run, "CPU")
        library.FRAGMENT.impl(name, self.run, "CUDA")
        if autocast:
            positions = [self.schema.position(argument) for argument in autocast]
            for device in ("CPU", "CUDA"):
                library.FRAGMENT.impl(name, self._autocast(device, positions), f"Autocast{device}")

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
                found = getattr(importlib.import_module(module.replace("pyvit", _PACKAGE, 1)), function)
            self._kernels[backend] = found
        return found

    def run(self, *args: Any) -> Any:
        """Kernel of the dispatcher where the library has none of its own: checks the arguments, resolves ``backend``,
        the last of them."""
        *given, backend = args
        chosen = cached_choice(self.check(*given), None if backend == "auto" else backend)
        return self.kernel(chosen)(*given, backend)

    def __call__(self, *args: Any) -> Any:
        if args[-1] in PLAIN:  # which autograd and the compiler see through
            return self.kernel(args[-1])(*args)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._op(*args)
        # Fake tensors, recorders and counters see what goes through the dispatcher.
        watched = torch_private.dispatch_modes() > 0
        if watched:
            for prepare in _before_modes:
                prepare()
        if torch_private.transforms_active():
            return self._op(*args) if self._transformed is None else self._transformed.apply(*args)
        if watched:
            return self._op(*args)
        for i in self.grads:
            if args[i] is not None and torch_private.is_batched(args[i]):
                return self._op(*args)  # the dispatcher takes them one by one
        if torch_private.forward_mode() and any(_is_dual(a) for a in args):
            raise NotImplementedError(
                f"{self.name}: forward-mode differentiation needs backend='reference', got {args[-1]!r}"
            )
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self._function.apply(*args) if self._function is not None else self._op(*args)
        with torch_private.below_autograd():
            return self.kernel(args[-1])(*args)

    def eager(self, *args: Any) -> Any:
        """The call where it is known that no compiler, transform, dispatch mode or dual number sees operators."""
        if self._function is not None and torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return self._function.apply(*args)
        return (self._inference.get(args[-1]) or self.kernel(args[-1]))(*args)

    def _make_function(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        operator = self

        def forward(ctx: Any, *args: Any) -> Any:
            with torch_private.below_autograd():
                output = operator.kernel(args[-1])(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self.name, (torch.autograd.Function,), methods)

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

    def _autocast(self, device: str, positions: Sequence[int]) -> Callable[..., Any]:
        def cast(*args: Any) -> Any:
            listed = list(args)
            for i in positions:
                (listed[i],) = cast_tensors(device.lower(), args[i])
            with torch_private.without_autocast_layer(device):
                return self._op(*listed)

        return cast


class Gradient(Operator):
    """The operator ``<name>_backward``, which computes the gradients of the operator ``<name>``.

    The names of its schema say what its arguments are: ``grad_<output>`` the gradient of an output, which thereby has
    one; ``<output>`` what the forward computed; ``<argument>_grad`` whether the gradient of an argument is wanted
    (without it, that of every tensor given is); then the forward's arguments. Its outputs are ``grad_<argument>``,
    empty where none is wanted.

    Args:
        name: of the forward.
        formula: the forward's naive form. The ``reference`` backend differentiates it, and a second derivative on any
            backend does so twice.
        fake: as for :class:`Operator`; by default each gradient is contiguous, of the shape and dtype of its argument.
        check: as for :class:`Operator`; by default the forward's for its arguments, and for results and their gradients
            the shapes and dtypes of its fake kernel.
        kernels: as for :class:`Operator`.
    """

    forward: Operator

    def __init__(
        self,
        name: str,
        *,
        formula: Callable[..., Any],
        fake: Callable[..., Any] | None = None,
        check: Callable[..., Call] | None = None,
        kernels: dict[str, str] | None = None,
    ) -> None:
        self.schema, forward = schema_of(f"{name}_backward"), schema_of(name)
        names = self.schema.arguments
        #: Arguments before the forward's, and positions of the outputs' gradients among them.
        self.own = names[: len(names) - len(forward.arguments)]
        self.grads = tuple(i for i, argument in enumerate(self.own) if argument.startswith("grad_"))
        #: Positions among the forward's arguments of those whose gradients are the outputs.
        self.inputs = [forward.position(output.removeprefix("grad_")) for output in self.schema.outputs]
        flags = [f"{forward.arguments[i]}_grad" for i in self.inputs]
        self._flags = [self.own.index(flag) if flag in self.own else None for flag in flags]
        self._formula = formula
        assert names[len(self.own) :] == forward.arguments, f"{name}_backward must end with the arguments of {name}"
        self._register(
            f"{name}_backward",
            self._reference,
            fake or self._fake,
            check or self._check,
            gradients.of_gradients(self, formula),
            (),
            kernels or {},
        )

    def _wanted(self, args: Sequence[Any]) -> list[bool]:
        """Which of the outputs are."""
        forward = args[len(self.own) :]
        return [
            forward[i] is not None and (flag is None or args[flag])
            for i, flag in zip(self.inputs, self._flags, strict=True)
        ]

    def _reference(self, *args: Any) -> Any:
        forward, wanted = args[len(self.own) :], self._wanted(args)
        inputs = [i for i, on in zip(self.inputs, wanted, strict=True) if on]
        found = iter(reference_backward(self._formula, [args[i] for i in self.grads], forward, inputs))
        like = self.fake(*args, "reference")
        outputs = [
            stored_as(next(found), t) if on else t  # type: ignore[arg-type]
            for on, t in zip(wanted, (like,) if isinstance(like, Tensor) else like, strict=True)
        ]
        return outputs[0] if isinstance(like, Tensor) else tuple(outputs)

    def _fake(self, *args: Any) -> Any:
        forward = args[len(self.own) :]
        outputs = [
            forward[i].new_empty(forward[i].shape) if on else args[self.grads[0]].new_empty(0)
            for i, on in zip(self.inputs, self._wanted(args), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _check(self, *args: Any) -> Call:
        forward = args[len(self.own) :]
        call = self.forward.check(*forward)
        meta = self.forward.fake(*(a.to("meta") if isinstance(a, Tensor) else a for a in forward), "auto")
        results = dict(zip(self.forward.schema.outputs, (meta,) if isinstance(meta, Tensor) else meta, strict=True))
        device = next(a.device for a in forward if isinstance(a, Tensor))
        for name, t in zip(self.own, args, strict=False):
            like = results.get(name.removeprefix("grad_"))
            if like is None or (t is None and name in self.schema.optional):
                continue
            if t is None:
                raise TypeError(f"{self.name}: {name} must be a Tensor, got None")
            for what, got, wanted in (
                ("shape", tuple(t.shape), tuple(like.shape)),
                ("dtype", t.dtype, like.dtype),
                ("device", t.device, device),
            ):
                if got != wanted:
                    error = TypeError if what == "dtype" else ValueError
                    raise error(f"{self.name}: {name} must have {what} {wanted}, got {got}")
        for i, flag in zip(self.inputs, self._flags, strict=True):
            if flag is not None and args[flag] and (forward[i] is None or not forward[i].is_floating_point()):
                name = self.forward.schema.arguments[i]
                raise ValueError(f"{self.name}: {name}_grad must be False unless {name} is a floating point tensor")
        return call
