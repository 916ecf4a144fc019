"""Patch embedding as one matrix product: contract, fake kernels and gradient.

Pixels are gathered by index arithmetic (no unfolded image in memory); normalisation, bias, positions, prefix tokens and
the choice of kept patches are part of the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, reference


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    keep: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Images to tokens: ``F.conv2d(images, weight, bias, stride).flatten(2).transpose(1, 2)`` with everything around
    it.

    Args:
        images: (B, C, H, W), floating, or uint8 with values 0..255 (read as bytes and divided by 255).
        weight: (D, C, ph, pw), as a convolution's; its dtype is that of the result.
        bias: (D,).
        stride: (sh, sw), default the patch size, and then H and W must divide by it. A smaller stride gives overlapping
            patches (AST), and like a convolution leaves out the pixels after the last whole patch. A larger one is
            refused.
        pos_embed: (N, D), added to the N patch tokens.
        prefix: (P, D), class token and registers with their own position already added; put before the patches.
        keep: (B, K) int64 in [0, N), the patches to compute, in that order (MAE); the others cost nothing.
        mean, std: (C,) float32, of pixels in 0..1: (x - mean) / std is folded in. Both or neither; they have no
            gradient.
        backend: force one backend.

    Returns:
        (B, P + K, D), with K = N without ``keep``. Gradients for every floating argument but mean and std.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. BackendError: ``backend`` cannot serve
            the call.

    Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021); He et al., "Masked Autoencoders" (2022) for
    ``keep``; Gong et al., "AST" (2021) for overlapping patches.
    """
    images, weight, bias, pos_embed, prefix = _prepare(images, weight, bias, pos_embed, prefix)
    call, stride = _check(images, weight, bias, stride, pos_embed, prefix, keep, mean, std)
    return PATCH(images, weight, bias, stride, pos_embed, prefix, keep, mean, std, dispatch.select(call, backend))


def _prepare(images: Tensor, weight: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """Images, parameters and tokens in autocast's dtype; bytes stay bytes."""
    device = checks.device("patch_embed", "images", images)
    return dispatch.autocast(device, images, weight, *rest)


def grid_size(size: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of patches of an image of (H, W) pixels."""
    return (size[0] - patch[0]) // stride[0] + 1, (size[1] - patch[1]) // stride[1] + 1


def _check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int] | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> tuple[Call, tuple[int, int]]:
    op = "patch_embed"
    checks.tensor(op, "images", images, "(B, C, H, W)", 4)
    checks.tensor(op, "weight", weight, "(D, C, ph, pw)", 4)
    checks.floating(op, "weight", weight)
    (b, c, h, w), (d, cw, ph, pw) = images.shape, weight.shape
    if cw != c:
        checks.fail(op, "weight", f"of shape (D, {c}, ph, pw) to fit images of {c} channels", checks.shape(weight))
    if images.dtype != torch.uint8:
        checks.same(op, "images", images, "weight", weight)
    checks.same(op, "weight", weight, "images", images, dtype=False)
    steps = (ph, pw) if stride is None else checks.pair(op, "stride", stride, 1)
    if steps[0] > ph or steps[1] > pw:
        checks.fail(op, "stride", f"at most the patch, {(ph, pw)}, so that every pixel is read", steps)
    if weight.numel() == 0:
        checks.fail(op, "weight", "of at least one element", checks.shape(weight))
    if h < ph or w < pw:
        checks.fail(op, "images", f"at least as large as one patch, {(ph, pw)}", f"{h} x {w} pixels")
    if (steps[0] == ph and h % ph) or (steps[1] == pw and w % pw):
        checks.fail(op, "images", f"of a height and width that divide by the patch {(ph, pw)}", f"{h} x {w} pixels")
    gh, gw = grid_size((h, w), (ph, pw), steps)
    for name, t, wanted in (("bias", bias, (d,)), ("pos_embed", pos_embed, (gh * gw, d)), ("prefix", prefix, ("P", d))):
        if t is None:
            continue
        checks.dense(op, name, t)
        if t.dim() != len(wanted) or any(isinstance(n, int) and n != s for n, s in zip(wanted, t.shape, strict=True)):
            checks.fail(
                op,
                name,
                f"of shape ({', '.join(map(str, wanted))}) for {gh} x {gw} patches of width {d}",
                checks.shape(t),
            )
        if t.dtype not in (torch.float32, weight.dtype):
            raise TypeError(f"{op}: {name} must be float32 or of the dtype of weight, {weight.dtype}, got {t.dtype}")
        checks.same(op, name, t, "images", images, dtype=False)
    if keep is not None:
        checks.dense(op, "keep", keep)
        if keep.dim() != 2 or keep.shape[0] != b:
            checks.fail(op, "keep", f"of shape ({b}, K)", checks.shape(keep))
        if keep.dtype != torch.int64:
            raise TypeError(f"{op}: keep must be int64, got {keep.dtype}")
        checks.same(op, "keep", keep, "images", images, dtype=False)
        concrete = keep.device.type == "cpu" and not torch.compiler.is_compiling() and not checks.is_fake(keep)
        if concrete and keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < gh * gw:
            checks.fail(op, "keep", f"indices in [0, {gh * gw})", f"{int(keep.min())}..{int(keep.max())}")
    if (mean is None) != (std is None):
        checks.fail(op, "mean and std", "given together", f"{'mean' if std is None else 'std'} alone")
    for name, t in (("mean", mean), ("std", std)):
        if t is not None:
            checks.dense(op, name, t)
            if tuple(t.shape) != (c,) or t.dtype != torch.float32:
                checks.fail(op, name, f"float32 of shape ({c},)", f"{t.dtype} {checks.shape(t)}")
            checks.same(op, name, t, "images", images, dtype=False)
    checks.no_gradient(op, mean=mean, std=std)
    features = ["uint8"] if images.dtype == torch.uint8 else []
    features += [
        name
        for name, t in (("normalize", mean), ("pos_embed", pos_embed), ("prefix", prefix), ("keep", keep))
        if t is not None
    ]
    if steps != (ph, pw):
        features.append("overlap")
    if torch.is_grad_enabled():
        if images.requires_grad:
            features.append("images_grad")
        if any(t is not None and t.requires_grad for t in (weight, bias, pos_embed, prefix)):
            features.append("grad")
    device, kept = images.device.type, gh * gw if keep is None else keep.shape[1]
    return Call(op, device, weight.dtype, tuple(features), (), dispatch.sizes(device, b, c, ph, pw, kept, d)), steps


@dispatch.describes(patch_embed)
def _describe(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    backend: str | None,
) -> tuple[Call, list[str]]:
    images, weight, bias, pos_embed, prefix = _prepare(images, weight, bias, pos_embed, prefix)
    call, _ = _check(images, weight, bias, stride, pos_embed, prefix, keep, mean, std)
    return call, dispatch.copy_notes(images=images, weight=weight)


def _check_low(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Call:
    return _check(images, weight, bias, stride, pos_embed, prefix, keep, mean, std)[0]


def _check_low_backward(
    grad_out: Tensor,
    images_grad: bool,
    _weight_grad: bool,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    *rest: Any,
) -> Call:
    call = _check_low(images, weight, bias, stride, pos_embed, prefix, keep, *rest)
    op = "patch_embed_backward"
    shape = (images.shape[0], _tokens(images, weight, stride, prefix, keep), weight.shape[0])
    checks.exactly(op, "grad_out", grad_out, shape, weight.dtype, weight)
    if images_grad and images.dtype == torch.uint8:
        checks.fail(op, "images_grad", "False for uint8 images", images_grad)
    return call


def _fake(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    *_: Any,
) -> Tensor:
    return weight.new_empty(images.shape[0], _tokens(images, weight, stride, prefix, keep), weight.shape[0])


def _tokens(images: Tensor, weight: Tensor, stride: Sequence[int], prefix: Tensor | None, keep: Tensor | None) -> int:
    """Of an image, prefix and patches."""
    gh, gw = grid_size(images.shape[2:], weight.shape[2:], stride)
    return (gh * gw if keep is None else keep.shape[1]) + (0 if prefix is None else prefix.shape[0])


_TRITON = "pyvit.triton_kernels.patch_embed:"

PATCH_BACKWARD = Gradient(
    "patch_embed",
    formula=reference.patch_embed,
    check=_check_low_backward,
    kernels={"triton": _TRITON + "patch_embed_backward"},
)
PATCH = Operator(
    "patch_embed",
    reference=lambda *args: reference.patch_embed(*args).contiguous(),
    fake=_fake,
    check=_check_low,
    gradient=PATCH_BACKWARD,
    autocast=("images", "weight", "bias", "pos_embed", "prefix"),
    kernels={"triton": _TRITON + "patch_embed"},
)
