"""pyvit.activate_sdpa: outputs and gradients of F.scaled_dot_product_attention, who is served, what goes to PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyvit
from pyvit import library
from pyvit.dispatch import choice, devices
from pyvit.integrations import sdpa_override as sdpa
from pyvit.testing import GRADIENT_FACTOR, compare, layout, poisoned, served

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))

SDPA = F.scaled_dot_product_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = {
    "none": None,
    "bool": lambda q, k: torch.rand(q.shape[2], k.shape[2]) > 0.3,
    "heads": lambda q, k: torch.randn(1, q.shape[1], q.shape[2], k.shape[2]),
    "keys": lambda q, k: torch.randn(q.shape[0], 1, 1, k.shape[2]),
    "empty row": lambda q, k: torch.arange(q.shape[2])[:, None] > torch.zeros(1, k.shape[2]),
}
#: batch, heads, key heads, queries, keys, channels
SHAPES = (
    (2, 3, 3, 49, 49, 32),
    (1, 2, 2, 1, 130, 64),
    (2, 4, 2, 37, 21, 40),
    (1, 1, 1, 3, 5, 1),
    (1, 2, 2, 70, 70, 256),
)


@pytest.fixture
def active() -> Iterator[sdpa.Activation]:
    with pyvit.activate_sdpa() as found:
        yield found
    assert not sdpa._active


class Counted:
    """How many calls were served and left within."""

    def __enter__(self) -> Counted:
        self._before = sdpa.sdpa_calls()
        return self

    def __exit__(self, *_: object) -> None:
        self.served, self.left = (b - a for a, b in zip(self._before, sdpa.sdpa_calls(), strict=True))


def _results(tensors: list[Tensor], weight: Tensor, **options: Any) -> list[Tensor]:
    """The output, and the gradients of all floating-point tensors that require one."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    out = SDPA(*leaves, **options)
    wanted = [t for t in leaves if t.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, wanted, weight.to(out.dtype)) if wanted else ())]


def _check(tensors: list[Tensor], calls: int = 1, **options: Any) -> None:
    """By the numerics rule, against the formula in float64 and in the tensors' dtype; and that ours were called."""
    q, _, v = tensors[:3]
    with sdpa_kernel(SDPBackend.MATH):
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        wide = [w.requires_grad_(t.requires_grad) for w, t in zip(wide, tensors, strict=True)]
        weight = torch.randn(*q.shape[:-1], v.shape[-1])
        ref, naive = _results(wide, weight, **options), _results(tensors, weight, **options)
    with pyvit.activate_sdpa(), Counted() as counted, poisoned():
        got = _results(tensors, weight, **options)
    assert (counted.served, counted.left) == (calls, 0)
    compare("out", got[0], naive[0], ref[0], dtype=q.dtype)
    if len(got) > 1:
        peak = max(float(g.abs().max()) for g in ref[1:])
        compare(
            "gradients", got[1:], naive[1:], ref[1:], GRADIENT_FACTOR, dtype=q.dtype, magnitudes=[peak] * len(ref[1:])
        )


def _heads(shape: tuple[int, ...], dtype: torch.dtype, grad: bool = True, how: str = "contiguous") -> list[Tensor]:
    b, h, hk, nq, nk, d = shape
    tensors = [torch.randn(*s, d).to(dtype) for s in ((b, h, nq), (b, hk, nk), (b, hk, nk))]
    return [layout(t, how).requires_grad_(grad) for t in tensors]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], causal: bool) -> None:
    _check(
        _heads(shape, dtype),
        is_causal=causal,
        scale=1.3 * shape[-1] ** -0.5 if causal else None,
        enable_gqa=shape[1] != shape[2],
    )


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_masks(dtype: torch.dtype, mask: str) -> None:
    q, k, v = _heads((2, 3, 3, 19, 33, 24), dtype)
    made = MASKS[mask](q, k)
    _check([q, k, v, made if made.dtype == torch.bool else made.to(dtype)])


@pytest.mark.parametrize("how", ["permuted", "sliced", "shifted", "transposed", "stepped"])
def test_strides(how: str) -> None:
    """The last two are not rows in memory, which PyTorch's fused kernel does not take."""
    _check(_heads((2, 3, 3, 19, 33, 24), torch.float32, how=how))


def test_expanded_gradient_and_packed_inputs(active: sdpa.Activation) -> None:
    qkv = torch.randn(2, 19, 3, 4, 16, requires_grad=True)
    found = []
    for call in (SDPA, pyvit.ops.flash_attention):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        found.append(torch.autograd.grad(call(q, k, v).sum(), qkv)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("grad", [False, True])
def test_strides_are_those_that_the_compiler_expects(active: sdpa.Activation, grad: bool) -> None:
    """The outputs' strides, and their equality with pyvit's operator bit for bit."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for how in ("contiguous", "permuted", "sliced"):
        q, k, v = _heads((2, 3, 3, 19, 33, 24), torch.bfloat16, grad, how)
        out, lse = op(q, k, v)
        expected = op(*(t.detach().to("meta") for t in (q, k, v)))
        strided = torch.empty_strided(q.shape, q.stride(), device="meta")
        assert out.stride() == torch.empty_like(strided).stride()
        assert (lse.shape, lse.stride(), lse.dtype) == (expected[1].shape, expected[1].stride(), torch.float32)
        ours, our_lse = pyvit.ops.flash_attention(q, k, v, return_lse=True, backend="cpu")
        assert torch.equal(out, ours)
        assert torch.equal(lse, our_lse)
        if grad:
            weight = torch.randn(out.shape).to(out)
            expected = torch.autograd.grad(ours, (q, k, v), weight)
            for g, e in zip(torch.autograd.grad(out, (q, k, v), weight), expected, strict=True):
                _, h, n, d = g.shape
                assert g.stride() == (h * n * d, d, h * d, 1)
                assert torch.equal(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 19, 33), (1, 1, 33), (2, 3, 19, 33)], ids=str)
def test_learned_masks(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """PyTorch has the formula alone for a mask that requires a gradient."""
    _check([*_heads((2, 3, 3, 19, 33, 24), dtype), torch.randn(shape).to(dtype).requires_grad_()])


@pytest.mark.parametrize("lead", [(), (3,), (2, 2, 3)], ids=str)
def test_other_numbers_of_dimensions(lead: tuple[int, ...]) -> None:
    tensors = [torch.randn(*lead, n, 24, requires_grad=True) for n in (19, 33, 33)]
    _check(tensors)
    _check([*tensors, torch.randn(19, 33)])


def test_values_of_another_width_and_broadcast() -> None:
    q, k, v = _heads((2, 3, 3, 19, 33, 24), torch.float32)
    _check([q, k, torch.randn(2, 3, 33, 40, requires_grad=True)])
    _check([q, k[:1].detach().requires_grad_(), v[:1].detach().requires_grad_()])


def _left(**options: Any) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        torch.manual_seed(0)
        dtype = options.get("dtype", torch.float32)
        tensors = _heads(options.get("shape", (2, 3, 3, 19, 33, 24)), dtype)
        if options.get("mask"):
            tensors.append(torch.randn(19, 33).to(dtype).requires_grad_(options["mask"] == "learned"))
        out = SDPA(*tensors, dropout_p=options.get("dropout_p", 0.0))
        return [out, *torch.autograd.grad(out.sum(), [t for t in tensors if t.requires_grad])]

    return call


def _by_formula() -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return _left()()


def _weights() -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.ops.aten._scaled_dot_product_attention_math(*_heads((1, 2, 2, 5, 5, 8), torch.float32)))


def _second_derivative_of_the_formula() -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = _heads((1, 2, 2, 5, 5, 8), torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        (g,) = torch.autograd.grad(SDPA(q, k, v).square().sum(), q, create_graph=True)
    return list(torch.autograd.grad(g.square().sum(), (q, k, v)))


def _nested() -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    return [SDPA(q, q, q).transpose(1, 2).values()]


@pytest.mark.parametrize(
    "call",
    [
        _left(dtype=torch.float64),
        _left(dropout_p=0.3),
        _left(shape=(2, 3, 3, 19, 33, 264)),
        _left(shape=(0, 3, 3, 19, 33, 8)),
        _left(dtype=torch.float64, mask="learned"),
        _left(dropout_p=0.3, mask="learned"),
        _left(shape=(2, 3, 3, 19, 33, 264), mask="learned"),
        _by_formula,
        _weights,
        _second_derivative_of_the_formula,
        _nested,
    ],
    ids=["float64", "dropout", "channels", "empty", "float64-learned", "dropout-learned", "channels-learned", "formula",
         "weights", "second-derivative", "nested"],
)  # fmt: skip
def test_other_calls_have_the_bits_of_pytorch(call: Callable[[], list[Tensor]]) -> None:
    before = call()
    with pyvit.activate_sdpa(), Counted() as counted:
        during = call()
    assert counted.served == 0
    for a, b, c in zip(before, during, call(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: _heads((2, 3, 2, 19, 33, 24), torch.float32),
        lambda: [torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 9), torch.randn(2, 3, 5, 8)],
        lambda: [*_heads((2, 3, 3, 19, 33, 24), torch.float32), torch.randn(19, 32)],
        lambda: [*_heads((2, 3, 3, 19, 33, 24), torch.float32), torch.randn(19, 32, requires_grad=True)],
    ],
)
def test_errors_are_those_of_pytorch(arguments: Callable[[], list[Tensor]]) -> None:
    tensors = arguments()
    with pytest.raises(RuntimeError) as before:
        SDPA(*tensors)
    with pyvit.activate_sdpa(), pytest.raises(RuntimeError) as during:
        SDPA(*tensors)
    assert str(before.value) == str(during.value)


def test_weights_that_are_not_computed_raise(active: sdpa.Activation) -> None:
    out, weights = torch.ops.aten._scaled_dot_product_attention_math(*(torch.randn(3, 5, 8) for _ in range(3)))
    assert out.shape == (3, 5, 8)
    with pytest.raises(RuntimeError, match="do not compute the attention weights"):
        weights.sum()


def test_second_derivatives() -> None:
    """Of calls that PyTorch serves by the formula; its fused kernel has none, with us as without."""
    q, k, v = (t.double() for t in _heads((1, 2, 2, 5, 7, 8), torch.float32))
    mask = torch.randn(2, 5, 7, dtype=torch.float64)

    def twice(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(SDPA(*leaves).square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    expected = twice((q, k, v, mask))
    with pyvit.activate_sdpa(), Counted() as counted:
        found = twice(tuple(t.float() for t in (q, k, v, mask)))
    assert counted.served == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    for context in (pyvit.activate_sdpa, torch.enable_grad):
        x = torch.randn(1, 2, 5, 8, requires_grad=True)
        with context():
            (g,) = torch.autograd.grad(SDPA(x, x, x).square().sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match="not implemented"):
                g.sum().backward()


def test_a_forward_and_its_backward_may_be_on_either_side() -> None:
    """The log-sum-exp means the same to both."""
    for mask in (None, torch.arange(19)[:, None].expand(19, 33) > 0):
        q, k, v = _heads((2, 3, 3, 19, 33, 24), torch.float32)
        with sdpa_kernel(SDPBackend.MATH):
            expected = torch.autograd.grad(SDPA(q, k, v, mask).square().sum(), (q, k, v))
        with pyvit.activate_sdpa():
            ours = SDPA(q, k, v, mask).square().sum()
        theirs = SDPA(q, k, v, mask).square().sum()
        found = [torch.autograd.grad(ours, (q, k, v))]
        with pyvit.activate_sdpa():
            found.append(torch.autograd.grad(theirs, (q, k, v)))
        for grads in found:
            for a, b in zip(grads, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return SDPA(q * 1.5, k, v, is_causal=True).square().sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", ["contiguous", "permuted"])
def test_compiled_graphs(backend: str, how: str) -> None:
    """Compiled before or while activated; served while, and not after."""
    torch._dynamo.reset()
    tensors = _heads((2, 3, 3, 19, 33, 24), torch.float32, how=how)
    expected = torch.autograd.grad(_three(*tensors), tensors)
    early, late = (torch.compile(_three, backend=backend, fullgraph=True) for _ in range(2))
    torch.autograd.grad(early(*tensors), tensors)
    with pyvit.activate_sdpa():
        for compiled in (early, late):
            with Counted() as counted:
                found = torch.autograd.grad(compiled(*tensors), tensors)
            assert (counted.served, counted.left) == (1, 0)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for compiled in (early, late):
        with Counted() as counted:
            torch.autograd.grad(compiled(*tensors), tensors)
        assert (counted.served, counted.left) == (0, 0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dims", [3, 4])
def test_compiled_graphs_are_those_of_pytorch(mode: Callable[[], Any], dims: int) -> None:
    """Caches of the compiler are read by processes that have not activated anything. The mask requires a gradient."""
    tensors = [t[0, ..., :] if dims == 3 else t for t in _heads((2, 3, 3, 19, 33, 24), torch.float32)]
    tensors = [t.detach().requires_grad_() for t in (*tensors, torch.randn(19, 33))]
    graphs: list[list[str]] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs[-1] += [str(node.target) for node in graph.graph.nodes]
        return make_boxed_func(graph)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    for context in (torch.enable_grad, pyvit.activate_sdpa):
        torch._dynamo.reset()
        graphs.append([])
        compiled = torch.compile(SDPA, backend=aot_autograd(fw_compiler=note, bw_compiler=note), fullgraph=True)
        with context(), mode():
            out = compiled(*tensors)
            if out.requires_grad:
                out.sum().backward()
    assert graphs[0]
    assert graphs[0] == graphs[1]


class _Module(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return SDPA(*tensors)


@pytest.mark.parametrize("learned", [False, True])
def test_exported_programs_are_those_of_pytorch(learned: bool) -> None:
    tensors = _heads((2, 3, 3, 19, 33, 24), torch.float32, False)
    tensors += [torch.randn(3, 19, 33, requires_grad=True)] if learned else []
    programs = []
    for context in (torch.enable_grad, pyvit.activate_sdpa):
        with context():
            program = torch.export.export(_Module(), tuple(tensors))
            programs.append(
                [str(node.target) for p in (program, program.run_decompositions()) for node in p.graph.nodes]
            )
    assert programs[0] == programs[1]


def test_transforms_and_autocast() -> None:
    q, k, v = _heads((2, 3, 3, 19, 33, 24), torch.float32, False)

    def calls() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            cast = SDPA(q, k, v)
        assert cast.dtype == torch.bfloat16
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused kernel has no forward mode
            tangent = torch.func.jvp(lambda q: SDPA(q[0], k[0], v[0]), (q,), (q,))[1]
        loss = lambda q, *rest: SDPA(q, *rest).square().sum()  # noqa: E731
        with torch.inference_mode():
            inferred = SDPA(q, k, v), SDPA(q[0], k[0], v[0])
        return [
            cast,
            *inferred,
            torch.func.vmap(SDPA)(q, k, v),
            torch.func.vmap(SDPA)(torch.stack([q, q]), torch.stack([k, k]), torch.stack([v, v])),
            torch.func.grad(loss)(q, k, v),
            torch.func.grad(loss)(q[0], k[0], v[0]),
            torch.func.vmap(torch.func.grad(loss))(q, k, v),
            tangent,
        ]

    expected = calls()
    with pyvit.activate_sdpa(), Counted() as counted:
        found = calls()
    assert counted.served
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=2e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-2 if a.dtype == torch.bfloat16 else 1e-5
        )


def test_modules_of_torch(active: sdpa.Activation) -> None:
    """An encoder layer in training calls the function. (In inference torch's fast path does not.)"""
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), torch.randn(2, 9, 32)
    with Counted() as counted:
        layer(x).sum().backward()
    assert counted.served == 1


def test_activations_nest_and_are_undone() -> None:
    q, k, v = _heads((1, 2, 2, 9, 9, 16), torch.float32, False)

    def is_served() -> bool:
        with Counted() as counted:
            SDPA(q, k, v)
        return counted.served == 1

    plain = SDPA(q, k, v)
    first, second = pyvit.activate_sdpa(), pyvit.activate_sdpa()
    assert is_served()
    first.restore()
    first.restore()
    assert is_served()
    assert "restored" in str(first)
    second.restore()
    assert not is_served()
    with pytest.raises(KeyError), pyvit.activate_sdpa():
        raise KeyError
    assert not is_served()
    pyvit.activate_sdpa()
    pyvit.activate_sdpa()
    pyvit.restore_sdpa()
    assert not is_served()
    pyvit.restore_sdpa()
    with pyvit.activate_sdpa() as report:
        assert is_served()
        served_elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: served_elsewhere.append(is_served()))
        thread.start()
        thread.join()
        assert served_elsewhere == [True]
        assert "float32, bfloat16, float16" in str(report)
        assert "left to PyTorch" in report.devices["cuda"] or torch.cuda.is_available()
        assert torch.equal(SDPA(q, k, v), pyvit.ops.flash_attention(q, k, v, backend="cpu"))
    assert torch.equal(SDPA(q, k, v), plain)


def test_what_comes_first_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dtype for which PyTorch's kernels come first is left to them; so is everything with another backend chosen."""
    q, k, v = _heads((1, 2, 2, 9, 9, 16), torch.bfloat16, False)
    rule = choice.Rule("torch", "flash_attention", "cpu", "for a test", (torch.bfloat16,))
    monkeypatch.setattr(choice, "RULES", (rule, *choice.RULES))
    monkeypatch.setattr(pyvit.dispatch.select.__globals__["choice"], "RULES", choice.RULES)
    pyvit.dispatch.select.__globals__["_choices"].clear()
    plain = SDPA(q, k, v)
    try:
        with pyvit.activate_sdpa() as report, Counted() as counted:
            assert torch.equal(SDPA(q, k, v), plain)
            SDPA(q.float(), k.float(), v.float())
        assert (counted.served, counted.left) == (1, 1)
        assert report.devices["cpu"] == "float32, float16; bfloat16 left to PyTorch: for a test"
    finally:
        pyvit.dispatch.select.__globals__["_choices"].clear()
    with pyvit.use_backend("reference"), pyvit.activate_sdpa() as report, Counted() as counted:
        SDPA(q[0], k[0], v[0])
        SDPA(q, k, v)
    assert counted.served == 0
    assert report.devices["cpu"] == "left to PyTorch: backend 'reference' is chosen"


# The CUDA operators' kernels; no GPU has run them through PyTorch's dispatcher.


@pytest.mark.parametrize("by", served("flash_attention", "causal", "grad", head_dims=(24,)), ids=str)
@pytest.mark.parametrize("how", ["contiguous", "permuted"])
def test_flash_functions(by: Any, how: str) -> None:
    """On any device: strides as PyTorch's meta kernels have them, values and gradients as our operator's."""
    q, k, v = (layout(by.randn(2, 3, n, 24), how) for n in (19, 33, 33))
    given = (q, k, v, True, None)
    out, lse, *rest = sdpa.flash_forward(by.backend, *given)
    meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (q, k, v)]
    expected = torch.ops.aten._scaled_dot_product_flash_attention(*meta, 0.0, True)
    assert [r if not isinstance(r, Tensor) else (r.shape, r.dtype) for r in (out, lse, *rest)] == [
        r if not isinstance(r, Tensor) else (r.shape, r.dtype) for r in expected
    ]
    assert (out.stride(), lse.stride()) == (expected[0].stride(), expected[1].stride())
    ours, our_lse = pyvit.ops.flash_attention(q, k, v, is_causal=True, return_lse=True, backend=by.backend)
    assert torch.equal(out, ours)
    assert torch.equal(lse, our_lse)
    grad = layout(by.randn(2, 3, 19, 24), how)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(pyvit.ops.flash_attention(*leaves, is_causal=True, backend=by.backend), leaves, grad)
    for t, g, w in zip(
        (q, k, v), sdpa.flash_backward(by.backend, grad, q, k, v, out, lse, True, None), wanted, strict=True
    ):
        assert torch.equal(g, w)
        assert g.stride() == torch.empty_like(t).stride()


class _Original:
    def __init__(self, *_: str) -> None:
        self.calls: list[Any] = []

    def call_boxed(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        return "torch's"


def test_nothing_stays_where_the_fused_operators_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "aten::_scaled_dot_product_attention_math"
    before = torch._C._dispatch_dump(name)
    monkeypatch.setattr(torch.ops.pyvit, "override_sdpa", lambda *_: False)
    with pyvit.activate_sdpa() as report:
        assert report.devices["cpu"].startswith("left to PyTorch: this torch does not have")
        assert torch._C._dispatch_dump(name) == before


def test_cuda_operators_are_overridden_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: that kernels are registered for the CUDA operators, whom they call, and that they go."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from torch.nn import attention

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sdpa, "_get_kernel", _Original)
    with pyvit.activate_sdpa() as report:
        assert report.devices["cuda"] == "left to PyTorch: there is no GPU"
    monkeypatch.setattr(devices, "present", lambda: (devices.PARTS["sm_90"],))
    with pyvit.activate_sdpa() as report:
        assert "have not been measured" in report.devices["cuda"]
    monkeypatch.setattr(sdpa, "_gpu_refusal", lambda: None)
    name = "aten::_scaled_dot_product_flash_attention"
    before = torch._C._dispatch_dump(name)
    with pyvit.activate_sdpa():
        assert torch._C._dispatch_dump(name) != before
        if hasattr(attention, "restore_flash_attention_impl"):
            assert attention.current_flash_attention_impl() == "pyvit"
    assert torch._C._dispatch_dump(name) == before
    if hasattr(attention, "restore_flash_attention_impl"):
        assert attention.current_flash_attention_impl() is None

    kernels = sdpa._Cuda()
    q, k, v = _heads((2, 3, 3, 19, 33, 24), torch.bfloat16, False)
    try:
        monkeypatch.setattr(sdpa, "_gpu_backend", lambda *_: "cpu")
        out, lse, *_ = kernels.forward(None, q, k, v, scale=0.2)
        assert torch.equal(out, pyvit.ops.flash_attention(q, k, v, scale=0.2, backend="cpu"))
        rest = (out, lse, None, None, 19, 33, 0.0, False, None, None)
        grads = kernels.backward(None, torch.ones_like(out), q, k, v, *rest, scale=0.2)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
        assert kernels.forward(None, q, k, v, 0.1) == "torch's"
        monkeypatch.setattr(sdpa, "_gpu_backend", lambda *_: None)
        assert kernels.forward(None, q, k, v, scale=0.2) == "torch's"
        assert kernels._forward.calls[-1] == ((None, q, k, v, 0.0, False, False), {"scale": 0.2})
        assert kernels.backward(None, out, q, k, v, *rest) == "torch's"
        assert kernels._backward.calls[-1] == ((None, out, q, k, v, *rest), {"scale": None})
    finally:
        kernels.remove()


def test_which_gpu_calls_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for which dispatch has a kernel of ours first: now, with a backend chosen."""
    q, k, v = _heads((2, 3, 3, 19, 33, 24), torch.bfloat16, False)
    assert sdpa._gpu_backend(q, k, v, False, False) is None
    with pyvit.use_backend("triton"):
        refused = pyvit.dispatch.reasons(
            pyvit.dispatch.Call("flash_attention", "cuda", torch.bfloat16, (), (24,)), "triton"
        )
        assert sdpa._gpu_backend(q, k, v, False, False) == (None if refused else "triton")
        assert sdpa._gpu_backend(q.double(), k.double(), v.double(), False, False) is None
