"""DINO and DINOv2 against the papers' code: teacher, prototypes, masks, loss weights, learning rates."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pyvit.data import load_data
from pyvit.models.dino import SelfDistillation, block_masks
from pyvit.models.resnet import ResNet
from pyvit.models.vit import VisionTransformer
from pyvit.nn import DropPath
from pyvit.train import Config, engine, train
from pyvit.train.collapse import CollapseDetector, entropies, feature_rank
from pyvit.train.optim import parameter_groups
from pyvit.train.recipe import load_recipe

TINY = ["embed_dim=24", "depth=2", "num_heads=1", "patch_size=8"]
SELF = ["prototypes=40", "hidden=16", "bottleneck=8", "local_crops=2", "local_size=16"]


def settings(name: str, *options: str, **more):
    chosen = {"set": TINY, "option": [*SELF, *options], "data": "digits", "steps": 4, "batch_size": 8, **more}
    return Config(recipe=name, **chosen)


def make(name: str, *options: str, **more):
    config, data = engine.resolve_config(settings(name, *options, **more)), load_data("digits")
    torch.manual_seed(0)
    recipe = load_recipe(name)(config, data).train()
    return recipe, recipe.views(data.train.fetch(range(config.batch_size or 8)), 0, 4)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_the_teacher_drops_nothing(name):
    """Also in training mode and with dropout in the model: two passes of the teacher are equal, two of the student are
    not."""
    recipe, views = make(name, "drop_path=0.3", set=[*TINY, "proj_drop_rate=0.2", "pos_drop_rate=0.2"])
    recipe.eval()
    recipe.train()
    rates = [m.p for m in recipe.model.student.modules() if isinstance(m, DropPath)]
    assert max(rates) == 0.3
    first, second = recipe.outputs(views), recipe.outputs(views)
    assert torch.equal(first.teacher, second.teacher)
    assert not torch.equal(first.student, second.student)
    if name == "dinov2":
        assert torch.equal(first.teacher_patches, second.teacher_patches)
    assert not first.teacher.requires_grad


def test_the_teacher_has_neither_gradient_nor_optimizer_state(tmp_path):
    run = engine.Run(settings("dinov2", out=str(tmp_path / "run")))
    batches = run.batches()
    before = [p.clone() for p in run.recipe.model.teacher.parameters()]
    run.step(0, batches)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not any(
        id(p) in held or p.requires_grad or p.grad is not None for p in run.recipe.model.teacher.parameters()
    )
    momentum = run.recipe.opt["momentum"]
    for old, now, student in zip(
        before, run.recipe.model.teacher.parameters(), run.recipe.model.student.parameters(), strict=True
    ):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * student.detach(), rtol=1e-5, atol=1e-7)
    run.close()


def test_a_resumed_teacher_drops_nothing(tmp_path):
    chosen = settings("dino", "drop_path=0.3", out=str(tmp_path), set=[*TINY, "drop_path_rate=0.3"])
    run = engine.Run(chosen)
    run.step(0, run.batches())
    run.save(1)
    run.close()
    run = engine.Run(chosen)
    run.model.train()
    views = run.recipe.views(run.data.train.fetch(range(8)), 1, 4)
    assert run.start == 1
    assert torch.equal(run.recipe.outputs(views).teacher, run.recipe.outputs(views).teacher)
    run.close()


def test_batch_norms_of_the_teacher_follow_the_batch():
    """As in DINO's code, whose teacher stays in training mode; in evaluation they use running statistics."""
    model = SelfDistillation(ResNet((1, 1, 1, 1), False, num_classes=0, width=8, small=True, img_size=32), 10, 16, 8)
    crops = [torch.randn(4, 3, 32, 32) + 3 for _ in range(2)]
    trained = model.train()(crops).teacher
    assert torch.allclose(
        trained, model(crops).student, atol=1e-5
    )  # the student begins alike, and takes the same statistics
    assert not torch.allclose(model.eval()(crops).teacher, trained, atol=1e-3)


def test_prototypes_are_frozen_for_one_epoch_and_stay_normalised(tmp_path):
    for norm, count in ((True, 1), (False, 2)):
        run = engine.Run(settings("dino", f"norm_last_layer={norm}", out=str(tmp_path / f"{norm}"), batch_size=1442))
        assert run.per_epoch == 1
        batches, last = run.batches(), run.recipe.model.student["head"].last_layer
        moved = []
        for step in range(2):
            before = [p.detach().clone() for p in last.parameters()]
            run.step(step, batches)
            moved.append(sum(not torch.equal(p, q) for p, q in zip(before, last.parameters(), strict=True)))
        assert moved == [0, count]
        if norm:
            torch.testing.assert_close(last.weight.norm(dim=1), torch.ones(40))
        run.close()


def test_ibot_weights_are_those_of_the_papers_code():
    """The cross-entropy of each masked patch divided by the masked patches of its crop, summed, divided by all crops,
    including those without a mask."""
    recipe, views = make("dinov2", "centering='centering'", "koleo=0.0", "drop_path=0.0")
    recipe.ibot.center.normal_()
    mask, total = views["mask"].flatten(0, 1), torch.zeros((), dtype=torch.float64)
    assert 0 < mask.any(1).sum() < len(mask)
    with torch.no_grad():
        got = recipe(views)["ibot"]
        seen = recipe.outputs(views)
        of = recipe.prototypes(patches=True)
        student = (seen.student_patches @ of["student_prototypes"].T).double() / 0.1
        teacher = ((seen.teacher_patches @ of["teacher_prototypes"].T).double() - recipe.ibot.center.double()) / views[
            "teacher_temp"
        ]
        at = 0
        for crop in mask:
            for _ in range(int(crop.sum())):
                total -= (teacher[at].softmax(-1) * student[at].log_softmax(-1)).sum() / int(crop.sum()) / len(mask)
                at += 1
    assert at == len(student)
    torch.testing.assert_close(got.double(), total, rtol=1e-5, atol=1e-6)


def test_masks_are_blocks_on_the_share_of_crops():
    torch.manual_seed(0)
    masks = block_masks(20, (14, 14), (0.1, 0.5), 0.5, spread=True)
    hidden = masks.sum(1)
    assert (hidden > 0).sum() == 10
    counts = hidden.sort().values[10:] / 196
    bounds = torch.linspace(0.1, 0.5, 11)
    assert (counts <= bounds[1:]).all()  # one in each tenth of the range, or a few patches fewer
    assert (counts > bounds[:-1] - 0.03).all()
    views = make("dinov2")[1]
    assert 6 <= (views["mask"].flatten(0, 1).any(1)).sum() <= 8  # half of the 16 large crops, which have 16 patches


def test_rates_are_the_papers():
    recipe, _ = make("dinov2")
    assert load_recipe("dinov2").peak_lr(4096) == pytest.approx(4e-3 * 2)
    assert load_recipe("dino").peak_lr(1024) == pytest.approx(5e-4 * 4)
    named = {id(p): n for n, p in recipe.named_parameters()}
    scales = {
        named[id(p)]: g["lr_scale"]
        for g in parameter_groups(
            recipe, recipe.backbone, 0.9, recipe.rate_scales(), recipe.no_decay(), recipe.own_rates()
        )
        for p in g["params"]
    }
    assert scales["model.student.backbone.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.9**3)
    assert scales["model.student.backbone.pos_embed"] == pytest.approx(0.9**3)
    assert scales["model.student.head.mlp.0.weight"] == 1.0
    config = engine.resolve_config(settings("dino", option=SELF, epochs=10.0, steps=None, lr=1e-3))
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr_scale": 1.0, "decays": True}])
    recipe.config = config
    assert engine._set_rates(optimizer, recipe, config, 99, 100) == pytest.approx(1e-6, abs=1e-6)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(recipe.opt["weight_decay_end"], abs=1e-3)


def test_the_centre_moves_once_a_step():
    """By the mean over micro-batches; not in steps that are skipped because float16 overflowed."""
    recipe, views = make("dino", "center_momentum=0.5", "batch_norm=False")
    cut = [{k: v.chunk(2, 1)[i] if isinstance(v, torch.Tensor) else v for k, v in views.items()} for i in range(2)]
    with torch.no_grad():
        seen = recipe.outputs(views)
        want = 0.5 * (seen.teacher @ recipe.model.head_of("teacher").prototypes.T).mean((0, 1))
        for part in cut:
            recipe(part)
    assert not recipe.loss.center.any()
    recipe.step_skipped()
    recipe.update(0, 4)
    assert not recipe.loss.center.any()
    with torch.no_grad():
        for part in cut:
            recipe(part)
    recipe.update(0, 4)
    torch.testing.assert_close(recipe.loss.center, want, rtol=1e-4, atol=1e-6)


def test_prototypes_keep_their_length_except_with_small_vision_transformers():
    recipe, _ = make("dino")
    assert recipe.opt["norm_last_layer"] == "auto"
    assert recipe.model.student["head"].last_layer.parametrizations.weight.original0.requires_grad
    with torch.device("meta"):
        small, base = (VisionTransformer(embed_dim=dim, depth=1, num_heads=6) for dim in (384, 768))
        assert [recipe.norm_last_layer(m) for m in (small, base, ResNet((1, 1, 1, 1), width=8))] == [False, True, True]
    fixed = make("dino", "norm_last_layer=True")[0].model.student["head"].last_layer.parametrizations.weight.original0
    assert not fixed.requires_grad


def test_signs_of_collapse():
    uniform, same = torch.full((8, 32), 1 / 32), torch.eye(32)[[3] * 8]
    for outputs, each, mean in (
        (uniform, math.log(32), math.log(32)),
        (same, 0, 0),
        (torch.eye(32)[:8], 0, math.log(8)),
    ):
        assert [float(e) for e in entropies(outputs)] == pytest.approx([each, mean], abs=1e-5)
    assert float(feature_rank(torch.eye(32)[:8])) == pytest.approx(8)
    assert float(feature_rank(torch.ones(8, 32))) == pytest.approx(1, abs=1e-4)
    assert 2 < float(feature_rank(torch.randn(8, 3))) < 3
    for outputs, kind in ((uniform, "near the uniform"), (same, "on few prototypes"), (torch.eye(32)[:8], "")):
        values = dict(zip(("teacher_entropy", "batch_entropy"), map(float, entropies(outputs)), strict=True))
        healthy = {"teacher_entropy": 1.0, "batch_entropy": 2.0}
        found = CollapseDetector(32, 8)
        assert not any(found.warning(v, 3) for v in (values, values, healthy, values, values))
        said = [found.warning(values, 3) for _ in range(3)]
        assert bool(said[0]) == bool(kind)  # the third in a row, and only once
        assert kind in said[0]
        assert not any(said[1:])


def test_schedules_do_not_recompile_the_networks(tmp_path):
    """Temperature and momentum change at every step."""
    warm = ["warm_teacher_temp=0.03", "warm_teacher=1.0", "local_crops=0"]
    run = engine.Run(settings("dino", *warm, out=str(tmp_path), set=["embed_dim=24", "depth=1", "num_heads=1"]))
    counter, batches = CompileCounter(), run.batches()
    torch._dynamo.reset()
    run.model.compile(backend=counter)
    temps, graphs = zip(
        *[(run.step(step, batches)["teacher_temp"], counter.frame_count) for step in range(3)], strict=True
    )
    assert temps[0] < temps[1] < temps[2]
    assert 0 < graphs[0] == graphs[2]
    run.close()


def test_a_collapsed_run_says_so(tmp_path, capsys):
    flat = ["teacher_temp=50.0", "warm_teacher_temp=50.0", "local_crops=0"]
    train(settings("dino", *flat, out=str(tmp_path), steps=56, warmup=0.05, log_every=1))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning: collapse" in line]
    assert len(said) == 1
    assert said[0].startswith("step 51: warning: collapse: for 50 steps")  # counted from the end of the warm-up
    assert "uniform" in said[0]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[10]["teacher_entropy"] == pytest.approx(math.log(40), abs=1e-3)
    assert lines[10]["teacher_temp"] == 50
    assert lines[0]["momentum"] < lines[50]["momentum"] < 1
    assert 1 <= lines[10]["feature_rank"] <= 8


@pytest.mark.parametrize("model", ["swin_pico_patch4_window4_32", "vit_pico_patch4_32"])
def test_other_backbones_and_poolings(model):
    more = ["global_pool=avg"] if "vit" in model else []
    recipe, views = make("dino", model=model, set=more, option=[*SELF, "drop_path=0.1"])
    loss = recipe(views)["loss"]
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    unused = [n for n, p in recipe.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mask_low=0.6"], "mask_low must be at most mask_high"),
        (["mask_share=0.01"], "mask_share must mask one of the 2 x 8"),
        (["local_crop=0.9"], "local_crop must be at most global_crop"),
        (["local_size=12"], "local_size must be a multiple of the patch, 8"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        make("dinov2", *options)


def test_one_image_has_no_neighbour():
    with pytest.raises(ValueError, match="koleo must be 0"):
        make("dinov2", batch_size=1)
