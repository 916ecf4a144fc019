"""The registry of models: names, constructors and settings."""

from __future__ import annotations

import difflib
import fnmatch
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

#: name -> (constructor, settings)
REGISTRY: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}


def register(name: str, constructor: Callable[..., nn.Module], **settings: Any) -> None:
    """Let ``create_model(name, **overrides)`` call ``constructor(**settings, **overrides)``. Overrides have
    priority."""
    if name in REGISTRY:
        raise ValueError(f"register: {name!r} is already a model")
    REGISTRY[name] = (constructor, settings)


def settings_of(name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Constructor and settings of a registered model. Raises ValueError, with the most similar names, for an unknown
    one."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see pyvit.list_models()"
        raise ValueError(f"create_model: name must be a registered model, got {name!r}; {hint}")
    constructor, settings = REGISTRY[name]
    return constructor, dict(settings)


def create_model(
    name: str, *, checkpoint: str | os.PathLike[str] | Mapping[str, Tensor] | None = None, **overrides: Any
) -> nn.Module:
    """Create a registered model in training mode, with new weights or with those of ``checkpoint``.

    Args:
        name: one of :func:`list_models`; names follow timm.
        checkpoint: a file or state dict for :func:`pyvit.load_checkpoint`. If ``num_classes`` is given, a head of
            another size keeps its initial weights, with a warning.
        overrides: arguments of the constructor, such as ``num_classes``, ``img_size``, ``patch_size``, ``embed_dim``,
            ``depth``, ``drop_path_rate``.

    Raises ValueError for an unknown name and TypeError for an argument that the constructor does not have.
    """
    constructor, settings = settings_of(name)
    model = constructor(**{**settings, **overrides})
    if checkpoint is not None:
        from pyvit.models.checkpoints import load_checkpoint

        report = load_checkpoint(model, checkpoint, allow=(r"head.*",) if "num_classes" in overrides else ())
        if report.missing or report.unexpected or report.mismatched:
            warnings.warn(f"create_model({name!r}): {report}", stacklevel=2)
    return model


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the registered models, sorted; with ``pattern``, those that match the wildcard (``"swin*"``)."""
    names = sorted(REGISTRY)
    return names if pattern is None else fnmatch.filter(names, pattern)
