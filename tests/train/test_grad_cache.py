"""Gradient accumulation of contrastive recipes keeps all negatives: gradients are those of one large batch."""

from __future__ import annotations

import json

import pytest
import torch

from pyvit.data import load_data
from pyvit.train import Config, train
from pyvit.train.engine import resolve_config
from pyvit.train.grad_cache import MicroBatch, cache, rng_state, set_rng_state
from pyvit.train.recipe import load_recipe

CPU = torch.device("cpu")
TINY = ["embed_dim=24", "depth=2", "num_heads=1", "patch_size=8"]
TOWERS = ["width=24", "depth=2", "num_heads=1", "patch_size=8"]
RECIPES = {
    "simclr": {"set": TINY, "option": ["hidden=16", "out=8"]},
    "clip": {"model": "clip_pico_patch8_32", "set": [*TOWERS, "text_depth=1"], "option": ["context=24"]},
    "siglip": {"model": "siglip_pico_patch8_32", "set": TOWERS, "option": ["context=24"]},
}


def make(name: str, *more: str):
    settings = {**RECIPES[name], "set": [*RECIPES[name]["set"], *more]}
    config = resolve_config(Config(recipe=name, data="digits", steps=1, batch_size=12, **settings))
    data = load_data("digits")
    torch.manual_seed(1)
    recipe = load_recipe(name)(config, data).train()
    return recipe, recipe.views(data.train.fetch(range(12)), 0, 10)


def gradients(recipe) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in recipe.named_parameters() if p.grad is not None}
    recipe.zero_grad(set_to_none=True)
    return found


def accumulated(recipe, micros, scale: float = 1.0):
    caches = cache(recipe, micros, CPU, scale)
    for micro, cached in zip(micros, caches, strict=True):
        set_rng_state(micro.state, CPU)
        found = recipe(micro.views, cached)
        found["loss"].backward()
    return found["loss"].detach(), gradients(recipe)


def close(found, wanted):
    assert found.keys() == wanted.keys()
    most = max(float(g.abs().max()) for g in wanted.values())
    for key, want in wanted.items():
        atol = (
            2e-4 * float(want.abs().max()) + 2e-5 * most
        )  # SimCLR's batch norms cost rounding, see test_distributed.py
        torch.testing.assert_close(found[key], want, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_give_the_gradients_of_the_batch(name):
    recipe, views = make(name)
    buffers = {n: b.clone() for n, b in recipe.named_buffers()}
    loss = recipe(views)["loss"]
    loss.backward()
    wanted = gradients(recipe)
    after = {n: b.clone() for n, b in recipe.named_buffers()}
    recipe.load_state_dict({**recipe.state_dict(), **{n: b for n, b in buffers.items() if n in recipe.state_dict()}})
    cut = [{k: v.chunk(3)[i] for k, v in views.items()} for i in range(3)]
    for scale in (1.0, 1024.0):
        got, found = accumulated(recipe, [MicroBatch(v, rng_state(CPU)) for v in cut], scale)
        torch.testing.assert_close(got, loss.detach(), rtol=1e-5, atol=1e-6)
        close(found, wanted)
        if scale == 1.0:
            for key, value in after.items():  # batch norms have counted the batch once
                torch.testing.assert_close(dict(recipe.named_buffers())[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["simclr", "clip"])
def test_both_forward_passes_draw_alike(name):
    """With stochastic depth, the gradients are those of the paths of the first pass."""
    recipe, views = make(name, "drop_path_rate=0.5", "proj_drop_rate=0.3")
    cut, micros, live = [{k: v.chunk(3)[i] for k, v in views.items()} for i in range(3)], [], []
    for part, each in enumerate(cut):
        torch.manual_seed(part)
        micros.append(MicroBatch(each, rng_state(CPU)))
        live.append(recipe.encode(each))
    recipe.compare({key: torch.cat([e[key] for e in live]) for key in live[0]})["loss"].backward()
    wanted = gradients(recipe)
    close(accumulated(recipe, micros)[1], wanted)


def test_the_engine_keeps_the_negatives(tmp_path):
    """The initial loss of 16 images is about ln 31, with micro-batches of 1 and of 16; a micro-batch of 4 would have ln
    7."""
    first, ranks = [], []
    for accumulate in (1, 4, 16):
        settings = {**RECIPES["simclr"], "option": ["hidden=16", "out=8", "temperature=10.0"]}
        out = tmp_path / str(accumulate)
        train(
            Config(
                recipe="simclr", steps=2, batch_size=16, accumulate=accumulate, log_every=1, out=str(out), **settings
            )
        )
        line = json.loads((out / "log.jsonl").read_text().splitlines()[0])
        first.append(line["loss"])
        ranks.append(line["feature_rank"])
    assert first == pytest.approx([3.434] * 3, abs=0.1)
    assert all(2 < rank < 16 for rank in ranks)  # of the whole batch; micro-batches of 1 alone have 1


def test_what_has_no_negatives_is_refused(tmp_path):
    settings = {"data": "digits", "steps": 1, "out": str(tmp_path)}
    for name in RECIPES:
        with pytest.raises(ValueError, match=f"{name}: batch_size must be at least 2"):
            train(Config(recipe=name, batch_size=1, **settings, **RECIPES[name]))


def test_batch_norm_in_the_encoder_is_refused():
    """Its statistics would be those of each micro-batch."""
    options = {
        "option": ["context=24"],
        "set": ["layers=(1,1,1,1)", "width=8", "num_heads=4", "embed_dim=16", "img_size=32"],
    }
    config = Config(
        recipe="clip",
        data="digits",
        model="clip_resnet50_224",
        image_size=32,
        steps=1,
        batch_size=8,
        accumulate=2,
        **options,
    )
    with pytest.raises(ValueError, match="accumulate must be 1 with clip_resnet50_224, whose batch norms"):
        load_recipe("clip")(resolve_config(config), load_data("digits"))
