"""Loading a finished run for evaluation: network, preprocessing and data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from pyvit.data import Data, load_data
from pyvit.data.description import from_description, locate


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
