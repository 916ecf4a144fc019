"""window_attention under the numerics rule: windows, shifts, maps of any size, both padding policies, V1 and V2."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from pyvit.ops import reference, window_attention
from pyvit.testing import LAYOUTS, Served, check_op, served
from tests.extremes import ROWS, extreme_table

on_every = pytest.mark.parametrize(
    "on", served("window_attention", "grad", "bias_table", "shift", "padding", "pad_qkv"), ids=str
)


def inputs(
    on: Served, b: int, size: tuple[int, int], window: tuple[int, int], heads: int, d: int, *kinds: str
) -> dict[str, Tensor]:
    """qkv and the optional tensors named in ``kinds``, with typical values."""
    tensors = {"qkv": on.randn(b, *size, 3 * heads * d)}
    if "bias_table" in kinds:
        tensors["bias_table"] = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads, device=on.device)
    if "logit_scale" in kinds:  # the raw logarithm, below and above the clamp at ln 100
        tensors["logit_scale"] = (
            torch.linspace(1.0, 5.0, heads, device=on.device) if heads > 1 else torch.tensor([2.3], device=on.device)
        )
    if "pad_qkv" in kinds:
        tensors["pad_qkv"] = on.randn(3 * heads * d)
    return tensors


def largest_lse(tensors: dict[str, Tensor], window: tuple[int, int], shift: tuple[int, int], heads: int) -> float:
    """A bound for the log-sum-exp: sharp cosine attention reaches a hundred."""
    wide = {name: t.double() for name, t in tensors.items()}
    optional = [wide.get(name) for name in ("bias_table", "logit_scale", "pad_qkv")]
    d = wide["qkv"].shape[3] // 3 // heads
    lse = reference.window_attention(wide["qkv"], list(window), list(shift), heads, *optional, d**-0.5, 0.0, None)[1]
    return float(lse[lse.isfinite()].abs().max())


def check(
    on: Served,
    b: int,
    size: tuple[int, int],
    window: int | tuple[int, int],
    shift: int | tuple[int, int],
    heads: int,
    d: int,
    *kinds: str,
) -> None:
    window, shift = ((n, n) if isinstance(n, int) else n for n in (window, shift))
    op = functools.partial(window_attention, window_size=window, shift_size=shift, num_heads=heads)
    tensors = inputs(on, b, size, window, heads, d, *kinds)
    check_op(
        op, tensors, backend=on.backend, scores=largest_lse(tensors, window, shift, heads), name="window_attention"
    )


GEOMETRIES = [  # map, window, shift
    *[((1, 1), 1, 0), ((3, 5), 1, 0), ((2, 2), 2, 1), ((6, 4), 2, 1), ((23, 31), 2, 1)],
    *[
        ((1, 1), 7, 3),
        ((7, 7), 7, 3),
        ((14, 14), 7, 0),
        ((14, 14), 7, 3),
        ((5, 3), 7, 3),
        ((9, 20), 7, 3),
        ((23, 31), 7, 3),
        ((15, 1), 7, 6),
    ],
    *[((8, 16), 8, 4), ((23, 31), 8, 4), ((12, 12), 12, 6), ((13, 24), 12, 6), ((1, 15), 7, 1)],
    *[((10, 11), (3, 5), (1, 4)), ((10, 11), (5, 3), (0, 2)), ((9, 16), (8, 7), (4, 0)), ((6, 50), (6, 16), (0, 9))],
]


@pytest.mark.isa
@on_every
@pytest.mark.parametrize(("size", "window", "shift"), GEOMETRIES, ids=str)
@pytest.mark.parametrize("pad", ["masked", "pad_qkv"])
def test_geometry(on: Served, size: tuple[int, int], window: int, shift: int, pad: str) -> None:
    check(on, 2 if size[0] * size[1] < 200 else 1, size, window, shift, 2, 16, "bias_table", pad)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("d", [1, 8, 16, 24, 32, 40, 64, 72, 80, 96, 128])
def test_head_dims(on: Served, d: int) -> None:
    check(on, 1, (9, 8), 7, 3, 2, d, "bias_table", "pad_qkv")
    check(on, 1, (9, 8), 7, 3, 2, d, "bias_table", "logit_scale")


@pytest.mark.isa
@on_every
@pytest.mark.parametrize(
    "kinds", [(), ("bias_table",), ("pad_qkv",), ("logit_scale",), ("bias_table", "logit_scale", "pad_qkv")], ids=str
)
@pytest.mark.parametrize(("b", "heads"), [(1, 1), (3, 3)])
def test_options(on: Served, kinds: tuple[str, ...], b: int, heads: int) -> None:
    for shift in (0, 2):
        check(on, b, (11, 6), 4, shift, heads, 32, *kinds)


@on_every
def test_swin_shapes(on: Served) -> None:
    """A Swin-T stage with a given scale, and windows of 12 and 16 with the heads of Swin-B and Swin V2."""
    check(on, 1, (28, 28), 7, 3, 6, 32, "bias_table")
    check(on, 1, (24, 24), 12, 6, 4, 32, "bias_table")
    check(on, 1, (16, 32), 16, 8, 2, 32, "bias_table", "logit_scale")
    op = functools.partial(window_attention, window_size=7, shift_size=3, num_heads=3, scale=0.3)
    check_op(op, inputs(on, 1, (14, 14), (7, 7), 3, 32, "bias_table"), backend=on.backend, name="window_attention")


@on_every
@pytest.mark.parametrize("store", [s for s in LAYOUTS if s != "contiguous"])
def test_strides(on: Served, store: str) -> None:
    op = functools.partial(window_attention, window_size=4, shift_size=2, num_heads=2)
    kinds = ("bias_table", "logit_scale", "pad_qkv")
    check_op(
        op, inputs(on, 2, (9, 8), (4, 4), 2, 24, *kinds), backend=on.backend, store=store, store_grad=store, name=store
    )


@on_every
def test_far_columns(on: Served, far: str) -> None:
    """Columns more than 2^32 elements apart: views into a huge tensor."""
    check_op(
        window_attention,
        inputs(on, 1, (2, 2), (2, 2), 1, 16),
        backend=on.backend,
        store=far,
        window_size=2,
        num_heads=1,
    )


@on_every
def test_stride_zero_gradient(on: Served) -> None:
    def op(**kw: object) -> Tensor:
        return window_attention(window_size=(4, 3), shift_size=(2, 1), num_heads=2, **kw).sum((1, 2))

    check_op(op, inputs(on, 2, (9, 8), (4, 3), 2, 24, "bias_table"), backend=on.backend)


@on_every
def test_tables_in_the_dtype_of_qkv(on: Served) -> None:
    op = functools.partial(window_attention, window_size=5, shift_size=2, num_heads=2)
    for dtype in {torch.float32, on.dtype}:
        tensors = inputs(on, 1, (9, 8), (5, 5), 2, 16, "bias_table", "logit_scale", "pad_qkv")
        tensors = {name: t if name == "qkv" else t.to(dtype) for name, t in tensors.items()}
        check_op(op, tensors, backend=on.backend, name=str(dtype))


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("kinds", [("bias_table",), ("bias_table", "logit_scale")], ids=str)
def test_large_magnitudes(on: Served, kinds: tuple[str, ...]) -> None:
    """One key dominates; cosine attention is invariant to magnitudes."""
    tensors = inputs(on, 1, (9, 14), (7, 7), 2, 32, *kinds)
    tensors["qkv"] *= 20
    op = functools.partial(window_attention, window_size=7, shift_size=3, num_heads=2)
    check_op(op, tensors, backend=on.backend, scores=largest_lse(tensors, (7, 7), (3, 3), 2), name="large")
    if "logit_scale" in kinds:
        tensors["qkv"] = on.randn(1, 9, 14, 192) * 1e-2
        check_op(op, tensors, backend=on.backend, name="small")


@on_every
def test_zero_vectors_under_cosine_attention(on: Served) -> None:
    """A zero query or key is normalised to zero, not to NaN."""
    tensors = inputs(on, 1, (4, 8), (4, 4), 2, 16, "logit_scale")
    tensors["qkv"][0, 1, 2] = 0
    op = functools.partial(window_attention, window_size=4, num_heads=2)
    check_op(op, tensors, backend=on.backend, grads=("logit_scale",), name="zero vectors")


@on_every
def test_logit_scale_beyond_the_clamp_has_no_gradient(on: Served) -> None:
    """Every backend clamps at the same float32: the last that has a gradient is ln 100 rounded, as in the reference."""
    clamp = torch.tensor(math.log(100))
    below, above = (clamp.nextafter(torch.tensor(to)).item() for to in (0.0, 9.0))
    scales = [1.0, below, clamp.item(), above, math.log(100) + 0.1, 9.0]
    tensors = inputs(on, 1, (4, 4), (4, 4), len(scales), 16)
    logit_scale = torch.tensor(scales, device=on.device, requires_grad=True)
    window_attention(
        **tensors, window_size=4, num_heads=len(scales), logit_scale=logit_scale, backend=on.backend
    ).float().sin().sum().backward()
    assert (logit_scale.grad != 0).tolist() == [True, True, True, False, False, False]
    options = {"window_size": 4, "num_heads": len(scales), "backend": on.backend}
    beyond, largest = (torch.full_like(logit_scale.detach(), value) for value in (9.0, clamp.item()))
    found = window_attention(**tensors, **options, logit_scale=beyond)
    assert torch.equal(found, window_attention(**tensors, **options, logit_scale=largest))


@on_every
def test_pad_value_without_padding_has_zero_gradient(on: Served) -> None:
    tensors = inputs(on, 1, (8, 8), (4, 4), 2, 16, "pad_qkv")
    pad = tensors["pad_qkv"].requires_grad_()
    qkv = tensors["qkv"].requires_grad_()
    (grad,) = torch.autograd.grad(
        window_attention(qkv, 4, 1, num_heads=2, pad_qkv=pad, backend=on.backend).sum(), pad, allow_unused=True
    )
    assert grad is None or (grad == 0).all()


@on_every
def test_empty_batch(on: Served) -> None:
    op = functools.partial(window_attention, window_size=4, shift_size=2, num_heads=2)
    check_op(
        op,
        inputs(on, 0, (9, 8), (4, 4), 2, 16, "bias_table", "pad_qkv", "logit_scale"),
        backend=on.backend,
        name="empty",
    )


@on_every
def test_each_image_and_head_by_itself(on: Served) -> None:
    """Batch entries and heads are independent, bit for bit."""
    tensors = inputs(on, 3, (9, 10), (4, 4), 3, 16, "bias_table")
    op = functools.partial(window_attention, window_size=4, shift_size=1, backend=on.backend)
    out = op(**tensors, num_heads=3)
    assert torch.equal(out[1:2], op(tensors["qkv"][1:2], bias_table=tensors["bias_table"], num_heads=3))
    one = tensors["qkv"].view(3, 9, 10, 3, 3, 16)[:, :, :, :, 1].flatten(3)
    alone = op(one, bias_table=tensors["bias_table"][:, 1:2], num_heads=1)
    torch.testing.assert_close(out.view(3, 9, 10, 3, 16)[..., 1, :], alone, rtol=0, atol=4 * torch.finfo(on.dtype).eps)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("kinds", [(), ("logit_scale",), ("pad_qkv",), ("logit_scale", "pad_qkv")], ids=str)
@pytest.mark.parametrize("window", [2, 4, 7, 8, 12])
def test_finite_masks(on: Served, window: int, kinds: tuple[str, ...]) -> None:
    """Tables that mask rows completely or partly by -inf or finite numbers give the naive form's result and
    gradients."""
    tensors = inputs(on, 1, (2 * window, 2 * window - 1), (window, window), ROWS, 16, *kinds)
    tensors["bias_table"] = extreme_table((2 * window - 1) ** 2).to(on.device)
    op = functools.partial(window_attention, window_size=window, shift_size=window // 2, num_heads=ROWS)
    check_op(op, tensors, backend=on.backend, scores=100.0 if "logit_scale" in kinds else 0.0)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("value", [-1e9, -1e30, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("window", [3, 7, 8, 12])
def test_table_of_one_number(on: Served, window: int, value: float) -> None:
    """A constant that rounds the scores away: outputs are means, and gradients no larger than theirs."""
    tensors = inputs(on, 2, (window, 2 * window), (window, window), 2, 16)
    tensors["bias_table"] = torch.full(((2 * window - 1) ** 2, 2), value, device=on.device)
    op = functools.partial(window_attention, window_size=window, num_heads=2)
    check_op(op, tensors, backend=on.backend)
    leaf = tensors["qkv"].requires_grad_()
    out = op(leaf, bias_table=tensors["bias_table"], backend=on.backend)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    v = tensors["qkv"].detach().float().unflatten(3, (3, 32))[..., 2, :]
    mean = v.unflatten(2, (2, window)).mean((1, 3))  # (B, windows, C)
    torch.testing.assert_close(out.detach().float().unflatten(2, (2, window)).mean((1, 3)), mean, rtol=0.02, atol=0.02)
    torch.testing.assert_close(grad.unflatten(3, (3, 32))[..., 2, :].float(), torch.ones_like(v), rtol=0.02, atol=0)
