"""Residual connections: LayerScale, stochastic depth, and the arguments with which a layer fuses its branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.nn.attention import Packing
from pyvit.nn.linear import bypassed, fuses_residual, plain
from pyvit.nn.rates import check_rate
from pyvit.nn.rms_norm import norm_args
from pyvit.ops import checks


@bypassed
class LayerScale(nn.Module):
    """A learned factor per channel, (..., C) -> (..., C). Touvron et al., "Going deeper with Image Transformers"
    (2021)."""

    def __init__(self, dim: int, init_values: float = 1e-5, **factory: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def fusion_args(
    norm: nn.Module, scale: nn.Module | None, drop_path: DropPath, layer: nn.Module
) -> dict[str, Any] | None:
    """``norm`` and ``scale`` as arguments of ``layer``, which then computes residual + scale(layer(norm(x))) itself.

    In inference, where nothing is dropped and no hook observes these modules. None otherwise, or where the class of
    ``layer`` itself (a subclass may compute something else) does not say ``fuses_residual``.
    """
    if torch.is_grad_enabled() or not plain(drop_path, DropPath) or (given := norm_args(norm)) is None:
        return None
    if (drop_path.p and drop_path.training) or not fuses_residual(layer):
        return None
    gamma = None
    if scale is not None and not plain(scale, nn.Identity):
        if not plain(scale, LayerScale):
            return None
        gamma = scale.gamma
    return {"norm": given, "scale": gamma}


@bypassed
class DropPath(nn.Module):
    """Stochastic depth: in training, each sample's branch is dropped with probability ``p`` and the others are divided
    by 1 - p.

    Two forms. ``"sample"``: an independent draw per sample (Huang et al., 2016). ``"batch"``: exactly round(B (1 - p))
    samples, at least one, are drawn and the branch is computed for them alone, which saves the work of the others
    (Oquab et al., "DINOv2", 2023, section 5); it needs :meth:`residual`, which sees the branch before it is computed.
    """

    def __init__(self, p: float = 0.0, form: str = "sample") -> None:
        super().__init__()
        p = checks.number("DropPath", "p", p)
        check_rate("DropPath: p", p)
        if form not in ("sample", "batch"):
            raise ValueError(f"DropPath: form must be 'sample' or 'batch', got {form!r}")
        self.p, self.form = p, form

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """x (B, ...), or (T, C) packed, with whole samples zeroed and the others scaled up."""
        if not self.training or self.p == 0.0:
            return x
        samples = x.shape[0] if packing is None else len(packing.lengths)
        keep = x.new_empty(samples, *[1] * (x.dim() - 1)).bernoulli_(1.0 - self.p).div_(1.0 - self.p)
        return x * (keep if packing is None else packing.spread(keep))

    def residual(
        self, x: Tensor, branch: Callable[[Tensor, Packing | None], Tensor], packing: Packing | None = None
    ) -> Tensor:
        """x + drop_path(branch(x, packing)), with x (B, ...), or (T, C) packed."""
        if not self.training or self.p == 0.0:
            return x + branch(x, packing)
        if self.form == "sample":
            return x + self(branch(x, packing), packing)
        samples = x.shape[0] if packing is None else len(packing.lengths)
        kept = max(round(samples * (1.0 - self.p)), 1)
        chosen = torch.randperm(samples, device=x.device)[:kept]
        if packing is None:
            rows, fewer = chosen, None
        else:
            rows, fewer = packing.select(x, chosen.tolist())
        y = branch(x[rows], fewer)
        return x.index_add(0, rows, y.to(x.dtype), alpha=samples / kept)

    def extra_repr(self) -> str:
        return f"p={self.p}, form={self.form}"


def add_branch(
    drop_path: nn.Module, x: Tensor, branch: Callable[[Tensor, Packing | None], Tensor], packing: Packing | None = None
) -> Tensor:
    """x + drop_path(branch(x, packing)): without the work of dropped samples where it is an unwatched
    :class:`DropPath`."""
    if plain(drop_path, DropPath):
        return drop_path.residual(x, branch, packing)
    y = branch(x, packing)
    return x + (drop_path(y, packing) if isinstance(drop_path, DropPath) else drop_path(y))
