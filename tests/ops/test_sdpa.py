"""pyvit's scaled_dot_product_attention against torch's: torch's own samples, broadcasting, errors, nested tensors."""

from __future__ import annotations

import inspect
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyvit
from pyvit.ops import flash_attention, scaled_dot_product_attention
from pyvit.testing import FORWARD_FACTOR, GRADIENT_FACTOR, compare

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _samples(dtype: torch.dtype) -> list[Any]:
    """The samples of torch's own tests."""
    if "expecttest" not in sys.modules:  # torch's tests import it, its samples do not use it
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    samples = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (info,) = (op for op in samples.op_db if op.name == "nn.functional.scaled_dot_product_attention")
    torch.manual_seed(0)
    return list(info.sample_inputs("cpu", dtype, requires_grad=True))


def _wide(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """torch's function in float64."""
    tensors = (t.double() if t is not None and t.dtype != torch.bool else t for t in (query, key, value, attn_mask))
    return F.scaled_dot_product_attention(*tensors, *rest, **options)


def _both(call: Callable[[Any], Tensor], leaves: list[Tensor]) -> None:
    """Outputs and gradients agree by the numerics rule, or both raise an error."""
    try:
        torchs = call(F.scaled_dot_product_attention)
    except (RuntimeError, ValueError, IndexError, TypeError):
        with pytest.raises((ValueError, TypeError)):
            call(scaled_dot_product_attention)
        return
    outputs = [call(scaled_dot_product_attention), torchs, call(_wide)]
    assert outputs[0].shape == torchs.shape
    assert outputs[0].dtype == torchs.dtype
    leaves = [t for t in leaves if t.requires_grad]
    weights = torch.linspace(-1, 1, torchs.numel()).view(torchs.shape)
    grads = [
        torch.autograd.grad(o, leaves, weights.to(o.dtype), allow_unused=True, materialize_grads=True) for o in outputs
    ]
    scores = 64.0  # of the samples' large numbers
    compare("out", *outputs, FORWARD_FACTOR, dtype=torchs.dtype, scores=scores)
    group = max((float(g.abs().max()) for g in grads[2] if g.numel()), default=0.0)
    compare(
        "gradients", *grads, GRADIENT_FACTOR, dtype=torchs.dtype, scores=scores, magnitudes=[8 * group] * len(leaves)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_torch(dtype: torch.dtype) -> None:
    samples = _samples(dtype)
    assert len(samples) >= 20
    for sample in samples:
        tensors = [sample.input, *sample.args, *(t for t in sample.kwargs.values() if isinstance(t, Tensor))]
        if sample.kwargs.get("dropout_p") in (None, 0.0, 1.0):
            _both(lambda sdpa, s=sample: sdpa(s.input, *s.args, **s.kwargs), tensors)
        else:  # other random numbers
            assert scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs).isfinite().all()


SHAPES = {
    "batch of keys": ((4, 2, 9, 16), (1, 2, 7, 16), (1, 2, 7, 16)),
    "batch of queries": ((1, 2, 9, 16), (4, 2, 7, 16), (4, 2, 7, 16)),
    "heads of keys": ((4, 2, 9, 16), (4, 1, 7, 16), (4, 1, 7, 16)),
    "heads of queries": ((4, 1, 9, 16), (4, 3, 7, 16), (4, 3, 7, 16)),
    "keys alone": ((2, 3, 9, 16), (1, 1, 7, 16), (2, 3, 7, 8)),
    "no heads": ((3, 9, 16), (3, 7, 16), (3, 7, 8)),
    "two dimensions": ((9, 16), (7, 16), (7, 8)),
    "queries without heads": ((9, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "five dimensions": ((2, 3, 4, 9, 16), (2, 3, 4, 7, 16), (2, 3, 4, 7, 8)),
    "five and three": ((2, 3, 4, 9, 16), (4, 7, 16), (1, 1, 4, 7, 16)),
    "no channels": ((2, 3, 9, 0), (2, 3, 7, 0), (2, 3, 7, 16)),
    "no channels of values": ((2, 3, 9, 16), (2, 3, 7, 16), (2, 3, 7, 0)),
    "no keys": ((2, 3, 9, 16), (2, 3, 0, 16), (2, 3, 0, 16)),
    "no queries": ((2, 3, 0, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "no batch": ((0, 3, 9, 16), (0, 3, 7, 16), (0, 3, 7, 16)),
    "no heads at all": ((2, 0, 9, 16), (2, 0, 7, 16), (2, 0, 7, 16)),
    "batches that differ": ((4, 2, 9, 16), (3, 2, 7, 16), (3, 2, 7, 16)),
    "channels that differ": ((2, 3, 9, 16), (2, 3, 7, 8), (2, 3, 7, 8)),
    "one dimension": ((16,), (16,), (16,)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "dropout of all": {"dropout_p": 1.0},
    "gqa": {"enable_gqa": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(shapes: str, option: str, seeded: int) -> None:
    leaves = [r(*shape, dtype=torch.float64).requires_grad_() for shape in SHAPES[shapes]]
    _both(lambda sdpa: sdpa(*leaves, **OPTIONS[option]), leaves)


GROUPED = {
    "keys and values": ((2, 6, 9, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "other heads of values": ((2, 6, 9, 8), (2, 2, 7, 8), (2, 3, 7, 8)),
    "batch of keys": ((2, 6, 9, 8), (1, 2, 7, 8), (2, 2, 7, 8)),
    "no batch": ((6, 9, 8), (2, 7, 8), (2, 7, 8)),
    "no divisor": ((2, 6, 9, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "more keys": ((2, 2, 9, 8), (2, 6, 7, 8), (2, 6, 7, 8)),
}


@pytest.mark.parametrize("shapes", GROUPED)
def test_grouped_queries(shapes: str, seeded: int) -> None:
    leaves = [r(*shape).requires_grad_() for shape in GROUPED[shapes]]
    _both(lambda sdpa: sdpa(*leaves, enable_gqa=True), leaves)


MASKS = [(9, 7), (1, 7), (9, 1), (2, 1, 9, 7), (3, 9, 7), (1, 3, 1, 7), (4, 1, 9, 7), (5, 2, 3, 9, 7), (9, 6)]


@pytest.mark.parametrize("lead", [(2, 3), (3,), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(lead: tuple[int, ...], mask: tuple[int, ...], seeded: int) -> None:
    """Masks that broadcast, with their gradients, and bool masks."""
    leaves = [r(*lead, n, 16, dtype=torch.float64).requires_grad_() for n in (9, 7, 7)]
    bias = r(*mask, dtype=torch.float64).requires_grad_()
    _both(lambda sdpa: sdpa(*leaves, bias), [*leaves, bias])
    allowed = torch.rand(mask) > 0.3
    if allowed.dim():
        allowed[..., 0] = True  # a row of nothing is zeros here, on every device
    _both(lambda sdpa: sdpa(*leaves, attn_mask=allowed), leaves)


@pytest.mark.parametrize("mask", [(7,), ()], ids=str)
def test_masks_of_few_dimensions(mask: tuple[int, ...], seeded: int) -> None:
    """torch accepts them if its fused kernels cannot serve the call, and fails otherwise."""
    q, k = r(2, 3, 9, 16), r(2, 3, 7, 16)
    bias = r(*mask)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, k, bias), F.scaled_dot_product_attention(q, k, k, bias.expand(9, 7))
    )


@pytest.mark.parametrize("of_query", DTYPES, ids=str)
@pytest.mark.parametrize("of_mask", [*DTYPES, torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_dtypes_of_masks(of_query: torch.dtype, of_mask: torch.dtype, seeded: int) -> None:
    q, mask = r(2, 3, 9, 16, dtype=of_query), torch.ones(9, 9, dtype=of_mask)
    _both(lambda sdpa: sdpa(q.requires_grad_(), q, q, mask), [q])


Q = torch.randn(2, 3, 9, 16)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": torch.tensor(0.3)},
        {"scale": torch.tensor([0.3])},
        {"scale": torch.tensor(0.3, requires_grad=True)},
        {"scale": "1"},
        {"scale": True},
        {"dropout_p": torch.tensor(0.0)},
        {"dropout_p": torch.tensor(1.0, requires_grad=True)},
        {"dropout_p": 2.0},
        {"is_causal": 1},
        {"attn_mask": [[1.0]]},
        {"key": Q.bfloat16()},
        {"query": Q + 0j, "key": Q + 0j, "value": Q + 0j},
        {"query": Q.int(), "key": Q.int(), "value": Q.int()},
        {"query": [1.0]},
        {"key": Q.to("meta")},
    ],
    ids=lambda a: "-".join(f"{k} {type(v).__name__}" for k, v in a.items()),
)
def test_other_arguments(arguments: dict[str, Any]) -> None:
    given = {"query": Q.clone().requires_grad_(), "key": Q, "value": Q, **arguments}
    _both(lambda sdpa: sdpa(**given), [given["query"]] if isinstance(given["query"], Tensor) else [])


def test_signature() -> None:
    """Positions, defaults and keyword-only arguments as torch documents them."""
    ours = inspect.signature(scaled_dot_product_attention)
    words = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(ours.parameters) == words
    assert [p.name for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY] == ["scale", "enable_gqa"]
    for sdpa in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        with pytest.raises(TypeError):
            sdpa(Q, Q, Q, None, 0.0, False, 0.3)


def jagged(lengths: list[int], channels: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, j, 2, channels), a leaf."""
    parts = [r(n, 2, channels, dtype=dtype) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def like(other: Tensor, channels: int) -> Tensor:
    values = r(other.values().shape[0], 2, channels, dtype=other.dtype)  # type: ignore[operator]
    return torch.nested.nested_tensor_from_jagged(values, other.offsets()).detach().requires_grad_()  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [([5, 1, 7], None), ([3, 4], [6, 2])], ids=["self", "cross"])
def test_nested(lengths: tuple[list[int], list[int] | None], causal: bool, backend: str | None, seeded: int) -> None:
    """Jagged (B, H, j, D): values and gradients of the separate sequences, and the queries' lengths."""
    if backend == "cpu" and pyvit.library.problem() is not None:
        pytest.skip("needs the compiled library")
    q = jagged(lengths[0])
    k = like(q, 16) if lengths[1] is None else jagged(lengths[1])
    v = like(k, 8)
    t = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = flash_attention(*t, is_causal=causal, return_lse=True, backend=backend)
    assert torch.equal(
        scaled_dot_product_attention(*t, is_causal=causal).values(), flash_attention(*t, is_causal=causal).values()
    )
    singles = [[x.detach().clone().requires_grad_() for x in part.unbind()] for part in (q, k, v)]
    wanted = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=causal)
        for part in zip(*singles, strict=True)
    ]
    for got, want, norm in zip(out.unbind(), wanted, lse.unbind(), strict=True):
        torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-5)
        assert norm.shape == want.shape[1:3]
    grads = torch.autograd.grad((out.values() ** 2).sum(), (q, k, v))
    for part, grad in zip(singles, grads, strict=True):
        want = torch.autograd.grad(sum((o**2).sum() for o in wanted), part, retain_graph=True)
        for got, one in zip(grad.unbind(), want, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-5)
    assert (
        out.transpose(1, 2).flatten(2) + like(q, 1).flatten(2)[..., :1]
    ).is_nested  # the same ragged size as the queries'


def test_nested_is_explained() -> None:
    t = jagged([5, 3]).transpose(1, 2)
    assert pyvit.explain("flash_attention", t, t, t).call.op == "flash_attention_varlen"


def test_nested_refusals() -> None:
    q = jagged([5, 3])
    t, other = q.transpose(1, 2), jagged([4, 4]).transpose(1, 2)
    strided = torch.nested.nested_tensor([r(5, 2, 16), r(3, 2, 16)]).transpose(1, 2)
    dense = r(2, 2, 5, 16)
    for arguments, message in (
        ((t, dense, dense), "k must be a nested Tensor of layout torch.jagged"),
        ((dense, t, t), "a dense Tensor|layout torch.jagged"),
        ((strided, strided, strided), "layout torch.strided"),
        ((q, q, q), r"q must be of shape \(B, H, j, D\)"),
        ((t, t, other), "v must be of sequences as long as those of k"),
    ):
        for op in (flash_attention, scaled_dot_product_attention):
            with pytest.raises((TypeError, ValueError), match=message):
                op(*arguments)
    for op in (flash_attention, scaled_dot_product_attention):
        with pytest.raises(ValueError, match="dropout_p must be 0 for nested"):
            op(t, t, t, dropout_p=0.5)
