"""LAMB against its paper and timm, Muon against torch, and the settings that choose and tune an optimizer."""

from __future__ import annotations

import pytest
import torch

from pyvit.train import Config
from pyvit.train.engine import resolve_config
from pyvit.train.optim import LAMB, LARS, Muon, make_optimizer, orthogonal, parameter_groups
from pyvit.train.recipe import load_recipe

SHAPES = {"matrix": (5, 3), "vector": (4,), "zero": (2, 2)}


def inputs(steps: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    draw = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    new = lambda shape: torch.randn(shape, dtype=torch.float64, generator=draw)  # noqa: E731
    start = {k: new(s) for k, s in SHAPES.items()}
    start["zero"].zero_()  # a tensor of norm 0 has no trust ratio
    return start, [{k: new(s) for k, s in SHAPES.items()} for _ in range(steps)]


def run(optimizer_of, start, gradients, rates):
    params = {k: torch.nn.Parameter(v.clone()) for k, v in start.items()}
    optimizer = optimizer_of(params)
    for grads, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for k, p in params.items():
            p.grad = grads[k].clone()
        optimizer.step()
    return {k: p.detach() for k, p in params.items()}


def groups(params, decay):
    decaying = [p for k, p in params.items() if k != "vector"]
    return [
        {"params": decaying, "decays": True, "weight_decay": decay},
        {"params": [params["vector"]], "decays": False, "weight_decay": 0.0},
    ]


def test_lamb_is_algorithm_2_of_the_paper():
    start, gradients = inputs(6)
    rates, (b1, b2), eps, decay = [0.1, 0.2, 0.3, 0.2, 0.1, 0.0], (0.8, 0.95), 1e-5, 0.3
    got = run(lambda p: LAMB(groups(p, decay), betas=(b1, b2), eps=eps), start, gradients, rates)
    for key, x in start.items():
        x, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            g = grads[key]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            r = (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)
            if key != "vector":
                r = r + decay * x
                size, change = float((x**2).sum() ** 0.5), float((r**2).sum() ** 0.5)
                r = r * (size / change if size > 0 and change > 0 else 1.0)
            x = x - rate * r
        torch.testing.assert_close(got[key], x, rtol=1e-12, atol=1e-13)


def test_lamb_is_timms():
    optim = pytest.importorskip("timm.optim")
    start, gradients = inputs(5)
    rates, settings = [0.1, 0.3, 0.2, 0.1, 0.05], {"betas": (0.9, 0.98), "eps": 1e-6}
    got = run(lambda p: LAMB(groups(p, 0.1), **settings), start, gradients, rates)
    theirs = lambda p: optim.Lamb(  # noqa: E731
        [{k: v for k, v in g.items() if k != "decays"} for g in groups(p, 0.1)], max_grad_norm=None, **settings
    )
    for key, want in run(theirs, start, gradients, rates).items():
        torch.testing.assert_close(got[key], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 16, 64), (1, 64, 16), (2, 1, 5)])
def test_orthogonal_keeps_the_singular_vectors(shape):
    u, _, v = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    x = u * torch.linspace(0.1, 1.0, u.shape[2], dtype=torch.float64) @ v
    found = u.mT @ orthogonal(x) @ v.mT  # diagonal in the basis of x
    sizes = found.diagonal(dim1=1, dim2=2)
    assert 0.6 < sizes.min() <= sizes.max() < 1.25
    torch.testing.assert_close(found, torch.diag_embed(sizes), rtol=0, atol=1e-9)
    assert not orthogonal(torch.zeros(1, 3, 4)).any()


def test_muon_is_torchs():
    """torch's iteration is in bfloat16."""
    start = {"q": torch.randn(24, 24), "k": torch.randn(24, 24), "wide": torch.randn(8, 40)}
    gradients, rates = [{k: torch.randn_like(v) for k, v in start.items()} for _ in range(4)], [0.1, 0.05, 0.1, 0.02]
    ours = run(lambda p: Muon([{"params": [*p.values()], "matrices": 1}], weight_decay=0.3), start, gradients, rates)
    settings = {"weight_decay": 0.3, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    theirs = run(lambda p: torch.optim.Muon([*p.values()], **settings), start, gradients, rates)
    for key, want in theirs.items():
        moved = (want - start[key]).norm()
        assert (ours[key] - want).norm() < 0.05 * moved
    both = {"qk": torch.cat([start["q"], start["k"]])}
    stacked = [{"qk": torch.cat([g["q"], g["k"]])} for g in gradients]
    found = run(lambda p: Muon([{"params": [p["qk"]], "matrices": 2}], weight_decay=0.3), both, stacked, rates)["qk"]
    torch.testing.assert_close(found, torch.cat([ours["q"], ours["k"]]), rtol=1e-5, atol=1e-5)


def test_muon_takes_adamw_for_the_rest():
    start, gradients = inputs(5)
    rates, settings = [0.1, 0.3, 0.2, 0.1, 0.05], {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.2}
    got = run(lambda p: Muon([*p.values()], **settings), start, gradients, rates)
    for key, want in run(lambda p: torch.optim.AdamW([*p.values()], **settings), start, gradients, rates).items():
        torch.testing.assert_close(got[key], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["vit_pico_patch8_32", "swin_pico_patch4_window4_32"])
def test_muons_matrices_are_the_weights_of_blocks(name):
    """Not embeddings, tokens, position tables or the classifier."""
    import pyvit

    model = pyvit.create_model(name, num_classes=7)
    groups = parameter_groups(model, model, 1.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {n: {names[id(p)] for g in groups if g["matrices"] == n for p in g["params"]} for n in (0, 1, 3)}
    wanted = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.split(".")[0] != "head"
    }
    assert found[3] == {name for name in wanted if "qkv" in name} != set()
    assert found[1] == wanted - found[3]
    assert found[0] >= {name for name in names.values() if name.startswith(("head", "patch_embed"))}


@pytest.mark.parametrize("kind", [LAMB, LARS, Muon])
def test_a_loaded_state_continues_to_the_same_bits(kind):
    start, gradients = inputs(4)
    whole = run(lambda p: kind(groups(p, 0.1)), start, gradients, [0.1] * 4)
    params = {k: torch.nn.Parameter(v.clone()) for k, v in start.items()}
    optimizer = kind(groups(params, 0.1), lr=0.1)
    for i, grads in enumerate(gradients):
        if i == 2:
            saved, optimizer = optimizer.state_dict(), kind(groups(params, 0.1), lr=0.5)
            optimizer.load_state_dict(saved)
        for k, p in params.items():
            p.grad = grads[k].clone()
        optimizer.step()
    assert all(torch.equal(p, whole[k]) for k, p in params.items())


@pytest.mark.parametrize(
    ("recipe", "given", "want"),
    [
        ("supervised", {}, {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum": None}),
        ("mae", {"beta2": 0.99}, {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.99}),
        ("supervised", {"optimizer": "lamb", "lr": 0.01}, {"eps": 1e-6, "beta1": 0.9}),
        ("supervised", {"optimizer": "sgd", "lr": 0.1, "momentum": 0.8}, {"momentum": 0.8, "beta1": None}),
        ("supervised", {"optimizer": "muon", "lr": 0.1}, {"momentum": 0.95, "beta1": 0.9, "eps": 1e-8}),
        ("simclr", {"model": "resnet18", "data": "synthetic"}, {"optimizer": "lars", "momentum": 0.9}),
    ],
)
def test_settings_reach_the_optimizer(recipe, given, want):
    config = resolve_config(Config(**{"recipe": recipe, **given}))
    assert {key: getattr(config, key) for key in want} == want
    group = make_optimizer([{"params": [torch.nn.Parameter(torch.ones(2, 2))]}], config).param_groups[0]
    if config.beta1 is not None:
        assert (group["betas"], group["eps"]) == ((config.beta1, config.beta2), config.eps)
    if config.momentum is not None:
        assert group["momentum"] == config.momentum
    assert group["lr"] == config.lr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "lamb"}, "lr must be given with optimizer lamb: the default of supervised is for adamw"),
        ({"optimizer": "sgd", "lr": 0.1, "beta1": 0.5}, "beta1 must not be given with optimizer sgd"),
        ({"momentum": 0.5}, "momentum must not be given with optimizer adamw"),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, muon, sgd, lars, lamb"),
        ({"recipe": "dino", "ema": 0.9}, "ema must be 0 with dino"),
        ({"optimizer": "muon", "lr": 0.1, "fsdp": True}, "fsdp must not be given with optimizer muon"),
        ({"select": "best"}, "select best needs eval_every"),
        ({"patience": 2}, "patience 2 needs eval_every"),
    ],
)
def test_settings_that_contradict_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        resolve_config(Config(**{"data": "synthetic", "recipe": "supervised", **given}))


def test_another_than_the_recipes_optimizer_trains(tmp_path):
    """The run's optimizer is the one that was chosen, with its schedule."""
    from pyvit.train.engine import Run

    tiny = ["embed_dim=24", "depth=1", "num_heads=1", "patch_size=8"]
    settings = {"data": "digits", "steps": 2, "batch_size": 8, "set": tiny, "warmup": 0.0}
    run = Run(Config(**settings, optimizer="lamb", lr=0.01, out=str(tmp_path)))
    assert isinstance(getattr(run.optimizer, "optimizer", run.optimizer), LAMB)
    assert run.step(0, run.batches())["lr"] == 0.01
    run.close()
    assert load_recipe("supervised").optimizer == "adamw"
