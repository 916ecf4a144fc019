"""Loading checkpoints of any layout of :mod:`pyvit.models.formats`, wrapped or not, of any image or window size."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.models.adapt import adapt
from pyvit.models.formats import FORMATS, NATIVE, Format, number_blocks, number_stages, pattern
from pyvit.models.metadata import Metadata, compare, describe, metadata_of_config
from pyvit.models.state_dict import Source, open_source, read_state

__all__ = [
    "CheckpointError",
    "LoadReport",
    "Source",
    "formats",
    "from_native",
    "load_checkpoint",
    "open_source",
    "read_state",
    "recognise",
    "to_native",
]

#: Parameters that a file may lack: timm's DINOv2 files have no mask token, old files no counters of batch norms.
_OPTIONAL = (r"(.*\.)?mask_token", r".*num_batches_tracked")

#: Wrappers that are removed from a model, besides torch.compile's.
_WRAPPED = (nn.DataParallel, nn.parallel.DistributedDataParallel)

#: Metadata whose differences are only reported, and metadata that determines resampling.
_NOTED, _RESAMPLED = ("eps",), ("grid", "window_size")


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did, key by key.

    missing: parameters of the model that the checkpoint lacks. unexpected: keys that no rule knows or that the model
    does not have. mismatched: parameters of another shape. unused: heads of pre-training and buffers, which are
    skipped. adapted: parameters resampled to another size. not_finite: parameters with NaN or infinity. differs:
    settings that shapes do not show (heads, activation, ...) and that differ from the file's metadata. notes:
    assumptions and small differences.
    """

    format: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.format} checkpoint: {len(self.loaded)} parameters loaded"]
        for name in ("adapted", "missing", "unexpected", "mismatched", "not_finite", "differs", "unused", "notes"):
            if keys := getattr(self, name):
                lines.append(f"  {name} ({len(keys)}): {', '.join(fold(keys))}")
        return "\n".join(lines)

    def summary(self) -> str:
        """A short report with one line per kind: loaded, resampled, left at the initial value, not used."""
        lines = [f"{self.format} checkpoint: {len(self.loaded)} parameters loaded"]
        left = [*self.missing, *(f"{entry.split()[0]} (another shape)" for entry in self.mismatched), *self.not_finite]
        told = {
            "adapted": fold(self.adapted),
            "left as initialised": _parts(left),
            "not used": _parts([*self.unused, *self.unexpected]),
        }
        told |= {"differs": fold(self.differs), "note": fold(self.notes)}
        return "\n".join([*lines, *(f"  {name}: {', '.join(found)}" for name, found in told.items() if found)])


def _parts(names: Iterable[str]) -> list[str]:
    """Names grouped by their first component, with counts: "text.* (31)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [found[0] if len(found) == 1 else f"{group}.* ({len(found)})" for group, found in groups.items()]


def fold(names: Iterable[str], most: int = 20) -> list[str]:
    """Names that differ only in block numbers as one, such as "blocks.*.attn.qkv.bias (12)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    folded = [found[0] if len(found) == 1 else f"{group} ({len(found)})" for group, found in groups.items()]
    return folded if len(folded) <= most else [*folded[:most], f"and {len(folded) - most} more"]


class CheckpointError(ValueError, RuntimeError):
    """The checkpoint does not fit the model. ``report`` has the details."""

    def __init__(self, report: LoadReport, name: str = "the checkpoint") -> None:
        super().__init__(f"load_checkpoint: {name} does not fit the model (strict=False loads what does)\n{report}")
        self.report = report


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any] | Source,
    *,
    strict: bool = True,
    allow: Sequence[str] = (),
    name: str | None = None,
    grid: Sequence[int] | None = None,
) -> LoadReport:
    """Load weights of any recognised layout into a pyvit model, in place.

    Position embeddings, relative-position biases and patch projections of another size, and patch projections of
    another number of channels, are resampled. A ViT loads the image tower of a CLIP.

    Args:
        model: a model of :mod:`pyvit.models`, possibly compiled or wrapped for distributed training.
        source: a file of ``torch.save`` (no code from it is executed), ``.safetensors``, or one of OpenAI's TorchScript
            archives; a folder of ``pyvit train``, transformers, timm or open_clip, whose configuration is read too; or
            a state dict, wrapped or not.
        strict: raise :class:`CheckpointError` if anything is missing, unexpected, of another shape or not finite, or if
            the file's configuration has another number of heads, activation or stride than the model. The model is then
            unchanged.
        allow: regular expressions of model keys that may be missing, unexpected or mismatched (``("head\\..*",)`` for
            fine-tuning), or of settings that may differ (``".*num_heads"``).
        name: the layout, if it should not be recognised from the keys (see :func:`formats`).
        grid: rows and columns of the checkpoint's position embeddings, if neither the file nor its configuration says;
            by default square.

    Returns a report of every key that was not simply copied.

    Raises ValueError for a file that is not a checkpoint or has other objects instead of tensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module, got {type(model).__name__}")
    while (
        inner := getattr(model, "_orig_mod", None) or (model.module if isinstance(model, _WRAPPED) else None)
    ) is not None:
        model = inner
    target = model.state_dict()
    if any(v.is_meta for v in target.values()):
        raise ValueError(
            "load_checkpoint: model is on the meta device, which holds no weights: model.to_empty(device='cpu') first"
        )
    opened = source if isinstance(source, Source) else open_source(source, target.keys())
    found = recognise(opened.state) if name is None else _format(name)
    native, unknown, unused = to_native(opened.state, found)
    metadata = {**opened.metadata, **({} if opened.metadata else metadata_of_config(opened.config, native))}
    native, metadata, other = _tower(native, metadata, target)
    if grid is not None:
        metadata |= {
            path: {**metadata.get(path, {}), "grid": list(grid)}
            for path, held in describe(model).items()
            if "grid" in held
        }
    report = LoadReport(found.name, unused=unused + other)
    if opened.wrapper:
        report.notes.append(f"weights taken from {opened.wrapper!r}")
    square = not (opened.plain and found is NATIVE)
    report.adapted, unfit = adapt(
        model, native, target, {path.replace("\\", ""): f for path, f in metadata.items()}, square
    )
    skipped = [re.compile(p) for p in (*found.extra, *found.drop)]
    if "dist_token" not in target and any(note.endswith("left out") for note in report.adapted):
        skipped.append(re.compile("dist_token"))
    chosen: dict[str, Tensor] = {}
    failed = {entry.split()[0]: entry for entry in unfit}
    for key, value in native.items():
        if key not in target:
            (report.unused if any(p.fullmatch(key) for p in skipped) else unknown).append(key)
        elif key in failed:
            report.mismatched.append(failed[key])
        elif value.shape != target[key].shape:
            report.mismatched.append(f"{key} {tuple(value.shape)} for {tuple(target[key].shape)}")
        elif value.is_floating_point() != target[key].is_floating_point():
            report.mismatched.append(f"{key} {value.dtype} for {target[key].dtype}")
        elif value.is_meta or not _finite(value):
            report.not_finite.append(f"{key} (on the meta device)" if value.is_meta else key)
        else:
            chosen[key] = value
            report.loaded.append(key)
    report.unexpected = unknown
    bad = {entry.split()[0] for entry in (*report.mismatched, *report.not_finite)}
    report.missing = [key for key in target if key not in chosen and key not in bad]
    settings = _settings(model, metadata, report, any(key.startswith(("head.", "head_dist.", "fc.")) for key in chosen))
    if found.name in ("OpenAI CLIP", "open_clip") and not any("activation" in f for f in metadata.values()):
        report.notes.append(
            "the file does not say whether its activation is quick_gelu (OpenAI's) or gelu; the model's is kept"
        )
    allowed = [re.compile(p) for p in (*allow, *_OPTIONAL)]
    wrong = [
        k.split()[0]
        for k in (*report.missing, *report.unexpected, *report.mismatched, *report.not_finite, *report.differs)
    ]
    if (strict and any(not any(p.fullmatch(k) for p in allowed) for k in wrong)) or not chosen:
        raise CheckpointError(report, opened.name)
    model.load_state_dict(chosen, strict=False)
    for path, end in settings.items():
        model.get_submodule(path).eot = end  # type: ignore[assignment]
    return report


def _finite(value: Tensor) -> bool:
    """Whether all entries are finite. Checks their float64 sum, which takes a third of the time of isfinite."""
    if not value.is_floating_point():
        return True
    return math.isfinite((value.float() if value.element_size() == 1 else value).sum(dtype=torch.float64).item())


def _settings(model: nn.Module, metadata: Metadata, report: LoadReport, head: bool) -> dict[str, int]:
    """Compare the file's metadata with the model and add the differences to ``report``. Returns the end tokens that
    text towers take from the file."""
    taken: dict[str, int] = {}
    noted: dict[str, None] = {}
    for path, setting, theirs, ours in compare(metadata, describe(model)):
        entry = f"{path + '.' if path else ''}{setting} {theirs!r} in the file, {ours!r} in the model"
        if setting in _RESAMPLED or (setting == "global_pool" and not head):
            continue
        if setting in _NOTED:
            noted[f"{setting} {theirs!r} in the file, {ours!r} in the model"] = None
        elif setting == "eot" and ours is None:
            taken[path] = theirs
            report.notes.append(f"{path}.eot {theirs}, the end token that the file names")
        elif setting == "eot" and theirs is None and ours == model.get_submodule(path).vocab_size - 1:
            continue
        else:
            report.differs.append(entry)
    report.notes += noted
    return taken


def _tower(
    native: dict[str, Tensor], metadata: Metadata, target: Collection[str]
) -> tuple[dict[str, Tensor], Metadata, list[str]]:
    """The keys of a CLIP checkpoint that a single-tower model loads, and the other tower's keys."""
    if not any(k.startswith("visual.") for k in native) or any(k.startswith(("visual.", "text.")) for k in target):
        return native, metadata, []
    tower = "text." if "token_embedding.weight" in target else "visual."
    chosen = {k.removeprefix(tower): v for k, v in native.items() if k.startswith(tower)}
    if "head.bias" in target or not any(k.startswith("head.") for k in target):
        chosen.pop("head.weight", None)  # the projection into the common space is not a classifier
    other = [k for k in native if k.removeprefix(tower) not in chosen or not k.startswith(tower)]
    cut = re.compile(re.escape(tower[:-1]) + r"(\\?\.|$)")
    return chosen, {cut.sub("", path, count=1): f for path, f in metadata.items() if cut.match(path)}, other


def formats() -> list[str]:
    """Names of the recognised layouts."""
    return [f.name for f in FORMATS]


def _format(name: str) -> Format:
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"checkpoint format must be one of {', '.join(formats())}, got {name!r}")


def recognise(state: Mapping[str, Tensor]) -> Format:
    """The layout of a state dict, from its keys."""
    for candidate in FORMATS:
        marks = [pattern(mark, candidate.bases) for mark in candidate.marks]
        dims = [(pattern(key, candidate.bases), n) for key, n in candidate.dims]
        if all(any(mark.fullmatch(k) for k in state) for mark in marks) and all(
            value.dim() == n for key, n in dims for k, value in state.items() if key.fullmatch(k)
        ):
            return candidate
    return NATIVE


def to_native(state: Mapping[str, Tensor], layout: Format) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The native state dict, the keys that no rule knows, and the keys that are skipped."""
    dropped = [re.compile(p) for p in layout.drop]
    unused = [k for k in state if any(p.fullmatch(k) for p in dropped)]
    left = {k: v for k, v in state.items() if k not in set(unused)}
    if not layout.rules:
        return left, [], unused
    native: dict[str, Tensor] = {}
    left = number_blocks(left, layout)
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
    """Convert a native state dict to the layout ``name`` of :func:`formats`, as ``pyvit convert`` does.

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
    return number_stages(found, layout, base)
