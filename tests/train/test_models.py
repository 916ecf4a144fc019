"""Every recipe with every registered model: it trains a step, or is refused before any data is read."""

from __future__ import annotations

import pytest
import torch

import pyvit
from pyvit.data import Data, TensorImages
from pyvit.models.encoders import image_encoder
from pyvit.models.registry import settings_of
from pyvit.models.resnet import ResNet
from pyvit.models.swin import SwinTransformer
from pyvit.train import RECIPES, Config, train
from pyvit.train.engine import resolve_config
from pyvit.train.recipe import load_recipe

VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2}
TEXT = {"text_width": 16, "text_depth": 1, "text_heads": 2}
OPTIONS = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "dino": {"prototypes": 16, "hidden": 16, "bottleneck": 8, "local_crops": 1},
    "simclr": {"hidden": 16, "out": 8},
    "clip": {"context": 12},
}
OPTIONS |= {"dinov2": OPTIONS["dino"], "siglip": OPTIONS["clip"]}


def tiny(name):
    """Settings that make a registered model small, for images of 32 pixels."""
    if name.startswith(("clip_vit", "siglip", "clip_pico")):
        vit = {"width": 24, "depth": 1, "num_heads": 2, "patch_size": 16}
        return vit if name.startswith("siglip") else {**vit, **TEXT}
    if name.startswith("clip_resnet"):
        return {"layers": (1, 1, 1, 1), "width": 8, "num_heads": 2, **TEXT}
    found = image_encoder(name)
    if found.constructor is SwinTransformer:
        return {
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (1, 2),
            "window_size": 2,
            "pretrained_window_sizes": None,
        }
    if found.constructor is ResNet:
        return {"layers": (1, 1, 1, 1), "width": 8}
    if "conv_channels" in found.settings:
        return {**VIT, "conv_channels": (8, 16)}
    if "_r50_" in name or "_r26_" in name:
        return {**VIT, "layers": (1,)}
    return {**VIT, "patch_size": 8 if "_r_" in name else 16}


def config(recipe, name, **more):
    chosen = [f"{k}={v!r}" for k, v in tiny(name).items()] if load_recipe(recipe).fits(name) else []
    options = [f"{k}={v!r}" for k, v in OPTIONS.get(recipe, {}).items()]
    init = {"init": "given"} if recipe in ("finetune", "linear") else {}
    return Config(
        recipe=recipe, model=name, set=chosen, option=options, batch_size=4, steps=1, data="nowhere", **init, **more
    )


def images():
    torch.manual_seed(0)
    part = TensorImages(
        torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2, [f"image {i}" for i in range(8)]
    )
    return Data("noise", part, part, (32, 32), ["even", "odd"])


def step(recipe, name):
    """A forward and backward pass of a recipe, as in the engine."""
    chosen = config(recipe, name)
    chosen.init = None
    made = load_recipe(recipe)(settled(chosen), images())
    made.train()
    batch = made.data.train.fetch(range(4))
    found = made(made.views(batch, 0, 1))
    found["loss"].backward()
    assert torch.isfinite(found["loss"])
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in made.parameters())


def settled(chosen):
    """The complete configuration of a recipe, which may lack --init here."""
    if load_recipe(chosen.recipe).needs_init and chosen.init is None:
        return chosen.resolved(load_recipe(chosen.recipe).defaults)
    return resolve_config(chosen)


NEVER = ("vitdet_", "fpn_", "samvit_", "sam2_", "hiera_")  # backbones of detectors, and models of maps
TWO_TOWERS = ("clip_", "metaclip2_", "siglip_", "siglip2_")


def expected(recipe, name):
    if name.startswith(NEVER):
        return False
    if recipe in ("clip", "siglip"):
        return name.startswith(TWO_TOWERS if recipe == "clip" else ("siglip_", "siglip2_"))
    if name.startswith("clip_resnet"):
        return False
    if recipe in ("mae", "dinov2"):
        plain = not name.startswith(("swin", "resnet")) and "swin" not in name and "resnet" not in name
        special = (
            "distilled" in name
            or name.startswith("ast_")
            or any(s in name for s in ("_r50_", "_r26_", "_r_", "_conv_"))
        )
        special = special or name.startswith(("aimv2_", "eva02_", "vit_pe_")) or "naflex" in name
        return plain and not (recipe == "mae" and special)
    return True


@pytest.mark.parametrize("recipe", RECIPES)
def test_models_are_taken_or_refused_before_data_is_read(recipe, monkeypatch):
    from pyvit.train import engine, initialisation

    monkeypatch.setattr(initialisation, "open_source", lambda *_: pytest.fail("a file was read"))
    monkeypatch.setattr(initialisation, "adopt", lambda config, recipe: config)
    monkeypatch.setattr(engine, "adopt", lambda config, recipe: config)
    for name in pyvit.list_models():
        if expected(recipe, name):
            assert resolve_config(config(recipe, name)).model == name
            continue
        with pytest.raises(ValueError, match=rf"^{recipe}: model must be .*, one of .*\*.*; got {name}$") as caught:
            train(config(recipe, name))
        assert "\n" not in str(caught.value)


REPRESENTATIVES = {
    "supervised": (
        "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "ast_base_patch16_1024x128", "vit_base_conv_s16_224",
        "vit_tiny_r_s16_p8_224", "vit_small_patch14_reg4_dinov2", "swinv2_tiny_window8_256", "resnet18",
        "clip_vit_base_patch32_224", "siglip_vit_base_patch16_224", "mae_vit_base_patch16_224",
        "dinov2_vit_giant_patch14_224", "simclr_resnet18",
    ),
    "finetune": ("swin_tiny_patch4_window7_224", "resnet50"),
    "linear": ("deit_tiny_distilled_patch16_224", "siglip_vit_base_patch16_224", "resnet18"),
    "mae": (
        "vit_small_patch14_reg4_dinov2", "mae_vit_base_patch16_224", "clip_vit_base_patch32_224",
        "siglip_vit_base_patch16_224", "vit_giant_patch14_dinov2",
    ),
    "dino": (
        "dino_vit_small_patch16_224", "ibot_vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224",
        "siglip_vit_base_patch16_224", "ast_base_patch16_1024x128", "vit_base_conv_s16_224", "vit_base_r50_s16_224",
    ),
    "dinov2": (
        "dinov2_vit_giant_patch14_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224",
        "clip_vit_base_patch32_224", "vit_base_r50_s16_224",
    ),
    "simclr": (
        "simclr_vit_small_patch16_224", "simclr_resnet18", "resnet18", "swinv2_tiny_window8_256",
        "vit_base_r50_s16_224",
    ),
    "clip": ("clip_resnet50_224", "clip_vit_base_patch32_224", "siglip_vit_base_patch16_224"),
    "siglip": ("siglip_vit_base_patch16_224",),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "name"), [(r, n) for r, names in REPRESENTATIVES.items() for n in names])
def test_a_step(recipe, name):
    step(recipe, name)


def test_unknown_settings_are_refused_before_data_is_read():
    for recipe, name in (
        ("supervised", "vit_tiny_patch16_224"),
        ("clip", "clip_pico_patch8_32"),
        ("mae", "vit_pico_patch8_32"),
    ):
        with pytest.raises(ValueError, match=rf"{recipe}: set must name settings of {name} .*, got dept"):
            train(Config(recipe=recipe, model=name, data="nowhere", set=["dept=2"]))
    for recipe, given in (("finetune", None), ("linear", None), ("finetune", ""), ("supervised", " ")):
        with pytest.raises(ValueError, match=rf"{recipe}: init must name .*, got {given!r}"):
            train(Config(recipe=recipe, model="vit_pico_patch8_32", data="nowhere", init=given))
    with pytest.raises(ValueError, match=r"did you mean"):
        train(Config(model="vit_pico_patch8_23", data="nowhere"))


def test_the_models_of_built_in_sets_fit():
    for recipe, data in [
        (r, d)
        for r in RECIPES
        if r not in ("finetune", "linear")
        for d in ("digits", "emoji", "icons", "scenes", "words", "table.csv")
    ]:
        if recipe in ("clip", "siglip") and data == "words":
            continue
        assert load_recipe(recipe).fits(resolve_config(Config(recipe=recipe, data=data)).model)


def test_a_registered_encoder_keeps_its_settings():
    """The registered settings of a model apply to the encoder that a recipe trains."""
    recipe = load_recipe("supervised")(resolve_config(config("supervised", "clip_vit_base_patch32_224")), images())
    tower = settings_of("clip_vit_base_patch32_224")[0](**tiny("clip_vit_base_patch32_224"), img_size=32).visual
    own = {k for k in recipe.model.state_dict() if not k.startswith("head")}
    assert own == {k for k in tower.state_dict() if not k.startswith("head")}
    assert recipe.model.blocks[0].mlp.fc1.activation == "quick_gelu"
    assert recipe.model.blocks[0].norm1.eps == 1e-5
    giant = load_recipe("dinov2")(resolve_config(config("dinov2", "dinov2_vit_giant_patch14_224")), images())
    assert type(giant.backbone.blocks[0].mlp).__name__ == "SwiGLU"
