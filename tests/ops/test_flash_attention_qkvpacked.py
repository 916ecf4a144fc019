"""flash_attention_qkvpacked gives the same bits as flash_attention on its parts, with one gradient tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyvit
from pyvit.nn import Attention
from pyvit.ops import flash_attention, flash_attention_qkvpacked
from pyvit.testing import layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_compiling.*")


def by_parts(qkv: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    out, lse = flash_attention(*(t.transpose(1, 2) for t in qkv.unbind(2)), return_lse=True, **options)
    return out.transpose(1, 2), lse


def results(function: object, qkv: Tensor, bias: Tensor | None, grads: list[Tensor], **options: object) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (qkv, bias) if t is not None and t.is_floating_point()]
    mask = bias if bias is None or not bias.is_floating_point() else leaves[1]
    found = function(leaves[0], bias=mask, **options)
    return [*found, *torch.autograd.grad(found, leaves, [g.to(f.dtype) for g, f in zip(grads, found, strict=True)])]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 37, 197])
@pytest.mark.parametrize("kind", ["none", "bias", "mask", "causal", "finite mask"])
def test_same_bits_as_the_parts(dtype: torch.dtype, n: int, kind: str) -> None:
    b, h, d = 2, 3, 24
    qkv = torch.randn(b, n, 3, h, d).to(dtype)
    bias = {"bias": torch.randn(h, 1, n), "mask": torch.rand(b, 1, n, n) > 0.3}.get(kind)
    if kind == "finite mask":
        bias = torch.full((1, 1, n, 1), -1e9)
        bias[:, :, ::2] = torch.finfo(torch.float32).min
    grads, options = [torch.randn(b, n, h, d), torch.randn(b, h, n)], {"is_causal": kind == "causal"}
    ours = results(lambda *a, **k: flash_attention_qkvpacked(*a, return_lse=True, **k), qkv, bias, grads, **options)
    for a, other in zip(ours, results(by_parts, qkv, bias, grads, **options), strict=True):
        assert torch.equal(a, other)


@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "shifted", "expanded"])
def test_strides(store: str) -> None:
    qkv = layout(torch.randn(2, 9, 3, 2, 16), store)
    grads = [torch.randn(2, 9, 2, 16), torch.randn(2, 2, 9)]
    ours = results(lambda *a, **k: flash_attention_qkvpacked(*a, return_lse=True, **k), qkv, None, grads)
    for a, other in zip(ours, results(by_parts, qkv, None, grads), strict=True):
        torch.testing.assert_close(a, other)


def test_the_gradient_is_written_once() -> None:
    """One gradient tensor without copies; also if one output has no gradient."""
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    out = flash_attention_qkvpacked(qkv)
    with torch.profiler.profile() as recorded:
        out.sum().backward()
    names = {event.name for event in recorded.events()}
    assert "pyvit::flash_attention_qkvpacked_backward" in names
    assert not names & {"aten::stack", "aten::cat"}
    _, lse = flash_attention_qkvpacked(qkv, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), qkv)
    (wanted,) = torch.autograd.grad(by_parts(qkv)[1].sum(), qkv)
    assert torch.equal(grad, wanted)


def test_double_backward() -> None:
    qkv, bias = torch.randn(1, 5, 3, 2, 4, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    seconds = []
    for function in (lambda q, b: flash_attention_qkvpacked(q, bias=b), lambda q, b: by_parts(q, bias=b)[0]):
        first = torch.autograd.grad(function(qkv, bias).square().sum(), (qkv, bias), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (qkv, bias)))
    for ours, wanted in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_compiler_transforms_and_autocast() -> None:
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    wanted = by_parts(qkv)[0]
    compiled = torch.compile(lambda t: flash_attention_qkvpacked(t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), wanted)
    (a,) = torch.autograd.grad(compiled(qkv).square().sum(), qkv)
    (b,) = torch.autograd.grad(wanted.square().sum(), qkv)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.grad(lambda t: flash_attention_qkvpacked(t).square().sum())(qkv.detach()), b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = flash_attention_qkvpacked(qkv)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert qkv.grad.dtype == torch.float32


def test_module_agrees_with_its_parts() -> None:
    layer, x = Attention(32, 4, qkv_bias=True), torch.randn(2, 9, 32, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in layer.project(x))
    torch.testing.assert_close(layer(x), layer.proj(flash_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_errors_and_explain() -> None:
    qkv = torch.randn(2, 9, 3, 2, 16)
    assert pyvit.explain(flash_attention_qkvpacked, qkv).chosen == "cpu"
    assert pyvit.explain(flash_attention_qkvpacked, qkv, dropout_p=0.5).chosen == "reference"
    with pytest.raises(
        ValueError,
        match=r"flash_attention_qkvpacked: qkv must be of shape \(B, N, 3, H, D\), got shape \(2, 9, 2, 2, 16\)",
    ):
        flash_attention_qkvpacked(qkv[:, :, :2])
    with pytest.raises(ValueError, match=r"flash_attention_qkvpacked: qkv must be .*\(B, N, 3, H, D\)"):
        flash_attention_qkvpacked(qkv[0])
    with pytest.raises(ValueError, match="flash_attention_qkvpacked: bias must be"):
        flash_attention_qkvpacked(qkv, bias=torch.zeros(3, 9, 9))
    with pytest.raises(pyvit.BackendError, match="flash_attention: backend 'triton' cannot serve"):
        flash_attention_qkvpacked(qkv, backend="triton")
