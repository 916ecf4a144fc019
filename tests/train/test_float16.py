"""Gradient scaling for float16, with torch's scaler on the CPU: overflows skip steps but do not end the run."""

from __future__ import annotations

import json

import pytest
import torch

from pyvit.train import Config, checkpoint, engine

SMALL = {
    "data": "digits",
    "set": ["embed_dim=24", "depth=1", "num_heads=1", "patch_size=8"],
    "batch_size": 8,
    "log_every": 1,
}
SIMCLR = {"recipe": "simclr", "option": ["hidden=8", "out=8"]}
SELF = [
    "prototypes=40",
    "hidden=16",
    "bottleneck=8",
    "local_crops=1",
    "local_size=16",
    "freeze_last=0.0",
    "batch_norm=False",
]


@pytest.fixture
def scaled(monkeypatch):
    """Runs scale their loss, initially by 2^127, at which it overflows."""
    make = engine._accelerator

    def accelerator(config):
        found = make(config)
        found.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        return found

    monkeypatch.setattr(engine, "_accelerator", accelerator)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [{"clip": 1.0}, {"clip": 0.0}, {"accumulate": 2}])
def test_overflows_are_skipped_and_counted(scaled, tmp_path, settings):
    engine.train(Config(**SMALL, **SIMCLR, **settings, steps=12, out=str(tmp_path)))
    found = [r for r in records(tmp_path) if "lr" in r]
    assert len(found) == 12
    assert 0 < found[-1]["skipped_steps"] < 12
    assert found[0]["skipped_steps"] == 1
    assert found[0]["loss_scale"] == 2.0**126
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["skipped"] == found[-1]["skipped_steps"]
    assert saved["scaler"]["scale"] == found[-1]["loss_scale"]


def test_a_skipped_step_moves_nothing(scaled, tmp_path):
    """Weights, teacher, centre and schedules do not change."""
    run = engine.Run(Config(**SMALL, recipe="dino", option=SELF, steps=40, out=str(tmp_path)))
    batches, before = run.batches(), {k: v.clone() for k, v in run.recipe.state_dict().items()}
    first = run.step(0, batches)
    assert run.overflows == run.skipped == 1
    assert all(torch.equal(v, before[k]) for k, v in run.recipe.state_dict().items())
    assert run.step(1, batches)["lr"] == first["lr"]
    step = 2
    while run.overflows:
        run.step(step, batches)
        step += 1
    assert not torch.equal(run.recipe.loss.center, before["loss.center"])
    assert first["lr"] == 0  # DINO's warm-up begins at 0: one step is made
    assert run.step(step, batches)["lr"] == pytest.approx(run.config.lr / 3)
    run.close()


def test_a_scaled_run_resumes_to_the_same_bits(scaled, tmp_path):
    settings = {**SMALL, **SIMCLR, "steps": 10, "save_every": 100}
    engine.train(Config(**settings, out=str(tmp_path / "whole")))
    run = engine.Run(Config(**settings, out=str(tmp_path / "broken")))
    batches = run.batches()
    for step in range(6):
        run.step(step, batches)
    run.save(6)
    run.close()
    engine.train(Config(**settings, out=str(tmp_path / "broken")))
    whole, broken = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "broken"))
    assert whole["scaler"] == broken["scaler"]
    assert whole["skipped"] == broken["skipped"] > 0
    assert all(torch.equal(whole["model"][k], broken["model"][k]) for k in whole["model"])


def test_overflow_without_end_stops_the_run(scaled, tmp_path, monkeypatch):
    run = engine.Run(Config(**SMALL, steps=100, out=str(tmp_path)))
    weight = run.recipe.model.head.weight
    weight.data.fill_(float("nan"))
    batches = run.batches()
    for step in range(engine.MAX_OVERFLOWS):
        run.step(step, batches)
    with pytest.raises(
        FloatingPointError,
        match=r"step 27: the gradients are not finite for 28 steps in a row, .* there is no checkpoint",
    ):
        run.step(engine.MAX_OVERFLOWS, batches)
    run.close()


def test_float16_needs_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="precision must be no or bf16 without a GPU"):
            engine.train(Config(**SMALL, precision="fp16", steps=1, out=str(tmp_path)))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """After an infinite gradient the loss is finite for one more step; the previous checkpoint is kept."""
    run = engine.Run(Config(**SMALL, steps=100, out=str(tmp_path)))
    batches = run.batches()
    run.step(0, batches)
    assert run.save(1)
    run.recipe.model.pos_embed.data[0, 0, 0] = float("inf")
    with pytest.raises(
        FloatingPointError, match="step 1: parameters are no longer finite; the checkpoint of step 1 is intact"
    ):
        run.save(2)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
    run.close()
