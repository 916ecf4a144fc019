"""mlp and the passes of its activation: numerics, what is kept for the backward pass, and what must see the plain
formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyvit
from pyvit.nn import Mlp
from pyvit.ops import activations, matmul, mlp, prepacked, reference
from pyvit.testing import compare, layout

ACTIVATIONS = list(reference.ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LABELS = ["out", "grad_x", "grad_fc1_weight", "grad_fc1_bias", "grad_fc2_weight", "grad_fc2_bias"]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_compiling.*")


def inputs(dtype: torch.dtype, *leading: int, k: int = 40, h: int = 52, m: int = 24) -> list[Tensor]:
    shapes = ((*leading, k), (h, k), (h,), (m, h), (m,))
    scales = (1.0, k**-0.5, 1.0, h**-0.5, 1.0)
    return [(torch.randn(shape) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]


def check(tensors: list[Tensor | None], activation: str) -> None:
    """Output and every gradient, against float64, as far off as the plain formula at most."""
    x, fc2_weight = tensors[0], tensors[3]
    grad = torch.randn(*x.shape[:-1], fc2_weight.shape[0]).to(x.dtype)

    def run(function: object, dtype: torch.dtype) -> list[Tensor]:
        keep = dtype == x.dtype and function is mlp
        leaves = [None if t is None else (t if keep else t.to(dtype)).detach().requires_grad_() for t in tensors]
        out = mlp(*leaves, activation=activation) if function is mlp else reference.mlp(*leaves, activation)
        return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(dtype))]

    labels = [n for n, t in zip(LABELS[1:], tensors, strict=True) if t is not None]
    ours, naive, exact = run(mlp, x.dtype), run(reference.mlp, x.dtype), run(reference.mlp, torch.float64)
    compare(f"mlp {activation}", ours[:1], naive[:1], exact[:1], labels=LABELS[:1])
    compare(f"mlp {activation}", ours[1:], naive[1:], exact[1:], factor=3.0, labels=labels)
    with torch.no_grad():
        compare(f"mlp {activation} without gradient", mlp(*tensors, activation=activation), naive[0], exact[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numerics(activation: str, dtype: torch.dtype) -> None:
    for leading, biases in itertools.product([(33,), (2, 3, 5), (1,), (67,)], [True, False]):
        tensors = inputs(dtype, *leading)
        check(tensors if biases else [tensors[0], tensors[1], None, tensors[3], None], activation)


@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "shifted", "expanded"])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_strides(which: int, store: str) -> None:
    tensors = inputs(torch.float32, 4, 9)
    tensors[which] = layout(tensors[which], store)
    check(tensors, "gelu")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: f"cpu-{dtype}")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_passes(name: str, dtype: torch.dtype) -> None:
    """Values and slopes over the whole range of arguments, in and out of place; rows that are no multiple of a
    vector."""
    for rows, cols in ((1, 1), (3, 7), (70, 33), (129, 64)):
        x = (torch.randn(rows, cols) * torch.logspace(-3, 1.3, cols)).to(dtype)
        grad = torch.randn(rows, cols).to(dtype)
        exact_x = x.double().requires_grad_()
        exact = reference.ACTIVATIONS[name](exact_x)
        slope = torch.autograd.grad(exact, exact_x, grad.double())[0]
        naive_x = x.clone().requires_grad_()
        naive = reference.ACTIVATIONS[name](naive_x)
        naive_slope = torch.autograd.grad(naive, naive_x, grad)[0]
        compare(name, activations.activate(x, name), naive, exact)
        found, sums = activations.gradient(grad, x, name)
        compare(
            f"{name} slope",
            [found, sums.to(dtype)],
            [naive_slope, naive_slope.sum(0)],
            [slope, slope.sum(0)],
            factor=3.0,
        )
        replaced = grad.clone()
        again, sums_again = activations.gradient_(replaced, x, name)
        assert torch.equal(replaced, found)
        assert torch.equal(sums_again, sums)
        assert torch.equal(again, activations.activate(x, name))
        assert torch.equal(activations.activate_(x.clone(), name), again)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_at_the_ends(name: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -1e30, 1e30, -200.0, 200.0, 0.0, -0.0])
    ours = activations.activate(x, name)
    torchs = torch.cat(
        [reference.ACTIVATIONS[name](one) for one in x.split(1)]
    )  # torch's gelu of whole AVX-512 vectors makes NaN of inf
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    finite = x[4:]
    slope, _ = activations.gradient(torch.ones(4), finite, name)
    leaf = finite.clone().requires_grad_()
    reference.ACTIVATIONS[name](leaf).sum().backward()
    torch.testing.assert_close(slope, leaf.grad)
    assert activations.gradient(torch.ones(1), x[:1], name)[0].isnan().item() or name == "relu"


def test_same_bits_for_any_number_of_threads() -> None:
    x, grad = torch.randn(300, 130), torch.randn(300, 130)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((*activations.gradient(grad, x, "gelu"), activations.activate(x, "gelu")))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_hidden_layer_is_kept_once() -> None:
    """What autograd keeps: the argument of the activation, not its result too."""
    x, *weights = (t.requires_grad_() for t in inputs(torch.float32, 50))
    sizes: list[int] = []
    known = {t.data_ptr() for t in (x, *weights)}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mlp(x, *weights)
    assert sizes == [50 * 52]


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5))[1:], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    leaves = [t.requires_grad_(need) for t, need in zip(inputs(torch.float32, 6), needs, strict=True)]
    mlp(*leaves, activation="silu").sum().backward()
    assert [t.grad is not None for t in leaves] == list(needs)


@pytest.mark.parametrize("leading", [(), (0,), (0, 3), (1, 1, 7, 1)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float32, *leading)]
    out = mlp(*leaves)
    assert out.shape == (*leading, 24)
    out.sum().backward()
    for ours, plain in zip(
        [t.grad for t in leaves], torch.autograd.grad(reference.mlp(*leaves, "gelu").sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_gradcheck_and_double_backward() -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float64, 2, 3, k=4, h=5, m=3)]
    assert torch.autograd.gradcheck(mlp, leaves)
    assert torch.autograd.gradgradcheck(mlp, leaves)
    seconds = []
    for function, tensors in (
        (mlp, [t.detach().float().requires_grad_() for t in leaves]),
        (lambda *t: reference.mlp(*t, "gelu"), leaves),
    ):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for ours, exact in zip(*seconds, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


def test_retained_graphs_checkpoints_and_autocast() -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float32, 20)]
    out = mlp(*leaves).square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    again = torch.autograd.grad(out, leaves)
    kept = torch.autograd.grad(checkpoint(mlp, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, kept, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = mlp(*leaves)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_compiler_and_transforms_see_the_plain_formula() -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float32, 6)]
    compiled = torch.compile(lambda *t: mlp(*t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), reference.mlp(*leaves, "gelu"))
    x, *weights = inputs(torch.float32, 3, 6)
    torch.testing.assert_close(torch.vmap(lambda t: mlp(t, *weights))(x), reference.mlp(x, *weights, "gelu"))
    assert mlp(*(t.to("meta") for t in (x, *weights))).shape == (3, 6, 24)


def test_the_module_steps_aside_for_what_watches_its_layers() -> None:
    layer, x = Mlp(16, 32), torch.randn(3, 16)
    wanted = layer(x)
    seen: list[int] = []
    handle = layer.fc1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), wanted)
    handle.remove()
    assert seen == [1]
    layer.fc2 = nn.Sequential(layer.fc2)  # an adapter
    torch.testing.assert_close(layer(x), wanted)
    dropped = Mlp(16, 32, drop=0.5)
    torch.manual_seed(0)
    a = dropped(x)
    torch.manual_seed(0)
    b = dropped.drop(dropped.fc2(dropped.drop(dropped.fc1(x))))
    assert torch.equal(a, b)


def test_explain_and_backends() -> None:
    tensors = inputs(torch.float32, 6)
    assert pyvit.explain(mlp, *tensors).chosen == "cpu"
    assert pyvit.explain(mlp, *(t.double() for t in tensors)).chosen == "torch"
    assert torch.equal(mlp(*tensors, backend="reference"), reference.mlp(*tensors, "gelu"))
    with pytest.raises(pyvit.BackendError, match="mlp: backend 'triton' cannot serve"):
        mlp(*tensors, backend="triton")


def test_the_first_layer_runs_once_where_only_its_weight_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_policy", "onednn")
    monkeypatch.setattr(matmul, "_chosen", {})
    layer, x = Mlp(16, 32), torch.randn(3, 16)
    if not prepacked.pack(layer.fc1):
        pytest.skip("oneDNN packs no weights here")
    with torch.no_grad():
        wanted = layer(x)
        calls: list[int] = []
        one = matmul.onednn()
        monkeypatch.setattr(matmul, "onednn", lambda: lambda *args: calls.append(args[0].shape[-1]) or one(*args))
        torch.testing.assert_close(layer(x), wanted)
        assert calls == [16, 32]
        pyvit.ops.linear(x, layer.fc1.weight, layer.fc1.bias)
        with pytest.raises(ValueError, match="mlp: activation must be"):
            mlp(x, layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias, activation=None)
