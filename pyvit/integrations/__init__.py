"""Models of other libraries on pyvit's kernels: :func:`accelerate` replaces forwards in place, per instance;
:func:`restore` undoes it.

Each library has a module here with a table RULES: a class's full name -> a function that says what to replace in an
instance. Classes are known by name, so that no library needs to be imported.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvit.integrations import originals
from pyvit.integrations.common import Rule
from pyvit.integrations.forwards import Forward, Left, Reason, Replacement, forwards, kind, put, take_away
from pyvit.integrations.functional import calls_sdpa, sdpa
from pyvit.integrations.multihead import MultiheadAttention
from pyvit.integrations.token_merging import installed as merging_of
from pyvit.integrations.token_merging import replacements as merging_in
from pyvit.integrations.unknown import unknown_attention

__all__ = ["AccelerateError", "Report", "Row", "accelerate", "restore"]

_LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")


class AccelerateError(RuntimeError):
    """``accelerate(model, strict=True)`` cannot replace everything. The message gives every reason; the model is
    unchanged."""


class Row(NamedTuple):
    """A module: its path, its class, and what runs it now or why it was not replaced."""

    path: str
    kind: str
    note: str
    #: Not replaced because the user's own code (a subclass, a patch, a hook) must run.
    users: bool = False


class Report:
    """Result of :func:`accelerate`: ``replaced`` and ``left``, lists of :class:`Row`. As a context manager it restores
    the model at the end."""

    def __init__(self, model: nn.Module, replaced: list[Row], left: list[Row]) -> None:
        self.model, self.replaced, self.left = model, replaced, left
        self.found: list[Forward] = []

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        if not self.replaced:
            lines.append(
                f"nothing in {kind(self.model)} is a module of {', '.join(_LIBRARIES)} or torch that pyvit replaces"
            )
        for title, rows in (("replaced", self.replaced), ("left", self.left)):
            first: dict[tuple[str, str], str] = {}
            counts = Counter((row.kind, row.note) for row in rows)
            for row in rows:
                first.setdefault((row.kind, row.note), row.path or "(the model)")
            for (what, note), count in counts.items():
                lines.append(
                    f"  {title} {count} x {what.rpartition('.')[2]} "
                    f"({first[what, note]}{', ...' if count > 1 else ''}): {note}"
                )
        return "\n".join(lines)

    def refresh(self) -> Report:
        """A new report about the model's current state: patches, subclasses, other layers and hooks may have been added
        since :func:`accelerate`."""
        found = {(id(forward.module), forward.method): forward for forward in forwards(self.model)}
        return _examine(self.model, found, merging_of(forward.item for forward in found.values()))

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        restore(self.model)


def accelerate(model: nn.Module, *, strict: bool = False, token_merging: int | Sequence[int] | None = None) -> Report:
    """Replace attention, windows, patch embeddings, MLPs and layer norms of timm, transformers, torchvision or
    open_clip models by pyvit's operators.

    Works in place and per instance. Parameters and buffers keep their names and identities; outputs and gradients agree
    up to rounding (dropout draws other numbers). Training, autocast, ``torch.compile``, ``copy.deepcopy`` and
    ``pickle`` work. Call it after loading weights and adding adapters, and before ``torch.compile`` and wrappers for
    distributed training.

    The original forward runs if a replacement cannot serve a call (attention probabilities requested, an unusual mask,
    a device without kernels) or would bypass hooks, patches or subclasses, added before or after.

    Args:
        model: any module; unknown classes are not changed.
        strict: raise if a known module, or any attention, cannot be replaced for another reason than the user's own
            code (subclasses, patches, hooks), or if nothing is replaced.
        token_merging: merge this many tokens in each block (or one number for each block) of the vision transformers
            of timm or pyvit in ``model``, see :class:`pyvit.nn.TokenMerging`. The outputs change. ``forward_features``
            still returns all tokens: those that were merged are equal.

    Returns a :class:`Report`; ``print`` it. ``with pyvit.accelerate(model):`` restores at the end.

    Raises TypeError if ``model`` is not a module, ValueError if ``token_merging`` does not fit it, and with ``strict``
    :class:`AccelerateError` with every reason; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    merged = [] if token_merging is None else merging_in(model, token_merging)
    _take_away(model)
    report = _examine(model, merged=merged)
    if strict and (not report.replaced or not all(row.users for row in report.left)):
        raise AccelerateError(f"accelerate: strict, and not everything can be replaced\n{report}")
    for forward in report.found:
        put(forward)
    return report


def _examine(
    model: nn.Module,
    installed: dict[tuple[int, str], Forward] | None = None,
    merged: Sequence[Replacement] = (),
) -> Report:
    """What can be replaced in ``model``, by the rules and by ``merged``; or with ``installed``, a map of module
    identity and method to replacement, which replacements are active."""
    originals.renew()
    report = Report(model, [], [])
    left: list[tuple[str, Left]] = []
    paths = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        items = rule(module) if (rule := _rule_of(module)) is not None else ()
        for item in (*items, *(item for item in merged if item.module is module)):
            if isinstance(item, Left):
                left.append((paths.get(id(item.module), ""), item))
                continue
            forward = Forward(item) if installed is None else installed.get((id(item.module), item.method))
            reason = Reason("not replaced") if forward is None else forward.reason(_known)
            if (
                forward is not None
                and reason is None
                and installed is not None
                and (changed := forward.changed()) is not None
            ):
                reason = Reason(changed, True)
            if forward is None or reason is not None:
                if not item.optional and reason is not None:
                    left.append((paths[id(item.module)], Left(item.module, *reason)))
                continue
            report.found.append(forward)
            report.replaced.append(Row(paths[id(item.module)], kind(item.module), item.by))
            if not item.optional and (note := forward.seen()) is not None:
                report.left.append(Row(paths[id(item.module)], kind(item.module), note, True))
    replaced = [forward.module for forward in report.found if not forward.item.optional]
    left += [
        (path, item._replace(users=_overrides(type(item.module))))
        for path, item in unknown_attention(model, [*replaced, *(item.module for _, item in left)])
    ]
    served = {*map(id, replaced)}
    report.left += [
        Row(path, kind(item.module), item.reason, item.users) for path, item in left if id(item.module) not in served
    ]
    return report


def is_accelerated(model: nn.Module) -> bool:
    """Whether any module of ``model`` runs a replacement of :func:`accelerate`."""
    return bool(forwards(model))


def replacements(model: nn.Module) -> list[Forward]:
    """What :func:`accelerate` has put into the modules of ``model``."""
    return forwards(model)


def examine(model: nn.Module) -> Report:
    """What :func:`accelerate` would do, or if it has been called, :meth:`Report.refresh`."""
    return Report(model, [], []).refresh() if forwards(model) else _examine(model)


def example_inputs(model: nn.Module, batch: int) -> Tensor | None:
    """Zeros of the shape of the images or spectrograms that a model of timm, transformers or torchvision takes, None
    where it does not say."""
    config, parameter = getattr(model, "config", None), next(model.parameters(), None)
    embedding = getattr(model, "patch_embed", None)
    shape: Any = None
    if getattr(model, "main_input_name", "") == "pixel_values":
        shape = (getattr(config, "num_channels", 3), *_pair(getattr(config, "image_size", None)))
    elif getattr(model, "main_input_name", "") == "input_values":
        shape = (getattr(config, "max_length", None), getattr(config, "num_mel_bins", None))
    elif isinstance(getattr(embedding, "proj", None), nn.Conv2d):
        shape = (embedding.proj.in_channels, *_pair(getattr(embedding, "img_size", None)))  # type: ignore[union-attr]
    elif isinstance(getattr(model, "conv_proj", None), nn.Conv2d):
        shape = (model.conv_proj.in_channels, *_pair(getattr(model, "image_size", None)))  # type: ignore[union-attr]
    if parameter is None or shape is None or not all(isinstance(n, int) and n > 0 for n in shape):
        return None
    return torch.zeros(batch, *shape, dtype=parameter.dtype)


def _pair(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module of ``model``, which may be a copy, runs its class's methods again.

    Wrappers that other libraries put around a replaced forward stay and call the class's own.

    Raises RuntimeError if one of those reads the weights of layers that :func:`pyvit.quantize` has replaced.
    """
    for forward in forwards(model):
        if forward.item.reads_weights:
            forward.refuse_int8()
    _take_away(model)


def _take_away(model: nn.Module) -> None:
    for module in model.modules():
        take_away(module)
        if isinstance(module, MultiheadAttention):
            take_away(module.original[0])


def _known(name: str) -> bool:
    return _rule(name) is not None


def _overrides(cls: type) -> bool:
    """Whether a class is a user's subclass of a class that pyvit knows."""
    if cls.__module__.partition(".")[0] in (*_LIBRARIES, "torch"):
        return False
    return any(_known(f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__[1:])


def _rule_of(module: nn.Module) -> Rule | None:
    rule = _rule(kind(module))
    if rule is not None or type(module).__module__.partition(".")[0] in ("torch", "pyvit"):
        return rule
    if calls_sdpa(type(module)):
        return sdpa
    if type(module).__module__.startswith("transformers."):
        library = importlib.import_module(f"{__name__}.transformers")
        return library.interface if library.calls_interface(type(module)) else None
    return None


def _rule(name: str) -> Rule | None:
    library = name.partition(".")[0]
    if library not in (*_LIBRARIES, "torch"):
        return None
    rules = importlib.import_module(f"{__name__}.{'common' if library == 'torch' else library}").RULES
    return rules.get(name)
