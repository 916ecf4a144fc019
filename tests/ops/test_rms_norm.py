"""rms_norm: numerics on every instruction set, rounding on the way out, and the ways of calling it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyvit
from pyvit.nn import RMSNorm
from pyvit.ops import reference, rms_norm
from pyvit.testing import check_op, compare, layout

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Dtypes of x, of the weight and of the result.
KINDS = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, F32, BF16), (F32, F32, F16), (BF16, F32, BF16)]
OP = torch.ops.pyvit.rms_norm.default

pytestmark = pytest.mark.filterwarnings("ignore:.*is_compiling.*")


def inputs(dtype: torch.dtype, *shape: int, weight: torch.dtype | None = None) -> list[Tensor]:
    x = (torch.randn(shape) * torch.logspace(-1, 1, shape[-1]) + 1).to(dtype)
    return [x, torch.randn(shape[-1]).to(weight or dtype)]


@pytest.mark.isa
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"cpu-{kind}")
@pytest.mark.parametrize("shape", [(1, 1), (7, 96), (2, 3, 17), (131, 33), (40, 768), (1, 5000), (300, 16)], ids=str)
def test_numerics(shape: tuple[int, ...], kind: tuple[torch.dtype, ...]) -> None:
    """Outputs and gradients against float64, which are to err at most twice (three times) as much as the naive form."""
    x, weight = inputs(kind[0], *shape, weight=kind[1])
    for tensors in ([x, weight], [x]):
        grad, found = torch.randn(shape).to(kind[2]), {}
        for form in ("ours", "naive", "exact"):
            leaves = [(t.double() if form == "exact" else t).detach().requires_grad_() for t in tensors]
            given = [*leaves, None][:2]
            dtype = torch.float64 if form == "exact" else kind[2]
            function = rms_norm if form == "ours" else reference.rms_norm
            out = function(*given, 1e-6, dtype=dtype)
            found[form] = [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]
        assert found["ours"][0].dtype == kind[2]
        compare("rms_norm", *(f[0] for f in found.values()), labels=["out"])
        labels = ["grad_x", "grad_weight"][: len(tensors)]
        # grad_x is a difference, whose terms cancel in rows of one element.
        rms = x.double().square().mean(-1, keepdim=True).add(1e-6).sqrt()
        term = float((grad.double() * (weight.double() if len(tensors) == 2 else 1.0) / rms).abs().max())
        magnitudes = [term, 0.0][: len(tensors)]
        compare("rms_norm", *(f[1:] for f in found.values()), factor=3.0, labels=labels, magnitudes=magnitudes)
        with torch.no_grad():  # the kernel without statistics
            assert torch.equal(rms_norm(*[*tensors, None][:2], 1e-6, dtype=kind[2]), found["ours"][0])


@pytest.mark.parametrize("store", ["contiguous", "transposed", "sliced", "stepped", "shifted", "expanded"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_strides_in_poisoned_memory(dtype: torch.dtype, store: str) -> None:
    x, weight = inputs(dtype, 4, 9, 27)
    check_op(rms_norm, {"x": layout(x, store), "weight": weight}, backend="cpu", eps=1e-6)
    check_op(rms_norm, {"x": x, "weight": weight}, backend="cpu", eps=1e-6, store_grad=store)


def test_as_torch() -> None:
    """The default eps, and the module: the same parameters, keys and values."""
    for dtype in (F32, BF16):
        x, weight = inputs(dtype, 5, 40)
        x *= 1e-3  # where eps matters
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (40,), weight, eps), rtol=1e-2, atol=1e-2)
        assert torch.equal(rms_norm(x, weight), rms_norm(x, weight, eps))
    ours, theirs = RMSNorm(40, eps=1e-5), nn.RMSNorm(40, eps=1e-5)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.RMSNorm)
    assert str(ours) == str(theirs)
    torch.testing.assert_close(ours(torch.ones(3, 40)), theirs(torch.ones(3, 40)))
    assert RMSNorm(40, elementwise_affine=False).weight is None


def test_rows_do_not_mix() -> None:
    x = torch.randn(9, 40)
    x[2, 3], x[5, 7] = float("nan"), float("inf")
    out = rms_norm(x)
    assert out.isnan().any(1).tolist() == [i in (2, 5) for i in range(9)]


def test_same_bits_for_any_number_of_threads() -> None:
    x, weight = (t.requires_grad_() for t in inputs(F32, 3000, 50))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = rms_norm(x, weight)
            found.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2))[1:], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    leaves = [t.requires_grad_(need) for t, need in zip(inputs(F32, 6, 20), needs, strict=True)]
    rms_norm(*leaves).square().sum().backward()
    assert [t.grad is not None for t in leaves] == list(needs)


@pytest.mark.parametrize("leading", [(), (0,), (0, 3), (1, 1, 7, 1)], ids=str)
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in inputs(F32, *leading, 24)]
    out = rms_norm(*leaves)
    assert out.shape == (*leading, 24)
    found = torch.autograd.grad(out.square().sum(), leaves)
    plain = torch.autograd.grad(rms_norm(*leaves, backend="reference").square().sum(), leaves)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_gradcheck_and_double_backward() -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float64, 2, 3, 5)]
    assert torch.autograd.gradcheck(rms_norm, leaves)
    assert torch.autograd.gradgradcheck(rms_norm, leaves)
    seconds = []
    for dtype in (F32, torch.float64):
        tensors = [t.detach().to(dtype).requires_grad_() for t in leaves]
        first = torch.autograd.grad(rms_norm(*tensors).pow(3).sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for ours, exact in zip(*seconds, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """torch.ops.pyvit.rms_norm: schema, fake kernel, autograd registration, tracing with dynamic shapes; and its
    values."""
    x, weight = (t.requires_grad_() for t in inputs(F32, 3, 4, 24))
    torch.library.opcheck(OP, (x, weight, 1e-5, dtype, "auto"))
    assert torch.equal(OP(x, weight, 1e-5, dtype, "auto")[0], rms_norm(x, weight, 1e-5, dtype=dtype))
    low = torch.autograd.grad(OP(x, weight, 1e-5, dtype, "auto")[0].float().sum(), (x, weight))
    assert all(
        map(torch.equal, low, torch.autograd.grad(rms_norm(x, weight, 1e-5, dtype=dtype).float().sum(), (x, weight)))
    )


def test_compiler_and_transforms_see_the_plain_formula() -> None:
    leaves = [t.requires_grad_() for t in inputs(F32, 6, 20)]
    compiled = torch.compile(lambda *t: rms_norm(*t, 1e-5, dtype=BF16), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), reference.rms_norm(*leaves, 1e-5, BF16))
    x, weight = inputs(F32, 3, 6, 20)
    mapped = torch.vmap(lambda t: rms_norm(t, weight))(x)
    torch.testing.assert_close(mapped, rms_norm(x, weight))
    assert rms_norm(x.to("meta"), weight.to("meta")).shape == x.shape


def test_autocast_leaves_the_dtype() -> None:
    x, weight = (t.requires_grad_() for t in inputs(F32, 6, 20))
    with torch.autocast("cpu", dtype=BF16):
        out = rms_norm(x, weight)
        rms_norm(x, weight).sum().backward()
    assert out.dtype == x.grad.dtype == weight.grad.dtype == F32
    assert torch.equal(out, rms_norm(x, weight))


def test_errors_name_the_argument() -> None:
    x, weight = inputs(F32, 4, 8)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be of shape \(8,\), got shape \(7\)"):
        rms_norm(x, weight[:7])
    with pytest.raises(TypeError, match="rms_norm: weight must have the dtype of"):
        rms_norm(x, weight.half())
    with pytest.raises(TypeError, match="rms_norm: x must be float32"):
        rms_norm(x.long())
    with pytest.raises(ValueError, match="rms_norm: x must be of shape"):
        rms_norm(torch.zeros(3, 0))
    with pytest.raises(TypeError, match="rms_norm: eps must be a number"):
        rms_norm(x, weight, "small")
    with pytest.raises(TypeError, match="rms_norm: dtype must be a floating point dtype"):
        rms_norm(x, dtype=torch.int32)
    with pytest.raises(pyvit.BackendError, match="float64"):
        rms_norm(x.double(), backend="cpu")
    with pytest.raises(pyvit.BackendError, match="does not support wider_dtype"):
        rms_norm(x.half(), dtype=F32, backend="cpu")
    assert rms_norm(x.half(), dtype=F32).dtype == F32
    assert "rms_norm on cpu" in str(pyvit.explain(rms_norm, x, weight))
    with pyvit.use_backend("cuda"):  # has no rms_norm, and leaves it to PyTorch or, here, the CPU's
        assert torch.equal(rms_norm(x, weight), rms_norm(x, weight, backend="cpu"))
