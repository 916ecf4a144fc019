"""Gated MLPs (SwiGLU, GEGLU): two linear layers with a gate between them, keeping little for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Operator
from pyvit.dispatch.capabilities import PLAIN
from pyvit.ops import activations, checks, matmul, prepacked, reference, row_norm
from pyvit.ops.linear import check_around, check_norm, explain, narrow, prepare, select
from pyvit.ops.prepacked import Branch, Norm
from pyvit.ops.tracing import transformed


def gated_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "silu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_last: bool = False,
    hidden_norm: Norm | None = None,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + scale * (hidden_norm(activation(gate) * value) fc2_weight^T + fc2_bias), where gate and value are
    linear in norm(x). Shazeer, "GLU Variants Improve Transformer" (2020).

    Packed, the halves of norm(x) fc1_weight^T + fc1_bias are the gate and the value. With ``gate_weight`` they have a
    weight each: the gate is norm(x) gate_weight^T + gate_bias and the value norm(x) fc1_weight^T + fc1_bias.

    On a CPU, inference with prepacked weights (:func:`pyvit.pack_weights`) computes a block of rows at a time in cache,
    applies the gate to tiles as they are computed, and stores neither gates nor values. Otherwise the layers run one
    after another. The backward pass needs the gates and the values; their product is computed again, in one pass with
    both gradients and the sums that are the biases' gradients.

    Args:
        x: (..., K).
        fc1_weight: (2 H, K), or (H, K) with ``gate_weight``; fc1_bias: of as many elements as rows, or None.
        fc2_weight: (M, H); fc2_bias: (M,) or None.
        activation: of the gate, as in :func:`pyvit.ops.linear`, but not None. "silu" is SwiGLU, "gelu" GEGLU.
        gate_weight: (H, K); gate_bias: (H,) or None. Weights whose rows alternate are views: ``gate_weight=w[0::2]``,
            ``fc1_weight=w[1::2]``.
        gate_last: the second half of fc1_weight is the gate's, not the first.
        hidden_norm: a norm over H before the last layer (EVA-02), as ``norm``.
        norm, scale (M,), residual (..., M), backend: as in :func:`pyvit.ops.linear`.

    Returns (..., M). Raises ValueError or TypeError naming the argument that does not fit, BackendError where
    ``backend`` cannot serve.
    """
    branch = Branch(fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, norm, scale, residual)
    gate = (gate_weight, gate_bias, gate_last, hidden_norm)
    if backend in (None, "cpu") and (out := _prepacked(x, branch, gate)) is not None:
        return out
    if norm is not None or scale is not None or residual is not None:
        _check(x, branch, *gate)
        layers = lambda y: gated_mlp(  # noqa: E731
            y,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            activation=activation,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
            gate_last=gate_last,
            hidden_norm=hidden_norm,
            backend=backend,
        )
        return prepacked.around(x, layers, branch, backend)
    x, weights, device = _prepare(x, branch, *gate)
    rest = (*prepacked.norm_arguments(hidden_norm, x.dtype), gate_last, activation)
    chosen = select("gated_mlp", device, x.dtype, backend, x, *weights)
    if chosen in PLAIN or torch.compiler.is_compiling():
        return GATED_MLP(x, *narrow(x, *weights), *rest, chosen)  # type: ignore[no-any-return]
    return GATED_MLP.eager(x, *weights, *rest, chosen)  # type: ignore[no-any-return]


_NORMS = (tuple, type(None))


def _prepacked(x: Tensor, branch: Branch, gate: tuple[Any, ...]) -> Tensor | None:
    """As :func:`pyvit.ops.linear.prepacked_branch`."""
    if type(branch.norm) not in _NORMS or type(gate[3]) not in _NORMS:
        return None
    try:
        return prepacked.gated_branch(x, branch, *gate)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        _check(x, branch, *gate)
        raise


def _check(x: Tensor, branch: Branch, *gate: Any) -> None:
    _prepare(x, branch, *gate)
    check_around("gated_mlp", x, branch)


_Weights = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]


def _prepare(
    x: Tensor,
    branch: Branch,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gate_last: bool,
    hidden_norm: Norm | None,
) -> tuple[Tensor, _Weights, str]:
    """x, the weights and biases in the order of the schema, checked, and their device; in autocast's dtype."""
    op = "gated_mlp"
    checks.flag(op, "gate_last", gate_last)
    fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, *_ = branch
    if activation is None:
        checks.fail(op, "activation", f"one of {', '.join(reference.ACTIVATIONS)}", None)
    x, fc1_weight, fc1_bias, device = prepare(x, fc1_weight, fc1_bias, activation, op, ("x", "fc1_weight", "fc1_bias"))
    rows = fc1_weight.shape[0]
    if gate_weight is None:
        if gate_bias is not None:
            checks.fail(op, "gate_bias", "None without gate_weight", checks.shape(gate_bias))
        if rows % 2:
            checks.fail(op, "fc1_weight", "of an even number of rows without gate_weight", checks.shape(fc1_weight))
        hidden = rows // 2
    else:
        if gate_last:
            checks.fail(op, "gate_last", "False with gate_weight", repr(gate_last))
        checks.tensor(op, "gate_weight", gate_weight, "(H, K)", 2)
        if gate_weight.shape != fc1_weight.shape:
            wanted = f"of the shape of fc1_weight, {tuple(fc1_weight.shape)}"
            checks.fail(op, "gate_weight", wanted, checks.shape(gate_weight))
        _, gate_weight, gate_bias, _ = prepare(x, gate_weight, gate_bias, None, op, ("x", "gate_weight", "gate_bias"))
        hidden = rows
    checks.tensor(op, "fc2_weight", fc2_weight, "(M, H)", 2)  # type: ignore[arg-type]
    if fc2_weight.shape[1] != hidden:  # type: ignore[union-attr]
        wanted = f"of shape (M, {hidden}) to fit fc1_weight"
        checks.fail(op, "fc2_weight", wanted, checks.shape(fc2_weight))  # type: ignore[arg-type]
    like = x.new_empty(0, hidden)
    _, fc2_weight, fc2_bias, _ = prepare(
        like,
        fc2_weight,  # type: ignore[arg-type]
        fc2_bias,
        None,
        op,
        ("the hidden layer", "fc2_weight", "fc2_bias"),
    )
    check_norm(op, "hidden_norm", like, hidden_norm)
    return x, (fc1_weight, fc1_bias, gate_weight, gate_bias, fc2_weight, fc2_bias), device


@dispatch.describes("gated_mlp")
def _describe(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "silu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_last: bool = False,
    hidden_norm: Norm | None = None,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    **_: Any,
) -> tuple[Call, list[str]]:
    branch = Branch(fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, norm, scale, residual)
    x, weights, device = _prepare(x, branch, gate_weight, gate_bias, gate_last, hidden_norm)
    check_around("gated_mlp", x, branch)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights))
    branch = branch._replace(weight=weights[0], bias=weights[1], weight2=weights[4], bias2=weights[5], activation=None)
    notes = explain(x, branch, grad) if device == "cpu" else []
    return Call("gated_mlp", device, x.dtype, ()), notes


class _GatedMlp(torch.autograd.Function):
    """Keeps gates, values and the statistics of the norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        kind: int,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        gate_last: bool,
        activation: str,
        _: str,
    ) -> Tensor:
        inner = matmul.forward(x, fc1_weight, fc1_bias, None)
        gates = None if gate_weight is None else matmul.forward(x, gate_weight, gate_bias, None)
        hidden = activations.gated(*_halves(inner, gates, gate_last), activation, temporary=True)
        hidden = hidden.view(*x.shape[:-1], fc2_weight.shape[1])
        hidden, statistics = _norm(hidden, kind, norm_weight, norm_bias, eps)
        ctx.rest = kind, eps, gate_last, activation
        inputs = (x, fc1_weight, fc1_bias, gate_weight, gate_bias, fc2_weight, fc2_bias, norm_weight, norm_bias)
        ctx.save_for_backward(*inputs, inner, gates, statistics)
        return matmul.forward(hidden, fc2_weight, fc2_bias, None)

    @staticmethod
    @dispatch.without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, inner, gates, statistics = ctx.saved_tensors
        x, w1, b1, wg, bg, w2, b2, norm_weight, norm_bias = inputs
        kind, eps, gate_last, activation = ctx.rest
        needs = ctx.needs_input_grad
        needs = (*needs[:7], *needs[8:10])  # in the order of inputs
        # A gradient of the gradient was asked for: by the plain formula, which autograd sees through.
        if torch.is_grad_enabled():

            def formula(x: Tensor, *given: Tensor | None) -> Tensor:
                weights, norm = narrow(x, *given[:6]), given[6:]
                return reference.gated_mlp(x, *weights, kind, *norm, eps, gate_last, activation)  # type: ignore[call-arg]

            found = dispatch.formula_gradients(formula, inputs, needs, grad)
            return (*found[:7], None, *found[7:], None, None, None, None)
        rows = grad.reshape(-1, grad.shape[-1])
        gate, value = _halves(inner, gates, gate_last)
        grads: list[Tensor | None] = [None] * 9
        if needs[6]:
            grads[6] = rows.sum(0).to(b2.dtype)
        grad_hidden = matmul.grad_input(rows, w2).contiguous()
        if kind:
            hidden = activations.gated(gate, value, activation, temporary=True)
            if needs[5]:
                normed, _ = _norm(hidden, kind, norm_weight, norm_bias, eps, statistics=False)
                grads[5] = matmul.grad_weight(rows, normed, w2.dtype)
                del normed
            parameters = needs[7] or needs[8]
            grad_hidden, *of_norm = _norm_gradients(
                grad_hidden, statistics, hidden, kind, norm_weight, norm_bias, eps, parameters
            )
            grads[7:] = [g if need else None for g, need in zip(of_norm, needs[7:], strict=True)]
        hidden, grad_inner, grad_gates, sums = activations.gate_gradient_(
            grad_hidden, gate, value, activation, gates is None, gate_last
        )
        if needs[5] and not kind:
            grads[5] = matmul.grad_weight(rows, hidden, w2.dtype)
        del grad_hidden, hidden
        of_gate, of_value = sums
        x_rows = x.reshape(-1, x.shape[-1]).contiguous()
        if needs[2]:
            both = (of_value, of_gate) if gate_last else (of_gate, of_value)
            grads[2] = (torch.cat(both) if gates is None else of_value).to(b1.dtype)
        if needs[4]:
            grads[4] = of_gate.to(bg.dtype)
        for of, weight, at in ((grad_inner, w1, 1), (grad_gates, wg, 3)):
            if of is None:
                continue
            if needs[at]:
                grads[at] = matmul.grad_weight(of, x_rows, weight.dtype)
            if needs[0]:
                part = matmul.grad_input(of, weight)
                grads[0] = part if grads[0] is None else grads[0] + part
        if needs[0]:
            grads[0] = grads[0].view(x.shape)  # type: ignore[union-attr]
        return (*grads[:7], None, *grads[7:], None, None, None, None)


def _halves(inner: Tensor, gates: Tensor | None, gate_last: bool) -> tuple[Tensor, Tensor]:
    """Gates and values (rows, H): the halves of ``inner``, or what there is of each."""
    inner = inner.view(-1, inner.shape[-1])
    if gates is not None:
        return gates.view(inner.shape), inner
    first, second = inner.chunk(2, -1)
    return (second, first) if gate_last else (first, second)


def _norm(
    hidden: Tensor, kind: int, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The norm of the hidden layer and, for the backward pass, its statistics."""
    if not kind:
        return hidden, None
    if not activations.ours(hidden):
        return reference.norm(hidden, kind, weight, bias, eps), None
    if kind == prepacked.RMS_NORM:
        rms_norm = row_norm.rms_norm if statistics else row_norm.rms_norm_inference
        return rms_norm(hidden, weight, eps, hidden.dtype, "cpu")
    layer_norm = row_norm.layer_norm if statistics else row_norm.layer_norm_inference
    return layer_norm(hidden, weight, bias, eps, hidden.dtype, "cpu")


def _norm_gradients(
    grad: Tensor,
    statistics: Tensor | None,
    hidden: Tensor,
    kind: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the hidden layer and, with ``parameters``, of the norm's weight and bias."""
    if statistics is not None and not transformed(grad):
        return row_norm.gradients(grad, statistics, parameters, hidden, weight, bias)
    at = [0] + [i for i, p in ((2, weight), (3, bias)) if p is not None and parameters]
    found = dispatch.reference_backward(reference.norm, [grad], (hidden, kind, weight, bias, eps), at)
    by_position = dict(zip(at, found, strict=True))
    return by_position[0], by_position.get(2), by_position.get(3)  # type: ignore[return-value]


def _kernel(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    kind: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gate_last: bool,
    activation: str,
    _: str,
) -> Tensor:
    inner = prepacked.layer(x, w1, b1, None)
    gates = None if wg is None else prepacked.layer(x, wg, bg, None)
    hidden = activations.gated(*_halves(inner, gates, gate_last), activation, temporary=True)
    hidden = hidden.view(*x.shape[:-1], w2.shape[1])
    hidden, _statistics = _norm(hidden, kind, norm_weight, norm_bias, eps, statistics=False)
    return prepacked.layer(hidden, w2, b2, None)


def _check_low(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    wg: Tensor | None,
    bg: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    kind: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gate_last: bool,
    activation: str,
) -> Call:
    norms: list[Norm | None] = [None, (norm_weight, norm_bias, eps), (norm_weight, eps)]
    if kind not in range(3):
        checks.fail("gated_mlp", "hidden_norm", "0 (none), 1 (layer norm) or 2 (RMS norm)", repr(kind))
    x, _, device = _prepare(x, Branch(w1, b1, activation, w2, b2), wg, bg, gate_last, norms[kind])
    return Call("gated_mlp", device, x.dtype, ())


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[4].shape[0])


_TENSORS = ("x", "fc1_weight", "fc1_bias", "gate_weight", "gate_bias", "fc2_weight", "fc2_bias")
GATED_MLP = Operator(
    "gated_mlp",
    reference=reference.gated_mlp,
    fake=_fake,
    check=_check_low,
    differentiable=(*_TENSORS, "norm_weight", "norm_bias"),
    autocast=_TENSORS,
    function=_GatedMlp,
    kernels={"cpu": "pyvit.ops.gated_mlp:_kernel"},
)
