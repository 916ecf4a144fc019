"""The model of a run, and the weights that ``--init`` names."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pyvit.data import Data
from pyvit.models.checkpoints import CheckpointError, LoadReport, load_checkpoint, open_source
from pyvit.models.encoders import image_encoder, parameters
from pyvit.models.infer import infer, registered_model, structure
from pyvit.models.registry import create_model, list_models, settings_of
from pyvit.models.vit import VisionTransformer
from pyvit.train.config import Config
from pyvit.train.log import say
from pyvit.train.options import parse

#: Keys that may differ from the weights of ``--init``: heads, their pooling and norm, and modules of pre-training only.
HEADS = (r"head(_dist)?\..*", r"fc\..*", r"fc_norm\..*", r"attn_pool\..*", r"mask_token", r"decoder_.*")


def check_model(recipe: Any, config: Config) -> None:
    """Refuse a model that the recipe cannot train, or settings that it does not have, before data is read. Raises
    ValueError."""
    if (recipe.needs_init and config.init is None) or (config.init is not None and not config.init.strip()):
        raise ValueError(
            f"{config.recipe}: init must name {recipe.needs_init or 'a run or a checkpoint'}, got {config.init!r}"
        )
    name = config.model or ""
    settings_of(name)
    if not recipe.fits(name):
        raise ValueError(
            f"{config.recipe}: model must be {recipe.models}, one of {', '.join(_families(recipe))}; got {name}"
        )
    chosen = parse(config.set, "set")
    found = image_encoder(name, chosen) if recipe.image_models else None
    known = set(parameters(found.constructor if found is not None else settings_of(name)[0]))
    changed = found.changed if found is not None else chosen
    if unknown := sorted(changed.keys() - known - set(recipe.extra_settings)):
        raise ValueError(
            f"{config.recipe}: set must name settings of {name} ({', '.join(sorted(known))}), got {', '.join(unknown)}"
        )


def _families(recipe: Any) -> list[str]:
    """The models that a recipe can train, by the first part of their names: "vit_*", or "some deit_*" if not
    all fit."""
    found: dict[str, list[bool]] = {}
    for name in list_models():
        found.setdefault(name.partition("_")[0] + "_*" if "_" in name else name, []).append(recipe.fits(name))
    return [family if all(fits) else f"some {family}" for family, fits in found.items() if any(fits)]


def build(name: str, data: Data, config: Config, whole: bool = False, **settings: Any) -> nn.Module:
    """Create the model of a run.

    Settings, in increasing priority: those registered for ``name``, the recipe's ``settings`` that the constructor has,
    and ``--set``. Image size and channels are the data's.

    The result is the image encoder of the model (see :func:`pyvit.models.encoders.image_encoder`), or with ``whole``
    the model itself.
    """
    constructor, registered = settings_of(name)
    changed = parse(config.set, "set")
    if not whole:
        found = image_encoder(name, changed)
        if found is None:
            raise ValueError(f"{config.recipe}: model must have an image encoder, {name} has none")
        constructor, registered, changed = found
    known = set(parameters(constructor))
    if data.sound and (whole or "in_chans" not in known):
        raise ValueError(
            f"{config.recipe}: model must take spectrograms of one channel (ast_*, vit_*, swin_*), {name} does not"
        )
    wanted = {"img_size": data.size, "in_chans": data.channels, **settings}
    if constructor is not settings_of(name)[0]:
        model = constructor(**{**registered, **{k: v for k, v in wanted.items() if k in known}, **changed})
    else:
        model = create_model(name, **{**{k: v for k, v in wanted.items() if k in known}, **changed})
    if config.checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"checkpointing: {name} does not support it")
        model.set_grad_checkpointing()
    return model


def inherit(config: Config, recipe: Any) -> Config:
    """``config`` with the model, image size and model settings of the run that ``--init`` names, or the model that fits
    the checkpoint that it names, where they are not given."""
    if config.init is None:
        return config
    before = _run_of(Path(config.init).expanduser())
    if before is not None:
        config = config.resolved({"model": before["model"], "image_size": before["image_size"]})
        if config.model == before["model"]:
            given, theirs = parse(config.set, "set"), parse(before["set"], "set")
            found = image_encoder(before["model"], theirs) if recipe.image_models else None
            known = (
                set(parameters(found.constructor)) | set(recipe.extra_settings) if found is not None else theirs.keys()
            )
            kept = (k for k in theirs if k not in given and (found is None or k not in found.changed or k in known))
            config = dataclasses.replace(config, set=[*(f"{k}={theirs[k]!r}" for k in kept), *config.set])
    elif config.model is None and config.init.strip() and recipe.image_models:
        name, differ, _ = registered_model(open_source(config.init))
        given = parse(config.set, "set")
        kept = [f"{k}={v!r}" for k, v in differ.items() if k not in given]
        _say(f"init: {config.init}: the model is {name}" + (f" with {', '.join(kept)}" if kept else ""))
        config = dataclasses.replace(config, model=name, set=[*kept, *config.set])
    return config


def adopt(config: Config, recipe: Any) -> Config:
    """``config`` with the model settings that the weights of ``--init`` show, as entries of ``set``.

    These are settings that a model needs to load the weights: LayerScale, registers, gated MLPs, biases, norms,
    pooling, which is the mean of the patches for a masked autoencoder if the recipe ``averages_patches``. Given
    settings and those that the recipe fixes have priority.
    """
    if config.init is None or not recipe.image_models:
        return config
    found = image_encoder(config.model or "", parse(config.set, "set"))
    if found is None or not issubclass(found.constructor, VisionTransformer):
        return config
    source = open_source(config.init)
    shown = structure(source)
    if recipe.averages_patches and any("decoder_pred." in key for key in source.state):
        shown["global_pool"] = "avg"
    constructors = [c for c in inspect.getmro(found.constructor) if c is not nn.Module and "__init__" in vars(c)]
    defaults = {p.name: p.default for c in constructors for p in inspect.signature(c.__init__).parameters.values()}
    given = {*found.settings, *found.changed, *recipe.fixed_settings}
    taken = {k: v for k, v in shown.items() if k in defaults and k not in given and v != defaults[k]}
    if taken:
        _say(
            f"init: {config.init}: settings of the model taken from the weights: "
            f"{', '.join(f'{k}={v}' for k, v in taken.items())}"
        )
    return dataclasses.replace(config, set=[*(f"{k}={v!r}" for k, v in taken.items()), *config.set])


def _run_of(path: Path) -> dict[str, Any] | None:
    """The configuration of the ``pyvit train`` run in a folder, or of the run that a weights file belongs to; None
    otherwise."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        found = json.loads(file.read_text())
    except OSError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    fields = {"recipe", "model", "image_size", "set"}
    if (
        not isinstance(found, dict)
        or not fields <= found.keys()
        or (path.is_file() and path.name not in ("model.safetensors", "last.pt"))
    ):
        return None
    return found


def initialise(model: nn.Module, init: str, allow: Sequence[str] = ()) -> LoadReport | None:
    """Load the weights of ``init`` into ``model`` and print what was done.

    ``init`` is a run's folder or anything :func:`load_checkpoint` reads; with "" nothing is loaded and None is
    returned. Heads may differ, and keys that match ``allow``. A CLIP model loads the weights of an image model into its
    image tower.

    The report lists what was loaded, resampled, left at its initial value and not used. Raises ValueError, with the
    names that differ, if the weights are of another model or the file has no weights.
    """
    if not init:
        return None
    source = open_source(init, model.state_dict().keys())
    target, note = model, ""
    two = hasattr(model, "visual")
    if two and not any(
        k.startswith(("text", "visual", "vision_model", "token_embedding", "logit")) for k in source.state
    ):
        target, two, note = model.visual, False, "\n  the text tower keeps its initial values"  # type: ignore[assignment]
        source = open_source(init, target.state_dict().keys())
    if "norm.running_mean" in source.state:  # a linear probe: drop its batch norm and classifier
        for key in [
            k for k in source.state if re.fullmatch(r"norm\.(running_(mean|var)|num_batches_tracked)|head\..*", k)
        ]:
            del source.state[key]
        note += "\n  the probe's classifier is not used"
    unused = (r"norm\..*",) if isinstance(getattr(target, "norm", None), nn.Identity) else ()  # fc_norm takes its place
    try:
        report = load_checkpoint(target, source, allow=allow if two else (*HEADS, *unused, *allow))
    except CheckpointError as error:
        raise ValueError(
            f"init: {init} does not fit {type(target).__name__}; it holds {_held(source)}\n{error.report}"
        ) from error
    _say(f"init: {init}: {report.summary()}{note}")
    return report


def _held(source: Any) -> str:
    """The architecture of a checkpoint, as text."""
    from pyvit.models.checkpoints import recognise, to_native

    try:
        constructor, settings = infer(to_native(source.state, recognise(source.state))[0])
    except (ValueError, KeyError, IndexError):
        return "another kind of model"
    names = (
        "patch_size",
        "in_chans",
        "embed_dim",
        "width",
        "depth",
        "depths",
        "num_classes",
        "reg_tokens",
        "init_values",
        "activation",
    )
    return f"{constructor.__name__}: " + ", ".join(f"{k}={settings[k]}" for k in names if settings.get(k) is not None)


def _say(line: str) -> None:
    """Print a line on the first process."""
    if os.environ.get("RANK", "0") == "0":
        say(line)
