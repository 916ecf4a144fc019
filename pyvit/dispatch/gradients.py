"""Gradients of operators: by their backward operator, or by differentiating the reference formula."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyvit import torch_private
from pyvit.dispatch.autocast import no_autocast
from pyvit.dispatch.schema import Schema

if TYPE_CHECKING:
    from pyvit.dispatch.operator import Gradient


class Derivative(NamedTuple):
    """What ``torch.library.register_autograd`` takes."""

    setup_context: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]


def _take(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """The elements at ``positions`` of a sequence, as a tuple."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)


def by_operator(schema: Schema, gradient: Gradient) -> Derivative:
    """The derivative of an operator whose gradients the operator ``gradient`` computes.

    What the context keeps is found by name, once: backward calls ``gradient`` with one selection from the gradients of
    the outputs, whether each argument needs its own, and the tensors and other values that were kept.
    """
    own = gradient.own
    tensors = [i for i, name in enumerate(schema.arguments) if name in schema.tensors]
    others = [i for i, name in enumerate(schema.arguments) if name not in schema.tensors]
    places = {i: at for at, i in enumerate(tensors)}  # of arguments among the saved tensors
    kept = [i for i, name in enumerate(schema.outputs) if name in own]
    constant = [i for i, name in enumerate(schema.outputs) if f"grad_{name}" not in own]
    pool = [f"grad_{name}" for name in schema.outputs]
    pool += [f"{name}_grad" for name in schema.arguments]
    pool += [schema.arguments[i] for i in tensors] + [schema.outputs[i] for i in kept]
    pool += [schema.arguments[i] for i in others]
    if unknown := [name for name in own if name not in pool]:
        raise ValueError(f"{gradient.name}: {', '.join(unknown)} must be named after an argument or output")
    take_saved = _take(tensors + [len(schema.arguments) + i for i in kept])
    take_others, take_constant = _take(others), _take(constant)
    take_arguments = _take([pool.index(name) for name in gradient.schema.arguments])
    # Outputs whose gradients must be tensors, each with its place among the saved tensors, if it is there.
    required = [
        (i, len(tensors) + kept.index(i) if i in kept else None)
        for i, name in enumerate(schema.outputs)
        if i not in constant and f"grad_{name}" not in gradient.schema.optional
    ]
    nothing = (None,) * len(schema.arguments)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        if constant:
            ctx.mark_non_differentiable(*take_constant(outputs))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*take_saved((*inputs, *outputs)))
        ctx.others = take_others(inputs)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        for i, like in required:
            if grads[i] is None:
                if all(grad is None for grad in grads):
                    return nothing
                assert like is not None
                grads = (*grads[:i], torch.zeros_like(saved[like]), *grads[i + 1 :])
        found = gradient(*take_arguments((*grads, *needs, *saved, *ctx.others)))
        answer: list[Any] = list(nothing)
        for i, grad in zip(gradient.inputs, (found,) if isinstance(found, Tensor) else found, strict=True):
            if needs[i]:
                answer[i] = _in_layout_of(saved[places[i]], grad)
        return tuple(answer)

    return Derivative(setup_context, backward)


def _in_layout_of(t: Tensor, grad: Tensor) -> Tensor:
    """A gradient whose channels are apart in memory where those of ``t`` are: of convolutions' outputs, for example,
    whose batch norm (PyTorch 2.13, on a CPU, in eval mode) computes wrong gradients from one of another layout."""
    if t.dim() < 2 or t.stride(-1) <= 1 or t.shape[-1] == 1 or grad.shape != t.shape:
        return grad
    return stored_as(grad, t)


def by_formula(schema: Schema, formula: Callable[..., Any], differentiable: Sequence[str]) -> Derivative:
    """The derivative of an operator that has no operator of its gradients: that of the reference ``formula``."""
    tensors = [i for i, name in enumerate(schema.arguments) if name in schema.tensors]
    others = [i for i, name in enumerate(schema.arguments) if name not in schema.tensors]
    take_tensors, take_others = _take(tensors), _take(others)
    take_arguments = _take([(tensors + others).index(i) for i in range(len(schema.arguments))])
    inputs = [schema.position(name) for name in differentiable]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*take_tensors(inputs))
        ctx.others = take_others(inputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *args, _backend = take_arguments((*ctx.saved_tensors, *ctx.others))
        wanted = [i for i in inputs if ctx.needs_input_grad[i]]
        found = reference_backward(formula, grads, args, wanted, create_graph=torch.is_grad_enabled())
        answer = dict(zip(wanted, found, strict=True))
        return tuple(answer.get(i) for i in range(len(schema.arguments)))

    return Derivative(setup_context, backward)


def of_gradients(gradient: Gradient, formula: Callable[..., Any]) -> Derivative:
    """The derivative of the operator ``gradient``: the reference ``formula`` differentiated twice."""

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
            skipped = len(gradient.own)
            forward, grads = args[skipped:-1], [args[i] for i in gradient.grads]
            present = [i for i in gradient.inputs if isinstance(forward[i], Tensor) and forward[i].is_floating_point()]
            firsts = dict(
                zip(present, reference_backward(formula, grads, forward, present, create_graph=True), strict=True)
            )
            pairs = []
            for i, g in zip(gradient.inputs, second, strict=True):
                first = firsts.get(i)
                if first is not None and first.requires_grad and g is not None and g.numel():
                    pairs.append((first, g.to(first.dtype)))
            wrt = [i for i in gradient.grads if args[i] is not None] + [skipped + i for i in present]
            found: Sequence[Tensor | None] = [None] * len(wrt)
            if pairs:
                found = torch.autograd.grad(
                    [f for f, _ in pairs], [args[i] for i in wrt], [g for _, g in pairs], allow_unused=True
                )
        answer: list[Any] = [None] * len(args)
        for i, grad in zip(wrt, found, strict=True):
            answer[i] = grad
        return tuple(answer)

    return Derivative(setup_context, backward)


def stored_as(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with its dimensions in the order in memory that those of ``like`` have."""
    strides = like.stride()
    order = sorted(range(t.dim()), key=lambda i: -strides[i])
    return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])


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
    # A tensor may be given twice, as keys and as values: views tell its gradients apart.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    given = [t for t, need in zip(inputs, needs, strict=False) if need and t is not None]
    with no_autocast(*grads):
        found = iter(torch.autograd.grad(formula(*inputs), given, grads, create_graph=True))
    return tuple(next(found) if need else None for need in needs)
