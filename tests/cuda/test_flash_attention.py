"""The CUDA attention kernels in the emulation, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from pyvit import testing
from pyvit.ops import flash_attention, flash_attention_varlen
from tests.extremes import ROWS, extreme_bias

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("cuda_on_host", "least_shared_memory")


def _qkv(dtype, b, h, nq, nk, d, dv=None, hkv=None):
    shapes = {"q": (b, h, nq, d), "k": (b, hkv or h, nk, d), "v": (b, hkv or h, nk, dv or d)}
    return {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("nq", "nk", "d"), [(197, 197, 64), (1, 1, 8), (17, 80, 32), (50, 33, 80), (33, 70, 96), (20, 49, 128)]
)
def test_shapes(dtype, nq, nk, d):
    testing.check_op(flash_attention, _qkv(dtype, 1, 1 if nq > 100 else 2, nq, nk, d), backend="cuda", return_lse=True)


@pytest.mark.parametrize(
    "shape", [(2, 3, 40, 70), (1, 3, 40, 70), (2, 1, 1, 70), (1, 1, 40, 1), (1, 3, 1, 1), (2, 3, 1, 1), (1, 1, 1, 70)]
)
def test_bias_of_any_broadcast(shape):
    tensors = _qkv(torch.bfloat16, 2, 3, 40, 70, 32) | {"bias": torch.randn(*shape)}
    testing.check_op(flash_attention, tensors, backend="cuda", broadcast={"bias": (2, 3, 40, 70)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_the_dtype_with_causal_mask(dtype):
    tensors = _qkv(dtype, 1, 2, 70, 90, 48) | {"bias": torch.randn(2, 70, 90).to(dtype)}
    testing.check_op(flash_attention, tensors, backend="cuda", is_causal=True, return_lse=True)


def test_bool_mask_and_empty_rows():
    mask = torch.rand(2, 1, 40, 70) > 0.6
    mask[:, :, 5] = False
    testing.check_op(flash_attention, _qkv(torch.float16, 2, 2, 40, 70, 32), backend="cuda", bias=mask, return_lse=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nq", [18, 45])  # one tile for each head of a group is already two steps
def test_grouped_heads_and_two_widths(nq, causal):
    tensors = _qkv(torch.bfloat16, 2, 4, nq, 40, 24, dv=40, hkv=2)
    testing.check_op(flash_attention, tensors, backend="cuda", enable_gqa=True, is_causal=causal)


@pytest.mark.parametrize("store", [s for s in testing.LAYOUTS if s != "contiguous"])
def test_strides(store):
    testing.check_op(
        flash_attention, _qkv(torch.bfloat16, 2, 2, 21, 30, 16), backend="cuda", store=store, store_grad=store
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nk", [37, 150])
def test_finite_masks(dtype, nk):
    """Rows masked completely or partly by finite numbers, in one and in several tiles of keys; the gradient of every
    broadcast bias."""
    for bias in {torch.float32: extreme_bias(nk), dtype: extreme_bias(nk, dtype)}.values():
        tensors = _qkv(dtype, 1, 2, ROWS, nk, 32) | {"bias": bias}
        testing.check_op(
            flash_attention, tensors, backend="cuda", return_lse=True, broadcast={"bias": (1, 2, ROWS, nk)}
        )
    tensors = _qkv(dtype, 1, 2, ROWS, nk, 32) | {"bias": extreme_bias(nk)[:, :1].contiguous()}
    testing.check_op(flash_attention, tensors, backend="cuda", is_causal=True, broadcast={"bias": (1, 2, ROWS, nk)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [300.0, 1e6, -300.0])
def test_large_scales(dtype, scale):
    """Without a bias: scores so large that float32 keeps few digits, with every key twice."""
    tensors = _qkv(dtype, 1, 2, 20, 150, 16)
    tensors["k"][:, :, 75:] = tensors["k"][:, :, :75].flip(2)
    largest = float((tensors["q"].double() @ tensors["k"].double().mT).abs().max()) * abs(scale)
    testing.check_op(flash_attention, tensors, backend="cuda", scale=scale, return_lse=True, scores=largest)


def test_no_heads():
    tensors = _qkv(torch.float32, 2, 0, 5, 5, 16) | {"bias": torch.randn(5, 5)}
    testing.check_op(flash_attention, tensors, backend="cuda", return_lse=True)


def test_a_nan_shows_in_its_row():
    tensors = _qkv(torch.float16, 1, 2, 9, 33, 16)
    tensors["q"][0, 1, 4, 3] = torch.nan
    out, lse = flash_attention(**tensors, backend="cuda", return_lse=True)
    assert torch.equal(lse.isnan().nonzero(), torch.tensor([[0, 1, 4]]))
    assert torch.equal(out.isnan().all(-1), lse.isnan())


@pytest.mark.parametrize("nk", [0, 5])
def test_no_queries_or_no_keys(nk):
    q, k, v = (torch.randn(2, 2, n, 16, requires_grad=True) for n in (3 if nk == 0 else 0, nk, nk))
    out, lse = flash_attention(q, k, v, backend="cuda", return_lse=True)
    out.sum().backward()
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(t.grad.any() for t in (q, k, v))


def test_longest_sequence():
    testing.check_op(flash_attention, _qkv(torch.bfloat16, 1, 1, 70, 1100, 32), backend="cuda", grads=("q",))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [False, True])
def test_packed(index, causal):
    lengths_q, lengths_k = [70, 0, 17, 1], [33, 4, 90, 0]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).to(index) for lengths in (lengths_q, lengths_k))
    tensors = {
        "q": torch.randn(88, 4, 32),
        "k": torch.randn(127, 2, 32),
        "v": torch.randn(127, 2, 32),
        "bias": torch.randn(1, 4, 70, 90),
    }
    fixed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 70, "max_seqlen_k": 90}
    testing.check_op(flash_attention_varlen, tensors, backend="cuda", is_causal=causal, return_lse=True, **fixed)


def test_same_bits_in_every_order_of_threads():
    tensors = {
        name: t.requires_grad_()
        for name, t in (_qkv(torch.bfloat16, 2, 2, 40, 70, 32) | {"bias": torch.randn(2, 1, 1, 70)}).items()
    }

    def run():
        out = flash_attention(**tensors, backend="cuda")
        return [out, *torch.autograd.grad(out.float().square().sum(), list(tensors.values()))]

    assert all(map(torch.equal, run(), run()))


def test_refusals():
    from pyvit import BackendError

    q = torch.randn(1, 1, 4, 20)
    with pytest.raises(BackendError, match=r"head dimension 20 is not in 8\.\.128 in steps of 8"):
        flash_attention(q, q, q, backend="cuda")
    q = torch.randn(1, 1, 4, 32)
    with pytest.raises(BackendError, match="does not support dropout"):
        flash_attention(q, q, q, dropout_p=0.1, backend="cuda")
