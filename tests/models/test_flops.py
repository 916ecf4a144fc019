"""Multiply-accumulates and attention memory of models, against published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pyvit
from pyvit.models import flops

GMACS = {  # closed forms, agreeing with torchvision's and the papers' rounded figures
    "vit_tiny_patch16_224": 1.254,
    "vit_base_patch16_224": 17.56,
    "vit_base_patch32_224": 4.41,
    "vit_base_patch16_384": 55.48,
    "vit_large_patch16_384": 191.07,
    "swin_tiny_patch4_window7_224": 4.49,
    "swin_base_patch4_window7_224": 15.44,
    "swin_base_patch4_window12_384": 47.10,
    "swin_large_patch4_window12_384": 103.95,
    "swinv2_tiny_window8_256": 5.93,
    "swinv2_base_window8_256": 20.29,
    "vit_base_patch14_dinov2": 151.6,
}


@pytest.mark.parametrize("name", GMACS)
def test_macs(name):
    cost = flops.count(name)
    assert cost.macs / 1e9 == pytest.approx(GMACS[name], rel=2e-3)


def test_count_follows_image_size():
    assert flops.count("vit_base_patch16_224", img_size=384).macs == flops.count("vit_base_patch16_384").macs


def test_attention_memory_of_vit():
    cost = flops.count("vit_base_patch16_224")
    assert cost.tokens == 197
    assert cost.memory() == (12 * 12 * 197**2 * 4, 12 * 12 * 197 * 4)


def test_counting_a_real_module_equals_counting_by_name():
    model = pyvit.create_model("vit_tiny_patch16_224")
    counted = flops.count_module(model)
    assert counted.macs == flops.count("vit_tiny_patch16_224").macs
    with FlopCounterMode(display=False) as plain, pyvit.use_backend("reference"):
        model(*model.example_inputs())
    assert counted.macs == plain.get_total_flops() // 2


def test_window_formula_agrees_with_the_reference():
    model = pyvit.create_model("swin_tiny_patch4_window7_224", img_size=60)
    with FlopCounterMode(display=False) as plain, pyvit.use_backend("reference"), torch.no_grad():
        model(*model.example_inputs())
    assert flops.count_module(model).macs == plain.get_total_flops() // 2


def test_paper_table():
    for published, cost in flops.paper_table():
        if cost is None:
            assert published.label.startswith("R-")
            continue
        assert cost.macs / 1e9 == pytest.approx(published.gmacs, rel=3e-3)
        assert cost.params / 1e6 == pytest.approx(published.params, rel=1.1e-2)


def test_pixels_or_patches():
    answers = dict(flops.PIXELS_OR_PATCHES)
    assert [flops.human(v) for v in answers.values()] == ["275 GB", "211 TB", "3.22 GB", "3.22 GB"]


def test_throughput_runs():
    model = pyvit.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    assert flops.throughput(model, batch=2, seconds=0.01) > 0
    assert model.training


def test_counting_leaves_the_backend_choice_alone():
    flops.count("vit_tiny_patch16_224")
    q = torch.randn(1, 1, 4, 8)
    before = pyvit.explain(pyvit.ops.flash_attention, q, q, q).chosen
    with pyvit.use_backend("reference"):
        assert pyvit.explain(pyvit.ops.flash_attention, q, q, q).chosen == "reference"
    assert pyvit.explain(pyvit.ops.flash_attention, q, q, q).chosen == before
