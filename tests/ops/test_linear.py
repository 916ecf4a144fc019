"""linear: activations and gradients under the numerics rule, the choice of the product, and what must see the plain
formula."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyvit
from pyvit import library
from pyvit.nn.linear import Linear
from pyvit.ops import linear, matmul, mlp, prepacked, reference
from pyvit.testing import compare, layout

ACTIVATIONS = [None, *reference.ACTIVATIONS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_compiling.*")


@pytest.fixture(params=["onednn", "pyvit", "torch", "auto", "measure"])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each policy, with nothing remembered."""
    monkeypatch.setattr(matmul, "_policy", request.param)
    monkeypatch.setattr(matmul, "_chosen", {})
    return request.param


def inputs(dtype: torch.dtype, *leading: int, k: int = 40, m: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*leading, k).to(dtype), (torch.randn(m, k) * k**-0.5).to(dtype), torch.randn(m).to(dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Output and every gradient, against float64, as far off as the plain formula at most."""
    grad = torch.randn(*x.shape[:-1], weight.shape[0]).to(x.dtype)

    def run(function: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        if dtype == x.dtype and function is linear:
            leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves, activation=activation)
        return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(dtype))]

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        return reference.linear(x, weight, bias, activation)

    labels = ["out", "grad_x", "grad_weight", "grad_bias"][: 4 if bias is not None else 3]
    ours, naive, exact = run(linear, x.dtype), run(plain, x.dtype), run(plain, torch.float64)
    compare(f"linear {activation}", ours[:1], naive[:1], exact[:1], labels=labels[:1])
    compare(f"linear {activation}", ours[1:], naive[1:], exact[1:], factor=3.0, labels=labels[1:])
    with torch.no_grad():
        compare(
            f"linear {activation} without gradient", linear(x, weight, bias, activation=activation), naive[0], exact[0]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numerics(policy: str, activation: str | None, dtype: torch.dtype) -> None:
    for leading, with_bias in itertools.product([(33,), (2, 3, 5)], [True, False]):
        x, weight, bias = inputs(dtype, *leading)
        check(x, weight, bias if with_bias else None, activation)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (0, 3), (1, 1, 7, 1)], ids=str)
def test_leading_dimensions(policy: str, leading: tuple[int, ...]) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(torch.float32, *leading))
    out = linear(x, weight, bias, activation="gelu")
    assert out.shape == (*leading, 24)
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in (x, weight, bias))
    torch.testing.assert_close(out, F.gelu(F.linear(x, weight, bias)))


@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "shifted", "expanded"])
@pytest.mark.parametrize("which", ["x", "weight", "both"])
def test_strides(policy: str, store: str, which: str) -> None:
    x, weight, bias = inputs(torch.float32, 4, 9)
    check(layout(x, store) if which != "weight" else x, layout(weight, store) if which != "x" else weight, bias, "gelu")


def test_a_bias_of_other_strides_than_before(policy: str) -> None:
    x, weight, bias = inputs(torch.float32, 40)
    linear(x, weight, bias)
    for other in (bias[:1].expand(24), torch.stack([bias, bias], 1)[:, 0]):
        torch.testing.assert_close(linear(x, weight, other), F.linear(x, weight, other))


def test_expanded_gradient(policy: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(torch.float32, 5, 7))
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(24, 40))
    torch.testing.assert_close(bias.grad, torch.full((24,), 35.0))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    leaves = [t.requires_grad_(need) for t, need in zip(inputs(torch.float32, 6), needs, strict=True)]
    linear(*leaves, activation="silu").sum().backward()
    assert [t.grad is not None for t in leaves] == list(needs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_in_float64_and_double_backward(activation: str | None) -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float64, 2, 3, k=4, m=3)]
    assert torch.autograd.gradgradcheck(lambda *t: linear(*t, activation=activation), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    seconds = []
    for function, tensors in ((linear, single), (reference.linear, leaves)):
        out = function(*tensors, activation=activation) if function is linear else function(*tensors, activation)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for ours, exact in zip(*seconds, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(torch.float32, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x, weight, bias, activation="gelu")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), F.gelu(F.linear(x, weight, bias)), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_stay_as_they_are_under_autocast(policy: str, dtype: torch.dtype) -> None:
    """No copy of them in the narrow dtype is kept, and their gradients err no more than torch's; a second derivative is
    there too."""
    x, weight, bias = (t.requires_grad_() for t in inputs(torch.float32, 70))
    grad = torch.randn(70, 24).to(dtype)
    saved: list[Tensor] = []

    def run(function: object) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            out = function(x, weight, bias, activation="gelu")
        return [out, *torch.autograd.grad(out, (x, weight, bias), grad)]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours = run(linear)
    assert any(t.data_ptr() == weight.data_ptr() for t in saved)
    assert not any(t.dtype == dtype and t.shape == weight.shape for t in saved)
    naive = run(lambda *t, activation: F.gelu(F.linear(*t)))
    double = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    out = F.gelu(F.linear(*double))
    exact = [out, *torch.autograd.grad(out, double, grad.double())]
    compare("linear under autocast", ours[:1], naive[:1], exact[:1])
    # Autocast rounds the operands: the error is theirs, whatever the dtype of a gradient.
    for one, other, true in zip(ours[1:], naive[1:], exact[1:], strict=True):
        assert one.dtype == torch.float32
        assert (one - true).abs().max() <= 2 * (other - true).abs().max()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(linear(x, weight, bias, activation="gelu").double(), exact[0], rtol=0.03, atol=0.03)
        with pytest.raises(ValueError, match="weight"):
            linear(x, weight.to("meta"), bias)
    with torch.autocast("cpu", dtype=dtype):
        first = torch.autograd.grad(linear(x, weight, bias).float().square().sum(), weight, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()


def test_same_bits_twice_and_under_checkpointing() -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(torch.float32, 50))
    grads = []
    for keep in (True, True, False):
        run = (lambda: linear(x, weight, bias, activation="gelu")) if keep else None
        out = run() if run else checkpoint(linear, x, weight, bias, activation="gelu", use_reentrant=False)
        grads.append(torch.autograd.grad(out.square().sum(), (x, weight, bias)))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu"])
def test_compiled_graphs_hold_the_plain_formula(activation: str | None) -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float32, 6)]
    compiled = torch.compile(lambda *t: linear(*t, activation=activation), fullgraph=True, backend="aot_eager")
    ours, eager = compiled(*leaves), reference.linear(*leaves, activation)
    torch.testing.assert_close(ours, eager)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (ours, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_modes_and_subclasses_see_the_plain_formula() -> None:
    x, weight, bias = inputs(torch.float32, 5, 6)
    torch.testing.assert_close(torch.vmap(lambda t: linear(t, weight, bias))(x), F.linear(x, weight, bias))
    _, tangent = torch.func.jvp(lambda t: linear(t, weight, bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, weight.sum(1).expand(5, 6, 24), rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias, activation="gelu")
    assert counter.get_total_flops() == 2 * 30 * 40 * 24
    with torch._subclasses.FakeTensorMode() as mode:
        assert linear(*(mode.from_tensor(t) for t in (x, weight, bias))).shape == (5, 6, 24)
    assert linear(*(t.to("meta") for t in (x, weight, bias))).shape == (5, 6, 24)


def test_measured_once_per_class_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_policy", "measure")
    monkeypatch.setattr(matmul, "_chosen", {})
    seen = []
    measured = matmul._measured
    monkeypatch.setattr(matmul, "_measured", lambda *args: seen.append(1) or measured(*args))
    x, weight, bias = inputs(torch.float32, 100)
    for rows in (100, 99, 70, 100):
        linear(x[:rows], weight, bias)
    assert len(seen) == 1
    linear(x[:30], weight, bias)
    linear(x, weight, bias, activation="relu")
    assert len(seen) == 3
    torch.use_deterministic_algorithms(True)
    try:
        linear(x, weight, bias)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seen) == 3
    assert "by rule" in list(matmul._chosen.values())[-1][1]


@pytest.mark.skipif(
    "onednn" not in matmul.forward_candidates(torch.float32, torch.float32, "gelu"),
    reason="this torch has no oneDNN product",
)
def test_explain_says_which(policy: str) -> None:
    if policy == "pyvit" and library.problem() is not None:
        pytest.skip("needs the compiled library")
    x, weight, bias = inputs(torch.float32, 100)
    before = str(pyvit.explain("linear", x, weight, bias, activation="gelu"))
    assert not matmul._chosen
    linear(x, weight, bias, activation="gelu")
    report = pyvit.explain(linear, x, weight, bias, activation="gelu")
    assert report.chosen == "cpu"
    wanted = {
        "onednn": "onednn (PYVIT_LINEAR)",
        "pyvit": "(PYVIT_LINEAR)",
        "torch": "torch (PYVIT_LINEAR)",
        "auto": "(by rule for ",
        "measure": "measured on 100 rows",
    }
    assert wanted[policy] in str(report)
    assert ("the first call measures" in before) if policy == "measure" else (before == str(report))
    assert pyvit.explain("linear", x.double(), weight.double()).chosen == "torch"


def test_a_wrong_library_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that returns something else, or raises, is dropped for another."""
    x, weight, bias = inputs(torch.float32, 100)
    monkeypatch.setattr(matmul, "_policy", "onednn")

    def refuses(*_: object) -> Tensor:
        raise RuntimeError("could not create a primitive")

    try:
        for broken in (lambda x, w, *_: torch.zeros(x.shape[0], w.shape[0]), refuses, None):
            monkeypatch.setattr(matmul, "onednn", lambda broken=broken: broken)
            monkeypatch.setattr(matmul, "_chosen", {})
            matmul.forward_candidates.cache_clear()
            torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
            assert not any(how.startswith("onednn") for _, how in matmul._chosen.values())
    finally:
        matmul.forward_candidates.cache_clear()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite_pass_through(policy: str, activation: str | None) -> None:
    x, weight, bias = inputs(torch.float32, 8)
    x[3] = float("nan")
    out, wanted = linear(x, weight, bias, activation=activation), reference.linear(x, weight, bias, activation)
    torch.testing.assert_close(out, wanted, equal_nan=True)


def test_environment() -> None:
    command = (
        "import torch, pyvit; from pyvit.ops import linear, matmul; t = torch.ones(8, 8); linear(t, t); "
        "print(matmul._chosen.values())"
    )

    def run(value: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYVIT_LINEAR": value}
        return subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False
        )

    assert "torch (PYVIT_LINEAR)" in run("torch").stdout
    assert "PYVIT_LINEAR must be one of auto, measure, onednn, pyvit, torch, got 'mkl'" in run("mkl").stderr


def test_module_is_a_linear_layer_that_can_be_copied() -> None:
    layer = Linear(40, 24, activation="gelu")
    x = torch.randn(3, 40)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(copy.deepcopy(layer)(x), out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "tanh"}, ValueError, "activation must be None or one of gelu"),
        ({"weight": torch.ones(24, 41)}, ValueError, "x must be of shape"),
        ({"weight": torch.ones(24)}, ValueError, "weight must be of shape"),
        ({"weight": torch.ones(24, 40, dtype=torch.bfloat16)}, TypeError, "weight must have the dtype of x"),
        ({"bias": torch.ones(23)}, ValueError, "bias must be of shape"),
        ({"bias": torch.ones(24, dtype=torch.float16)}, TypeError, "bias must have the dtype of x"),
        ({"x": [1.0]}, TypeError, "x must be a Tensor"),
        ({"backend": "mkl"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, pyvit.BackendError, "backend 'triton' cannot serve"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    x, weight, bias = inputs(torch.float32, 4)
    with pytest.raises(error, match=message):
        linear(**{"x": x, "weight": weight, "bias": bias, **change})


def test_backends() -> None:
    x, weight, bias = inputs(torch.float32, 4)
    plain = F.linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias, backend="reference"), plain)
    torch.testing.assert_close(linear(x, weight, bias, backend="cpu"), plain)
    with pyvit.use_backend("reference"):
        assert torch.equal(linear(x, weight, bias), plain)
    with pyvit.use_backend("triton"):
        assert torch.equal(linear(x, weight, bias), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_packed_weights_follow_the_weights(
    dtype: torch.dtype, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One way for both: a fused activation comes before the rounding to bfloat16, another after it.
    monkeypatch.setattr(matmul, "_policy", "onednn")
    monkeypatch.setattr(matmul, "_chosen", {})
    model = torch.nn.Linear(48, 80).to(dtype)
    x = torch.randn(3, 70, 48, dtype=dtype)

    def check() -> None:
        with torch.no_grad():
            wanted = linear(x, model.weight.clone(), model.bias, activation=activation)
            torch.testing.assert_close(linear(x, model.weight, model.bias, activation=activation), wanted)

    count = pyvit.pack_weights(model)
    check()
    with torch.no_grad():
        model.weight.mul_(-2)  # in place, as an optimizer does
    check()
    model.load_state_dict({"weight": torch.randn(80, 48), "bias": torch.randn(80)})
    check()
    model.weight.data = torch.randn(80, 48).to(dtype)  # another tensor
    check()
    model.weight.data.mul_(3)  # out of autograd's sight
    check()
    assert pyvit.pack_weights(model) == count
    check()
    grad_x = x.clone().requires_grad_()
    linear(grad_x, model.weight, model.bias, activation=activation).sum().backward()
    assert model.weight.grad is not None
    assert grad_x.grad is not None
    pyvit.unpack_weights(model)
    assert not prepacked.is_packed(model.weight)
    check()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_float32_copies_are_rounded_once(dtype: torch.dtype, autocast: bool) -> None:
    """Also within autocast, which would round the copies again."""
    x, weight, bias, grad = (torch.randn(*shape, dtype=dtype) for shape in ((70, 48), (80, 48), (80,), (70, 80)))
    name = "float32 copies"
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = (
            matmul.FORWARD[name](x, weight, bias, "gelu"),
            matmul.GRAD_INPUT[name](grad, weight),
            matmul.GRAD_WEIGHT[name](grad, x, dtype),
        )
    x, weight, bias, grad = (t.double() for t in (x, weight, bias, grad))
    wanted = (torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias)), grad @ weight, grad.t() @ x)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1576, 96), (17, 33), (1, 5), (64, 3), (0, 4), (3, 0)], ids=str)
def test_transposed(shape, dtype):
    if library.problem() is not None:
        pytest.skip("needs the compiled library")
    x = torch.randn(shape).to(dtype)
    out = torch.empty(x.shape[::-1], dtype=dtype)
    torch.ops.pyvit.transposed(x, out)
    assert torch.equal(out, x.t())
    with pytest.raises(RuntimeError, match="contiguous matrix"):
        torch.ops.pyvit.transposed(torch.randn(4, 6).t(), torch.empty(4, 6))


def test_compiled_inference_multiplies_as_eager_calls_do():
    x, w1, b1, w2 = torch.randn(3, 50, 64), torch.randn(128, 64), torch.randn(128), torch.randn(32, 128)
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def model(x):
        return linear(mlp(x, w1, b1, w2, None), w1[:, :32].contiguous(), b1, activation="silu")

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert [t for t in seen if "pyvit" in str(t)] == [torch.ops.pyvit.mlp.default, torch.ops.pyvit.linear.default]
        torch.library.opcheck(torch.ops.pyvit.linear, (x, w1, b1, "gelu", "cpu"))
    seen.clear()
    w1.requires_grad_()
    compiled(x).sum().backward()  # with gradients the plain formula, which the compiler differentiates
    assert torch.ops.pyvit.linear not in seen
    assert w1.grad is not None


@pytest.mark.filterwarnings("error:.*batching rule")
def test_transforms_and_subclasses_in_compiled_inference_see_the_plain_formula():
    class Marked(Tensor):
        pass

    x, w, b = torch.randn(4, 3, 8), torch.randn(5, 8), torch.randn(5)
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def layer(x):
        return linear(x, w, b, activation="gelu")

    with torch.no_grad():
        for call, given in (
            (torch.func.vmap(layer), x),
            (torch.func.grad(lambda x: layer(x).sum()), x),
            (layer, x.as_subclass(Marked)),
        ):
            torch._dynamo.reset()
            found = torch.compile(call, fullgraph=True, backend=backend)(given)
            torch.testing.assert_close(found.as_subclass(Tensor), call(given).as_subclass(Tensor))
    assert seen
    assert torch.ops.pyvit.linear not in seen
