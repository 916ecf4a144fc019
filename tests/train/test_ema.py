"""The moving average of the weights: formula, evaluation, export, and resuming to the same bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pyvit.train import Config, checkpoint, train
from pyvit.train.ema import WeightAverage, decay_at
from pyvit.train.engine import Run

SMALL = {
    "data": "digits", "set": ["embed_dim=24", "depth=1", "num_heads=1", "patch_size=8"], "batch_size": 8,
    "steps": 6, "warmup": 0.0, "save_every": 4,
}  # fmt: skip


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms(warmup):
    """Also of running statistics."""
    utils = pytest.importorskip("timm.utils")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    ours, theirs = WeightAverage(model), utils.ModelEmaV3(model, decay=0.7, use_warmup=warmup)
    for n in range(1, 7):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model(torch.randn(5, 3, dtype=torch.float64))
        ours.update(decay_at(0.7, n, warmup))
        theirs.update(model, step=n if warmup else None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with ours.applied():
        for key, want in theirs.module.state_dict().items():
            if want.is_floating_point():
                torch.testing.assert_close(model.state_dict()[key], want, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_it_is_evaluated_and_exported_and_the_weights_themselves_go_on(tmp_path, monkeypatch):
    decay, weights, seen = 0.6, [], []
    run = Run(Config(**SMALL, ema=decay, out=str(tmp_path)))
    start = {k: v.detach().double().clone() for k, v in run.recipe.model.named_parameters()}
    step, evaluate = run.step, run.recipe.evaluate

    def noted(number, batches):
        values = step(number, batches)
        weights.append({k: v.detach().double().clone() for k, v in run.recipe.model.named_parameters()})
        return values

    def shown(data):
        seen.append({k: v.detach().clone() for k, v in run.recipe.model.named_parameters()})
        return evaluate(data)

    monkeypatch.setattr(run, "step", noted)
    monkeypatch.setattr(run.recipe, "evaluate", shown)
    run.run()
    run.close()
    want = start
    for each in weights:
        want = {k: decay * v + (1 - decay) * each[k] for k, v in want.items()}
    exported, saved = load_file(tmp_path / "model.safetensors"), checkpoint.load(tmp_path / "last.pt")
    for key, value in want.items():
        torch.testing.assert_close(exported[key].double(), value, rtol=1e-5, atol=1e-7)
        assert torch.equal(exported[key], seen[-1][key])
        assert torch.equal(saved["model"]["model." + key].double(), weights[-1][key])
        assert torch.equal(saved["ema"]["model." + key], exported[key])


def test_a_resumed_average_is_the_same_to_the_bit(tmp_path):
    """With LAMB, whose state is resumed too."""
    settings = {**SMALL, "ema": 0.9, "ema_warmup": True, "optimizer": "lamb", "lr": 0.01}
    whole = train(Config(**settings, out=str(tmp_path / "whole")))
    run = Run(Config(**settings, out=str(tmp_path / "broken")))
    batches = run.batches()
    for step in range(4):
        run.step(step, batches)
    run.save(4)
    run.close()
    assert train(Config(**settings, out=str(tmp_path / "broken"))) == whole
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]
    ends = [checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "broken")]
    for part in ("model", "ema"):
        assert all(torch.equal(ends[0][part][key], ends[1][part][key]) for key in ends[0][part])
    with pytest.raises(ValueError, match=r"holds another run \(ema was 0.9, is 0.8\)"):
        train(Config(**{**settings, "ema": 0.8}, out=str(tmp_path / "broken")))
