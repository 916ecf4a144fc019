"""Accelerated models under torch's tracers, exporters and devices without kernels."""

import copy
import io

import pytest
import torch

import pyvit
from tests.integrations.checks import made
from tests.models.parity import relative_error
from tests.peers import peer

NAMES = ["timm vit", "timm eva", "timm swin", "timm swin v2", "torchvision vit", "torchvision swin", "open_clip custom"]

UNTRACEABLE = {("open_clip custom", torch.fx.symbolic_trace)}  # as they are


def accelerated(name):
    model, run = made(name)
    with torch.no_grad():
        expected = run(model)
    model = copy.deepcopy(model)
    pyvit.accelerate(model)
    return model, run, expected


@pytest.mark.parametrize(
    ("name", "trace"),
    [
        (name, trace)
        for name in NAMES
        for trace in (torch.fx.symbolic_trace, torch.jit.script)
        if (name, trace) not in UNTRACEABLE
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_symbolic_traces_see_the_original(name, trace):
    model, run, expected = accelerated(name)
    traced = trace(model)
    with torch.no_grad():
        assert relative_error(run(traced), expected) < 1e-4
        found = run(model)
        assert relative_error(found, expected) < 1e-4
        assert not torch.equal(found, expected)  # still accelerated


def test_feature_extraction():
    model, _, _ = accelerated("torchvision vit")
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    assert "encoder.layers.encoder_layer_0.mlp" in get_graph_node_names(model)[0]
    nodes = ["encoder.layers.encoder_layer_0.mlp", "heads"]
    images = torch.randn(1, 3, 16, 16)
    found = create_feature_extractor(model, nodes)(images)
    theirs = create_feature_extractor(copy.deepcopy(made("torchvision vit")[0]), nodes)(images)
    assert all(relative_error(found[n], theirs[n]) < 1e-4 for n in nodes)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "num_heads": 2, "out_indices": (0, 1)}),
        ("vit_tiny_patch16_224", {"depth": 2, "num_heads": 2, "out_indices": (0,), "feature_cls": "fx"}),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "out_indices": (0, 1)},
        ),
    ],
    ids=str,
)
def test_timm_features(name, config):
    torch.manual_seed(0)
    model = peer("timm").create_model(name, img_size=32, embed_dim=24, features_only=True, **config).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        pyvit.accelerate(model)
        assert all(relative_error(a, b) < 1e-4 for a, b in zip(model(images), expected, strict=True))


@pytest.mark.parametrize("name", ["timm vit", "timm swin", "torchvision vit", "open_clip custom"])
def test_traced_by_running(name):
    model, _, _ = accelerated(name)
    with torch.no_grad():
        size = (2, 9, 32) if name == "open_clip custom" else (2, 3, 32, 32) if "swin" in name else (2, 3, 16, 16)
        x = torch.randn(size)
        want = made(name)[0](x)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), file)
        file.seek(0)
        assert relative_error(torch.jit.load(file)(x), want) < 1e-4
        assert relative_error(torch.export.export(model, (x,)).module()(x), want) < 1e-4
