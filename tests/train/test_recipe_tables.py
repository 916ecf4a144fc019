"""The tables of docs/recipes.md have the defaults of the code."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from pyvit.eval.knn import knn_accuracy
from pyvit.train.config import Config
from pyvit.train.engine import resolve_config
from pyvit.train.recipe import load_recipe

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
SECTIONS = {
    "Supervised": "supervised",
    "Fine-tuning": "finetune",
    "Linear probe and k-NN": "linear",
    "MAE": "mae",
    "SimCLR": "simclr",
}


def tables(section):
    """(model, {setting: default as text}) of each table of a section. The model is the last one named before it."""
    text = re.search(rf"^## {section}$(.*?)(?=^## )", PAGE, re.M | re.S)[1]
    for match in re.finditer(r"((?:^(?!\|).*\n)*)((?:^\|.*\n)+)", text, re.M):
        models = re.findall(r"for `([a-z0-9_]+)`", match[1])
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in match[2].splitlines()]
        assert rows[0] == ["setting", "paper", "pyvit's default", "why it differs"]
        assert all(len(row) == 4 for row in rows)
        yield models[-1] if models else None, {row[0].strip("`"): row[2] for row in rows if row[0].startswith("`")}


def value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


CASES = [(SECTIONS[section], model, rows) for section in SECTIONS for model, rows in tables(section)]


def test_every_section_has_a_table():
    found = [recipe for recipe, _, _ in CASES]
    assert found == ["supervised", "supervised", "finetune", "linear", "linear", "mae", "simclr", "simclr"]


@pytest.mark.parametrize(("recipe", "model", "rows"), CASES, ids=[f"{r} {m}" for r, m, _ in CASES])
def test_defaults_are_those_of_the_page(recipe, model, rows, monkeypatch):
    if model is None:
        known = {k: p.default for k, p in inspect.signature(knn_accuracy).parameters.items()}
    else:
        monkeypatch.setattr("pyvit.train.engine.adopt", lambda config, recipe: config)
        chosen = load_recipe(recipe)
        config = resolve_config(
            Config(recipe=recipe, model=model, data="synthetic", init="given" if chosen.needs_init else None)
        )
        options = chosen.options_of(config)
        attributes = ("optimizer", "betas", "first_lr", "swin_first_lr")
        fixed = {name: getattr(chosen, name) for name in attributes if hasattr(chosen, name)}
        known = {**fixed, **{k: v for k, v in vars(config).items() if v is not None}, **options}
    assert len(rows) > 1
    for name, text in rows.items():
        wanted = value(text)
        if isinstance(wanted, float) and not isinstance(known[name], str):
            assert known[name] == pytest.approx(wanted, rel=5e-3), name
        else:
            assert known[name] == wanted, name
