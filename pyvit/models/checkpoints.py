"""Loading the weights people have: any layout of :mod:`pyvit.models.formats`, any wrapper, any image or window size."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.models.formats import FORMATS, NATIVE, Format, pattern
from pyvit.nn import WindowAttention, WindowAttentionV2, resample_positions

#: Dictionaries that training loops wrap a state dict in, and prefixes that wrappers put before every key.
WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "student", "model_ema", "ema", "module", "net", "backbone")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "teacher.", "student.", "model.", "net.")

#: First layer of a ViT, a Swin and a ResNet: "encoder." before one of them is a wrapper's (SimCLR), elsewhere a layout's own name.
STEMS = ("patch_embed.proj.weight", "conv1.weight")


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did, key by key.

    missing: parameters of the model that the checkpoint does not have. unexpected: keys that no rule knows or the model has no place for.
    mismatched: parameters whose shape does not fit. unused: keys of pre-training heads and buffers, left out by design.
    adapted: parameters resampled to another size.
    """

    format: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.format} checkpoint: {len(self.loaded)} parameters loaded"]
        for name in ("adapted", "missing", "unexpected", "mismatched", "unused"):
            keys = getattr(self, name)
            if keys:
                lines.append(f"  {name} ({len(keys)}): {', '.join(keys)}")
        return "\n".join(lines)


class CheckpointError(RuntimeError):
    """The checkpoint does not fit the model; ``report`` says where."""

    def __init__(self, report: LoadReport) -> None:
        super().__init__(f"load_checkpoint: the checkpoint does not fit the model (strict=False loads what does)\n{report}")
        self.report = report


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    allow: Sequence[str] = (),
    name: str | None = None,
) -> LoadReport:
    """Load weights of any recognised layout into a pyvit model, in place.

    Position tables and relative-position biases of another grid or window are resampled.

    Args:
        model: a model of :mod:`pyvit.models`.
        source: ``.safetensors``, a file of ``torch.save`` (read with ``weights_only``) or OpenAI's TorchScript archives; or a state dict,
            wrapped or not.
        strict: raise :class:`CheckpointError` if anything is missing, unexpected or of another shape; the model is then left untouched.
        allow: regular expressions of the model's keys that may be missing, unexpected or mismatched (``("head\\\\..*",)`` to fine-tune).
        name: the format, where it should not be recognised from the keys (see :func:`formats`).

    Returns the report, which names every key that was not simply copied.

    Raises ValueError for a file that is no checkpoint or holds objects besides tensors and plain values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module, got {type(model).__name__}")
    state = read_state(source, model.state_dict().keys())
    found = recognise(state) if name is None else _format(name)
    native, unknown, unused = to_native(state, found)
    report = LoadReport(found.name, unused=unused)
    target = model.state_dict()
    report.adapted = adapt(model, native, target)
    skipped = [re.compile(p) for p in (*found.extra, *found.drop)]
    chosen: dict[str, Tensor] = {}
    for key, value in native.items():
        if key not in target:
            (report.unused if any(p.fullmatch(key) for p in skipped) else unknown).append(key)
        elif value.shape != target[key].shape:
            report.mismatched.append(f"{key} {tuple(value.shape)} for {tuple(target[key].shape)}")
        elif value.is_floating_point() != target[key].is_floating_point():
            report.mismatched.append(f"{key} {value.dtype} for {target[key].dtype}")
        else:
            chosen[key] = value
            report.loaded.append(key)
    report.unexpected = unknown
    bad_shape = {entry.split()[0] for entry in report.mismatched}
    report.missing = [key for key in target if key not in chosen and key not in bad_shape]
    allowed = [re.compile(p) for p in (*allow, r"(.*\.)?mask_token")]  # timm's DINOv2 checkpoints leave the mask token out
    wrong = [k.split()[0] for k in (*report.missing, *report.unexpected, *report.mismatched)]
    if (strict and any(not any(p.fullmatch(k) for p in allowed) for k in wrong)) or not chosen:
        raise CheckpointError(report)
    model.load_state_dict(chosen, strict=False)
    return report


def formats() -> list[str]:
    """Names of the layouts that are recognised."""
    return [f.name for f in FORMATS]


def _format(name: str) -> Format:
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"checkpoint format must be one of {', '.join(formats())}, got {name!r}")


def read_state(source: str | os.PathLike[str] | Mapping[str, Any], target: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a file or (wrapped) state dict, without the wrappers' dictionaries and prefixes.

    ``target`` are the keys of the model they are for: a prefix that they have too is no wrapper's.
    """
    if isinstance(source, str | os.PathLike):
        source = _read_file(os.fspath(source))
    if not isinstance(source, Mapping):
        raise TypeError(f"load_checkpoint: source must hold a state dict, got {type(source).__name__}")
    while inner := next((source[w] for w in WRAPPERS if isinstance(source.get(w), Mapping)), None):
        source = inner
    state = {k: v for k, v in source.items() if isinstance(v, Tensor)}
    if not state:
        raise ValueError(f"load_checkpoint: no tensors in source, whose keys are {list(source)[:8]}")
    prefixes = [p for p in PREFIXES if not any(k.startswith(p) for k in target)]
    while True:
        prefix = next((p for p in prefixes if any(k.startswith(p) for k in state)), None)
        if prefix is None and not any(k.startswith("encoder.") for k in target) and any("encoder." + stem in state for stem in STEMS):
            prefix = "encoder."
        if prefix is None:  # DINOv2 trains in chunks of blocks: blocks.chunk.i
            return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
        if prefix == "teacher.":  # as among WRAPPERS, the better of the two
            state = {k: v for k, v in state.items() if not k.startswith("student.")}
        # A DINO checkpoint holds heads beside the backbone: keys without the prefix stay as they are.
        stripped = {k.removeprefix(prefix): v for k, v in state.items()}
        if len(stripped) < len(state):
            twice = [k for k in state if k.startswith(prefix) and k.removeprefix(prefix) in state]
            raise ValueError(f"load_checkpoint: source has keys with and without the prefix {prefix!r}: {', '.join(twice[:5])}")
        state = stripped


def _read_file(path: str) -> Any:
    """What a file holds, read without running any code in it."""
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"load_checkpoint: {path} is no safetensors file: {error}") from error
    try:
        if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            return torch.jit.load(path, map_location="cpu").state_dict()
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's, DeiT's and MAE's training scripts save their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, RuntimeError, ValueError) as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"load_checkpoint: {path} holds objects besides tensors and plain values ({named[1]}); if you trust it, read it with "
                "torch.load(path, weights_only=False) and give its state dict"
            ) from error
        raise ValueError(f"load_checkpoint: {path} is no file of torch.save: {type(error).__name__}: {error}") from error


def recognise(state: Mapping[str, Tensor]) -> Format:
    """The layout of a state dict, from its keys."""
    for candidate in FORMATS:
        if all(any(mark.fullmatch(k) for k in state) for mark in (pattern(m, candidate.bases) for m in candidate.marks)):
            return candidate
    return NATIVE


def to_native(state: Mapping[str, Tensor], layout: Format) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Native state dict, the keys no rule knows, and the keys left out by design."""
    dropped = [re.compile(p) for p in layout.drop]
    unused = [k for k in state if any(p.fullmatch(k) for p in dropped)]
    left = {k: v for k, v in state.items() if k not in set(unused)}
    if not layout.rules:
        return left, [], unused
    native: dict[str, Tensor] = {}
    for rule in layout.rules:
        first = pattern(rule.foreign[0], layout.bases)
        for match in [m for m in map(first.fullmatch, list(left)) if m]:
            fields = match.groupdict()
            keys = [k.replace("@", fields.get("base") or "").format(**fields) for k in rule.foreign]
            if all(k in left for k in keys):
                values = rule.op.to_native(*(left.pop(k) for k in keys))
                native.update(zip((k.format(**fields) for k in rule.native), values, strict=True))
    extra = [re.compile(p) for p in layout.extra]
    unused += [k for k in left if any(p.fullmatch(k) for p in extra)]
    return native, [k for k in left if k not in set(unused)], unused


def from_native(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A native state dict in another layout, by its name in :func:`formats`: what ``pyvit convert`` writes.

    Raises ValueError for keys that the layout has no name for.
    """
    layout = _format(name)
    if not layout.rules:
        return dict(state)
    left, found = dict(state), dict[str, Tensor]()
    base = next((base for keys, base in layout.written if all(k in state for k in keys)), layout.bases[0])
    pairs = ((state[k], state.get(k.replace("fc1", "fc2"))) for k in state if k.endswith("blocks.0.mlp.fc1.weight"))
    swiglu = any(b is not None and a.shape[0] == 2 * b.shape[1] for a, b in pairs)
    for rule in layout.rules:
        if rule.swiglu not in (None, swiglu):
            continue
        first = pattern(rule.native[0])
        for match in [m for m in map(first.fullmatch, list(left)) if m]:
            fields = match.groupdict()
            keys = [k.format(**fields) for k in rule.native]
            if all(k in left for k in keys):
                values = rule.op.to_foreign(*(left.pop(k) for k in keys))
                found.update(zip((k.replace("@", base).format(**fields) for k in rule.foreign), values, strict=True))
    if left:
        raise ValueError(f"from_native: the {layout.name} layout has no name for {', '.join(left)}")
    return found


def adapt(model: nn.Module, state: dict[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Resample position tables in ``state`` to the model's grid and windows, in place; returns what was done."""
    notes = []
    for prefix, module in ((f"{n}." if n else "", m) for n, m in model.named_modules()):
        key = prefix + "pos_embed"
        if key in state and key in target and hasattr(module, "grid"):
            state[key], note = _fit_positions(module, state, prefix, target[key])
            notes += [f"{key} {note}"] if note else []
        key = prefix + "relative_position_bias_table"
        if isinstance(module, WindowAttention) and not isinstance(module, WindowAttentionV2) and key in state:
            table, new = state[key], tuple(2 * w - 1 for w in module.window_size)
            old = math.isqrt(table.shape[0])
            if table.shape[0] != new[0] * new[1] and old * old == table.shape[0]:
                state[key] = resample_positions(table, (old, old), new, antialias=False)
                notes.append(f"{key} {old}x{old} -> {new[0]}x{new[1]}")
    return notes


def _fit_positions(module: Any, state: dict[str, Tensor], prefix: str, target: Tensor) -> tuple[Tensor, str]:
    pos = state[prefix + "pos_embed"]
    if pos.shape == target.shape or pos.shape[2] != target.shape[2]:
        return pos, ""
    tokens = target.shape[1] - module.grid[0] * module.grid[1]  # positions of class and distillation tokens
    there = next((t for t in (tokens, 0, 1, 2) if math.isqrt(pos.shape[1] - t) ** 2 == pos.shape[1] - t), tokens)
    side = math.isqrt(pos.shape[1] - there)
    if side * side != pos.shape[1] - there or tokens == 2 != there:
        return pos, ""  # not a square grid: reported as mismatched
    note = f"{side}x{side} -> {module.grid[0]}x{module.grid[1]}"
    of_class, of_patches = pos[:, :there], resample_positions(pos[0, there:], (side, side), module.grid)[None]
    if there > tokens:  # no position for the class token here: it becomes part of the token
        state[prefix + "cls_token"] = state[prefix + "cls_token"] + of_class[:, :1]
        return of_patches, note + ", class position added to cls_token"
    if there < tokens:
        of_class = of_patches.new_zeros(1, tokens, of_patches.shape[2])
        note += ", class position zero"
    return torch.cat((of_class, of_patches), 1), note
