"""Window attention, patch embedding and attention maps on Triton against the reference, forward and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyvit.ops import reference
from pyvit.ops.patch_embed import PATCH_BACKWARD
from pyvit.ops.window_attention import WINDOW_BACKWARD
from tests.extremes import ROWS, extreme_bias, extreme_table

windows = pytest.importorskip("pyvit.triton_kernels.window_attention")
patches = pytest.importorskip("pyvit.triton_kernels.patch_embed")
maps = pytest.importorskip("pyvit.triton_kernels.attention_map")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _exact(args: list) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


# map, window, shift, heads, d, features
WINDOWS = [
    ((1, 7, 7), (7, 7), (0, 0), 2, 16, "table"),
    ((1, 9, 10), (7, 7), (3, 3), 1, 24, "table pad dropout"),
    ((2, 9, 6), (4, 4), (2, 1), 2, 16, "table pad"),
    ((1, 6, 9), (4, 4), (2, 2), 1, 16, "table cosine"),
    ((1, 5, 9), (7, 7), (3, 3), 1, 16, "table cosine pad dropout"),
    ((1, 8, 8), (8, 8), (0, 0), 1, 16, ""),
    ((1, 10, 9), (9, 9), (4, 4), 1, 16, "table cosine pad dropout"),
    ((1, 18, 9), (9, 9), (2, 0), 2, 16, "table"),
    ((1, 12, 24), (12, 12), (0, 6), 1, 16, "table cosine"),
    ((1, 11, 10), (3, 23), (1, 7), 1, 16, ""),
    ((2, 10, 10), (10, 10), (0, 0), 1, 24, "table pad"),
]


def _compare_windows(agree, dtype, size, window, shift, heads, d, features, table=None) -> None:
    qkv = torch.randn(*size, 3 * heads * d).to(dtype)
    if "table" in features:
        table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    logit = torch.linspace(4.9, 1.0, heads) if "cosine" in features else None
    pad = torch.randn(3 * heads * d).to(dtype) if "pad" in features else None
    p, seed = (0.2, torch.randint(0, 2**62, (1,))) if "dropout" in features else (0.0, None)
    args = [qkv, window, shift, heads, table, logit, pad, 0.4, p, seed]
    out, lse = windows.window_attention(*args)
    grad_out = torch.randn(out.shape).to(dtype)
    grads = windows.window_attention_backward(grad_out, out, lse, *args)
    forms = []
    for cast in (_exact, list):
        own = cast(args)
        r = reference.window_attention(*own)
        forms.append((*r, *WINDOW_BACKWARD.reference(cast([grad_out])[0], *r, *own)))
    largest = forms[0][1][forms[0][1].isfinite()].abs().max()
    scores = float(largest) if logit is not None else 0.0  # cosine attention: up to 100, and so their rounding
    agree((out, lse, *grads), *forms, 2, scores=scores)


@pytest.mark.parametrize("case", WINDOWS, ids=lambda c: f"{c[1][0]}x{c[1][1]} {c[5]}")
def test_windows(agree, case) -> None:
    _compare_windows(agree, F32, *case)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
def test_windows_in_low_precision(agree, dtype) -> None:
    _compare_windows(agree, dtype, (1, 8, 9), (7, 7), (3, 3), 1, 32, "table pad")
    _compare_windows(agree, dtype, (1, 9, 10), (9, 9), (3, 3), 1, 32, "table")


# Several windows per program, of every class: inside, at the far edges, and with padding in the last two of an axis.
HELD = [
    ((2, 18, 27), (9, 9), (4, 5), "table"),
    ((1, 13, 25), (9, 9), (6, 4), "table dropout"),
    ((1, 13, 20), (9, 9), (6, 4), "table cosine pad"),
    ((1, 21, 10), (7, 10), (3, 0), ""),
]


@pytest.mark.parametrize("case", HELD, ids=lambda c: f"{c[1][0]}x{c[1][1]} {c[3]}")
def test_windows_whose_bias_stays_on_chip(agree, case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "processors", lambda _: 1)
    size, window, shift, features = case
    _compare_windows(agree, BF16, size, window, shift, 1, 16, features)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("features", ["", "cosine pad"])
@pytest.mark.parametrize("window", [(3, 3), (7, 7), (9, 9)], ids=str)
def test_finite_masks(agree, dtype, window: tuple[int, int], features: str) -> None:
    """Tables that mask rows by -inf or finite numbers, for packed windows, for a window in one tile, and for several
    tiles."""
    table = extreme_table((2 * window[0] - 1) * (2 * window[1] - 1))
    size = (1, window[0] + 1, 2 * window[1]) if "pad" in features else (1, *window)
    _compare_windows(agree, dtype, size, window, (1, 1), ROWS, 16, features, table)


@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
def test_maps_of_finite_masks(agree, dtype) -> None:
    q, k = torch.randn(1, 2, ROWS, 16).to(dtype), torch.randn(1, 2, 150, 16).to(dtype)
    args = [q, k, torch.arange(ROWS)[None], extreme_bias(150)[None, None], 0.3]
    agree([maps.attention_map(*args)], [reference.attention_map(*_exact(args))], [reference.attention_map(*args)], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "features"), [(8, "table cosine"), (12, "table"), (16, "table cosine"), (24, "table")]
)
@pytest.mark.usefixtures("tuned_tiles")
def test_windows_of_models(agree, side: int, features: str) -> None:
    """Windows of Swin and Swin V2 with heads of 32 channels, with the tuned tiles."""
    _compare_windows(agree, BF16, (1, side, 2 * side), (side, side), (0, side // 2), 1, 32, features)


@pytest.mark.slow
@pytest.mark.parametrize("side", [12, 24])
def test_large_window(agree, side: int) -> None:
    _compare_windows(agree, F32, (1, side, side + 1), (side, side), (side // 2, side // 2), 1, 16, "table pad")


# images, patch, stride, features
PATCHES = [
    ((2, 3, 8, 12), (4, 4), (4, 4), ""),
    ((2, 3, 8, 12), (4, 4), (4, 4), "bytes normalise prefix position keep"),
    ((2, 1, 11, 10), (4, 5), (3, 2), "normalise prefix position"),
    ((1, 2, 9, 9), (3, 3), (3, 3), "position keep"),
    ((1, 2, 9, 10), (4, 4), (2, 3), "keep bfloat"),
    ((1, 3, 8, 8), (4, 4), (4, 4), "half prefix"),
    ((1, 3, 10, 8), (5, 4), (5, 4), "bytes"),
    ((1, 3, 16, 16), (8, 8), (8, 8), "bytes normalise bfloat prefix keep"),
]


@pytest.mark.parametrize("case", PATCHES, ids=lambda c: f"{c[1]} {c[2]} {c[3]}")
def test_patch_embedding(agree, case) -> None:
    (b, c, h, w), patch, stride, features = case
    dtype = BF16 if "bfloat" in features else F16 if "half" in features else F32
    as_bytes, d = "bytes" in features, 24
    images = (
        torch.randint(0, 256, (b, c, h, w), dtype=torch.uint8)
        if as_bytes
        else torch.rand(b, h, w, c).to(dtype).permute(0, 3, 1, 2)
    )
    n = ((h - patch[0]) // stride[0] + 1) * ((w - patch[1]) // stride[1] + 1)
    args = [
        images,
        torch.randn(d, c, *patch).to(dtype),
        torch.randn(d),
        stride,
        torch.randn(n, d) if "position" in features else None,
        torch.randn(2, d) if "prefix" in features else None,
        torch.randint(0, n, (b, 4)) if "keep" in features else None,  # may repeat a patch
        *((torch.rand(c, 2) + 0.5).unbind(1) if "normalise" in features else (None, None)),
    ]
    if dtype != F32:
        args[2] = args[2].to(dtype)
    out = patches.patch_embed(*args)
    grad_out = torch.randn(out.shape).to(dtype)
    grads = patches.patch_embed_backward(grad_out, not as_bytes, True, *args)
    forms = []
    for cast in (_exact, list):
        own = cast(args)
        forms.append(
            (reference.patch_embed(*own), *PATCH_BACKWARD.reference(cast([grad_out])[0], not as_bytes, True, *own))
        )
    agree((out, *grads), *forms, 1)


#: Smallest and largest byte, mean, std: pixels on both sides of a mean that leaves few digits of them, pixels whose
#: normalisation is exact in the naive form, and a mean far from all pixels.
NORMALISATIONS = [(126, 129, 0.5, 0.004), (255, 255, 255 / 256, 1 / 256), (0, 255, 100.0, 0.25)]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("pixels", NORMALISATIONS, ids=str)
def test_normalised_bytes(agree, pixels: tuple[int, int, float, float], dtype: torch.dtype) -> None:
    """Patches whose channels are whole steps of the product, as those of 16 x 16 pixels."""
    low, high, mean, std = pixels
    images = torch.randint(low, high + 1, (1, 2, 16, 16), dtype=torch.uint8)
    weight, bias = torch.randn(24, 2, 8, 8).to(dtype), torch.randn(24).to(dtype)
    args = [images, weight, bias, (8, 8), None, None, None, torch.tensor([mean, 0.5]), torch.tensor([std, 0.25])]
    out = patches.patch_embed(*args)
    grad_out = torch.randn(out.shape).to(dtype)
    grads = patches.patch_embed_backward(grad_out, False, True, *args)
    forms = []
    for cast in (_exact, list):
        own = cast(args)
        forms.append((reference.patch_embed(*own), *PATCH_BACKWARD.reference(cast([grad_out])[0], False, True, *own)))
    agree((out, *grads), *forms, 1)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_patches_of_sixteen(agree, dtype: torch.dtype) -> None:
    """Several steps over depth and channels, with the tuned tiles."""
    args = [
        torch.rand(1, 3, 64, 48).to(dtype),
        torch.randn(130, 3, 16, 16).to(dtype),
        None,
        (16, 16),
        None,
        None,
        None,
        None,
        None,
    ]
    out = patches.patch_embed(*args)
    grad_out = torch.randn(out.shape).to(dtype)
    grads = patches.patch_embed_backward(grad_out, True, False, *args)
    forms = []
    for cast in (_exact, list):
        own = cast(args)
        forms.append((reference.patch_embed(*own), *PATCH_BACKWARD.reference(cast([grad_out])[0], True, False, *own)))
    agree((out, *grads), *forms, 1)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bias", ["none", "float", "mask"])
def test_attention_map(agree, bias: str, dtype) -> None:
    q, k, rows = torch.randn(2, 4, 9, 24).to(dtype), torch.randn(2, 2, 70, 24).to(dtype), torch.randint(0, 9, (2, 3))
    added = {"none": None, "float": torch.randn(1, 4, 9, 1), "mask": torch.rand(2, 1, 9, 70) > 0.5}[bias]
    if bias == "mask":
        added[:, :, 2] = False
        rows[0, 0] = 2
    args = [q, k, rows, added, 0.3]
    agree((maps.attention_map(*args),), (reference.attention_map(*_exact(args)),), (reference.attention_map(*args),), 1)
