"""Token merging in timm's and pyvit's vision transformers: the option ``token_merging`` of
:func:`pyvit.integrations.accelerate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.integrations.forwards import Replacement, kind
from pyvit.nn.token_merging import TokenMerging, unmerge

_MODELS = {
    "pyvit.models.hybrid.HybridVisionTransformer",
    "pyvit.models.vit.VisionTransformer",
    "timm.models.deit.VisionTransformerDistilled",
    "timm.models.vision_transformer.VisionTransformer",
}
_BLOCKS = {
    "pyvit.nn.block.Block": "pyvit.nn.attention.Attention",
    "timm.models.vision_transformer.Block": "timm.layers.attention.Attention",
}
_BY = "token merging"


def replacements(model: nn.Module, r: int | Sequence[int]) -> list[Replacement]:
    """A replacement of ``forward_features`` for each vision transformer in ``model``.

    Raises ValueError if there is none, or if one has blocks or positions that tokens cannot be merged in.
    """
    found = []
    for path, module in model.named_modules():
        if kind(module) not in _MODELS:
            continue
        if (reason := _obstacle(module)) is not None:
            raise ValueError(f"accelerate: token_merging: {path or 'the model'}, a {kind(module)}, {reason}")
        merging = TokenMerging(r, module.num_prefix_tokens)  # type: ignore[arg-type]
        merging.rates(len(module.blocks))  # type: ignore[arg-type]
        function = partial(_timm if kind(module).startswith("timm.") else _pyvit, merging=merging)
        # A hook on one of these would not be called: the original runs while there is one, and the report says so.
        parts = tuple(f"blocks.{i}{part}" for i in range(len(module.blocks)) for part in ("", ".attn"))  # type: ignore[arg-type]
        found.append(Replacement(module, function, f"{_BY}, r = {r}", "forward_features", parts=parts))
    if not found:
        raise ValueError(
            f"accelerate: token_merging needs a VisionTransformer of timm or pyvit, {kind(model)} has none"
        )
    return found


def installed(items: Iterator[Replacement]) -> list[Replacement]:
    """Those of ``items`` that :func:`replacements` made."""
    return [item for item in items if item.by.startswith(_BY)]


def _obstacle(module: Any) -> str | None:
    """Why tokens cannot be merged in a vision transformer, or None."""
    if getattr(module, "rope", None) is not None:
        return "has rotary positions, which merged tokens have none of"
    for block in module.blocks:
        attn = getattr(block, "attn", None)
        if kind(block) not in _BLOCKS or kind(attn) != _BLOCKS[kind(block)]:
            return f"has a {kind(block)} with a {kind(attn)}, and merging knows timm's and pyvit's Block with Attention"
        if getattr(attn, "gate", None) is not None:
            return "has gated attention"
    return None


def _check(module: Any) -> None:
    if module.grad_checkpointing and torch.is_grad_enabled():
        raise RuntimeError("token_merging: gradient checkpointing must be off; fewer tokens need less memory already")


def _timm(
    module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, merging: TokenMerging
) -> Tensor:
    if attn_mask is not None or is_causal:
        raise ValueError("token_merging: attn_mask must be None and is_causal False: masks are not merged")
    _check(module)
    x = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(x))))
    x, rows = merging(module.blocks, x)
    return unmerge(module.norm(x), rows)


def _pyvit(
    module: Any, images: Tensor, masks: Tensor | None = None, keep: Tensor | None = None, *, merging: TokenMerging
) -> Tensor:
    _check(module)
    x, rows = merging(module.blocks, module.embed(images, masks, keep))
    return unmerge(module.norm(x), rows)
