"""layer_norm: numerics, rounding of the result, and calls that must use the plain formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyvit
from pyvit.nn import LayerNorm
from pyvit.ops import layer_norm, reference
from pyvit.testing import compare, layout

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Dtypes of x, of the parameters and of the result.
KINDS = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, F32, BF16), (F32, F32, F16), (BF16, F32, BF16)]
LABELS = ["out", "grad_x", "grad_weight", "grad_bias"]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_compiling.*")


def inputs(dtype: torch.dtype, *shape: int, parameters: torch.dtype | None = None) -> list[Tensor]:
    c = shape[-1]
    x = (torch.randn(shape) * torch.logspace(-1, 1, c) + 3).to(dtype)
    return [x, *(torch.randn(c).to(parameters or dtype) for _ in range(2))]


def check(tensors: list[Tensor | None], wanted: torch.dtype, eps: float = 1e-6) -> None:
    x = tensors[0]
    grad = torch.randn(x.shape).to(wanted)

    def run(kind: str) -> list[Tensor]:
        given = [t if t is None or kind != "exact" else t.double() for t in tensors]
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        dtype = torch.float64 if kind == "exact" else wanted
        out = layer_norm(*leaves, eps, dtype=dtype) if kind == "ours" else reference.layer_norm(*leaves, eps, dtype)
        return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(dtype))]

    labels = [n for n, t in zip(LABELS[1:], tensors, strict=True) if t is not None]
    ours, naive, exact = run("ours"), run("naive"), run("exact")
    assert ours[0].dtype == wanted
    compare("layer_norm", ours[:1], naive[:1], exact[:1], labels=LABELS[:1])
    compare("layer_norm", ours[1:], naive[1:], exact[1:], factor=3.0, labels=labels)
    with torch.no_grad():
        assert torch.equal(layer_norm(*tensors, eps, dtype=wanted), ours[0])


@pytest.mark.isa
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"cpu-{kind}")
@pytest.mark.parametrize("shape", [(1, 1), (7, 96), (2, 3, 17), (131, 33), (40, 768), (1, 5000), (300, 16)], ids=str)
def test_numerics(shape: tuple[int, ...], kind: tuple[torch.dtype, ...]) -> None:
    dtype, parameters, wanted = kind
    if shape[-1] > 1:  # one element has no gradient but rounding
        x, weight, bias = inputs(dtype, *shape, parameters=parameters)
        for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
            if b is None or w is not None or parameters == dtype:  # else torch's gradient fails
                check([x, w, b], wanted)
    x, weight, bias = inputs(dtype, *shape, parameters=parameters)
    torch.testing.assert_close(
        layer_norm(x, weight, bias, dtype=wanted), reference.layer_norm(x, weight, bias, 1e-5, wanted)
    )


@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "shifted", "expanded"])
def test_strides(store: str) -> None:
    tensors = inputs(F32, 4, 9, 24)
    tensors[0] = layout(tensors[0], store)
    check(tensors, F32)


def test_variance_with_a_large_mean() -> None:
    x = torch.randn(20, 100) + 1e4
    exact = reference.layer_norm(x.double(), None, None, 1e-6, torch.float64)
    compare("layer_norm", layer_norm(x, eps=1e-6), reference.layer_norm(x, None, None, 1e-6, F32), exact)


def test_rows_do_not_mix() -> None:
    x = torch.randn(9, 40)
    x[2, 3], x[5, 7] = float("nan"), float("inf")
    out = layer_norm(x)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 5]] = True
    assert torch.equal(out.isnan().any(1), bad)
    assert torch.equal(out.isnan().all(1)[2:3], bad[2:3])


def test_same_bits_for_any_number_of_threads() -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(F32, 3000, 50))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = layer_norm(x, weight, bias)
            found.append((out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    leaves = [t.requires_grad_(need) for t, need in zip(inputs(F32, 6, 20), needs, strict=True)]
    layer_norm(*leaves).square().sum().backward()
    assert [t.grad is not None for t in leaves] == list(needs)


@pytest.mark.parametrize("leading", [(), (0,), (0, 3), (1, 1, 7, 1)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in inputs(F32, *leading, 24)]
    out = layer_norm(*leaves)
    assert out.shape == (*leading, 24)
    out.square().sum().backward()
    plain = torch.autograd.grad(reference.layer_norm(*leaves, 1e-5, F32).square().sum(), leaves)
    for leaf, wanted in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-4, atol=1e-4)


def test_gradcheck_and_double_backward() -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float64, 2, 3, 5)]
    assert torch.autograd.gradcheck(layer_norm, leaves)
    assert torch.autograd.gradgradcheck(layer_norm, leaves)
    seconds = []
    for dtype in (F32, torch.float64):
        tensors = [t.detach().to(dtype).requires_grad_() for t in leaves]
        first = torch.autograd.grad(layer_norm(*tensors).pow(3).sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for ours, exact in zip(*seconds, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


def test_retained_graphs_and_checkpoints() -> None:
    leaves = [t.requires_grad_() for t in inputs(F32, 20, 30)]
    out = layer_norm(*leaves).square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    again = torch.autograd.grad(out, leaves)
    kept = torch.autograd.grad(checkpoint(layer_norm, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, kept, strict=True))


def test_compiler_and_transforms_see_the_plain_formula() -> None:
    leaves = [t.requires_grad_() for t in inputs(F32, 6, 20)]
    compiled = torch.compile(lambda *t: layer_norm(*t, dtype=BF16), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), reference.layer_norm(*leaves, 1e-5, BF16))
    x, weight, bias = inputs(F32, 3, 6, 20)
    torch.testing.assert_close(
        torch.vmap(lambda t: layer_norm(t, weight, bias))(x), reference.layer_norm(x, weight, bias, 1e-5, F32)
    )
    assert layer_norm(*(t.to("meta") for t in (x, weight, bias))).shape == x.shape


def test_before_a_linear_layer_autocast_rounds_once() -> None:
    torch.manual_seed(0)
    first, plain, linear = LayerNorm(24, before_linear=True), nn.LayerNorm(24), pyvit.nn.Linear(24, 8)
    x = torch.randn(10, 24, requires_grad=True)
    assert first(x).dtype == F32
    assert LayerNorm(24)(x).dtype == F32
    with torch.autocast("cpu", dtype=BF16):
        low = first(x)
        assert low.dtype == BF16
        assert LayerNorm(24)(x).dtype == F32
        wanted = plain(x)
        torch.testing.assert_close(linear(low), linear(wanted))
    torch.testing.assert_close(low, wanted.to(BF16))
    linear(low.float()).sum().backward()
    assert x.grad.dtype == first.weight.grad.dtype == F32


def test_errors_name_the_argument() -> None:
    x, weight, bias = inputs(F32, 4, 8)
    with pytest.raises(ValueError, match=r"layer_norm: weight must be of shape \(8,\), got shape \(7\)"):
        layer_norm(x, weight[:7], bias)
    with pytest.raises(ValueError, match=r"layer_norm: bias must be of shape"):
        layer_norm(x, weight, bias[None])
    with pytest.raises(TypeError, match="layer_norm: bias must have the dtype of"):
        layer_norm(x, weight, bias.half())
    with pytest.raises(TypeError, match="layer_norm: x must be float32"):
        layer_norm(x.long())
    with pytest.raises(ValueError, match="layer_norm: x must be of shape"):
        layer_norm(torch.zeros(3, 0))
    with pytest.raises(TypeError, match="layer_norm: dtype must be a floating point dtype"):
        layer_norm(x, dtype=torch.int32)
    with pytest.raises(pyvit.BackendError, match="float64"):
        layer_norm(x.double(), backend="cpu")
    assert layer_norm(x, backend="reference").equal(reference.layer_norm(x, None, None, 1e-5, F32))
    assert "layer_norm on cpu" in str(pyvit.explain(layer_norm, x, weight, bias))
