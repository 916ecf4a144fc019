"""Other libraries' models on pyvit's kernels: :func:`accelerate` replaces forwards in place, per instance;
:func:`restore` undoes it.

Each library has a module here with one table, RULES: a class's full name -> a function that says what to replace in an
instance of it. Classes are known by name, so that nothing is imported that the model at hand has not imported.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import NamedTuple

from torch import nn

from pyvit.integrations import originals
from pyvit.integrations.common import Rule
from pyvit.integrations.forwards import Forward, Left, Reason, forwards, kind, put, take_away
from pyvit.integrations.functional import calls_sdpa, sdpa
from pyvit.integrations.unknown import unknown_attention

__all__ = ["AccelerateError", "Report", "Row", "accelerate", "restore"]

_LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")


class AccelerateError(RuntimeError):
    """``accelerate(model, strict=True)`` would have left something; the message carries every reason. The model is as
    it was."""


class Row(NamedTuple):
    """One module: where it is, its class, and what serves it now or why nothing does."""

    path: str
    kind: str
    note: str
    #: Of what was left: because the user's own code is there (a subclass, a patch, a hook), and runs.
    users: bool = False


class Report:
    """What :func:`accelerate` did: ``replaced`` and ``left``, lists of :class:`Row`. As a context manager it restores
    at the end."""

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
        """What serves the model now: patches, subclasses, other layers and hooks may have come after
        :func:`accelerate`."""
        return _examine(self.model, {(id(forward.module), forward.method): forward for forward in forwards(self.model)})

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        restore(self.model)


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Put attention, windows, patch embeddings, MLPs and layer norms of timm, transformers, torchvision or open_clip
    models on pyvit's ops.

    In place and per instance: the same parameters and buffers under the same names, the same outputs and gradients up
    to rounding (dropout draws other numbers), training and evaluation, autocast, ``torch.compile``, ``copy.deepcopy``
    and ``pickle``. Call it after weights are loaded and adapters are put in, before ``torch.compile`` and wrappers for
    distributed training. A call that a replacement cannot serve (attention probabilities asked for, an unusual mask, a
    device without kernels), or must not (hooks, patches or subclasses where the library's own code would be bypassed,
    put there before or after), runs the original forward.

    Args:
        model: any module; classes that pyvit does not know are not touched.
        strict: raise where a module that pyvit knows, or any attention, is left for another reason than the user's own
            code (subclasses, patches, hooks, which run), or where nothing is replaced.

    Returns a :class:`Report`; ``print`` it. ``with pyvit.accelerate(model):`` restores at the end.

    Raises TypeError if ``model`` is no module, :class:`AccelerateError` with every reason under ``strict``, the model
    as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    restore(model)
    report = _examine(model)
    if strict and (not report.replaced or not all(row.users for row in report.left)):
        raise AccelerateError(f"accelerate: strict, and not everything can be replaced\n{report}")
    for forward in report.found:
        put(forward)
    return report


def _examine(model: nn.Module, installed: dict[tuple[int, str], Forward] | None = None) -> Report:
    """What can be replaced in ``model``, or what serves of that which was ``installed``, by identity of the module and
    by method."""
    originals.renew()
    report = Report(model, [], [])
    left: list[tuple[str, Left]] = []
    paths = {id(module): path for path, module in model.named_modules()}
    for module in model.modules():
        for item in rule(module) if (rule := _rule_of(module)) is not None else ():
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


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module of ``model``, which may be a copy, runs its class's methods again.

    What another library wrapped around a replaced forward stays, and reaches the class's own.
    """
    for module in model.modules():
        take_away(module)


def _known(name: str) -> bool:
    return _rule(name) is not None


def _overrides(cls: type) -> bool:
    """Whether a class is a user's own, derived from one that pyvit knows."""
    if cls.__module__.partition(".")[0] in (*_LIBRARIES, "torch"):
        return False
    return any(_known(f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__[1:])


def _rule_of(module: nn.Module) -> Rule | None:
    rule = _rule(kind(module))
    if rule is not None or type(module).__module__.partition(".")[0] in ("torch", "pyvit"):
        return rule
    return sdpa if calls_sdpa(type(module)) else None


def _rule(name: str) -> Rule | None:
    library = name.partition(".")[0]
    if library not in (*_LIBRARIES, "torch"):
        return None
    rules = importlib.import_module(f"{__name__}.{'common' if library == 'torch' else library}").RULES
    return rules.get(name)
