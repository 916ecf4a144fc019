"""Loading a finished run for evaluation: network, preprocessing and data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyvit.data import Data, load_data
from pyvit.data.decode import CENTRE
from pyvit.data.description import from_description, locate
from pyvit.models.checkpoint_files import config_beside
from pyvit.models.state_dict import open_source


def load_run(folder: str | Path, data: str | None = None) -> tuple[Any, Data]:
    """The recipe of the run in ``folder`` with its trained weights, in evaluation mode, and its data or the data named
    by ``data``.

    Only the run's folder and images are needed: the original data and ``init`` may have moved. Labels are matched to
    the run's classes by name. Raises ValueError for data that does not fit the run.
    """
    recipe, kept = load_trained(folder)
    chosen = _images(recipe.config, kept, data, recipe.data)
    return recipe, chosen.with_classes(recipe.data.classes) if recipe.classifies else chosen


def load_trained(folder: str | Path) -> tuple[Any, dict[str, Any] | None]:
    """The recipe of the run in ``folder`` with its trained weights, in evaluation mode, and what the run recorded of
    its data (data.json). Needs no images."""
    from pyvit.train.config import Config, parse
    from pyvit.train.recipe import load_recipe

    folder = Path(folder)
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"run: {folder} must hold config.json and model.safetensors, as a finished 'pyvit train' leaves them"
        )
    record = _read(folder / "config.json")
    if unknown := record.keys() - {field.name for field in dataclasses.fields(Config)}:
        raise ValueError(
            f"run: {folder / 'config.json'} has settings of another version of pyvit: {', '.join(sorted(unknown))}"
        )
    config = Config(**record)
    kept = _read(folder / "data.json") if (folder / "data.json").exists() else None
    trained_on = (
        from_description(kept)
        if kept
        else load_data(config.data, config.image_size, config.validation, config.train_images)
    )
    config = dataclasses.replace(config, init=None)  # the run's file has all weights
    if (folder / "tokenizer.json").exists():
        options = {**parse(config.option, "option"), "tokenizer": str(folder / "tokenizer.json")}
        config = dataclasses.replace(config, option=[f"{k}={v!r}" for k, v in options.items()])
    torch.manual_seed(config.seed)
    recipe = load_recipe(config.recipe)(config, trained_on)
    _load(recipe.exported(), folder / "model.safetensors")
    return recipe.eval(), kept


def _images(config: Any, kept: dict[str, Any] | None, data: str | None, trained_on: Data) -> Data:
    if data is None:
        if not kept:
            return trained_on
        try:
            return load_data(
                locate(config.data, kept["source"]), trained_on.size[1], config.validation, config.train_images
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; give the images to evaluate on with --data") from error
    chosen = load_data(data, trained_on.size[1])
    if chosen.sound != trained_on.sound:
        kinds = [("spectrograms" if each.sound else "images") for each in (trained_on, chosen)]
        raise ValueError(f"data: the run was trained on {kinds[0]}, {chosen.name} has {kinds[1]}")
    centre = (kept or {}).get("centre")
    return dataclasses.replace(chosen, train=chosen.train.centred(centre), test=chosen.test.centred(centre))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"run: {path} is damaged: {error}") from error


def _load(model: torch.nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(str(path)))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"run: {path} is damaged, or of another version of pyvit: {reason[:300]}") from error


@dataclasses.dataclass
class Network:
    """A network for inference, in evaluation mode: normalised images (B, C, H, W) to class scores (B, classes).

    ``multi_label``: an image has any number of classes, so that each score stands for itself. ``centre``: see
    :class:`pyvit.data.decode.ImageDecoder`. ``notes``: what was assumed.
    """

    model: torch.nn.Module
    name: str
    classes: list[str] | None
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    centre: float
    multi_label: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) to normalised floats."""
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (self.mean, self.std))
        return (images / 255 - mean) / std


def load_network(source: str | Path, needs_classes: bool = True) -> Network:
    """The network of a finished run's folder, or of any checkpoint whose model can be told from its weights.

    Raises ValueError if the network gives no class scores, unless ``needs_classes`` is False, and for spectrograms.
    """
    folder = Path(source).expanduser()
    folder = folder.parent if folder.name == "model.safetensors" else folder
    if folder.is_dir() and "recipe" in config_beside(folder / "model.safetensors"):
        recipe, kept = load_trained(folder)
        data = recipe.data
        if data.sound:
            raise ValueError(f"{source} was trained on spectrograms; only networks of images can be used here")
        if needs_classes and not recipe.classifies:
            raise ValueError(
                f"{source} is a run of {recipe.config.recipe}, which gives no class scores; train a classifier on it: "
                f"pyvit train finetune --init {source} (or linear)"
            )
        classes = data.classes if recipe.classifies else None
        centre = (kept or {}).get("centre") or CENTRE
        model = recipe.classifier() if recipe.classifies else recipe.encoder()
        several = bool(getattr(data, "multilabel", False))
        return Network(model.eval(), str(recipe.config.model), classes, data.size, data.mean, data.std, centre, several)
    return _from_checkpoint(str(source), needs_classes)


def _from_checkpoint(source: str, needs_classes: bool) -> Network:
    from pyvit.models.infer import model_from_checkpoint
    from pyvit.models.preprocessing import preprocessing_of

    model, report = model_from_checkpoint(source)
    prepared = preprocessing_of(open_source(source).config)
    count = int(getattr(model, "num_classes", 0) or 0)
    if needs_classes and not count:
        raise ValueError(f"{source} has no classifier; train one: pyvit train finetune --init {source} (or linear)")
    classes = prepared.classes if prepared.classes is None or len(prepared.classes) == count else None
    side = prepared.size or tuple(model.img_size)
    notes = [*report.notes, *prepared.notes]
    if count and classes is None:
        notes.append("the checkpoint does not name its classes: they are numbered")
        classes = [str(i) for i in range(count)]
    return Network(
        model.eval(), type(model).__name__, classes, side, prepared.mean, prepared.std, prepared.centre, notes=notes
    )
