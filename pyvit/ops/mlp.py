"""Two linear layers with an activation between them, keeping less for the backward pass than the layers one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Operator
from pyvit.dispatch.capabilities import PLAIN
from pyvit.ops import activations, checks, matmul, prepacked, reference
from pyvit.ops.linear import check_around, explain, narrow, prepacked_branch, prepare, select
from pyvit.ops.prepacked import Branch, Norm


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + scale * (activation(norm(x) fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias): a transformer's
    feed-forward layer.

    On a CPU, inference with prepacked weights (:func:`pyvit.pack_weights`) computes a block of rows at a time in cache
    and never stores the whole hidden layer. Otherwise the layers run one after another. For the backward pass only the
    argument of the activation is saved; the activation is recomputed together with its derivative. The hidden layer is
    thus stored once instead of twice, which saves a quarter of the memory of a ViT block.

    Args:
        x: (..., K).
        fc1_weight: (H, K); fc1_bias: (H,) or None.
        fc2_weight: (M, H); fc2_bias: (M,) or None.
        activation: as in :func:`pyvit.ops.linear`, but not None. norm, scale (M,), residual (..., M), backend: as
            there.

    Returns (..., M). Raises ValueError or TypeError naming the argument that does not fit, BackendError where
    ``backend`` cannot serve.
    """
    branch = Branch(fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, norm, scale, residual)
    if backend in (None, "cpu") and activation is not None and (out := prepacked_branch(x, branch, _check)) is not None:
        return out
    if norm is not None or scale is not None or residual is not None:
        _check(x, branch)
        layers = lambda y: mlp(  # noqa: E731
            y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation, backend=backend
        )
        return prepacked.around(x, layers, branch, backend)
    x, w1, b1, w2, b2, device = _prepare(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    chosen = select("mlp", device, x.dtype, backend, x, w1, w2)
    if chosen in PLAIN or torch.compiler.is_compiling():
        w1, b1, w2, b2 = narrow(x, w1, b1, w2, b2)
        return MLP(x, w1, b1, w2, b2, activation, chosen)  # type: ignore[no-any-return]
    return MLP.eager(x, w1, b1, w2, b2, activation, chosen)  # type: ignore[no-any-return]


def _check(x: Tensor, branch: Branch) -> None:
    _prepare(x, branch.weight, branch.bias, branch.weight2, branch.bias2, branch.activation)  # type: ignore[arg-type]
    check_around("mlp", x, branch)


def _prepare(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, str]:
    if activation is None:
        checks.fail("mlp", "activation", f"one of {', '.join(reference.ACTIVATIONS)}", None)
    x, fc1_weight, fc1_bias, device = prepare(
        x, fc1_weight, fc1_bias, activation, "mlp", ("x", "fc1_weight", "fc1_bias")
    )
    checks.tensor("mlp", "fc2_weight", fc2_weight, "(M, H)", 2)
    if fc2_weight.shape[1] != fc1_weight.shape[0]:
        checks.fail(
            "mlp", "fc2_weight", f"of shape (M, {fc1_weight.shape[0]}) to fit fc1_weight", checks.shape(fc2_weight)
        )
    hidden = x.new_empty(0, fc1_weight.shape[0])
    _, fc2_weight, fc2_bias, _ = prepare(
        hidden, fc2_weight, fc2_bias, None, "mlp", ("the hidden layer", "fc2_weight", "fc2_bias")
    )
    return x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, device


@dispatch.describes("mlp")
def _describe(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    **_: Any,
) -> tuple[Call, list[str]]:
    *layers, device = _prepare(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in layers)
    x, *weights = layers  # type: ignore[assignment]
    branch = Branch(weights[0], weights[1], activation, weights[2], weights[3], norm, scale, residual)  # type: ignore[arg-type]
    check_around("mlp", x, branch)
    notes = explain(x, branch, grad) if device == "cpu" else []
    return Call("mlp", device, layers[0].dtype, ()), notes  # type: ignore[union-attr]


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        activation: str,
        _: str,
    ) -> Tensor:
        inner = matmul.forward(x, fc1_weight, fc1_bias, None)
        ctx.activation = activation
        ctx.save_for_backward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, inner)
        return matmul.forward(activations.activate(inner, activation, temporary=True), fc2_weight, fc2_bias, None)

    @staticmethod
    @dispatch.without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, inner = ctx.saved_tensors
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs
        needs = ctx.needs_input_grad
        if (
            torch.is_grad_enabled()
        ):  # a gradient of the gradient was asked for: by the plain formula, which autograd sees through

            def formula(x: Tensor, *weights: Tensor | None) -> Tensor:
                w1, b1, w2, b2 = narrow(x, *weights)
                return reference.mlp(x, w1, b1, w2, b2, ctx.activation)

            return (*dispatch.formula_gradients(formula, inputs, needs[:5], grad), None, None)
        rows = grad.reshape(-1, grad.shape[-1])
        inner = inner.view(-1, inner.shape[-1])
        grads: list[Tensor | None] = [None] * 7
        if needs[4]:
            grads[4] = rows.sum(0).to(fc2_bias.dtype)
        grad_inner = matmul.grad_input(rows, fc2_weight).contiguous()
        hidden, sums = activations.gradient_(grad_inner, inner, ctx.activation)
        if needs[3]:
            grads[3] = matmul.grad_weight(rows, hidden, fc2_weight.dtype)
        del hidden
        if needs[2]:
            grads[2] = sums.to(fc1_bias.dtype)
        if needs[1]:
            grads[1] = matmul.grad_weight(grad_inner, x.reshape(-1, x.shape[-1]).contiguous(), fc1_weight.dtype)
        if needs[0]:
            grads[0] = matmul.grad_input(grad_inner, fc1_weight).view(x.shape)
        return tuple(grads)


def _kernel(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, _: str) -> Tensor:
    return prepacked.layer(prepacked.layer(x, w1, b1, activation), w2, b2, None)


def _check_low(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Call:
    x, *_, device = _prepare(x, w1, b1, w2, b2, activation)
    return Call("mlp", device, x.dtype, ())


def _fake(x: Tensor, _w1: Tensor, _b1: Tensor | None, w2: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], w2.shape[0])


MLP = Operator(
    "mlp",
    reference=reference.mlp,
    fake=_fake,
    check=_check_low,
    differentiable=("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    autocast=("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    function=_Mlp,
    kernels={"cpu": "pyvit.ops.mlp:_kernel"},
)
