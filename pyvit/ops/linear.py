"""A linear layer with its activation, on the fastest matrix product of the machine.

On a CPU, PyTorch's default product is not always the fastest. oneDNN, which is part of PyTorch, and ``csrc/cpu`` have
others, which also fuse the activation. :mod:`pyvit.ops.matmul_rules` chooses by processor, dtype and shape. On a GPU
the product is the vendor's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Operator
from pyvit.dispatch.capabilities import PLAIN
from pyvit.ops import activations, checks, matmul, prepacked, reference, row_norm
from pyvit.ops.prepacked import Branch, Norm
from pyvit.ops.tracing import compiled_inference, traced


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + scale * activation(norm(x) weight^T + bias).

    Args:
        x: (..., K).
        weight: (M, K); bias: (M,).
        activation: None, "gelu" (exact), "gelu_tanh", "quick_gelu" (x sigmoid(1.702 x)), "silu" or "relu".
        norm: (weight, bias, eps) of a layer norm of x, as for :func:`pyvit.ops.layer_norm`, or (weight, eps) of an RMS
            norm, as for :func:`pyvit.ops.rms_norm`; None for none.
        scale: (M,), LayerScale's; None for 1.
        residual: (..., M); None for 0.
        backend: "cpu" (the product of the rules), "reference" (the plain formula), or None: "cpu" where it can serve.

    Returns (..., M). Raises ValueError or TypeError naming the argument that does not fit, BackendError where
    ``backend`` cannot serve.

    Which product runs, torch's, oneDNN's or pyvit's own, is part of the result's last bits. It follows from the
    instruction set, the dtype, M, K and the rows to the next power of two: the same call on the same processor with as
    many threads has the same bits in every process. Where no gradient is wanted and the weight is packed
    (:func:`pyvit.pack_weights`), norm, scale and residual cost no pass over memory in pyvit's own product.

    Under autocast on a CPU the weights stay float32 beside a 16-bit x: the product rounds them as it packs them, no
    copies are kept for the backward pass, and their gradients are float32 sums that were never rounded.

    The environment variable ``PYVIT_LINEAR`` pins ``onednn``, ``pyvit`` or ``torch`` wherever that can serve (default
    ``auto``: the rules). With ``measure`` the first call of a kind in each process times them, which takes about ten
    times as long as the call, and keeps the fastest: processes may then differ in the last bits. Under
    ``torch.use_deterministic_algorithms`` nothing is measured.

    Graphs that ``torch.compile`` makes without gradients choose as eager calls do; those with gradients, exported ones
    and tensors that are traced hold the plain formula.
    """
    branch = Branch(weight, bias, activation, None, None, norm, scale, residual)
    if backend in (None, "cpu") and (out := prepacked_branch(x, branch, _check)) is not None:
        return out
    if not branch.is_one_layer():
        _check(x, branch)
        return prepacked.around(
            x, lambda y: linear(y, weight, bias, activation=activation, backend=backend), branch, backend
        )
    x, weight, bias, device = prepare(x, weight, bias, activation)
    chosen = select("linear", device, x.dtype, backend, x, weight)
    if chosen in PLAIN or torch.compiler.is_compiling():
        weight, bias = narrow(x, weight, bias)
        return LINEAR(x, weight, bias, activation, chosen)  # type: ignore[no-any-return]
    return LINEAR.eager(x, weight, bias, activation, chosen)  # type: ignore[no-any-return]


def prepacked_branch(x: Tensor, branch: Branch, check: Callable[[Tensor, Branch], object]) -> Tensor | None:
    """The branch with prepacked weights, or None where they are not or the call is more than inference.

    What does not fit is said by ``check``, in the words of the public function.
    """
    if type(branch.norm) not in _NORMS:
        return None
    try:
        return prepacked.linear_branch(x, branch)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        check(x, branch)
        raise


_NORMS = (tuple, type(None))


def _check(x: Tensor, branch: Branch) -> None:
    prepare(x, branch.weight, branch.bias, branch.activation)
    check_around("linear", x, branch)


def check_around(op: str, x: Tensor, branch: Branch) -> None:
    """Raises ValueError or TypeError where norm, scale or residual do not fit."""
    check_norm(op, "norm", x, branch.norm)
    last = branch.weight if branch.weight2 is None else branch.weight2
    for name, t, shape in (
        ("scale", branch.scale, last.shape[:1]),
        ("residual", branch.residual, (*x.shape[:-1], last.shape[0])),
    ):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.shape != shape:
            checks.tensor(op, name, t, str(tuple(shape)), len(shape))
            checks.fail(op, name, f"of shape {tuple(shape)}", checks.shape(t))
        checks.beside(op, name, t, "x", x)


def check_norm(op: str, name: str, x: Tensor, norm: Norm | None) -> None:
    """Raises ValueError or TypeError where a norm of x does not fit."""
    if norm is None:
        return
    if not isinstance(norm, tuple) or len(norm) not in (2, 3):
        wanted = "(weight, bias, eps) of a layer norm, (weight, eps) of an RMS norm or None"
        checks.fail(op, name, wanted, repr(norm))
    *parameters, eps = norm
    if name == "norm":
        row_norm.check("layer_norm" if len(norm) == 3 else "rms_norm", x, *parameters)  # type: ignore[arg-type]
    for at, t in enumerate(parameters):
        if t is None:
            continue
        argument = f"{name}[{at}]"
        checks.tensor(op, argument, t, f"({x.shape[-1]},)", 1)
        if t.shape != x.shape[-1:]:
            checks.fail(op, argument, f"of shape ({x.shape[-1]},)", checks.shape(t))
        if t.device != x.device or t.dtype not in (x.dtype, checks.wide(x.dtype)):
            checks.same(op, argument, t, "x", x)
        if parameters[0] is not None and t.dtype != parameters[0].dtype:
            checks.same(op, argument, t, f"{name}[0]", parameters[0])
    if len(norm) == 3 or eps is not None:
        checks.number(op, f"{name}[{len(norm) - 1}]", eps)


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    op: str = "linear",
    names: tuple[str, str, str] = ("x", "weight", "bias"),
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """The operands of ``op``'s layer, so called, checked, and their device; x in autocast's dtype.

    On a CPU float32 weights stay beside it as they are, to be rounded as they are multiplied: see :func:`narrow`.
    """
    _x, _weight, _bias = names
    if activation is not None and activation not in reference.ACTIVATIONS:
        checks.fail(op, "activation", f"None or one of {', '.join(reference.ACTIVATIONS)}", repr(activation))
    device = checks.device(op, _x, x)
    checks.tensor(op, _weight, weight, "(M, K)", 2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        checks.fail(
            op, _x, f"of shape (..., {weight.shape[1]}) to fit {_weight} {tuple(weight.shape)}", checks.shape(x)
        )
    if bias is not None:
        checks.dense(op, _bias, bias)
    if bias is not None and bias.shape != weight.shape[:1]:
        checks.fail(op, _bias, f"of shape ({weight.shape[0]},)", checks.shape(bias))
    wide = all(t is None or (t.dtype == torch.float32 and t.is_cpu) for t in (weight, bias))
    if wide and device == "cpu" and torch.is_autocast_enabled("cpu"):
        (x,) = dispatch.autocast(device, x)
        if x.dtype in (torch.bfloat16, torch.float16):
            return x, weight, bias, device
    x, weight, bias = dispatch.autocast(device, x, weight, bias)
    if weight.dtype != x.dtype or weight.device != x.device:
        checks.same(op, _weight, weight, _x, x)
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        checks.same(op, _bias, bias, _x, x)
    return x, weight, bias, device


def narrow(x: Tensor, *weights: Tensor | None) -> Any:
    """``weights`` in the dtype of x."""
    return tuple(t if t is None or t.dtype == x.dtype else t.to(x.dtype) for t in weights)


def select(op: str, device: str, dtype: torch.dtype, backend: str | None, *operands: Tensor | None) -> str:
    """The backend of ``op``: "reference" where a compiler, a transform or a mode must see the plain formula."""
    chosen = dispatch.select(Call(op, device, dtype, ()), backend)
    if chosen == "cpu" and traced(*operands) and not compiled_inference(*operands):
        return "reference"
    return chosen


@dispatch.describes("linear")
def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    **_: Any,
) -> tuple[Call, list[str]]:
    x, weight, bias, device = prepare(x, weight, bias, activation)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    branch = Branch(weight, bias, activation, None, None, norm, scale, residual)
    check_around("linear", x, branch)
    notes = explain(x, branch, grad) if device == "cpu" else []
    return Call("linear", device, x.dtype, ()), notes


def explain(x: Tensor, branch: Branch, grad: bool) -> list[str]:
    """Which matrix products a call uses."""
    if grad:
        return matmul.explain(x, branch.weight, branch.bias, None)
    return prepacked.explain(x, branch) or matmul.explain(x, branch.weight, branch.bias, branch.activation)


class _Linear(torch.autograd.Function):
    """Keeps the input and, for an activation, what it was applied to (relu: its result), and takes gradients by the
    faster products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, _: str) -> Tensor:
        fused = activation if activation == "relu" else None
        inner = matmul.forward(x, weight, bias, fused)
        out = inner if activation is None or activation == fused else activations.activate(inner, activation)
        ctx.activation = activation
        ctx.save_for_backward(x, weight, bias, None if activation is None else inner)
        return out

    @staticmethod
    @dispatch.without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, inner = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if (
            torch.is_grad_enabled()
        ):  # a gradient of the gradient was asked for: by the plain formula, which autograd sees through

            def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                weight, bias = narrow(x, weight, bias)
                return reference.linear(x, weight, bias, ctx.activation)

            return (*dispatch.formula_gradients(formula, (x, weight, bias), needs[:3], grad), None, None)
        sums = None
        if inner is not None:
            grad, sums = activations.gradient(grad, inner, ctx.activation)
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            matmul.grad_input(rows, weight).view(x.shape) if needs[0] else None,
            matmul.grad_weight(rows, x.reshape(-1, x.shape[-1]).contiguous(), weight.dtype) if needs[1] else None,
            (rows.sum(0) if sums is None else sums).to(bias.dtype) if needs[2] else None,
            None,
            None,
        )


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, _: str) -> Tensor:
    return prepacked.layer(x, weight, bias, activation)


def _check_low(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Call:
    x, *_, device = prepare(x, weight, bias, activation)
    return Call("linear", device, x.dtype, ())


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


LINEAR = Operator(
    "linear",
    reference=reference.linear,
    fake=_fake,
    check=_check_low,
    differentiable=("x", "weight", "bias"),
    autocast=("x", "weight", "bias"),
    function=_Linear,
    kernels={"cpu": "pyvit.ops.linear:_kernel"},
)
