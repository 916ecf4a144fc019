"""gated_mlp and the passes of its gate: numerics of every form, what is kept for the backward pass, and what must see
the plain formula."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyvit
from pyvit import library
from pyvit.nn import GatedMlp, LayerNorm, RMSNorm, SwiGLU
from pyvit.ops import activations, gated_mlp, matmul, prepacked, reference
from pyvit.testing import compare, layout

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = ["fc1_weight", "fc1_bias", "gate_weight", "gate_bias", "fc2_weight", "fc2_bias"]
NAMES = ["x", *LAYERS, "norm_weight", "norm_bias"]
FORMS = ["packed", "gate last", "split"]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_compiling.*")


def mixed(first: Sequence[Any], *others: Sequence[Any], times: int = 2) -> Iterator[tuple[Any, ...]]:
    """Every element of ``first`` with some of the combinations of the others, the same in every run."""
    draw = random.Random(0)
    for _ in range(times):
        for each in first:
            yield each, *map(draw.choice, others)


class Given(NamedTuple):
    """Tensors in the order of NAMES, and the rest of the reference's arguments."""

    tensors: list[Tensor | None]
    norm: int
    gate_last: bool
    activation: str

    def reference(self, *t: Tensor | None) -> Tensor:
        return reference.gated_mlp(*t[:7], self.norm, *t[7:], 1e-5, self.gate_last, self.activation)

    def ours(self, *t: Tensor | None, **options: Any) -> Tensor:
        x, w1, b1, wg, bg, w2, b2, *parameters = t
        norms = [None, (*parameters, 1e-5), (parameters[0], 1e-5)]
        gate = {"gate_weight": wg, "gate_bias": bg, "gate_last": self.gate_last, "hidden_norm": norms[self.norm]}
        return gated_mlp(x, w1, b1, w2, b2, activation=self.activation, **gate, **options)


def given(
    dtype: torch.dtype,
    *leading: int,
    k: int = 40,
    h: int = 52,
    m: int = 24,
    form: str = "packed",
    norm: int = 0,
    bias: bool = True,
    activation: str = "silu",
) -> Given:
    split = form == "split"
    rows = h if split else 2 * h

    def randn(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    tensors = [
        randn((*leading, k)),
        randn((rows, k), k**-0.5),
        randn((rows,)) if bias else None,
        randn((h, k), k**-0.5) if split else None,
        randn((h,)) if split and bias else None,
        randn((m, h), h**-0.5),
        randn((m,)) if bias else None,
        randn((h,)) if norm else None,
        randn((h,)) if norm == 1 and bias else None,
    ]
    return Given(tensors, norm, form == "gate last", activation)


def check(g: Given) -> None:
    """Output and every gradient, against float64, as far off as the plain formula at most."""
    x, fc2_weight = g.tensors[0], g.tensors[5]
    grad = torch.randn(*x.shape[:-1], fc2_weight.shape[0]).to(x.dtype)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        keep = dtype == x.dtype and function == g.ours
        leaves = [None if t is None else (t if keep else t.to(dtype)).detach().requires_grad_() for t in g.tensors]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(dtype))]

    labels = [f"grad_{n}" for n, t in zip(NAMES, g.tensors, strict=True) if t is not None]
    ours, naive, exact = run(g.ours, x.dtype), run(g.reference, x.dtype), run(g.reference, torch.float64)
    name = f"gated_mlp {g.activation} norm {g.norm}"
    compare(name, ours[:1], naive[:1], exact[:1], labels=["out"])
    compare(name, ours[1:], naive[1:], exact[1:], factor=3.0, labels=labels)
    with torch.no_grad():
        compare(f"{name} without gradient", g.ours(*g.tensors), naive[0], exact[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [0, 1, 2])
def test_numerics(form: str, norm: int, dtype: torch.dtype) -> None:
    for leading, bias, activation in mixed([(33,), (2, 3, 5), (1,), (67,)], [True, False], ACTIVATIONS):
        check(given(dtype, *leading, form=form, norm=norm, bias=bias, activation=activation))
    check(given(dtype, 3, k=3, h=5 if norm else 1, m=1, form=form, norm=norm))
    check(given(dtype, 9, k=7, h=33, m=5, form=form, norm=norm))


@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "shifted", "expanded"])
@pytest.mark.parametrize("which", ["x", "fc1_weight", "gate_weight", "fc2_weight"])
def test_strides(which: str, store: str) -> None:
    g = given(torch.float32, 4, 9, form="split" if which == "gate_weight" else "packed")
    g.tensors[NAMES.index(which)] = layout(g.tensors[NAMES.index(which)], store)
    check(g)


def test_rows_that_alternate_are_two_weights() -> None:
    g = given(torch.float32, 5)
    x, w, b, _, _, w2, b2, *_ = g.tensors
    order = torch.arange(104).view(2, 52).t().flatten()  # gate, value, gate, ...
    w_alternating, b_alternating = w[order].contiguous(), b[order].contiguous()
    found = gated_mlp(
        x,
        w_alternating[1::2],
        b_alternating[1::2],
        w2,
        b2,
        gate_weight=w_alternating[0::2],
        gate_bias=b_alternating[0::2],
    )
    torch.testing.assert_close(found, g.reference(*g.tensors), rtol=1e-5, atol=1e-5)


needs_library = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")


@pytest.mark.isa
@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: f"cpu-{dtype}")
@pytest.mark.parametrize("name", list(reference.ACTIVATIONS))
def test_gate_passes(name: str, dtype: torch.dtype) -> None:
    """Values and slopes over the whole range of arguments; rows that are no multiple of a vector; halves of one matrix
    and two matrices."""
    for (rows, cols), packed, last in itertools.product(
        ((1, 1), (3, 7), (70, 33), (65, 64)), [True, False], [False, True]
    ):
        both = torch.randn(rows, 2 * cols) * torch.logspace(-3, 1.3, 2 * cols)[torch.randperm(2 * cols)]
        a, b = (t.to(dtype) for t in both.chunk(2, -1))
        if packed:
            a, b = torch.cat((b, a) if last else (a, b), -1).chunk(2, -1)[:: -1 if last else 1]
        grad = torch.randn(rows, cols).to(dtype)

        def run(a: Tensor, b: Tensor, grad: Tensor, name: str = name) -> list[Tensor]:
            leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
            out = reference.ACTIVATIONS[name](leaves[0]) * leaves[1]
            of_a, of_b = torch.autograd.grad(out, leaves, grad)
            return [out.detach(), of_a, of_b, of_a.sum(0), of_b.sum(0)]

        naive, exact = run(a, b, grad), run(a.double(), b.double(), grad.double())
        compare(name, activations.gated(a, b, name), naive[0], exact[0])
        replaced = grad.clone()
        again, values, gates, sums = activations.gate_gradient_(replaced, a, b, name, packed, last)
        of_a, of_b = (values.chunk(2, -1) if not last else values.chunk(2, -1)[::-1]) if packed else (gates, values)
        assert torch.equal(again, activations.gated(a, b, name))
        labels = ["grad_a", "grad_b", "sum_a", "sum_b"]
        compare(name, [of_a, of_b, *sums.to(dtype)], naive[1:], exact[1:], factor=3.0, labels=labels)


@needs_library
def test_same_bits_for_any_number_of_threads() -> None:
    a, b, grad = torch.randn(3, 300, 130)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            replaced = grad.clone()
            found.append(
                (activations.gated(a, b, "gelu"), *activations.gate_gradient_(replaced, a, b, "gelu", False, False))
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


# Prepacked weights


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights go through pyvit's own product."""
    monkeypatch.setattr(matmul, "_policy", "pyvit")
    monkeypatch.setattr(matmul, "_chosen", {})


def pack(*weights: Tensor | None) -> None:
    for weight in weights:
        if weight is not None:
            layer = nn.Linear(1, 1, bias=False)
            layer._parameters["weight"] = weight
            assert prepacked.pack(layer)


@needs_library
@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: f"cpu-{dtype}")
@pytest.mark.parametrize("form", FORMS)
def test_prepacked_numerics(own: None, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes on every side of a vector, of a panel of columns, of a tile of rows and of a block of the sum; few rows of
    wide layers; with a norm, a scale and a residual, and without."""
    calls: list[int] = []
    one = prepacked.gated_branch
    monkeypatch.setattr(prepacked, "gated_branch", lambda *args: calls.append(1) or _there(one(*args)))
    sizes = [(1, 3, 5, 2), (7, 33, 64, 9), (50, 96, 96, 33), (13, 600, 17, 70), (20, 40, 130, 65), (6, 17, 1, 9)]
    sizes += [(200, 64, 256, 64), (300, 30, 200, 40), (13, 70, 5001, 40), (5, 4401, 70, 3)]
    options = mixed(sizes, ["silu", "gelu", "gelu_tanh"], [0, 1, 2], [0, 1, 2], [True, False])
    for (rows, k, h, m), activation, hidden_norm, norm, bias in options:
        g = given(dtype, rows, k=k, h=h, m=m, form=form, norm=hidden_norm, bias=bias, activation=activation)
        around = [torch.randn(k), torch.randn(k), torch.randn(m), torch.randn(rows, m)]
        around = [t.to(dtype) for t in around]

        def formula(t: list[Tensor | None], around: list[Tensor], g: Given = g, norm: int = norm) -> Tensor:
            weight, shift, scale, residual = around
            x = reference.norm(t[0], norm, weight, shift, 1e-5)
            return residual + scale * g.reference(x, *t[1:])

        wide = [None if t is None else t.double() for t in g.tensors]
        naive, exact = formula(g.tensors, around), formula(wide, [t.double() for t in around])
        pack(g.tensors[1], g.tensors[3], g.tensors[5])
        norms = [None, (around[0], around[1], 1e-5), (around[0], 1e-5)]
        with torch.no_grad():
            found = g.ours(*g.tensors, norm=norms[norm], scale=around[2], residual=around[3])
        name = f"{rows} x {k} -> {h} -> {m} {activation} {form}"
        compare(f"{name} norms {norm} {hidden_norm} {bias=}", found, naive, exact)
        bare = Given([*g.tensors[:7], None, None], 0, g.gate_last, g.activation)
        with torch.no_grad():
            found = bare.ours(*bare.tensors)
        wide[7:] = None, None
        compare(f"{name} alone", found, bare.reference(*bare.tensors), bare.reference(*wide))
    assert calls


def _there(found: Tensor | None) -> Tensor:
    assert found is not None, "the weights were not taken packed"
    return found


@needs_library
def test_packed_weights_in_halves_and_whole(own: None) -> None:
    """A weight that was packed whole is packed in halves at its first gated call; other calls then leave it."""
    g = given(torch.float32, 6)
    x, w1, b1, _, _, w2, *_ = g.tensors
    pack(w1, w2)
    with torch.no_grad():
        wanted = pyvit.ops.linear(x, w1, b1)
        assert prepacked.find(w1).parts == 1
        torch.testing.assert_close(g.ours(*g.tensors), g.reference(*g.tensors))
        assert prepacked.find(w1).parts == 2
        torch.testing.assert_close(pyvit.ops.linear(x, w1, b1), wanted)
        w1.mul_(2.0)  # in place: found, and packed anew
        torch.testing.assert_close(g.ours(*g.tensors), g.reference(*g.tensors))
    model = nn.Sequential(SwiGLU(16, 24), GatedMlp(16, 24, split=True))
    assert pyvit.pack_weights(model) == 5
    assert [prepacked.find(m.weight).parts for m in (model[0].fc1, model[0].fc2, model[1].fc1_g)] == [2, 1, 1]


# What is kept, and who must see the formula


def test_gates_and_values_are_kept_once() -> None:
    """What autograd keeps: gates and values, not their product too."""
    for form in FORMS:
        g = given(torch.float32, 50, form=form)
        tensors = [None if t is None else t.requires_grad_() for t in g.tensors]
        known = {t.data_ptr() for t in tensors if t is not None}
        sizes: list[int] = []

        def keep(t: Tensor, known: set[int] = known, sizes: list[int] = sizes) -> Tensor:
            if t.data_ptr() not in known:
                sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            g.ours(*tensors)
        assert sum(sizes) == 50 * 2 * 52


@pytest.mark.parametrize("which", range(9))
def test_only_the_gradients_asked_for(which: int) -> None:
    for norm, packed in ((1, False), (1, True)):
        g = given(torch.float32, 6, form="packed" if packed else "split", norm=norm)
        for only in (True, False):
            tensors = [None if t is None else t.detach() for t in g.tensors]
            if tensors[which] is None:
                continue
            for i, t in enumerate(tensors):
                if t is not None:
                    t.requires_grad_((i == which) == only)
            g.ours(*tensors).sum().backward()
            assert all(t is None or (t.grad is not None) == t.requires_grad for t in tensors)


@pytest.mark.parametrize("leading", [(), (0,), (0, 3), (1, 1, 7, 1)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    for form, norm in itertools.product(FORMS, (0, 2)):
        g = given(torch.float32, *leading, form=form, norm=norm)
        leaves = [None if t is None else t.requires_grad_() for t in g.tensors]
        out = g.ours(*leaves)
        assert out.shape == (*leading, 24)
        there = [t for t in leaves if t is not None]
        found = torch.autograd.grad(out.sum(), there)
        for ours, plain in zip(found, torch.autograd.grad(g.reference(*leaves).sum(), there), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [0, 1, 2])
def test_gradcheck_and_double_backward(form: str, norm: int) -> None:
    g = given(torch.float64, 2, 3, k=4, h=5, m=3, form=form, norm=norm)
    at = [i for i, t in enumerate(g.tensors) if t is not None]

    def call(function: Any, *leaves: Tensor) -> Tensor:
        tensors: list[Tensor | None] = [None] * 9
        for i, t in zip(at, leaves, strict=True):
            tensors[i] = t
        return function(*tensors)

    leaves = [g.tensors[i].requires_grad_() for i in at]
    assert torch.autograd.gradcheck(lambda *t: call(g.ours, *t), leaves)
    seconds = []
    for function, tensors in ((g.ours, [t.detach().float().requires_grad_() for t in leaves]), (g.reference, leaves)):
        first = torch.autograd.grad(call(function, *tensors).square().sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(f.square().sum() for f in first), tensors))
    for ours, exact in zip(*seconds, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=1e-3 * float(exact.abs().max() + 1))


def test_batched_gradients() -> None:
    g = given(torch.float32, 6, norm=2)
    leaves = [None if t is None else t.requires_grad_() for t in g.tensors]
    there = [t for t in leaves if t is not None]
    out, grads = g.ours(*leaves), torch.randn(3, 6, 24)
    found = torch.autograd.grad(out, there, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for batched, one in zip(found, torch.autograd.grad(out, there, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(batched[i], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_retained_graphs_checkpoints_and_autocast(form: str) -> None:
    g = given(torch.float32, 20, form=form, norm=1)
    leaves = [None if t is None else t.requires_grad_() for t in g.tensors]
    there = [t for t in leaves if t is not None]
    out = g.ours(*leaves).square().sum()
    first = torch.autograd.grad(out, there, retain_graph=True)
    again = torch.autograd.grad(out, there)
    kept = torch.autograd.grad(checkpoint(g.ours, *leaves, use_reentrant=False).square().sum(), there)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, kept, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = g.ours(*leaves)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), g.reference(*leaves), rtol=0.05, atol=0.1)
    low.float().square().sum().backward()
    for t, exact in zip(there, first, strict=True):
        assert t.grad.dtype == torch.float32
        assert (t.grad - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("form", FORMS)
def test_compiler_and_transforms_see_the_plain_formula(form: str) -> None:
    g = given(torch.float32, 6, form=form, norm=2)
    leaves = [None if t is None else t.requires_grad_() for t in g.tensors]
    compiled = torch.compile(lambda *t: g.ours(*t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), g.reference(*leaves))
    x, *weights = given(torch.float32, 3, 6, form=form, norm=2).tensors
    torch.testing.assert_close(
        torch.vmap(lambda t: g.ours(t, *weights))(x), g.reference(x, *weights), rtol=1e-5, atol=1e-5
    )
    meta = [None if t is None else t.to("meta") for t in (x, *weights)]
    assert g.ours(*meta).shape == (3, 6, 24)
    with torch.no_grad():
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(lambda *t: g.ours(*t), fullgraph=True, backend="aot_eager")(x, *weights),
            g.reference(x, *weights),
            rtol=1e-5,
            atol=1e-5,
        )


@needs_library
@pytest.mark.parametrize("split", [False, True])
def test_compiled_inference_takes_packed_weights(own: None, split: bool) -> None:
    layer = SwiGLU(16, 24, split=split, norm_layer=RMSNorm).eval()
    pyvit.pack_weights(layer)
    x, graphs = torch.randn(3, 16), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(found, layer(x))
    calls = [n.target for n in graphs[0].graph.nodes if n.op == "call_function" and "pyvit" in str(n.target)]
    assert calls == [torch.ops.pyvit.prepacked_gated_mlp.default]


@pytest.mark.parametrize("split", [False, True])
def test_the_module_steps_aside_for_what_watches_its_layers(split: bool) -> None:
    layer, x = SwiGLU(16, 32, split=split, norm_layer=LayerNorm), torch.randn(3, 16)
    with torch.no_grad():
        layer.norm.weight.normal_()
    wanted = layer(x)
    for part in layer.children():
        seen: list[int] = []
        handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        torch.testing.assert_close(layer(x), wanted)
        handle.remove()
        assert seen == [1], part
    layer.fc2 = nn.Sequential(layer.fc2)  # an adapter
    torch.testing.assert_close(layer(x), wanted)
    layer.norm = nn.LayerNorm(32)
    other = layer(x)
    assert not torch.allclose(other, wanted)
    torch.testing.assert_close(other, layer.fc2(layer._hidden(x, None)))


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("norm_layer", [None, LayerNorm, RMSNorm])
@pytest.mark.parametrize("split", [False, True])
def test_modules_agree_with_their_layers(split: bool, norm_layer: Any, gate_last: bool) -> None:
    if split and gate_last:
        with pytest.raises(ValueError, match="gate_last must be False with split"):
            GatedMlp(16, 32, split=True, gate_last=True)
        return
    layer = GatedMlp(16, 20, "gelu", out_dim=12, split=split, gate_last=gate_last, norm_layer=norm_layer)
    x = torch.randn(3, 16)
    if split:
        a, b = layer.fc1_g(x), layer.fc1_x(x)
    else:
        a, b = layer.fc1(x).chunk(2, -1)[:: -1 if gate_last else 1]
    wanted = layer.fc2(layer.norm(nn.functional.gelu(a) * b))
    for packs in (False, True):
        if packs:
            pyvit.pack_weights(layer)
        for training in (True, False):
            with torch.set_grad_enabled(training):
                torch.testing.assert_close(layer(x), wanted)
    with pytest.raises(ValueError, match="GatedMlp: activation must be one of gelu"):
        GatedMlp(8, 8, "tanh")


def test_explain_and_backends() -> None:
    g = given(torch.float32, 6)
    x, w1, b1, _, _, w2, b2, *_ = g.tensors
    assert pyvit.explain(gated_mlp, x, w1, b1, w2, b2).chosen == "cpu"
    assert pyvit.explain(gated_mlp, *(t.double() for t in (x, w1, b1, w2, b2))).chosen == "torch"
    assert torch.equal(g.ours(*g.tensors, backend="reference"), g.reference(*g.tensors))
    with pytest.raises(pyvit.BackendError, match="gated_mlp: backend 'triton' cannot serve"):
        g.ours(*g.tensors, backend="triton")
