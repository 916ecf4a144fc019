"""The CUDA patch-embedding kernels in the emulation, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from pyvit import testing
from pyvit.ops import patch_embed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("cuda_on_host", "least_shared_memory")


def _tensors(dtype, b, c, h, w, patch, d, patches, prefix=0, parameters=torch.float32):
    tensors = {"images": torch.randn(b, c, h, w).to(dtype), "weight": (torch.randn(d, c, *patch) * 0.1).to(dtype)}
    tensors |= {"bias": torch.randn(d).to(dtype), "pos_embed": torch.randn(patches, d).to(parameters)}
    if prefix:
        tensors["prefix"] = torch.randn(prefix, d).to(parameters)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "patch", "d", "prefix"),
    [((32, 48), (16, 16), 40, 2), ((28, 28), (14, 14), 136, 0), ((8, 12), (4, 4), 20, 1)],
)
def test_shapes(dtype, size, patch, d, prefix):
    patches = size[0] // patch[0] * (size[1] // patch[1])
    testing.check_op(patch_embed, _tensors(dtype, 3, 3, *size, patch, d, patches, prefix, dtype), backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_overlap(dtype):
    testing.check_op(patch_embed, _tensors(dtype, 2, 1, 33, 41, (16, 16), 24, 6), backend="cuda", stride=10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_patches(dtype):
    keep = torch.tensor([[3, 0, 5], [5, 5, 1]])  # one twice: its gradients add up
    tensors = _tensors(dtype, 2, 3, 16, 24, (8, 8), 32, 6, 1)
    testing.check_op(patch_embed, tensors, backend="cuda", keep=keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", [8, 6])
def test_bytes_with_normalisation(dtype, patch):
    tensors = _tensors(dtype, 2, 3, 4 * patch, 2 * patch, (patch, patch), 40, 8)
    tensors["images"] = torch.randint(0, 256, tensors["images"].shape, dtype=torch.uint8)
    mean, std = torch.rand(3), torch.rand(3) + 0.5
    testing.check_op(patch_embed, tensors, backend="cuda", mean=mean, std=std)


def test_normalised_floats_and_their_gradient():
    tensors = _tensors(torch.float32, 2, 3, 16, 16, (8, 8), 16, 4)
    testing.check_op(patch_embed, tensors, backend="cuda", mean=torch.rand(3), std=torch.rand(3) + 0.5)


@pytest.mark.parametrize("store", [s for s in testing.LAYOUTS if s != "contiguous"])
def test_strides(store):
    tensors = _tensors(torch.bfloat16, 2, 3, 16, 24, (8, 8), 24, 6)
    testing.check_op(patch_embed, tensors, backend="cuda", store=store, store_grad=store)


def test_a_patch_that_does_not_exist_gives_nan(emulator):
    images, weight = torch.randn(1, 1, 8, 8), torch.randn(8, 1, 4, 4)
    out = emulator.op(
        "patch_embed", images, weight, None, [4, 4], None, None, torch.tensor([[0, 4, -1]]), None, None, "cuda"
    )
    assert out[0, 0].isfinite().all()
    assert out[0, 1:].isnan().all()


def test_nothing_kept():
    tensors = _tensors(torch.bfloat16, 2, 3, 16, 24, (8, 8), 32, 6, 1)
    testing.check_op(patch_embed, tensors, backend="cuda", keep=torch.zeros(2, 0, dtype=torch.int64))
