"""Launchers of patch embedding, and the final sums of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyvit.triton_kernels.common import arch_of, launch, precision, processors, rows_unit
from pyvit.triton_kernels.patch_embed_kernels import (
    patch_forward,
    patch_image_gradient,
    patch_weight_gradient,
    spread_tokens,
)
from pyvit.triton_kernels.tiles import Config, choose
from torch import Tensor


class _Patches:
    """The geometry of a call, as kernel arguments."""

    def __init__(
        self,
        images: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        keep: Tensor | None,
        mean: Tensor | None,
        std: Tensor | None,
    ) -> None:
        self.images, self.weight = images, weight.contiguous()
        self.batch, self.channels, self.height, self.width = images.shape
        self.d, _, ph, pw = weight.shape
        self.patch, self.step = (ph, pw), (stride[0], stride[1])
        self.depth = self.channels * ph * pw
        self.grid = ((self.height - ph) // stride[0] + 1, (self.width - pw) // stride[1] + 1)
        self.keep = None if keep is None else rows_unit(keep)
        self.count = self.grid[0] * self.grid[1] if keep is None else keep.shape[1]
        self.shape: dict[str, Any] = {
            "CHANNELS": self.channels,
            "PATCH": self.patch,
            "STEP": self.step,
            "PRECISION": precision(weight),
        }
        self.pixels: dict[str, Any] = {
            "keep": self.keep,
            "keep_stride": 0 if self.keep is None else self.keep.stride(0),
            "mean": None if mean is None else mean.contiguous(),
            "std": None if std is None else std.contiguous(),
            "image_strides": images.stride(),
            "grid_w": self.grid[1],
            "BYTES": images.dtype == torch.uint8,
            **self.shape,
        }

    def choose(self, kernel: str, length: int) -> tuple[Config, dict[str, int]]:
        c = choose(kernel, arch_of(self.images), self.weight.element_size(), 1, length)
        return c, {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.edge_n}


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    backend: str = "triton",
) -> Tensor:
    """Tokens (B, P + K, D), as :func:`pyvit.ops.patch_embed` states them."""
    p = _Patches(images, weight, stride, keep, mean, std)
    n_prefix = 0 if prefix is None else prefix.shape[0]
    out = weight.new_empty(p.batch, n_prefix + p.count, p.d)
    if prefix is not None:
        out[:, :n_prefix] = prefix
    rows = p.batch * p.count
    c, blocks = p.choose("patch_forward", rows)
    args = p.pixels | blocks
    args |= {"images": images, "weight": p.weight, "weight_stride": p.depth, "out": out}
    args |= {name: None if t is None else t.contiguous() for name, t in (("bias", bias), ("pos_embed", pos_embed))}
    args |= {"rows_total": rows, "kept": p.count, "n_prefix": n_prefix, "WIDTH": p.d}
    launch(patch_forward, -(-rows // c.block_m) * -(-p.d // c.block_n), args, c.warps, c.stages)
    return out


def patch_embed_backward(
    grad_out: Tensor,
    images_grad: bool,
    weight_grad: bool,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of images, weight, bias, pos_embed and prefix; empty if not given or not requested."""
    p = _Patches(images, weight, stride, keep, mean, std)
    grad_out = rows_unit(grad_out.to(weight.dtype))
    n_prefix = 0 if prefix is None else prefix.shape[0]
    grad_tokens = grad_out[:, n_prefix:]
    none = weight.new_empty(0)
    return (
        _image_grad(p, grad_tokens) if images_grad else none,
        _weight_grad(p, grad_tokens) if weight_grad else none,
        none if bias is None else grad_tokens.sum((0, 1), dtype=torch.float32).to(bias.dtype),
        none if pos_embed is None else _position_grad(p, grad_tokens, pos_embed),
        none if prefix is None else grad_out[:, :n_prefix].sum(0, dtype=torch.float32).to(prefix.dtype),
    )


def _weight_grad(p: _Patches, grad_tokens: Tensor) -> Tensor:
    rows = p.batch * p.count
    c, blocks = p.choose("patch_weight_gradient", rows)
    tiles = -(-p.d // c.block_m) * -(-p.depth // c.block_n)
    splits = max(1, min(-(-rows // (4 * c.edge_n)), 2 * processors(p.images) // tiles))
    blocks_each = -(-rows // (splits * c.edge_n))
    share = blocks_each * c.edge_n
    splits = -(-rows // max(share, 1))
    partial = p.weight.new_empty((splits, p.d, p.depth), dtype=torch.float32)
    args = (
        p.pixels
        | blocks
        | {"grad_out": grad_tokens, "grad_strides": grad_tokens.stride()[:2], "images": p.images, "partial": partial}
    )
    args |= {"rows_total": rows, "kept": p.count, "share": share, "WIDTH": p.d}
    launch(patch_weight_gradient, tiles * splits, args, c.warps, c.stages)
    return (partial[0] if splits == 1 else partial.sum(0)).view(p.weight.shape).to(p.weight.dtype)


def _spread(p: _Patches, grad_tokens: Tensor, each: bool, dtype: torch.dtype) -> Tensor:
    patches = p.grid[0] * p.grid[1]
    out = grad_tokens.new_empty((p.batch if each else 1, patches, p.d), dtype=dtype)
    c, blocks = p.choose("spread_tokens", patches)
    args = {"grad_out": grad_tokens, "keep": p.keep, "out": out, "grad_strides": grad_tokens.stride()[:2]} | blocks
    args |= {
        "keep_stride": p.pixels["keep_stride"],
        "batch": p.batch,
        "patches": patches,
        "kept": p.count,
        "WIDTH": p.d,
    }
    args |= {"EACH": each, "PRECISION": p.shape["PRECISION"]}
    launch(spread_tokens, out.shape[0] * -(-patches // c.block_m) * -(-p.d // c.block_n), args, c.warps, c.stages)
    return out


def _position_grad(p: _Patches, grad_tokens: Tensor, pos_embed: Tensor) -> Tensor:
    if p.keep is None:
        return grad_tokens.sum(0, dtype=torch.float32).to(pos_embed.dtype)
    return _spread(p, grad_tokens, False, pos_embed.dtype)[0]


def _image_grad(p: _Patches, grad_tokens: Tensor) -> Tensor:
    if p.keep is not None:
        grad_tokens = _spread(p, grad_tokens, True, grad_tokens.dtype)
    cells = (-(-p.height // p.step[0]), -(-p.width // p.step[1]))
    grad = p.images.new_empty(p.images.shape)
    rows = p.batch * cells[0] * cells[1]
    c, blocks = p.choose("patch_image_gradient", rows)
    args = (
        p.shape | blocks | {"grad_tokens": grad_tokens, "weight": p.weight, "std": p.pixels["std"], "grad_images": grad}
    )
    args |= {
        "grad_strides": grad_tokens.stride()[:2],
        "weight_stride": p.depth,
        "rows_total": rows,
        "size": (p.height, p.width),
    }
    args |= {"cells_h": cells[0], "cells_w": cells[1], "grid_h": p.grid[0], "grid_w": p.grid[1], "WIDTH": p.d}
    grid = -(-rows // c.block_m) * -(-p.channels * p.step[0] * p.step[1] // c.block_n)
    launch(patch_image_gradient, grid, args, c.warps, c.stages)
    return grad
