"""The benchmarks' plain PyTorch models agree with pyvit's, timm's and transformers'."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import baselines, inputs, peers
from benchmarks.cases import Case
from benchmarks.workload import OURS


def test_plain_models_equal_ours():
    from benchmarks import models

    images = inputs.normalised(inputs.pixels("photos", 1, 224))
    name = "vit_tiny_patch16_224"
    with torch.no_grad():
        outs = [models.MODULES[kind](name).eval()(images) for kind in (OURS, "eager SDPA", "eager naive")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-4)
    assert models.flops("vit_base_patch16_224", 1, False) == pytest.approx(2 * 17.56e9, rel=0.01)
    assert models.flops("swin_tiny_patch4_window7_224", 1, False) == pytest.approx(2 * 4.5e9, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_plain_models_equal_timm(name):
    state = baselines.create(name).state_dict()
    model = baselines.create(name, attention="naive").eval()
    model.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), peers.timm_model(name, state).eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_plain_models_equal_transformers(name):
    pytest.importorskip("transformers")
    state = baselines.create(name).state_dict()
    model = baselines.create(name, attention="naive").eval()
    model.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), peers.transformers_model(name, state).eval()(images), rtol=1e-4, atol=1e-5
        )


def test_absent_peers_say_why(monkeypatch):
    from benchmarks import models

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    case = Case("vit_tiny_patch16_224", "batch 1", "bf16", "train", {"batch": 1, "size": 224})
    names, unavailable = models._wanted(case, ("timm", "openvino"), "cpu")
    assert names == [OURS, "eager SDPA", "eager naive"]
    assert unavailable == {"timm": "not installed: timm", "openvino": "not installed: openvino"}
