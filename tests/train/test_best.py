"""Evaluations during a run: the best weights, the end without progress, and the extension of a finished run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pyvit.train import Config, checkpoint, train
from pyvit.train.engine import Run
from pyvit.train.recipe import load_recipe
from pyvit.train.supervised import Supervised

#: Two steps per epoch.
SMALL = {
    "data": "digits", "set": ["embed_dim=12", "depth=1", "num_heads=1", "patch_size=16"], "validation": 0.9,
    "batch_size": 72, "eval_every": 1, "log_every": 1, "option": ["augment=none"],
}  # fmt: skip


class Killed(Exception):
    pass


@pytest.fixture
def scripted(monkeypatch):
    """``scripted(figures)``: accuracies that evaluations give in turn; None kills the run. Returns the weights that
    each evaluation saw."""
    seen = []

    def use(figures):
        left = list(figures)

        def evaluate(self, data):
            seen.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})
            if (figure := left.pop(0)) is None:
                raise Killed
            return {"accuracy": figure}

        monkeypatch.setattr(Supervised, "evaluate", evaluate)
        seen.clear()
        return seen

    return use


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def evaluations(folder):
    return [(r["step"], r["accuracy"]) for r in log(folder) if "accuracy" in r]


@pytest.mark.parametrize("select", ["last", "best"])
def test_the_best_weights_are_kept(tmp_path, scripted, capsys, select):
    seen = scripted([30.0, 50.0, 50.0, 40.0])
    settings = {**SMALL, "epochs": 4, "select": select, "out": str(tmp_path)}
    if select == "best":
        settings |= {"validation": 0.0, "batch_size": 721}
    found = train(Config(**settings))
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(best[key], value) for key, value in seen[1].items())  # of equal ones, the first
    exported, wanted = load_file(tmp_path / "model.safetensors"), seen[1 if select == "best" else 3]
    assert all(torch.equal(exported[key], value) for key, value in wanted.items())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {**found, "best": {"step": 4, "metric": "accuracy", "value": 50.0}}
    assert found == {"accuracy": 50.0 if select == "best" else 40.0}
    assert evaluations(tmp_path) == [(1, 30.0), (3, 50.0), (5, 50.0), (7, 40.0)]
    said = capsys.readouterr().out
    assert f"best accuracy 50 after step 4: {tmp_path / 'best.safetensors'}" in said
    assert ("chooses by a part of the training images" in said) == (select == "best")


def test_a_run_killed_in_an_evaluation_makes_up_for_it(tmp_path, scripted):
    """The checkpoint comes first, so that the resumed run begins with the missing evaluation."""
    settings = {**SMALL, "epochs": 3, "select": "best", "out": str(tmp_path)}
    scripted([30.0, None])
    with pytest.raises(Killed):
        train(Config(**settings))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    seen = scripted([60.0, 50.0])
    assert train(Config(**settings)) == {"accuracy": 60.0}
    assert evaluations(tmp_path) == [(1, 30.0), (3, 60.0), (5, 50.0)]
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in seen[0].items())
    scripted([50.0])
    train(Config(**settings))  # a finished run is evaluated again, but its log stays
    assert evaluations(tmp_path) == [(1, 30.0), (3, 60.0), (5, 50.0)]
    assert json.loads((tmp_path / "results.json").read_text())["best"]["step"] == 4
    scripted([10.0])
    train(Config(**{**settings, "epochs": 1, "overwrite": True}))
    assert json.loads((tmp_path / "results.json").read_text())["best"] == {
        "step": 2, "metric": "accuracy", "value": 10.0
    }  # fmt: skip


def test_patience_ends_a_run(tmp_path, scripted, capsys):
    settings = {**SMALL, "epochs": 9, "patience": 2, "out": str(tmp_path)}
    scripted([30.0, 40.0, 35.0, 40.0])
    assert train(Config(**settings)) == {"accuracy": 40.0}
    assert "ended after step 8 of 18: 2 evaluations without a better accuracy" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 8
    scripted([40.0])
    train(Config(**settings))  # it stays ended
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 8
    scripted([41.0, 0.0, 0.0, 0.0])
    train(Config(**{**settings, "patience": 3}))  # with more patience it goes on
    assert [step for step, _ in evaluations(tmp_path)] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 16


def test_a_finished_run_is_extended_by_more_epochs(tmp_path, scripted, capsys):
    """From its end on, schedules are those of the longer run. An unfinished run is not extended, a longer one not
    shortened."""
    settings = {**SMALL, "lr": 0.1, "warmup": 0.0, "out": str(tmp_path)}
    scripted([10.0, 20.0, 30.0, 40.0])
    train(Config(**settings, epochs=2))
    with pytest.raises(ValueError, match=r"holds another run \(epochs was 2, is 1\)"):
        train(Config(**settings, epochs=1))
    capsys.readouterr()
    train(Config(**settings, epochs=4))
    said = capsys.readouterr().out
    assert "extending" in said
    assert "from 4 to 8 steps: from here on, the learning rate and all other schedules are those of a run of 8" in said
    rates = [r["lr"] for r in log(tmp_path) if "lr" in r]
    whole = Run(Config(**{**settings, "epochs": 4, "out": str(tmp_path / "whole")}))
    batches = whole.batches()
    wanted = [whole.step(step, batches)["lr"] for step in range(8)]
    whole.save(8 - 1)
    whole.close()
    assert rates[4:] == pytest.approx(wanted[4:], rel=1e-5)
    assert rates[3] < wanted[3]
    assert rates[4] > 0.02
    assert evaluations(tmp_path) == [(1, 10.0), (3, 20.0), (5, 30.0), (7, 40.0)]
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 4
    with pytest.raises(ValueError, match="has taken 7 of its 8 steps; only a finished run can be extended to 10"):
        train(Config(**{**settings, "epochs": 5, "out": str(tmp_path / "whole")}))


@pytest.mark.parametrize(
    ("recipe", "results", "want"),
    [
        ("supervised", {"top5": 99.0, "accuracy": 50.0}, ("accuracy", 50.0)),
        ("mae", {"test_loss": 0.5, "knn": 70.0}, ("knn", 70.0)),
        ("mae", {"test_loss": 0.5}, ("test_loss", -0.5)),
        ("clip", {"image_to_text@1": 3.0}, ("image_to_text@1", 3.0)),
        ("dino", {}, None),
        ("mae", {"test_loss": float("nan")}, None),
    ],
)
def test_what_better_means(recipe, results, want):
    assert load_recipe(recipe).score(load_recipe(recipe), results) == want
