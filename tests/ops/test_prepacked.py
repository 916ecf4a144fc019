"""Inference with prepacked weights: numerics, which calls take them, and that changes of a weight are seen."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyvit
from pyvit import library, memory
from pyvit.models import create_model
from pyvit.nn import Block, Mlp
from pyvit.ops import linear, matmul, mlp, prepacked, reference
from pyvit.ops.prepacked import Branch
from pyvit.testing import compare, layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights go through pyvit's own product."""
    monkeypatch.setattr(matmul, "_policy", "pyvit")
    monkeypatch.setattr(matmul, "_chosen", {})


def formula(x: Tensor, b: Branch) -> Tensor:
    y = x if b.norm is None else F.layer_norm(x, x.shape[-1:], *b.norm)
    y = reference.linear(y, b.weight, b.bias, b.activation)
    y = y if b.weight2 is None else F.linear(y, b.weight2, b.bias2)
    y = y if b.scale is None else y * b.scale
    return y if b.residual is None else b.residual + y


def cast(b: Branch, dtype: torch.dtype) -> Branch:
    def to(t: object) -> object:
        if isinstance(t, tuple):
            return tuple(to(each) for each in t)
        return t.to(dtype) if isinstance(t, Tensor) else t

    return Branch(*map(to, b))


def branch(
    dtype: torch.dtype, rows: int, k: int, h: int, m: int, activation: str | None, around: bool, bias: bool
) -> Branch:
    """Of one layer where m is 0."""

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    out = m or h
    return Branch(
        randn(h, k, scale=k**-0.5),
        randn(h) if bias else None,
        activation,
        randn(m, h, scale=h**-0.5) if m else None,
        randn(m) if m and bias else None,
        (randn(k), randn(k) if bias else None, 1e-5) if around else None,
        randn(out) if around and bias else None,
        randn(rows, out) if around else None,
    )


def keep(weight: Tensor) -> bool:
    """Packed as the weight of a layer."""
    layer = nn.Linear(1, 1, bias=False)
    layer._parameters["weight"] = weight
    return prepacked.pack(layer)


def run(x: Tensor, b: Branch) -> Tensor:
    with torch.no_grad():
        for weight in (b.weight, b.weight2):
            if weight is not None:
                assert keep(weight)
        found, again = prepacked.linear_branch(x, b), prepacked.linear_branch(x, b)
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)
    assert found is not None
    return found


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: f"cpu-{dtype}")
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
def test_numerics(own: None, activation: str | None, dtype: torch.dtype) -> None:
    """Sizes on every side of a vector, of a panel of columns, of a tile of rows and of a block of the sum; few rows of
    wide layers."""
    sizes = [
        (1, 3, 5, 0),
        (7, 33, 64, 0),
        (50, 96, 96, 0),
        (13, 600, 17, 0),
        (20, 40, 130, 65),
        (6, 17, 7, 1),
        (200, 64, 256, 64),
    ]
    sizes += [(13, 70, 5001, 40), (25, 4401, 70, 0), (1, 4400, 129, 0)]
    if activation is None:
        sizes = [s for s in sizes if not s[3]]
    for (rows, k, h, m), around, bias in itertools.product(sizes, [True, False], [True, False]):
        b = branch(dtype, rows, k, h, m, activation, around, bias)
        x = torch.randn(rows, k).to(dtype)
        name = f"{rows} x {k} -> {h} -> {m} {activation} {around=} {bias=}"
        compare(name, run(x, b), formula(x, b), formula(x.double(), cast(b, torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "shifted", "expanded"])
def test_strides(own: None, store: str, dtype: torch.dtype) -> None:
    b = branch(dtype, 21, 48, 40, 24, "gelu", False, True)
    x = layout(torch.randn(3, 7, 48).to(dtype), store)
    compare(store, run(x, b), formula(x, b), formula(x.double(), cast(b, torch.float64)))


def test_a_residual_of_other_strides_than_before(own: None) -> None:
    block = Block(32, 2).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        pyvit.pack_weights(block)
        wanted = block(x)
        assert torch.equal(block(x), wanted)
        assert torch.equal(block(x.transpose(1, 2).contiguous().transpose(1, 2)), wanted)
        assert torch.equal(block(x[:1].expand(2, 5, 32))[1], wanted[0])


def test_a_norm_kept_in_float32(own: None) -> None:
    b = branch(torch.bfloat16, 9, 32, 48, 0, "silu", True, True)
    wide = b._replace(norm=(b.norm[0].float(), b.norm[1].float(), b.norm[2]))
    x = torch.randn(9, 32).bfloat16()
    assert torch.equal(run(x, wide), run(x, b))


def test_values_that_are_not_finite_stay_in_their_row(own: None) -> None:
    b = branch(torch.float32, 8, 33, 40, 24, "gelu", False, True)
    x = torch.randn(8, 33)
    wanted = run(x, b).clone()
    x[3, 5] = float("nan")
    found = run(x, b)
    assert found[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(found[others], wanted[others])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_no_rows(own: None, shape: tuple[int, ...]) -> None:
    b = branch(torch.float32, 0, 8, 12, 4, "gelu", False, True)
    assert run(torch.empty(shape), b).shape == (*shape[:-1], 4)


def test_same_bits_for_any_number_of_threads_and_rows(own: None) -> None:
    b = branch(torch.float32, 203, 96, 200, 96, "gelu", True, True)
    x = torch.randn(203, 96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)
    few = run(x[40:57], b._replace(residual=b.residual[40:57]))
    assert torch.equal(few, found[0][40:57])


@pytest.mark.parametrize("grad", [True, False])
def test_surroundings_by_any_way(own: None, grad: bool) -> None:
    """linear and mlp with norm, scale and residual: with gradients, packed or not, under autocast and in float64, one
    function."""
    for m in (0, 24):
        b = branch(torch.float32, 10, 32, 40, m, "gelu", True, True)
        leaves = [t.requires_grad_(grad) for t in (b.weight, b.norm[0], b.scale, b.residual)]
        x = torch.randn(10, 32)

        def call(x: Tensor, b: Branch, **options: object) -> Tensor:
            around = {"norm": b.norm, "scale": b.scale, "residual": b.residual}
            if b.weight2 is None:
                return linear(x, b.weight, b.bias, activation=b.activation, **around, **options)
            return mlp(x, b.weight, b.bias, b.weight2, b.bias2, activation=b.activation, **around, **options)

        wanted = formula(x.double(), cast(b, torch.float64))
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(call(x.double(), cast(b, torch.float64)), wanted)
            torch.testing.assert_close(call(x, b, backend="reference").double(), wanted, rtol=1e-5, atol=1e-5)
            for _ in range(2):
                found = call(x, b)
                torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
                for weight in (b.weight, b.weight2):
                    assert weight is None or keep(weight)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                coarse = call(x, b)
            assert coarse.dtype == torch.float32
            torch.testing.assert_close(coarse.double(), wanted, rtol=0.05, atol=0.05)
        if grad:
            for ours, exact in zip(
                torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
            ):
                torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_errors() -> None:
    x, w, w2 = torch.randn(4, 8), torch.randn(6, 8), torch.randn(8, 6)
    with pytest.raises(
        ValueError, match=r"linear: norm must be \(weight, bias, eps\) of a layer norm, \(weight, eps\)"
    ):
        linear(x, w, norm=torch.ones(8))
    with pytest.raises(ValueError, match=r"linear: scale must be of shape \(6,\), got shape \(8\)"):
        linear(x, w, scale=torch.ones(8))
    with pytest.raises(ValueError, match=r"mlp: residual must be of shape \(4, 8\), got shape \(4, 6\)"):
        mlp(x, w, None, w2, None, residual=torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"layer_norm: weight must be of shape \(8,\)"):
        linear(x, w, norm=(torch.ones(6), None, 1e-5))
    with pytest.raises(ValueError, match="linear: x must be of shape"):
        linear(x, w2, residual=x)
    assert keep(w)
    with torch.no_grad():  # packed, where calls like it went before, too
        linear(x, w, norm=(torch.ones(8), None, 1e-5))
        with pytest.raises(ValueError, match=r"layer_norm: weight must be of shape \(8,\)"):
            linear(x, w, norm=(torch.ones(6), None, 1e-5))
        with pytest.raises(TypeError, match=r"layer_norm: weight must have the dtype of x"):
            linear(x, w, norm=(torch.ones(8).bfloat16(), None, 1e-5))
        for norm in (torch.ones(8), [torch.ones(8), None, 1e-5], (torch.ones(8),)):
            with pytest.raises(
                ValueError, match=r"linear: norm must be \(weight, bias, eps\) of a layer norm, \(weight, eps\)"
            ):
                linear(x, w, norm=norm)
        with pytest.raises(ValueError, match="linear: activation must be None or one of"):
            linear(x, w, activation="")
        with pytest.raises(TypeError, match=r"linear: scale must be a Tensor of shape \(6,\), got float"):
            linear(x, w, scale=0.5)
        with pytest.raises(ValueError, match=r"linear: residual must be of shape \(4, 6\)"):
            linear(x, w, residual=torch.ones(4, 1))
    words = torch.ops.pyvit.prepack_weight(w)
    for other in (torch.randn(70, 8), torch.randn(6, 8).bfloat16(), torch.randn(8, 6).t()):
        rest = (None, "", None, None, None, None, None)
        with pytest.raises(RuntimeError, match=r"prepacked weights: (packed|weight) must be|must be of the dtype"):
            torch.ops.pyvit.prepacked_mlp(x, False, None, None, 0.0, other, words, *rest)


MODELS = ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "swinv2_tiny_window8_256"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_infer_the_same(own: None, name: str, dtype: torch.dtype) -> None:
    model = create_model(name, img_size=64 if "swin" in name else 56 if "14" in name else 48).eval().to(dtype)
    images = torch.randn(model.example_inputs(2)[0].shape).to(dtype)
    with torch.no_grad():
        exact = model.double().forward_features(images.double())
        plain = model.to(dtype).forward_features(images)
        assert pyvit.pack_weights(model) > 0
        found = model.forward_features(images)
        assert torch.equal(model.forward_features(images), found)
    # A chain of roundings in another order: twice the error of the same model layer by layer, and the floor of the last
    # one.
    error, allowed = (
        (found - exact).abs().max(),
        2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max(),
    )
    assert error <= allowed


def test_hooks_adapters_and_dropout_are_not_passed_over(own: None) -> None:
    block = Block(32, 2, init_values=1.0).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        wanted = block(x)
        pyvit.pack_weights(block)
        for part in (
            "norm1",
            "attn",
            "attn.qkv",
            "attn.proj",
            "ls1",
            "drop_path1",
            "norm2",
            "mlp",
            "mlp.fc1",
            "mlp.fc2",
            "ls2",
            "drop_path2",
        ):
            seen: list[str] = []
            handle = block.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append("here"))
            torch.testing.assert_close(block(x), wanted)
            handle.remove()
            assert seen == ["here"] or part.startswith("drop_path"), (
                part
            )  # which has no call of its own where it drops nothing
        block.mlp.fc2 = nn.Sequential(block.mlp.fc2)  # wrapped
        torch.testing.assert_close(block(x), wanted)
        block.mlp = Mlp(32, 64, drop=0.5).train()
        assert not torch.equal(block(x), block(x))


def test_compiled_inference_takes_the_branches(own: None) -> None:
    block = Block(32, 2, init_values=1.0).eval()
    x = torch.randn(2, 5, 32)
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    pyvit.pack_weights(block)
    with torch.no_grad():
        wanted = block(x)
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=backend)(x), wanted, rtol=0, atol=0)
    assert [target for target in seen if "prepacked" in str(target)] == [
        torch.ops.pyvit.prepacked_attention.default,
        torch.ops.pyvit.prepacked_mlp.default,
    ]


@pytest.mark.parametrize("policy", ["auto", "measure", "onednn", "pyvit", "torch"])
def test_the_form_follows_the_policy(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_policy", policy)
    monkeypatch.setattr(matmul, "_chosen", {})
    layer, x = Mlp(64, 128), torch.randn(50, 64)
    with torch.no_grad():
        wanted = layer(x)
        assert pyvit.pack_weights(layer) == (0 if policy == "torch" else 2)
        for _ in range(2):
            torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
        layer.fc1.weight.mul_(2.0)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=1e-5, atol=1e-5)
    kept = prepacked.find(layer.fc1.weight)
    assert (kept is None) == (policy == "torch")
    if policy in prepacked.forms(torch.float32):
        assert kept.form == policy


def test_recycled_memory_is_nobodys() -> None:
    """A tensor of the same size takes the memory over once the earlier one is gone, views of it included."""
    shape = (1 << 18, 2)
    first = memory.recycled(shape, torch.float32)
    assert first.shape == shape
    assert first.untyped_storage().nbytes() == first.numel() * 4
    assert first.is_contiguous()
    assert not first._is_view()
    at, view = first.data_ptr(), first[5:]
    del first
    assert memory.recycled(shape, torch.float32).data_ptr() != at
    view.fill_(3)
    del view
    taken = [memory.recycled(shape, torch.float32) for _ in range(2)]
    assert at in [t.data_ptr() for t in taken]
    held = taken[0].untyped_storage()  # of no tensor, but in use
    at = held.data_ptr()
    taken = [memory.recycled(shape, torch.float32) for _ in range(4)]
    assert at not in [t.data_ptr() for t in taken]
    shared = taken[0].share_memory_()  # as sent to another process, which may outlive the tensor here
    at = shared.data_ptr()
    del shared, taken
    assert at not in [memory.recycled(shape, torch.float32).data_ptr() for _ in range(6)]
    small = memory.recycled((4, 4), torch.float32)
    assert small.data_ptr() != memory.recycled((4, 4), torch.float32).data_ptr()


def test_results_held_by_the_caller_are_not_overwritten(own: None) -> None:
    model = nn.Linear(256, 2048)
    pyvit.pack_weights(model)
    with torch.no_grad():
        inputs = [torch.randn(256, 256) for _ in range(4)]
        outs = [linear(x, model.weight, model.bias) for x in inputs]  # 2 MiB each
        for x, out in zip(inputs, outs, strict=True):
            torch.testing.assert_close(out, F.linear(x, model.weight, model.bias), rtol=1e-4, atol=1e-4)


def _numpy(w: Tensor) -> None:
    w.detach().numpy()[:] *= -1.5


def _dlpack(w: Tensor) -> None:
    torch.from_dlpack(w.detach()).mul_(-1.5)


def _set(w: Tensor) -> None:
    w.data = torch.randn_like(w)


WRITES = {
    "data +=": lambda w: w.data.add_(torch.randn(w.shape)),
    "data.copy_": lambda w: w.data.copy_(torch.randn(w.shape)),
    "data =": _set,
    "data of its transpose": lambda w: setattr(w, "data", w.data.t()),
    "detach": lambda w: w.detach().mul_(-1.5),
    "in place": lambda w: w.mul_(-1.5),
    "foreach": lambda w: torch._foreach_mul_([w], -1.5),
    "set_": lambda w: w.set_(torch.randn_like(w)),
    "numpy": _numpy,
    "dlpack": _dlpack,
    "storage": lambda w: w.untyped_storage().copy_(torch.randn(w.shape).untyped_storage()),
    "a head's rows": lambda w: w.data[8 : 8 + len(w) // 48].zero_(),  # of a ViT-L
    "a head's columns": lambda w: w.data[:, 16 : 16 + w.shape[1] // 48 + 1].zero_(),
    "rows exchanged": lambda w: w.data.copy_(w.data.flip(0)),
    "pruned": lambda w: w.data.mul_((torch.rand(w.shape) > 0.3).float()),
    "swapped": lambda w: torch.utils.swap_tensors(w, nn.Parameter(torch.randn(w.shape))),
}


@pytest.mark.parametrize("whole", [True, False], ids=["block", "layer"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_to_packed_weights_are_seen(write: Callable[[Tensor], object], whole: bool) -> None:
    """However they are made, also past the count of changes that autograd keeps."""
    block = Block(64, 2).eval() if whole else Mlp(64, 64).eval()
    pyvit.pack_weights(block)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        for _ in range(3):
            block(x)
        for weight in [m.weight for m in block.modules() if isinstance(m, nn.Linear)]:
            if weight.shape[0] == weight.shape[1] or write is not WRITES["data of its transpose"]:
                write(weight)
            for _ in range(3):
                torch.testing.assert_close(block(x), copy.deepcopy(block)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False], ids=["block", "layer"])
def test_a_single_element_is_seen_in_the_end_and_said(whole: bool) -> None:
    block = Block(64, 2).eval() if whole else Mlp(64, 128).eval()
    pyvit.pack_weights(block)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        for _ in range(3):
            block(x)
        for at in (5, 1001, 7777):
            (block.mlp if whole else block).fc1.weight.data.view(-1)[at] += 100.0
            with pytest.warns(RuntimeWarning, match="written to past PyTorch's count of changes"):
                _ = [block(x) for _ in range(128)]
            torch.testing.assert_close(block(x), copy.deepcopy(block)(x), rtol=1e-4, atol=1e-4)


def test_replaced_weights_are_not_multiplied_packed() -> None:
    """By load_state_dict(assign=True), a parametrization, functional_call, copies and pickles; and ids that return
    after a collection."""
    made = nn.Sequential(Mlp(64, 128), Mlp(64, 128)).eval()
    x = torch.randn(3, 64)

    def check() -> None:
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(made(x), formula_of(made, x), rtol=1e-4, atol=1e-4)

    def formula_of(made: nn.Module, x: Tensor) -> Tensor:
        for layer in made:
            x = F.linear(F.gelu(F.linear(x, layer.fc1.weight, layer.fc1.bias)), layer.fc2.weight, layer.fc2.bias)
        return x

    assert pyvit.pack_weights(made) == 4
    check()
    made.load_state_dict({k: torch.randn_like(v) * 0.1 for k, v in made.state_dict().items()}, assign=True)
    check()
    assert pyvit.pack_weights(made) == 4
    check()
    other = {k: torch.randn_like(v) * 0.1 for k, v in made.state_dict().items()}
    with torch.no_grad():
        found = torch.func.functional_call(made, other, (x,))
        wanted = copy.deepcopy(made)
        wanted.load_state_dict(other)
        torch.testing.assert_close(found, formula_of(wanted, x), rtol=1e-4, atol=1e-4)
    check()
    made.share_memory()
    check()
    made.requires_grad_(False)
    check()
    nn.utils.parametrizations.weight_norm(made[0].fc1)
    assert pyvit.pack_weights(made) == 3
    check()
    with torch.no_grad():
        made[0].fc1.parametrizations.weight.original0.mul_(2.0)
    check()
    again = pickle.loads(pickle.dumps(made[1]))
    assert not any(prepacked.is_packed(p) for p in [*again.parameters(), *copy.deepcopy(made).parameters()])
    for _ in range(200):  # an id that a weight had may be another's
        made[1].fc1 = type(made[1].fc1)(64, 128, activation="gelu")
        gc.collect(0)
        check()


@pytest.mark.parametrize("swap", [True, False])
def test_conversions(swap: bool) -> None:
    """Also by exchanging tensors, which no weak reference may point to."""
    model = Block(64, 2).eval()
    x = torch.randn(2, 5, 64)
    pyvit.pack_weights(model)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with torch.no_grad():
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                for _ in range(3):
                    model(x.to(next(model.parameters()).dtype))
                model.to(dtype)
                torch.testing.assert_close(model(x.to(dtype)), copy.deepcopy(model)(x.to(dtype)), rtol=0.02, atol=0.02)
            model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=1e-3, atol=1e-3)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_explain_says_which(own: None) -> None:
    """Before a call as after it, of the call that the packed weights take."""
    made, x = Mlp(64, 128), torch.randn(5, 64)
    arguments = (x, made.fc1.weight, made.fc1.bias, made.fc2.weight, made.fc2.bias)
    with torch.no_grad():
        assert "matrix product by pyvit" in str(pyvit.explain(mlp, *arguments))
        pyvit.pack_weights(made)
        before = str(pyvit.explain(mlp, *arguments))
        assert "weights kept packed: pyvit (PYVIT_LINEAR)" in before
        made(x)
        assert str(pyvit.explain(mlp, *arguments)) == before
    assert "packed" not in str(pyvit.explain(mlp, *arguments))


def test_what_is_no_matrix_is_refused() -> None:
    for t in (torch.zeros(4), torch.zeros(4, 4).t()[:2], torch.zeros(1, 1)):
        for op in (torch.ops.pyvit.prepack_weight, torch.ops.pyvit.prepack_header):
            with pytest.raises(RuntimeError, match="weight must be a contiguous matrix of 8 bytes or more"):
                op(t)


def test_a_header_tells_once_that_its_weight_has_changed() -> None:
    weight = torch.randn(16, 8)
    header = torch.ops.pyvit.prepack_header(weight)
    assert torch.ops.pyvit.is_prepacked(weight, header)
    for change in (lambda: weight.mul_(2), lambda: weight.data.mul_(2)):
        change()
        assert not torch.ops.pyvit.is_prepacked(weight, header)
        assert torch.ops.pyvit.is_prepacked(weight, header)
    for wrong in (header[:-1], header.float(), weight):
        with pytest.raises(RuntimeError, match="is_prepacked: header must be"):
            torch.ops.pyvit.is_prepacked(weight, wrong)


def test_saved_parameters_load_without_pyvit() -> None:
    layer = nn.Linear(8, 8)
    pyvit.pack_weights(layer)
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded, layer.weight)
    assert not prepacked.is_packed(loaded)
