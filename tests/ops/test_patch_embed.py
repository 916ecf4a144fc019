"""patch_embed under the numerics rule: patches, strides, kept patches, prefix tokens, positions, uint8 pixels."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.ops import patch_embed
from pyvit.testing import LAYOUTS, Served, check_op, compare, layout, poisoned, served

on_every = pytest.mark.parametrize("on", served("patch_embed", "grad", "images_grad"), ids=str)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grid(size: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]) -> int:
    return ((size[0] - patch[0]) // stride[0] + 1) * ((size[1] - patch[1]) // stride[1] + 1)


def inputs(
    on: Served, b: int, c: int, size: tuple[int, int], patch: tuple[int, int], d: int, n: int, *kinds: str
) -> dict[str, Tensor]:
    tensors = {
        "images": on.randn(b, c, *size),
        "weight": on.randn(d, c, *patch, scale=(c * patch[0] * patch[1]) ** -0.5),
    }
    if "uint8" in kinds:
        tensors["images"] = torch.randint(256, (b, c, *size), dtype=torch.uint8, device=on.device)
    shapes = {"bias": (d,), "pos_embed": (n, d), "prefix": (3, d)}
    tensors.update({name: on.randn(*shape) for name, shape in shapes.items() if name in kinds})
    return tensors


def check(
    on: Served,
    b: int,
    c: int,
    size: tuple[int, int],
    patch: tuple[int, int],
    d: int,
    *kinds: str,
    stride: tuple[int, int] | None = None,
    **more: str,
) -> None:
    n = grid(size, patch, stride or patch)
    tensors = inputs(on, b, c, size, patch, d, n, *kinds)
    op = functools.partial(patch_embed, stride=stride)
    if "keep" in kinds:
        op = functools.partial(
            op, keep=torch.stack([torch.randperm(n)[: max(n // 4, 1)] for _ in range(b)]).to(on.device)
        )
    if "normalize" in kinds:
        op = functools.partial(
            op, mean=torch.tensor(MEAN[:c], device=on.device), std=torch.tensor(STD[:c], device=on.device)
        )
    check_op(op, tensors, backend=on.backend, name="patch_embed", **more)


ALL = ("bias", "pos_embed", "prefix")
PATCHES = [
    *[
        (3, (8, 12), (4, 4)),
        (3, (16, 32), (8, 8)),
        (1, (28, 14), (14, 14)),
        (4, (32, 16), (16, 16)),
        (3, (64, 32), (32, 32)),
    ],
    *[(2, (5, 7), (1, 1)), (3, (6, 35), (2, 7))],
]
OVERLAPS = [
    *[(1, (36, 52), (16, 16), (10, 10)), (3, (17, 23), (4, 4), (3, 2)), (3, (16, 16), (8, 8), (8, 4))],
    *[(2, (9, 9), (9, 9), (1, 1)), (3, (11, 9), (7, 7), (4, 4))],
]


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("d", [1, 8, 40, 64, 192, 384])
@pytest.mark.parametrize(("c", "size", "patch"), PATCHES, ids=str)
def test_patches(on: Served, c: int, size: tuple[int, int], patch: tuple[int, int], d: int) -> None:
    check(on, 2, c, size, patch, d, *ALL)


@pytest.mark.slow
@on_every
def test_vit_base(on: Served) -> None:
    check(on, 1, 3, (224, 224), (16, 16), 768, *ALL)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("kinds", [(), ("bias",), ("pos_embed",), ("prefix",), ("keep",), (*ALL, "keep")], ids=str)
@pytest.mark.parametrize("pixels", [(), ("uint8",), ("normalize",), ("uint8", "normalize")], ids=str)
def test_options(on: Served, kinds: tuple[str, ...], pixels: tuple[str, ...]) -> None:
    check(on, 3, 3, (24, 40), (8, 8), 48, *kinds, *pixels)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize(("c", "size", "patch", "stride"), OVERLAPS, ids=str)
def test_overlapping_patches(
    on: Served, c: int, size: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]
) -> None:
    """Strides smaller than the patch; the last pixels are left out as in a convolution."""
    check(on, 2, c, size, patch, 24, *ALL, stride=stride)
    check(on, 2, c, size, patch, 24, *ALL, "keep", "uint8", "normalize", stride=stride)


@on_every
def test_one_image_many_channels(on: Served) -> None:
    check(on, 1, 12, (16, 16), (4, 4), 33, *ALL)
    check(on, 5, 1, (4, 4), (4, 4), 17, *ALL, "keep")


@on_every
@pytest.mark.parametrize("store", [s for s in LAYOUTS if s != "contiguous"])
@pytest.mark.parametrize("kinds", [(), ("uint8", "normalize", "keep")], ids=str)
def test_strides(on: Served, store: str, kinds: tuple[str, ...]) -> None:
    check(on, 2, 3, (12, 20), (4, 4), 40, *ALL, *kinds, store=store, store_grad=store)


@on_every
def test_channels_last_bytes_and_strided_keep(on: Served) -> None:
    """Images as a decoder gives them, permuted from (B, H, W, C); indices and statistics with any strides."""
    images = torch.randint(256, (2, 16, 24, 3), dtype=torch.uint8, device=on.device).permute(0, 3, 1, 2)
    tensors = inputs(on, 2, 3, (16, 24), (8, 8), 32, 6, *ALL)
    keep = torch.tensor([[5, 0], [2, 3]], device=on.device)
    mean, std = torch.tensor(MEAN, device=on.device), torch.tensor(STD, device=on.device)
    op = functools.partial(
        patch_embed, keep=layout(keep, "transposed"), mean=layout(mean, "stepped"), std=layout(std, "stepped")
    )
    check_op(op, {**tensors, "images": images}, backend=on.backend)
    check_op(op, {**tensors, "images": images.to(on.dtype)}, backend=on.backend)


@on_every
def test_keep_in_any_order_and_repeated(on: Served) -> None:
    """Kept patches are in the given order, and a patch that is kept twice gets both gradients."""
    tensors = inputs(on, 2, 3, (12, 12), (4, 4), 24, 9, *ALL)
    keep = torch.tensor([[8, 0, 4, 4], [1, 1, 1, 7]], device=on.device)
    check_op(functools.partial(patch_embed, keep=keep), tensors, backend=on.backend)
    full = patch_embed(**tensors, backend=on.backend)
    kept = patch_embed(**tensors, keep=keep, backend=on.backend)
    wanted = torch.cat([full[:, :3], torch.stack([full[b, 3:][keep[b]] for b in range(2)])], 1)
    torch.testing.assert_close(kept, wanted, rtol=0, atol=8 * torch.finfo(on.dtype).eps)


@on_every
def test_patches_left_out_are_never_read(on: Served) -> None:
    tensors = inputs(on, 1, 3, (8, 8), (4, 4), 16, 4, "bias")
    if on.backend == "reference":
        pytest.skip("the naive form computes every patch")
    tensors["images"][:, :, 4:] = float("nan")
    with poisoned():
        out = patch_embed(**tensors, keep=torch.tensor([[1, 0]], device=on.device), backend=on.backend)
    assert out.isfinite().all()


@on_every
@pytest.mark.parametrize("case", ["batch", "keep", "prefix"])
def test_empty(on: Served, case: str) -> None:
    tensors = inputs(on, 0 if case == "batch" else 2, 3, (8, 8), (4, 4), 16, 4, *ALL)
    keep = torch.zeros(len(tensors["images"]), 0 if case == "keep" else 2, dtype=torch.int64, device=on.device)
    if case == "prefix":
        tensors["prefix"] = tensors["prefix"][:0]
    check_op(functools.partial(patch_embed, keep=keep), tensors, backend=on.backend)
    check_op(patch_embed, tensors, backend=on.backend)


@on_every
def test_large_magnitudes(on: Served) -> None:
    tensors = inputs(on, 2, 3, (16, 16), (8, 8), 32, 4, *ALL)
    tensors["images"] *= 1e3
    check_op(patch_embed, tensors, backend=on.backend)


@on_every
def test_is_a_convolution(on: Served) -> None:
    images, weight, bias = on.randn(2, 3, 32, 48), on.randn(40, 3, 16, 16, scale=0.05), on.randn(40)
    out = patch_embed(images, weight, bias, stride=8, backend=on.backend)
    wanted = [
        F.conv2d(*(t.to(dtype) for t in (images, weight, bias)), stride=8).flatten(2).mT
        for dtype in (on.dtype, torch.float64)
    ]
    compare("conv2d", out, *wanted)


@on_every
def test_only_some_gradients_asked(on: Served) -> None:
    for grads in (("weight",), ("images",), ("prefix",), ("pos_embed", "bias")):
        check_op(
            patch_embed,
            inputs(on, 2, 3, (8, 12), (4, 4), 20, 6, *ALL),
            backend=on.backend,
            grads=grads,
            name=str(grads),
        )
