"""Other libraries' models on pyvit's kernels: :func:`accelerate` replaces forwards in place, per instance; :func:`restore` undoes it.

Each library has a module here with one table, RULES: a class's full name -> a function that says what to replace in an instance of it.
Classes are known by name, so that nothing is imported that the model at hand has not imported.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import NamedTuple

from torch import nn

from pyvit.integrations import originals
from pyvit.integrations.common import Rule
from pyvit.integrations.forwards import WATCHED, Forward, Left, forwards, kind, put, take_away
from pyvit.integrations.unknown import unknown_attention

__all__ = ["AccelerateError", "Report", "Row", "accelerate", "restore"]

_LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")


class AccelerateError(RuntimeError):
    """``accelerate(model, strict=True)`` would have left something; the message carries every reason. The model is as it was."""


class Row(NamedTuple):
    """One module: where it is, its class, and what serves it now or why nothing does."""

    path: str
    kind: str
    note: str


class Report:
    """What :func:`accelerate` did: ``replaced`` and ``left``, lists of :class:`Row`. As a context manager it restores at the end."""

    def __init__(self, model: nn.Module, replaced: list[Row], left: list[Row]) -> None:
        self.model, self.replaced, self.left = model, replaced, left

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        if not self.replaced:
            lines.append(f"nothing in {kind(self.model)} is a module of {', '.join(_LIBRARIES)} or torch that pyvit replaces")
        for title, rows in (("replaced", self.replaced), ("left", self.left)):
            first: dict[tuple[str, str], str] = {}
            counts = Counter((row.kind, row.note) for row in rows)
            for row in rows:
                first.setdefault((row.kind, row.note), row.path or "(the model)")
            for (what, note), count in counts.items():
                lines.append(f"  {title} {count} x {what.rpartition('.')[2]} ({first[what, note]}{', ...' if count > 1 else ''}): {note}")
        return "\n".join(lines)

    def refresh(self) -> Report:
        """What serves the model now: patches, subclasses, other layers and hooks may have come after :func:`accelerate`."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        now = Report(self.model, [], [row for row in self.left if not row.note.startswith(WATCHED)])
        for forward in forwards(self.model):
            reason = forward.reason(_known) or forward.changed() or forward.seen()
            row = Row(paths[id(forward.module)], kind(forward.module), reason or forward.item.by)
            (now.left if reason else now.replaced).append(row)
        return now

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        restore(self.model)


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Put attention, windows, patch embeddings, MLPs and layer norms of timm, transformers, torchvision or open_clip models on pyvit's ops.

    In place and per instance: the same parameters and buffers under the same names, the same outputs and gradients up to rounding (dropout
    draws other numbers), training and evaluation, autocast, ``torch.compile``, ``copy.deepcopy`` and ``pickle``. Call it after weights are
    loaded and adapters are put in, before ``torch.compile`` and wrappers for distributed training. A call that a replacement cannot serve
    (attention probabilities asked for, hooks on a bypassed module, an unusual mask) runs the original forward.

    Args:
        model: any module; classes that pyvit does not know are not touched.
        strict: raise where an attention module was left, or nothing was replaced.

    Returns a :class:`Report`; ``print`` it. ``with pyvit.accelerate(model):`` restores at the end.

    Raises TypeError if ``model`` is no module, :class:`AccelerateError` with every reason under ``strict``, the model as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    restore(model)
    originals.renew()
    found: list[tuple[str, Forward]] = []
    left: list[tuple[str, Left]] = []
    paths = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules():
        rule = _rule(kind(module))
        if rule is None:
            continue
        for item in rule(module):
            where = paths.get(id(item.module), path)
            if isinstance(item, Left):
                left.append((where, item))
                continue
            forward = Forward(item)
            reason = forward.reason(_known)
            if reason is None:
                found.append((where, forward))
            elif not item.optional:
                left.append((where, Left(item.module, reason)))
    served = {id(forward.module) for _, forward in found}
    left += unknown_attention(model, served | {id(item.module) for _, item in left}, _known)
    watched = [(path, Left(forward.module, note)) for path, forward in found if not forward.item.optional and (note := forward.seen())]
    report = Report(
        model,
        [Row(path, kind(forward.module), forward.item.by) for path, forward in found],
        [Row(path, kind(item.module), item.reason) for path, item in left if id(item.module) not in served]
        + [Row(path, kind(item.module), item.reason) for path, item in watched],
    )
    if strict and (report.left or not report.replaced):
        raise AccelerateError(f"accelerate: strict, and not everything can be replaced\n{report}")
    for _, forward in found:
        put(forward)
    return report


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module of ``model``, which may be a copy, runs its class's methods again.

    What another library wrapped around a replaced forward stays, and reaches the class's own.
    """
    for module in model.modules():
        take_away(module)


def _known(name: str) -> bool:
    return _rule(name) is not None


def _rule(name: str) -> Rule | None:
    library = name.partition(".")[0]
    if library not in (*_LIBRARIES, "torch"):
        return None
    rules = importlib.import_module(f"{__name__}.{'common' if library == 'torch' else library}").RULES
    return rules.get(name)
