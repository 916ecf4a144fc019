"""Resampling weights for a model of another image size, patch size, window size, number of channels or text length."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.models.metadata import Metadata
from pyvit.nn import WindowAttention, WindowAttentionV2, resample_positions

#: First convolutions, whose input channels are those of the image.
_STEM = re.compile(
    r"(.*\.)?(patch_embed\.(proj|backbone\.(stem\.)?conv|backbone\.convs\.0)|visual\.conv1|encoder\.conv1|(?<![\w.])conv1)\.weight"
)


class Unknown(ValueError):
    """The grid of a position table is unknown: its size fits the model's grid and another one."""


def adapt(
    model: nn.Module, state: dict[str, Tensor], target: Mapping[str, Tensor], metadata: Metadata, square: bool
) -> tuple[list[str], list[str]]:
    """Adapt ``state`` to the model, in place. Returns what was done, and what cannot be adapted, with the reason.

    ``metadata``: the file's metadata about its modules. ``square``: position tables without metadata have square grids.
    """
    done, failed = [], []
    fits = [*((key, _fit_stem) for key in state if _STEM.fullmatch(key))]
    for prefix, module in ((f"{n}." if n else "", m) for n, m in model.named_modules()):
        fits += [
            (prefix + name, _fit_positions) for name in ("pos_embed", "decoder_pos_embed") if hasattr(module, "grid")
        ]
        if isinstance(module, WindowAttention) and not isinstance(module, WindowAttentionV2):
            fits.append((prefix + "relative_position_bias_table", _fit_window))
        fits += [(prefix + name, _fit_relative) for name in ("rel_pos_h", "rel_pos_w") if hasattr(module, name)]
        if hasattr(module, "positional_embedding"):
            fits.append((prefix + "positional_embedding", _fit_pool if hasattr(module, "side") else _fit_text))
    for key, fit in fits:
        if key not in state or key not in target:
            continue
        path = key.rpartition(".")[0]
        module = model.get_submodule(path) if fit is not _fit_stem else None
        known = (metadata.get(path) or {}).get("window_size" if fit is _fit_window else "grid")
        try:
            note = fit(module, state, key, target, known, square)
        except Unknown as error:
            failed.append(f"{key} {error}")
            continue
        done += [f"{key} {note}"] if note else []
    return done, failed


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def _names(grid: Sequence[int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _fit_positions(
    module: Any, state: dict[str, Tensor], key: str, target: Mapping[str, Tensor], known: Any, square: bool
) -> str:
    """Resample position embeddings from the file's grid to the model's, with the positions of the class and
    distillation tokens."""
    pos = state[key]
    prefix = key.removesuffix("decoder_pos_embed").removesuffix("pos_embed")
    new = tuple(module.grid)
    if pos.dim() == 4 and target[key].shape == (1, *new, pos.shape[3]):  # a map (1, rows, columns, D)
        old = (pos.shape[1], pos.shape[2])
        if old == new:
            return ""
        state[key] = resample_positions(pos[0].flatten(0, 1), old, new, antialias=False).unflatten(0, new)[None]
        return f"{_names(old)} -> {_names(new)}"
    if pos.dim() != 3 or pos.shape[2] != target[key].shape[2]:
        return ""
    tokens = target[key].shape[1] - new[0] * new[1]  # positions of class and distillation token
    held = 1 if "decoder" in key else sum(prefix + name in state for name in ("cls_token", "dist_token"))
    registers = state[prefix + "reg_token"].shape[1] if prefix + "reg_token" in state and "decoder" not in key else 0
    found = _grid(
        pos.shape[1], list(dict.fromkeys((held, 0, tokens, held + registers, 1, 2))), known, new, tokens, square
    )
    if found is None:
        return ""  # reported as mismatched
    old, there = found
    moved = ""
    if (
        registers and there == held + registers
    ):  # timm's models with positions for all prefix tokens: add those of the registers to the registers
        state[prefix + "reg_token"] = state[prefix + "reg_token"] + pos[:, held:there]
        state[key] = pos = torch.cat((pos[:, :held], pos[:, there:]), 1)
        there, moved = held, "positions of registers added to reg_token"
    if tuple(old) == new and there == tokens:
        return moved
    first, patches = (
        pos[:, :there],
        resample_positions(pos[0, there:], old, new, **getattr(module, "interpolation", {}))[None],
    )
    note = f"{_names(old)} -> {_names(new)}" + (f", {moved}" if moved else "")
    if there < tokens:
        if there:
            return ""  # a distillation token without a position: the token is missing too
        first = patches.new_zeros(1, tokens, patches.shape[2])
        note += ", class position zero"
    elif there > tokens and not tokens and prefix + "cls_token" in target:  # add the position to the token
        for i, name in enumerate(("cls_token", "dist_token")[:there]):
            if prefix + name in state:
                state[prefix + name] = state[prefix + name] + first[:, i : i + 1]
        first, note = first[:, :0], note + ", class position added to cls_token"
    elif there > tokens:
        first, note = first[:, :tokens], note + f", positions of {there - tokens} more prefix token left out"
    state[key] = torch.cat((first, patches), 1)
    return note


def _grid(
    n: int, tokens: Sequence[int], known: Any, new: Sequence[int], own: int, square: bool
) -> tuple[tuple[int, ...], int] | None:
    """Rows and columns of a table of n positions, and the number of prefix positions: from the file's metadata, else
    square, else the model's."""
    area = new[0] * new[1]
    if known is not None:
        left = n - known[0] * known[1]
        return (tuple(known), left) if left in tokens else None
    if n == area + own and new[0] != new[1] and not square:
        if _is_square(area):
            side = math.isqrt(area)
            raise Unknown(
                f"of {area} patches: the file does not say whether they are {side}x{side} or {_names(new)}; give "
                "grid=(rows, columns)"
            )
        return tuple(new), own
    for there in tokens:
        if _is_square(n - there):
            side = math.isqrt(n - there)
            return (side, side), there
    return next(((tuple(new), there) for there in tokens if n - there == area), None)


def _fit_window(
    module: Any, state: dict[str, Tensor], key: str, target: Mapping[str, Tensor], known: Any, square: bool
) -> str:
    """Resample relative-position biases of another window size."""
    table, new = state[key], tuple(2 * w - 1 for w in module.window_size)
    if table.dim() != 2:
        return ""
    found = _grid(table.shape[0], (0,), None if known is None else [2 * w - 1 for w in known], new, 0, square)
    if found is None or found[0] == new:
        return ""
    state[key] = resample_positions(table, found[0], new, antialias=False)
    return f"{_names(found[0])} -> {_names(new)}"


def _fit_relative(
    module: Any, state: dict[str, Tensor], key: str, target: Mapping[str, Tensor], known: Any, square: bool
) -> str:
    """Interpolate decomposed relative positions linearly to another length, as at run time."""
    table, n = state[key], target[key].shape[0]
    if table.dim() != 2 or table.shape[0] == n or table.shape[1] != target[key].shape[1]:
        return ""
    state[key] = F.interpolate(table.float().T[None], size=n, mode="linear")[0].T.to(table.dtype)
    return f"{table.shape[0]} -> {n}"


def _fit_pool(
    module: Any, state: dict[str, Tensor], key: str, target: Mapping[str, Tensor], known: Any, square: bool
) -> str:
    """Position embeddings of CLIP's ResNet tower: one of the mean token, then those of a square map."""
    pos, n = state[key], module.side
    if pos.dim() != 2 or pos.shape == target[key].shape or not _is_square(pos.shape[0] - 1):
        return ""
    side = math.isqrt(pos.shape[0] - 1)
    state[key] = torch.cat((pos[:1], resample_positions(pos[1:], (side, side), (n, n))))
    return f"{side}x{side} -> {n}x{n}"


def _fit_text(
    module: Any, state: dict[str, Tensor], key: str, target: Mapping[str, Tensor], known: Any, square: bool
) -> str:
    """Position embeddings of a longer text, cut to the model's length."""
    pos, n = state[key], target[key].shape[0]
    if pos.dim() != 2 or pos.shape[0] == n:
        return ""
    if pos.shape[0] < n:
        raise Unknown(f"of {pos.shape[0]} tokens, the model's context is {n}: give it context_length={pos.shape[0]}")
    state[key] = pos[:n].clone()
    return f"the first {n} of {pos.shape[0]}"


def _fit_stem(
    module: Any, state: dict[str, Tensor], key: str, target: Mapping[str, Tensor], known: Any, square: bool
) -> str:
    """The first convolution for another number of channels, then for another patch size."""
    weight, want = state[key], target[key].shape
    if weight.dim() != 4 or len(want) != 4 or weight.shape[0] != want[0] or weight.shape == want:
        return ""
    notes = []
    if weight.shape[1] != want[1]:
        if 1 not in (weight.shape[1], want[1]) and weight.shape[1] != 3:
            return ""
        notes.append(f"{weight.shape[1]} -> {want[1]} channels")
        weight = adapt_channels(weight, want[1])
    if weight.shape[2:] != want[2:]:
        if "patch_embed.proj" not in key:
            return ""
        notes.append(f"patch {_names(weight.shape[2:])} -> {_names(want[2:])}")
        weight = resample_patch(weight, want[2:])
    state[key] = weight
    return ", ".join(notes)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Filters (D, C, h, w) for another number of channels. Grey images give the same result with their value in every
    channel.

    For one channel the filters are summed; for more they are repeated and scaled by the ratio of the numbers.
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, -(-channels // old), 1, 1)[:, :channels]
    return (repeated * (old / channels)).to(weight.dtype)


def resample_patch(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Filters (D, C, h, w) for another patch size, such that their products with resized patches change least.

    Uses the pseudo-inverse of the resize matrix (bicubic, antialiased). Beyer et al., "FlexiViT" (2023), section 3.4.
    """
    old = weight.shape[2:]
    basis = torch.eye(old[0] * old[1]).view(-1, 1, *old)
    resize = F.interpolate(basis, size=tuple(size), mode="bicubic", antialias=True).flatten(
        1
    )  # (old area, new area): row i is pixel i resized
    found = weight.float().flatten(2) @ torch.linalg.pinv(resize).T  # (D, C, new area)
    return found.view(*weight.shape[:2], *size).to(weight.dtype)
