"""The backend "torch": PyTorch's kernels serve only what they compute exactly as the contract says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyvit
from pyvit.ops import flash_attention, layer_norm, linear, mlp, patch_embed, rms_norm
from pyvit.testing import LAYOUTS, check_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _qkv(dtype: torch.dtype, b: int, h: int, nq: int, nk: int, d: int, dv: int, hkv: int) -> dict[str, Tensor]:
    return {
        "q": torch.randn(b, h, nq, d).to(dtype),
        "k": torch.randn(b, hkv, nk, d).to(dtype),
        "v": torch.randn(b, hkv, nk, dv).to(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 197, 197, 64, 64, 3), (1, 4, 1, 33, 72, 72, 2), (1, 2, 50, 17, 40, 24, 2), (1, 6, 9, 21, 128, 128, 1)],
    ids=str,
)
def test_attention(dtype: torch.dtype, is_causal: bool, shape: tuple[int, ...]) -> None:
    check_op(flash_attention, _qkv(dtype, *shape), backend="torch", is_causal=is_causal, enable_gqa=True, scale=0.2)


@pytest.mark.parametrize("store", LAYOUTS)
def test_attention_in_every_layout(store: str) -> None:
    check_op(flash_attention, _qkv(torch.float32, 2, 2, 21, 21, 32, 32, 2), backend="torch", store=store)


def test_second_derivative() -> None:
    """PyTorch's kernels have none: it is the reference's. A tensor that is both keys and values gets both gradients."""
    q, k = (torch.randn(2, 2, n, 16, dtype=torch.float32, requires_grad=True) for n in (9, 7))
    found: dict[str, list[Tensor]] = {}
    for backend in ("torch", "reference"):
        out = flash_attention(q, k, k, is_causal=True, backend=backend)
        first = torch.autograd.grad(out.square().sum(), (q, k), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k))
        found[backend] = [*first, *second]
    for got, wanted in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_other_kernels_second_derivative_of_a_shared_tensor() -> None:
    q, k = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (9, 7))
    found = []
    for backend in (None, "reference"):
        out = flash_attention(q, k, k, backend=backend)
        first = torch.autograd.grad(out.square().sum(), (q, k), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"return_lse": True}, "lse"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"bias": torch.zeros(5, 5)}, "bias"),
        ({"bias": torch.ones(5, 5, dtype=torch.bool)}, "bool_mask"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], why: str) -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(pyvit.BackendError, match=f"'torch' cannot serve this call: does not support {why}"):
        flash_attention(q, q, q, backend="torch", **options)
    with pytest.raises((pyvit.BackendError, RuntimeError), match="torch"):
        torch.ops.pyvit.flash_attention(q, q, q, None, False, 0.3, 0.0, None, "torch")


def test_empty() -> None:
    q = torch.randn(2, 3, 4, 8)
    assert flash_attention(q[:0], q[:0], q[:0], backend="torch").shape == (0, 3, 4, 8)
    out = flash_attention(q, q[:, :, :0], q[:, :, :0], backend="torch")
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return flash_attention(q, k, k, backend="torch") * 2

    q, k = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (9, 7))
    torch._dynamo.reset()
    got, wanted = torch.compile(attend, fullgraph=True, dynamic=dynamic)(q, k), attend(q, k)
    for a, b in zip(
        (got, *torch.autograd.grad(got.sum(), (q, k))),
        (wanted, *torch.autograd.grad(wanted.sum(), (q, k))),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_embed(dtype: torch.dtype) -> None:
    tensors = {
        "images": torch.randn(2, 3, 20, 12).to(dtype),
        "weight": torch.randn(10, 3, 4, 4).to(dtype),
        "bias": torch.randn(10).to(dtype),
        "prefix": torch.randn(2, 10).to(dtype),
    }
    check_op(patch_embed, tensors, backend="torch")
    check_op(patch_embed, tensors | {"pos_embed": torch.randn(45, 10).to(dtype)}, backend="torch", stride=2)
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(pyvit.BackendError, match="does not support uint8"):
        patch_embed(pixels, tensors["weight"], backend="torch")


def test_layers() -> None:
    x, w, w2 = torch.randn(5, 8), torch.randn(12, 8), torch.randn(8, 12)
    for op, args in ((linear, (x, w)), (mlp, (x, w, None, w2, None)), (layer_norm, (x,)), (rms_norm, (x,))):
        assert torch.equal(op(*args, backend="torch"), op(*args, backend="reference"))  # type: ignore[operator]
    with pyvit.use_backend("triton"):  # which has no kernels for them
        assert pyvit.explain(layer_norm, x).chosen in ("cpu", "torch")


def test_a_context_serves_models() -> None:
    model = pyvit.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), pyvit.use_backend("reference"):
        wanted = model(images)
    with torch.no_grad(), pyvit.use_backend("torch"):
        torch.testing.assert_close(model(images), wanted, rtol=1e-3, atol=1e-4)
