"""Options and settings of every recipe: defaults are valid, values out of range are refused by name."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import pyvit
from pyvit.train import RECIPES, Config
from pyvit.train.engine import resolve_config
from pyvit.train.options import Option, inside, wording
from pyvit.train.presets import PRESETS
from pyvit.train.recipe import load_recipe

OPTIONS = [(recipe, name) for recipe in RECIPES for name in load_recipe(recipe).options]
NEED_INIT = ("finetune", "linear")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Initial weights for the recipes that need some."""
    path = tmp_path_factory.mktemp("init") / "weights.pth"
    torch.save(pyvit.create_model("vit_small_patch16_224", depth=1, embed_dim=48, num_heads=3).state_dict(), path)
    return dict.fromkeys(NEED_INIT, str(path))


def wrong(kind: type, within: str, choices: tuple) -> list:
    """Values that an option must refuse."""
    if choices:
        return ["nonsense", 1, None]
    if kind is bool:
        return [1, "yes", None]
    if kind is str:
        return [1, None]
    low, high = (float(side) for side in within[1:-1].split(","))
    below = low - 1 if within[0] == "[" else low
    above = [] if math.isinf(high) else [high + 1 if within[-1] == "]" else high]
    values = [int(v) if kind is int else v for v in (below, *above)]
    return [*values, *([1.5] if kind is int else []), float("nan"), float("inf"), -float("inf"), True, "x", None]


def test_every_number_has_a_range():
    for recipe, name in OPTIONS:
        option = load_recipe(recipe).options[name]
        assert option.help
        assert bool(option.within) == (type(option.default) in (int, float)), (recipe, name)
        option.check(name, option.default)
    for field in dataclasses.fields(Config):
        if field.name != "recipe":
            assert bool(field.metadata["within"]) == (str(field.type).split(" ")[0] in ("int", "float")), field.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_out_of_range_are_refused_by_name(recipe, init):
    for name, option in load_recipe(recipe).options.items():
        for value in wrong(type(option.default), option.within, option.choices):
            config = Config(recipe=recipe, option=[f"{name}={value!r}"], init=init.get(recipe))
            with pytest.raises(ValueError, match=f"{recipe}: option {name} must be "):
                resolve_config(config)


@pytest.mark.parametrize(
    "field", [f for f in dataclasses.fields(Config) if f.metadata.get("within") or f.metadata.get("choices")]
)
def test_settings_out_of_range_are_refused_by_name(field):
    kind = {"int": int, "float": float, "str": str}[str(field.type).split(" ")[0]]
    for value in wrong(kind, field.metadata["within"], field.metadata["choices"]):
        if value is not None or "None" not in str(field.type):
            with pytest.raises(ValueError, match=f"^{field.name} must be "):
                resolve_config(Config(**{field.name: value}))


def test_presets_are_in_range(init):
    for recipe, data in PRESETS:
        resolve_config(Config(recipe=recipe, data=data, init=init.get(recipe)))


def test_the_last_rate_is_at_most_the_first():
    with pytest.raises(ValueError, match=r"min_lr must be at most lr, 0\.001, got 0\.1"):
        resolve_config(Config(lr=1e-3, min_lr=0.1))


def test_intervals():
    assert [inside(v, "(0, 1]") for v in (0, 0.5, 1, 2, math.nan)] == [False, True, True, False, False]
    assert not inside(math.inf, "[0, inf)")
    assert [wording(w) for w in ("[1, inf)", "(0, inf)", "[0, 1)")] == ["at least 1", "above 0", "in [0, 1)"]
    assert Option(3, "blocks", "[0, inf)").describe("depth") == "depth=3: blocks, at least 0"
