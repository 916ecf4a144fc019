"""The benchmarks' plain PyTorch models agree with pyvit's and those of other libraries."""

from __future__ import annotations

import pytest
import torch

from benchmarks import backbones, baselines, inputs, models, peer_models, peers
from benchmarks.cases import Case
from benchmarks.workload import OURS
from tests.peers import peer


def test_plain_models_equal_ours():
    images = inputs.normalised(inputs.pixels("photos", 1, 224))
    name = "vit_tiny_patch16_224"
    with torch.no_grad():
        outs = [models.MODULES[kind](name).eval()(images) for kind in (OURS, "eager SDPA", "eager naive")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-4)
    assert models.flops("vit_base_patch16_224", 1, False) == pytest.approx(2 * 17.56e9, rel=0.01)
    assert models.flops("swin_tiny_patch4_window7_224", 1, False) == pytest.approx(2 * 4.5e9, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("library", list(peer_models.MODELS))
def test_plain_models_equal_those_of_libraries(library, name):
    peer(library)
    if library == "open_clip" and name.startswith("swin"):
        with pytest.raises(ValueError, match="open_clip has no Swin"):
            peer_models.MODELS[library](name, {})
        return
    state = models.weights(name)
    model = baselines.create(name, attention="naive").eval()
    model.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            peer_models.MODELS[library](name, state).eval()(images), model(images), rtol=1e-4, atol=1e-4
        )


def test_max_autotune_freezes_weights_for_inference_alone(monkeypatch):
    options = {}
    monkeypatch.setattr(torch, "compile", lambda model, **given: options.update(given) or model)
    model = torch.nn.Linear(2, 2)
    models.compiled("compile, max-autotune", model.eval())
    assert options["options"] == {"max_autotune": True, "freezing": True}
    models.compiled("compile, max-autotune", model.train())
    assert options["options"] == {"max_autotune": True, "freezing": False}


def test_newer_backbones_beside_timm(monkeypatch):
    peer("timm")
    name = "hiera_small_224"
    case = Case(name, "batch 1", "fp32", "inference", {"batch": 1, "size": 224})
    work = models.build(case, "photos", ("accelerate",))
    assert list(work.contenders) == [OURS, "timm", "timm + accelerate"]
    assert not work.unavailable
    assert models.parameters(name) == pytest.approx(35.0e6, rel=0.01)
    assert work.flops == pytest.approx(2 * 6.4e9, rel=0.05)
    for contender in work.contenders.values():
        verdict = contender.verdict()
        assert 0 < verdict.error <= verdict.allowed, verdict.detail
    backbones.weights.cache_clear()

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    reason = "timm is the reference: not installed: timm"
    assert models.build(case, "photos", ()).unavailable == {OURS: reason, "timm": reason}


def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    case = Case("vit_tiny_patch16_224", "batch 1", "bf16", "train", {"batch": 1, "size": 224})
    names, unavailable = models._wanted(case, ("timm", "openvino"), "cpu")
    assert names == [OURS, "eager SDPA", "eager naive"]
    assert unavailable == {"timm": "not installed: timm", "openvino": "not installed: openvino"}
