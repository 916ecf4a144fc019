"""Properties of every operator on every backend: dispatcher rules, torch.compile, export, autocast, double backward,
determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyvit
from pyvit import library
from pyvit.dispatch.capabilities import CAPABILITIES, absent, preference
from pyvit.testing import Served, compare


def _low_level(name: str, on: Served) -> Any:
    if on.backend == "reference" and library.problem() is None:
        pytest.skip("the library's dispatcher operators run its kernels, and there is none for this one")
    return getattr(torch.ops.pyvit, name.partition("-")[0]).default


def _gradients(
    example: Any, on: Served, leaves: dict[str, Tensor], call: Any = None, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of a fixed weighted sum of them."""
    outputs = (call or example)(on, leaves)
    differentiable = [o for o in outputs if o.requires_grad]
    weights = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in differentiable]
    wanted = [t for t in leaves.values() if t.requires_grad]
    return outputs, list(torch.autograd.grad(differentiable, wanted, weights, **options))


def _same(got: Any, want: Any) -> None:
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_opcheck(example: Any, name: str, on: Served) -> None:
    """Schema, fake kernel against the real one, autograd registration, and tracing with dynamic shapes."""
    low = tuple(
        t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in example.low
    )
    torch.library.opcheck(_low_level(name, on), low)


@pytest.mark.isa
@pytest.mark.every_dtype
def test_same_bits_twice_and_for_one_and_two_threads(example: Any, on: Served, threads: Any) -> None:
    results = []
    for n in (1, 1, 2, 2):
        threads(n)
        results.append(_gradients(example, on, example.leaves()))
    _same(results[0], results[1])
    _same(results[2], results[3])
    if on.backend != "reference":  # the naive form consists of PyTorch's operators, which do not guarantee this
        _same(results[0], results[2])


@pytest.mark.every_dtype
def test_inputs_are_left_alone(example: Any, on: Served) -> None:
    leaves = example.leaves()
    _gradients(example, on, leaves)
    for name, t in example.tensors.items():
        assert torch.equal(leaves[name], t), name


@pytest.mark.every_dtype
def test_forward_is_the_same_without_gradients(example: Any, on: Served) -> None:
    with_grad = example(on, example.leaves())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            _same((example(on), []), (with_grad, []))


def test_low_level_call_is_the_same(example: Any, name: str, on: Served) -> None:
    """torch.ops.pyvit.<op> gives the same result, with the backend's name and with "auto"."""
    op, key = _low_level(name, on), name.partition("-")[0]
    first = next(b for b in preference(key) if b in CAPABILITIES[key] and absent(key, b, on.device) is None)
    for backend, served in ((on.backend, on.backend), ("auto", first)):
        out = example(on._replace(backend=served))
        if example.op is pyvit.ops.window_attention:
            out = out[:1]
        low = op(*example.low[:-1], backend)
        low = [low] if isinstance(low, Tensor) else list(low)[: len(out)]
        _same((low, []), (out, []))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(example: Any, on: Served, dynamic: bool) -> None:
    """One graph without breaks, forward and backward, with the same bits."""
    torch._dynamo.reset()
    call = example.__call__  # of a named tuple, which the compiler of torch 2.10 does not call
    compiled = torch.compile(lambda leaves: call(on, leaves), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = _gradients(example, on, example.leaves())
    got = _gradients(example, on, example.leaves(), call=lambda on, leaves: compiled(leaves))
    if on.backend == "reference":  # decomposed before it runs, which may round differently
        for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    else:
        _same(got, want)


@pytest.mark.slow
def test_compile_with_inductor(example: Any, on: Served) -> None:
    """In one graph with fused elementwise operations."""
    torch._dynamo.reset()
    call = example.__call__

    def around(leaves: dict[str, Tensor]) -> list[Tensor]:
        scaled = {name: t * 1.5 if t.is_floating_point() else t for name, t in leaves.items()}
        return [o.sin() for o in call(on, scaled)]

    compiled = torch.compile(around, fullgraph=True)
    want = _gradients(example, on, example.leaves(), call=lambda on, leaves: around(leaves))
    got = _gradients(example, on, example.leaves(), call=lambda on, leaves: compiled(leaves))
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_export(example: Any, on: Served) -> None:
    """torch.export captures the call, and the exported program gives the same result."""

    class Module(torch.nn.Module):
        def forward(self, leaves: dict[str, Tensor]) -> list[Tensor]:
            return example(on, leaves)

    with torch.no_grad():
        program = torch.export.export(Module(), (example.tensors,))
        got, want = program.module()(example.tensors), example(on)
    if on.backend == "reference":
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    else:
        _same((got, []), (want, []))
        assert any("pyvit" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace. is deprecated:DeprecationWarning"
)
def test_jit_trace(example: Any, on: Served) -> None:
    """torch.jit.trace records the call, and the graph gives the right result for other values."""
    names = list(example.tensors)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(example(on, dict(zip(names, tensors, strict=True))))

    with torch.no_grad():
        traced = torch.jit.trace(Module(), tuple(example.tensors.values()), check_trace=False)
        other = {name: t * 0.5 if t.is_floating_point() else t for name, t in example.tensors.items()}
        for got, want in zip(traced(*other.values()), example(on, other), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_autocast(example: Any, name: str, on: Served) -> None:
    """Under autocast the operands are cast, as in a matrix product, and gradients have the dtype of the leaves."""
    leaves = example.leaves()
    with torch.autocast(on.device, torch.bfloat16):
        outputs, grads = _gradients(example, on, leaves)
        report = pyvit.explain(example.op, **example.tensors, **example.options)
    assert outputs[0].dtype == report.call.dtype == torch.bfloat16
    assert all(g.dtype == t.dtype for g, t in zip(grads, (t for t in leaves.values() if t.requires_grad), strict=True))
    wide, _ = _gradients(example, on, example.leaves())
    assert (outputs[0].float() - wide[0]).norm() < 0.05 * wide[0].norm()  # a sharp softmax may change single elements
    with torch.autocast(
        on.device, torch.bfloat16
    ):  # the dispatcher's own autocast layer, for calls that bypass pyvit.ops
        low = _low_level(name, on)(*example.low)
    assert torch.equal(low if isinstance(low, Tensor) else low[0], outputs[0])


def test_checkpointing(example: Any, on: Served) -> None:
    def again(on: Served, leaves: dict[str, Tensor]) -> list[Tensor]:
        return torch.utils.checkpoint.checkpoint(lambda: example(on, leaves), use_reentrant=False)

    _same(_gradients(example, on, example.leaves(), call=again), _gradients(example, on, example.leaves()))


def _second(example: Any, on: Served, leaves: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Gradients of the squared norm of the gradients."""
    _, grads = _gradients(example, on._replace(backend=backend), leaves, create_graph=True)
    wanted = [t for t in leaves.values() if t.requires_grad]
    return list(
        torch.autograd.grad(sum(g.square().sum() for g in grads), wanted, allow_unused=True, materialize_grads=True)
    )


def test_double_backward(example: Any, on: Served) -> None:
    """Second derivatives against float64."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in example.tensors.items()}
    leaves = {name: t.requires_grad_(t.is_floating_point()) for name, t in wide.items()}
    results = [_second(example, on, example.leaves(), backend) for backend in (on.backend, "reference")]
    names = [name for name, t in leaves.items() if t.requires_grad]
    compare("second", *results, _second(example, on, leaves, "reference"), factor=4, labels=names)


def _reverse(call: Any, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: call(x).square().sum())(x)


def _forward(call: Any, x: Tensor) -> Tensor:
    return torch.func.jvp(call, (x,), (torch.ones_like(x),))[1]


def _mapped(call: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(call)(torch.stack([x, 2 * x]))


@pytest.mark.parametrize("transform", [_reverse, _forward, _mapped], ids=lambda f: f.__name__[1:])
def test_function_transforms_are_right_or_refused(example: Any, on: Served, transform: Any) -> None:
    """torch.func gives the same as for the naive form, or raises; gradients are never silently dropped."""
    key = next(name for name, t in example.tensors.items() if t.is_floating_point())

    def call(x: Tensor, backend: str = on.backend) -> Tensor:
        return example(on._replace(backend=backend), {**example.tensors, key: x})[0]

    x = example.tensors[key]
    want = transform(lambda x: call(x, "reference"), x)
    try:
        got = transform(call, x)
    except (RuntimeError, NotImplementedError):
        if on.backend == "reference" or transform is _reverse:
            raise
        return
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * max(1.0, float(want.abs().max())))


def test_forward_mode_is_refused(example: Any, on: Served) -> None:
    """Kernels have no forward-mode derivative and raise an error; the naive form supports it."""
    key = next(name for name, t in example.tensors.items() if t.is_floating_point())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(example.tensors[key], torch.ones_like(example.tensors[key]))
        out = example(on._replace(backend="reference"), {**example.tensors, key: dual})[0]
        assert torch.autograd.forward_ad.unpack_dual(out).tangent.abs().sum() > 0
        if on.backend != "reference":
            with pytest.raises(NotImplementedError, match="forward-mode differentiation needs backend='reference'"):
                example(on, {**example.tensors, key: dual})
