"""A finished run, loaded again: its network, its data, its preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pyvit.data import Data, load_data


def load_run(folder: str | Path, data: str | None = None) -> tuple[Any, Data]:
    """The recipe of the run in ``folder`` with its trained weights, in evaluation mode, and its data, or the set named by ``data``."""
    from pyvit.train import Config
    from pyvit.train.recipe import load_recipe

    folder = Path(folder)
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"run: {folder} must hold config.json and model.safetensors, as a finished 'pyvit train' leaves them")
    from safetensors.torch import load_file

    config = Config(**json.loads((folder / "config.json").read_text()))
    own = load_data(config.data, config.image_size, config.validation)
    torch.manual_seed(config.seed)
    recipe = load_recipe(config.recipe)(config, own)
    recipe.exported().load_state_dict(load_file(str(folder / "model.safetensors")))
    return recipe.eval(), load_data(data, config.image_size) if data is not None else own
