"""flash_attention under the numerics rule: outputs, log-sum-exp and all gradients, for difficult shapes, biases and
masks."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.ops import flash_attention, scaled_dot_product_attention
from pyvit.testing import LAYOUTS, Served, check_op, poisoned, served
from tests.extremes import ROWS, extreme_bias

on_every = pytest.mark.parametrize("on", served("flash_attention", "grad", "bias"), ids=str)
with_lse = functools.partial(flash_attention, return_lse=True)


def qkv(
    on: Served, b: int, h: int, nq: int, nk: int, d: int, dv: int | None = None, hkv: int | None = None
) -> dict[str, Tensor]:
    hkv = hkv or h
    return {"q": on.randn(b, h, nq, d), "k": on.randn(b, hkv, nk, d), "v": on.randn(b, hkv, nk, dv or d)}


LENGTHS = [(2, 3, n, n, 64) for n in (1, 2, 15, 16, 17, 49, 77)] + [(1, 2, 197, 197, 64), (1, 1, 257, 257, 64)]
HEAD_DIMS = [(1, 2, 33, 33, d) for d in (1, 3, 8, 16, 32, 40, 72, 80, 96, 128)] + [(1, 1, 7, 20, 256)]
UNEQUAL = [
    (1, 2, 1, 257, 64),
    (1, 2, 65, 3, 64),
    (2, 1, 197, 50, 64, 32),
    (1, 1, 50, 197, 40, 72),
    (1, 1, 9, 21, 128, 8),
    (1, 3, 5, 18, 8, 128),
]


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("shape", LENGTHS + HEAD_DIMS + UNEQUAL, ids=str)
def test_shapes(on: Served, shape: tuple[int, ...]) -> None:
    check_op(with_lse, qkv(on, *shape), backend=on.backend)


@pytest.mark.slow
@on_every
@pytest.mark.parametrize(
    "shape", [(1, 1, 577, 577, 64), (1, 2, 1025, 1025, 64), (1, 1, 3, 4097, 80), (1, 1, 2050, 5, 32)], ids=str
)
def test_long(on: Served, shape: tuple[int, ...]) -> None:
    check_op(with_lse, qkv(on, *shape), backend=on.backend)


@on_every
def test_far_rows(on: Served, far: str) -> None:
    """Rows more than 2^32 elements apart: views into a huge tensor."""
    check_op(with_lse, qkv(on, 1, 1, 2, 2, 16), backend=on.backend, store=far)


@on_every
def test_without_lse(on: Served) -> None:
    check_op(flash_attention, qkv(on, 2, 3, 50, 50, 64), backend=on.backend, scale=0.3)
    tensors = qkv(on, 2, 3, 50, 50, 64)
    out, lse = with_lse(**tensors, backend=on.backend)
    assert out.transpose(1, 2).is_contiguous(), "heads merge without a copy"
    assert lse.dtype == torch.float32
    assert torch.equal(out, flash_attention(**tensors, backend=on.backend))


@on_every
def test_gradient_through_one_output_alone(on: Served) -> None:
    """Gradients of only the log-sum-exp or only the output, if both were returned."""
    for chosen in (0, 1):
        check_op(
            lambda i=chosen, **kw: with_lse(**kw)[i],
            qkv(on, 1, 2, 19, 35, 40),
            backend=on.backend,
            name=f"output {chosen}",
        )


def _bias(on: Served, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return on.randn(*shape, scale=2.0).to(dtype)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("pattern", list(itertools.product((0, 1), repeat=4)), ids=lambda p: "".join(map(str, p)))
def test_broadcast_bias(on: Served, pattern: tuple[int, ...]) -> None:
    """Every broadcast, in float32 and in the dtype of q; the gradient is summed over broadcast dimensions."""
    full = (2, 3, 18, 37)
    for dtype in {torch.float32, on.dtype}:
        bias = _bias(on, tuple(n if keep else 1 for n, keep in zip(full, pattern, strict=True)), dtype)
        check_op(with_lse, {**qkv(on, 2, 3, 18, 37, 40), "bias": bias}, backend=on.backend, broadcast={"bias": full})


@on_every
@pytest.mark.parametrize("shape", [(37,), (18, 37), (1, 37), (3, 1, 37), (3, 18, 37)], ids=str)
def test_bias_of_fewer_dimensions(on: Served, shape: tuple[int, ...]) -> None:
    tensors = {**qkv(on, 2, 3, 18, 37, 32), "bias": _bias(on, shape, torch.float32)}
    check_op(with_lse, tensors, backend=on.backend, broadcast={"bias": (2, 3, 18, 37)})


@on_every
@pytest.mark.parametrize("store", [s for s in LAYOUTS if s != "contiguous"])
def test_strides(on: Served, store: str) -> None:
    """Operands, bias and incoming gradients with all kinds of strides."""
    tensors = {**qkv(on, 2, 3, 21, 34, 48, 40), "bias": _bias(on, (2, 3, 21, 34), torch.float32)}
    check_op(with_lse, tensors, backend=on.backend, store=store, store_grad=store)
    mask = {"bias": torch.rand(2, 3, 21, 34, device=on.device) > 0.3}
    check_op(with_lse, {**qkv(on, 2, 3, 21, 34, 48), **mask}, backend=on.backend, store=store)


@on_every
def test_packed_projection_and_summed_loss(on: Served) -> None:
    """q, k and v as views of one projection, and the stride-0 gradient of ``sum``."""
    packed = on.randn(2, 27, 3 * 4 * 32)

    def op(packed: Tensor, backend: str) -> Tensor:
        q, k, v = packed.view(2, 27, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind(0)
        return flash_attention(q, k, v, backend=backend).sum((0, 1, 2))

    check_op(op, {"packed": packed}, backend=on.backend)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("pattern", [(1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1)], ids=str)
def test_bool_mask(on: Served, pattern: tuple[int, ...]) -> None:
    mask = (
        torch.rand([n if keep else 1 for n, keep in zip((2, 3, 40, 53), pattern, strict=True)], device=on.device) > 0.4
    )
    check_op(with_lse, {**qkv(on, 2, 3, 40, 53, 64), "bias": mask}, backend=on.backend)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("nk", [5, 64, 300])
def test_fully_masked_rows(on: Served, kind: str, nk: int) -> None:
    """Fully masked rows give zeros and -inf, and zero gradients."""
    rows = [0, 7, 8, 19]
    mask = torch.rand(2, 1, 20, nk, device=on.device) > 0.5
    mask[:, :, :, 0] = True
    mask[:, :, rows] = False
    bias = mask if kind == "bool" else _bias(on, mask.shape, torch.float32).masked_fill(~mask, -math.inf)
    tensors = {**qkv(on, 2, 3, 20, nk, 32), "bias": bias}
    check_op(with_lse, tensors, backend=on.backend, broadcast={"bias": (2, 3, 20, nk)})
    leaves = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    with poisoned():
        out, lse = with_lse(**leaves, backend=on.backend)
        out.float().pow(2).sum().backward()
    assert (out[:, :, rows] == 0).all()
    assert (lse[:, :, rows] == -math.inf).all()
    assert (leaves["q"].grad[:, :, rows] == 0).all()
    assert all(t.grad.isfinite().all() for t in leaves.values() if t.requires_grad)


@on_every
def test_everything_masked(on: Served) -> None:
    for bias in (torch.zeros(1, 1, 1, 33, dtype=torch.bool), torch.full((33,), -math.inf)):
        check_op(with_lse, {**qkv(on, 1, 2, 17, 33, 32), "bias": bias.to(on.device)}, backend=on.backend)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("nk", [5, 40, 300])
def test_keys_that_a_mask_keeps_out_may_be_anything(on: Served, value: float, nk: int) -> None:
    """The output, log-sum-exp, and gradients but those of queries (which are products with the keys)."""
    tensors = qkv(on, 1, 2, 20, nk, 32)
    mask = torch.ones(20, nk, dtype=torch.bool, device=on.device)
    mask[:, [1, nk - 1]] = False
    results = []
    for filler in (0.0, value):
        leaves = {name: t.clone() for name, t in tensors.items()}
        leaves["k"][:, :, [1, nk - 1]] = filler
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        out, lse = with_lse(**leaves, bias=mask, backend=on.backend)
        results.append([out, lse, *torch.autograd.grad(out.float().square().sum(), [leaves["k"], leaves["v"]])])
    for zero, other in zip(*results, strict=True):
        assert torch.equal(zero, other)


@on_every
def test_leading_keys_masked(on: Served) -> None:
    """The running maximum is -inf over whole blocks of keys."""
    mask = torch.zeros(1, 1, 20, 700, dtype=torch.bool, device=on.device)
    mask[..., 650:] = True
    mask[:, :, 3] = False
    mask[:, :, 3, 0] = True
    check_op(with_lse, {**qkv(on, 1, 1, 20, 700, 32), "bias": mask}, backend=on.backend)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 1, 1, 16), (2, 1, 65, 65, 64), (1, 2, 40, 90, 32), (1, 2, 90, 40, 32), (1, 1, 197, 197, 72)],
    ids=str,
)
def test_causal(on: Served, shape: tuple[int, ...]) -> None:
    check_op(with_lse, qkv(on, *shape), backend=on.backend, is_causal=True)


@on_every
def test_causal_with_bias_and_mask(on: Served) -> None:
    mask = torch.rand(1, 2, 50, 50, device=on.device) > 0.3
    for bias in (_bias(on, (2, 50, 50), torch.float32), mask):
        check_op(with_lse, {**qkv(on, 1, 2, 50, 50, 64), "bias": bias}, backend=on.backend, is_causal=True)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize(("h", "hkv"), [(6, 2), (4, 1), (4, 4)])
def test_grouped_queries(on: Served, h: int, hkv: int) -> None:
    tensors = {**qkv(on, 2, h, 30, 47, 40, 24, hkv), "bias": _bias(on, (1, h, 30, 47), torch.float32)}
    check_op(
        with_lse, tensors, backend=on.backend, enable_gqa=True, is_causal=hkv == 2, broadcast={"bias": (2, h, 30, 47)}
    )


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("case", ["large", "saturated", "offset", "small", "bias"])
def test_magnitudes(on: Served, case: str) -> None:
    tensors = qkv(on, 1, 2, 60, 77, 64)
    if case == "large":
        tensors["q"] *= 30
    elif case == "saturated":  # scores in the thousands: one key takes everything
        tensors = {"q": tensors["q"] * 60, "k": tensors["k"] * 60, "v": tensors["v"]}
    elif case == "offset":  # every score shifted by the same hundreds
        tensors["k"] += 8 * tensors["q"][:, :, :1].sign()
    elif case == "small":
        tensors = {name: t * 1e-3 for name, t in tensors.items()}
    else:
        tensors["bias"] = _bias(on, (60, 77), torch.float32) * 500 - 1e4
    lse = with_lse(**{name: t.double() for name, t in tensors.items()}, backend="reference")[1]
    check_op(with_lse, tensors, backend=on.backend, scores=float(lse.abs().max()))


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("nk", [5, 37, 64, 1100])
def test_finite_masks(on: Served, nk: int) -> None:
    """Rows masked completely or partly by finite numbers give the naive form's result and gradients."""
    for dtype in {torch.float32, on.dtype}:
        tensors = {**qkv(on, 2, 2, ROWS, nk, 32), "bias": extreme_bias(nk, dtype).to(on.device)}
        check_op(with_lse, tensors, backend=on.backend, broadcast={"bias": (2, 2, ROWS, nk)})


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("value", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 1), (1, 1, 20, 1), (1, 1, 1, 41), (2, 3, 20, 41)], ids=str)
def test_rows_shifted_by_any_number(on: Served, shape: tuple[int, ...], value: float) -> None:
    """Softmax is invariant to a constant added to a row: probabilities are at most 1, and gradients are those without
    the bias, up to the rounding of the addition."""
    tensors = qkv(on, 2, 3, 20, 41, 32)
    bias = {"bias": torch.full(shape, value, device=on.device)}
    for causal in (False, True):
        check_op(
            with_lse, {**tensors, **bias}, backend=on.backend, broadcast={"bias": (2, 3, 20, 41)}, is_causal=causal
        )
    naive = torch.softmax((tensors["q"].float() * 32**-0.5 @ tensors["k"].float().mT + value), -1)
    out = flash_attention(**tensors, **bias, backend=on.backend)
    torch.testing.assert_close(
        out.float(), naive @ tensors["v"].float(), rtol=0.02, atol=0.02 if on.dtype != torch.float32 else 1e-5
    )


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("scale", [300.0, -300.0, 1e5, 1e9])
@pytest.mark.parametrize("nk", [16, 1100])
def test_gradients_at_large_scales(on: Served, scale: float, nk: int) -> None:
    """Scores so large that float32 keeps few digits, including rows with several equal maxima."""
    if on.dtype == torch.float16:
        pytest.skip("its gradients overflow")
    tensors = qkv(on, 1, 2, 18, nk, 16)
    tensors["k"][:, :, nk // 2 :] = tensors["k"][:, :, : nk - nk // 2].flip(2)  # every key twice, or nearly every
    largest = float((tensors["q"].double() @ tensors["k"].double().mT).abs().max()) * abs(scale)
    check_op(with_lse, tensors, backend=on.backend, scale=scale, scores=largest)
    leaves = [t.float().requires_grad_() for t in tensors.values()]
    q, k, v = leaves
    wanted = torch.autograd.grad(
        torch.softmax(q * scale @ k.mT, -1) @ v, leaves, torch.ones(1, 2, 18, 16, device=on.device)
    )
    ours = [t.requires_grad_() for t in tensors.values()]
    got = torch.autograd.grad(flash_attention(*ours, scale=scale, backend=on.backend), ours, torch.ones_like(ours[0]))
    bound = float(wanted[2].abs().max())
    assert float(got[2].abs().max()) <= 1.5 * bound, "a probability above 1"


@on_every
@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 16), (2, 0, 5, 5, 16), (2, 2, 0, 5, 16), (2, 2, 5, 0, 16)], ids=str)
def test_empty(on: Served, shape: tuple[int, ...]) -> None:
    tensors = {**qkv(on, *shape), "bias": _bias(on, (1, 1, shape[2], shape[3]), torch.float32)}
    check_op(with_lse, tensors, backend=on.backend)
    if shape[3] == 0:
        out, lse = with_lse(**qkv(on, *shape), backend=on.backend)
        assert (out == 0).all()
        assert (lse == -math.inf).all()


SDPA = [
    ((2, 3, 20, 33, 32), {}),
    ((2, 3, 20, 33, 32), {"scale": 0.2}),
    ((2, 3, 33, 33, 32), {"is_causal": True}),
    ((2, 3, 20, 33, 32), {"attn_mask": (20, 33)}),
    ((2, 3, 20, 33, 32), {"attn_mask": (2, 1, 1, 33)}),
    ((2, 6, 20, 33, 32), {"enable_gqa": True}),
    ((20, 33, 32), {}),
    ((4, 20, 33, 32), {"attn_mask": (4, 20, 33)}),
    ((2, 3, 4, 20, 33, 32), {"attn_mask": (3, 1, 20, 33)}),
    ((2, 3, 4, 20, 33, 32), {"is_causal": True}),
]


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize(("shape", "options"), SDPA, ids=str)
def test_sdpa_twin(shape: tuple[int, ...], options: dict, kind: str) -> None:
    """The same result and gradients as torch.nn.functional's function, with positional and keyword arguments."""
    *lead, nq, nk, d = shape
    few = [*lead[:-1], lead[-1] // 3] if options.get("enable_gqa") else lead
    leaves = [torch.randn(*dims, requires_grad=True) for dims in ((*lead, nq, d), (*few, nk, d), (*few, nk, d + 1))]
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = torch.randn(options["attn_mask"])
        if kind == "bool":
            options["attn_mask"] = options["attn_mask"] > -1
    elif kind == "bool":
        pytest.skip("no mask to vary")
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(*leaves, **options)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_sdpa_twin_has_the_same_signature() -> None:
    leaves = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    mask = torch.zeros(5, 5)
    named = scaled_dot_product_attention(
        query=leaves[0], key=leaves[1], value=leaves[2], attn_mask=mask, dropout_p=0.0, is_causal=False, scale=None
    )
    torch.testing.assert_close(
        named, F.scaled_dot_product_attention(*leaves, mask, 0.0, False, scale=None), rtol=1e-5, atol=1e-5
    )


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("nk", [5, 33])
def test_a_nan_is_not_lost(on: Served, nk: int) -> None:
    """A query with NaN gives NaN, and no other row does."""
    tensors = qkv(on, 1, 2, 9, nk, 16)
    tensors["q"][0, 1, 4, 3] = math.nan
    out, lse = with_lse(**tensors, backend=on.backend)
    wanted = torch.zeros(1, 2, 9, dtype=torch.bool)
    wanted[0, 1, 4] = True
    assert torch.equal(out.isnan().all(-1).cpu(), wanted)
    assert torch.equal(out.isnan().any(-1).cpu(), wanted)
    assert torch.equal(lse.isnan().cpu(), wanted)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("scale", [1e6, 1e20])
def test_one_key_takes_all_at_large_scales(on: Served, scale: float) -> None:
    """Only the largest score matters: rounding must not give it a weight other than 1."""
    if on.backend == "reference" and on.dtype == torch.float16:
        pytest.skip("the naive form's scores overflow")
    tensors = qkv(on, 1, 2, 9, 33, 16)
    scores = tensors["q"].float() @ tensors["k"].float().transpose(-1, -2)
    wanted = tensors["v"].gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 16))
    top = scores.topk(2).values
    assert float((top[..., 0] - top[..., 1]).min()) * scale > 200, "one score stands out in every row"
    out = flash_attention(**tensors, scale=scale, backend=on.backend)
    torch.testing.assert_close(out, wanted, rtol=4 * torch.finfo(on.dtype).eps, atol=0)
