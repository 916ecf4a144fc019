"""Gradients and second derivatives do not depend on autocast around the backward pass or on the gradients' strides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyvit import library, ops
from pyvit.testing import Served, layout
from tests.ops.conftest import EXAMPLES

KERNELS = "cpu" if library.problem() is None else "reference"


class Call:
    """``function(**leaves)`` and its leaves."""

    def __init__(self, function: Callable[..., Any], **tensors: Tensor) -> None:
        self.function, self.tensors = function, tensors

    def __call__(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        found = self.function(**leaves)
        return [o for o in ([found] if isinstance(found, Tensor) else found) if o.requires_grad]

    def leaves(self) -> dict[str, Tensor]:
        return {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in self.tensors.items()}


def _example(name: str, backend: str) -> Call:
    example = EXAMPLES[name](Served(backend, "cpu", torch.float32))
    return Call(lambda **kw: example.op(**kw, **example.options, backend=backend), **example.tensors)


def _other(name: str, backend: str) -> Call:
    r = torch.randn
    a, b = r(5, 8), r(5, 8)
    heads, keep = r(7, 8), {"backend": backend}
    calls: dict[str, Callable[[], Call]] = {
        "qkvpacked": lambda: Call(
            lambda qkv, bias: ops.flash_attention_qkvpacked(qkv, bias=bias, return_lse=True, **keep),
            qkv=r(2, 9, 3, 2, 16),
            bias=r(9, 9),
        ),
        "sdpa": lambda: Call(
            ops.scaled_dot_product_attention, query=r(2, 3, 9, 8), key=r(1, 3, 7, 8), value=r(2, 1, 7, 8)
        ),
        "layer_norm": lambda: Call(
            lambda x, weight, bias: ops.layer_norm(x, weight, bias, **keep), x=a, weight=r(8), bias=r(8)
        ),
        "rms_norm": lambda: Call(lambda x, weight: ops.rms_norm(x, weight, **keep), x=a, weight=r(8)),
        "linear": lambda: Call(
            lambda x, weight, bias: ops.linear(x, weight, bias, activation="gelu", **keep), x=a, weight=heads, bias=r(7)
        ),
        "gated_mlp": lambda: Call(
            lambda x, w, v, n: ops.gated_mlp(x, w, None, v, None, hidden_norm=(n, 1e-5), **keep),
            x=a,
            w=torch.cat((heads, heads * 0.5)),
            v=r(3, 7),
            n=r(7),
        ),
        "mlp": lambda: Call(lambda x, w, v: ops.mlp(x, w, None, v, None, **keep), x=a, w=heads, v=r(3, 7)),
        "info_nce": lambda: Call(
            lambda a, b, scale: ops.info_nce(a, b, scale, **keep), a=a, b=b, scale=torch.tensor(1.5)
        ),
        "nt_xent": lambda: Call(lambda a, b, t: ops.nt_xent(a, b, t, **keep), a=a, b=b, t=torch.tensor(0.5)),
        "sigmoid_contrastive": lambda: Call(
            lambda a, b, scale, bias: ops.sigmoid_contrastive(a, b, scale, bias, **keep),
            a=a,
            b=b,
            scale=torch.tensor(1.5),
            bias=torch.ones(()),
        ),
        "koleo": lambda: Call(lambda x: ops.koleo(x, **keep), x=a),
        "distillation": lambda: Call(lambda s: ops.distillation_cross_entropy(s, b, 0.5, 0.3, **keep), s=a),
        "distillation-prototypes": lambda: Call(
            lambda s, p: ops.distillation_cross_entropy(
                s, b, 0.5, 0.3, student_prototypes=p, teacher_prototypes=heads, **keep
            ),
            s=a,
            p=r(7, 8),
        ),
    }
    return calls[name]()


OTHERS = [
    "qkvpacked",
    "sdpa",
    "layer_norm",
    "rms_norm",
    "linear",
    "mlp",
    "gated_mlp",
    "info_nce",
    "nt_xent",
    "sigmoid_contrastive",
    "koleo",
    "distillation",
]
NAMES = [*EXAMPLES, *OTHERS, "distillation-prototypes"]


@pytest.fixture
def call(name: str, seeded: int) -> Call:
    return _example(name, KERNELS) if name in EXAMPLES else _other(name, KERNELS)


def _weights(outputs: list[Tensor]) -> list[Tensor]:
    return [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype) for o in outputs]


def _twice(call: Call, autocast: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients and the gradients of their squared norm, with autocast around the passes in ``autocast``: forward,
    first, second."""

    def around(part: str) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=part in autocast)

    leaves = call.leaves()
    wanted = [t for t in leaves.values() if t.requires_grad]
    with around("forward"):
        outputs = call(leaves)
    with around("first"):
        grads = torch.autograd.grad(outputs, wanted, _weights(outputs), create_graph=True)
    with around("second"):
        second = torch.autograd.grad(
            sum(g.float().square().sum() for g in grads), wanted, allow_unused=True, materialize_grads=True
        )
    return [g.detach() for g in grads], list(second)


@pytest.mark.parametrize("forward", ["", "forward"], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_the_backward_changes_nothing(call: Call, name: str, forward: str) -> None:
    want = _twice(call, forward)
    # The second pass over a linear layer's formula is torch's own, which casts its products.
    for around in ("first",) if name in ("linear", "mlp", "gated_mlp") else ("first", "second", "first and second"):
        got = _twice(call, f"{forward} {around}")
        for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_the_backward_alone(call: Call, name: str) -> None:
    """loss.backward() inside the autocast block."""
    leaves = call.leaves()
    wanted = [t for t in leaves.values() if t.requires_grad]
    outputs = call(leaves)
    want = torch.autograd.grad(outputs, wanted, _weights(outputs), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(outputs, wanted, _weights(outputs))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


STORED = ["transposed", "permuted", "sliced", "stepped", "shifted", "expanded"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
def test_gradients_stored_in_any_way(call: Call, name: str, create_graph: bool) -> None:
    leaves = call.leaves()
    wanted = [t for t in leaves.values() if t.requires_grad]
    outputs = call(leaves)
    for how in STORED:
        grads = (
            [layout(g, how) for g in _weights(outputs)]
            if how != "expanded"
            else [torch.ones(()).expand(o.shape) for o in outputs]
        )
        grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        got, want = (
            torch.autograd.grad(outputs, wanted, given, retain_graph=True, create_graph=create_graph)
            for given in (grads, [g.contiguous() for g in grads])
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_another_dtype(call: Call, name: str) -> None:
    """autograd converts them to the output's dtype."""
    leaves = call.leaves()
    wanted = [t for t in leaves.values() if t.requires_grad]
    outputs = call(leaves)
    weights = _weights(outputs)
    want = torch.autograd.grad(outputs, wanted, [w.bfloat16().float() for w in weights], retain_graph=True)
    for dtype in (torch.bfloat16, torch.float64):
        got = torch.autograd.grad(outputs, wanted, [w.bfloat16().to(dtype) for w in weights], retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_gradients_of_channels_that_are_apart_in_memory() -> None:
    """They lie in memory as the tensor does: torch's batch norm in eval mode (2.13, CPU) computes wrong gradients from
    some other layouts, silently."""
    features = torch.randn(1, 32, 6, 6, requires_grad=True)
    norm = torch.nn.BatchNorm2d(32).eval()
    found: dict[float, Tensor] = {}
    scales = (1.0, 0.5, 2.0)
    qkv = [norm(features * n) for n in scales]
    for n, t in zip(scales, qkv, strict=True):
        t.register_hook(functools.partial(found.__setitem__, n))
    out = ops.flash_attention(*(t.flatten(2).transpose(1, 2)[:, None] for t in qkv), backend=KERNELS)
    (out * torch.randn_like(out)).sum().backward()
    assert all(gradient.stride() == qkv[0].stride() for gradient in found.values())
    want = sum(n * gradient.double() for n, gradient in found.items()) / (1 + norm.eps) ** 0.5
    assert features.grad is not None
    torch.testing.assert_close(features.grad.double(), want, rtol=1e-5, atol=1e-6)
