"""DINO, iBOT and DINOv2: 20 steps of the recipes beside the formulas of the papers' code, in float64.

The formulas are those of facebookresearch/dino (main_dino.py, utils.py, vision_transformer.py), bytedance/ibot
(main_ibot.py, loader.py) and facebookresearch/dinov2 (train/ssl_meta_arch.py, loss, layers, utils/param_groups.py,
data/masking.py, data/collate.py), written anew as plain PyTorch.
"""

from __future__ import annotations

import ast
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvit.models.dino import block_masks
from pyvit.train import Config, engine
from pyvit.train.recipe import load_recipe

STEPS, WARMUP, WARM_TEMP, FROZEN = 20, 4, 6, 5
LR, END_LR, WEIGHT_DECAY, END_WEIGHT_DECAY, MOMENTUM, CLIP = 2e-3, 1e-6, 0.04, 0.4, 0.9, 0.02
STUDENT_TEMP, WARM, TEMP, CENTER_MOMENTUM = 0.1, 0.04, 0.07, 0.9
HEADS = 2


def cosine_scheduler(base, final, steps, warmup=0):
    iters = np.arange(steps - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * iters / len(iters)))
    return np.concatenate((np.linspace(0, base, warmup), cosine))


def positions(pos, rows, columns):
    """pos (1, 1 + N, D) of a square grid, for another grid."""
    side = math.isqrt(pos.shape[1] - 1)
    if (rows, columns) == (side, side):
        return pos
    grid = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
    return torch.cat((pos[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)), 1)


def vit(w, images, masks=None):
    """Images (B, 3, H, W) to normalised tokens (B, 1 + N, D). ``w``: {name: parameter}."""
    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1])
    rows, columns, width = x.shape[2], x.shape[3], x.shape[1]
    x = x.flatten(2).transpose(1, 2)
    if masks is not None:
        x = torch.where(masks[:, :, None], w["mask_token"], x)
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), 1) + positions(w["pos_embed"], rows, columns)

    def norm(name, x):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(sum(name.endswith("attn.qkv.weight") for name in w)):
        at = f"blocks.{i}"
        qkv = linear(f"{at}.attn.qkv", norm(f"{at}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2)) * (width // HEADS) ** -0.5).softmax(-1) @ v
        y = linear(f"{at}.attn.proj", y.transpose(1, 2).reshape(x.shape))
        x = x + y * w.get(f"{at}.ls1.gamma", 1.0)
        y = linear(f"{at}.mlp.fc2", F.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", x))))
        x = x + y * w.get(f"{at}.ls2.gamma", 1.0)
    return norm("norm", x)


def head(w, x):
    for i in (0, 2, 4):
        x = F.linear(x, w[f"mlp.{i}.weight"], w[f"mlp.{i}.bias"])
        x = F.gelu(x) if i < 4 else F.normalize(x, dim=-1)
    length, direction = (w[f"last_layer.parametrizations.weight.original{i}"] for i in (0, 1))
    return F.linear(x, length * direction / direction.norm(dim=1, keepdim=True))


def part(w, name):
    return {key.removeprefix(f"{name}."): p for key, p in w.items() if key.startswith(f"{name}.")}


class DINO:
    """main_dino.py. ``start``: {name: tensor} of the student; the teacher begins alike."""

    def __init__(self, start, fixed, prototypes):
        self.student = {k: v.clone().requires_grad_(k not in fixed) for k, v in start.items()}
        self.teacher = {k: v.clone() for k, v in start.items()}
        self.center = torch.zeros(prototypes, dtype=torch.float64)
        self.rates = cosine_scheduler(LR, END_LR, STEPS, WARMUP)
        self.decays = cosine_scheduler(WEIGHT_DECAY, END_WEIGHT_DECAY, STEPS)
        self.momenta = cosine_scheduler(MOMENTUM, 1.0, STEPS)
        self.temps = np.concatenate((np.linspace(WARM, TEMP, WARM_TEMP), np.full(STEPS - WARM_TEMP, TEMP)))
        self.groups = {n: self.group(n, p) for n, p in self.student.items() if p.requires_grad}
        groups = [{"params": [self.student[n]]} for n in self.groups]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)

    def group(self, name, p):
        """Factors on learning rate and weight decay."""
        return 1.0, 0.0 if name.endswith(".bias") or p.dim() == 1 else 1.0

    def loss(self, views, temp):
        student = [vit(part(self.student, "backbone"), views["global"].flatten(0, 1))]
        if views["local"] is not None:
            student.append(vit(part(self.student, "backbone"), views["local"].flatten(0, 1)))
        student = head(part(self.student, "head"), torch.cat([x[:, 0] for x in student])) / STUDENT_TEMP
        student = student.chunk(len(student) // views["global"].shape[1])
        with torch.no_grad():
            scores = vit(part(self.teacher, "backbone"), views["global"].flatten(0, 1))[:, 0]
            scores = head(part(self.teacher, "head"), scores)
            teacher = ((scores - self.center) / temp).softmax(-1).chunk(2)
            self.center = self.center * CENTER_MOMENTUM + scores.mean(0) * (1 - CENTER_MOMENTUM)
        terms = [
            torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
            for i, q in enumerate(teacher)
            for j, s in enumerate(student)
            if i != j
        ]
        return sum(terms) / len(terms)

    def limit(self, step):
        for name in self.groups:
            p = self.student[name]
            p.grad *= min(1.0, CLIP / (float(p.grad.norm()) + 1e-6))
            if step < FROZEN and "last_layer" in name:
                p.grad = None

    def rate(self, step, name):
        return self.rates[step] * self.groups[name][0]

    def step(self, step, views):
        """-> loss, gradients before clipping."""
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            group["lr"], group["weight_decay"] = self.rate(step, name), self.decays[step] * self.groups[name][1]
        loss = self.loss(views, self.temps[step])
        self.optimizer.zero_grad()
        loss.backward()
        gradients = {n: self.student[n].grad.clone() for n in self.groups}
        self.limit(step)
        self.optimizer.step()
        m = self.momenta[step]
        for name, p in self.teacher.items():
            p.mul_(m).add_((1 - m) * self.student[name].detach())
        return loss.detach(), gradients


def sinkhorn_knopp(scores, temp):
    q = torch.exp(scores / temp).t()
    k, b = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= k
        q /= q.sum(0, keepdim=True)
        q /= b
    return (q * b).t()


class DINOv2(DINO):
    """ssl_meta_arch.py; iBOT with one head, centring and neither KoLeo nor LayerScale."""

    def __init__(self, start, fixed, prototypes, sinkhorn, koleo, layer_decay, patch_rate):
        self.sinkhorn, self.koleo, self.layer_decay, self.patch_rate = sinkhorn, koleo, layer_decay, patch_rate
        self.depth = sum(name.endswith("attn.qkv.weight") for name in start)
        super().__init__(start, fixed, prototypes)
        self.patch_center = torch.zeros_like(self.center)
        self.patch_head = "patch_head" if any(k.startswith("patch_head") for k in start) else "head"

    def group(self, name, p):
        layer = self.depth + 1
        if name.startswith("backbone"):
            if any(s in name for s in ("pos_embed", "patch_embed", "mask_token", "cls_token")):
                layer = 0
            elif ".blocks." in name:
                layer = int(name.split(".")[2]) + 1
        scale = self.layer_decay ** (self.depth + 1 - layer) * (self.patch_rate if "patch_embed" in name else 1.0)
        return scale, 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0

    def rate(self, step, name):
        return 0.0 if step < FROZEN and "last_layer" in name else super().rate(step, name)

    def limit(self, step):
        for side in ("backbone", "head", "patch_head"):
            names = [n for n in self.groups if n.startswith(side)]
            norm = math.sqrt(sum(float(self.student[n].grad.square().sum()) for n in names))
            for n in names:
                self.student[n].grad *= min(1.0, CLIP / (norm + 1e-6))

    def targets(self, scores, center, temp):
        if self.sinkhorn:
            return sinkhorn_knopp(scores, temp), center
        moved = center * CENTER_MOMENTUM + scores.mean(0) * (1 - CENTER_MOMENTUM)
        return ((scores - center) / temp).softmax(-1), moved

    def loss(self, views, temp):
        crops, masks = views["global"].flatten(0, 1), views["mask"].flatten(0, 1)
        backbone = part(self.student, "backbone")
        student = vit(backbone, crops, masks)
        with torch.no_grad():
            seen = vit(part(self.teacher, "backbone"), crops)
            first, second = seen[:, 0].chunk(2)
            scores = head(part(self.teacher, "head"), torch.cat((second, first)))
            teacher, self.center = self.targets(scores, self.center, temp)
            patches = head(part(self.teacher, self.patch_head), seen[:, 1:][masks])
            patch_teacher, self.patch_center = self.targets(patches, self.patch_center, temp)
        local_crops = len(views["local"])
        count = 2 + 2 * local_crops
        local = vit(backbone, views["local"].flatten(0, 1))[:, 0]
        loss = 0.0
        for s in head(part(self.student, "head"), local).chunk(local_crops):
            for t in teacher.chunk(2):
                loss -= (t * F.log_softmax(s / STUDENT_TEMP, dim=-1)).sum(-1).mean() / count
        s = head(part(self.student, "head"), student[:, 0])
        loss -= (teacher * F.log_softmax(s / STUDENT_TEMP, dim=-1)).sum(-1).mean() * 2 / count
        for tokens in student[:, 0].chunk(2) if self.koleo else ():
            x = F.normalize(tokens, dim=-1, eps=1e-8)
            near = (x @ x.T).fill_diagonal_(-1).argmax(1)
            loss -= self.koleo * torch.log(F.pairwise_distance(x, x[near], 2, 1e-8) + 1e-8).mean()
        s = head(part(self.student, self.patch_head), student[:, 1:][masks])
        each = (patch_teacher * F.log_softmax(s / STUDENT_TEMP, dim=-1)).sum(-1)
        weight = (1 / masks.sum(-1).double().clamp(min=1.0))[:, None].expand_as(masks)[masks]
        return loss - (each * weight).sum() / len(masks)


def options(**more):
    chosen = {
        "prototypes": 48, "hidden": 16, "bottleneck": 8, "local_crops": 2, "local_size": 16, "drop_path": 0.0,
        "momentum": MOMENTUM, "warm_teacher_temp": WARM, "teacher_temp": TEMP, "warm_teacher": WARM_TEMP / STEPS,
        "freeze_last": FROZEN / 180, **more,
    }  # fmt: skip
    return [f"{k}={v!r}" for k, v in chosen.items()]


IBOT = {"centering": "centering", "separate_head": False, "koleo": 0.0, "layer_scale": 0.0, "patch_embed_rate": 1.0}
CASES = {
    "dino": ("dino", {"batch_norm": False}, None),
    "dino, two crops": ("dino", {"batch_norm": False, "local_crops": 0, "norm_last_layer": True}, None),
    "ibot": ("dinov2", IBOT, {"sinkhorn": False, "koleo": 0.0, "layer_decay": 1.0, "patch_rate": 1.0}),
    "dinov2": ("dinov2", {}, {"sinkhorn": True, "koleo": 0.1, "layer_decay": 0.9, "patch_rate": 0.2}),
    "dinov2, one head": (
        "dinov2",
        {"separate_head": False, "layer_scale": 0.1, "norm_last_layer": True},
        {"sinkhorn": True, "koleo": 0.1, "layer_decay": 0.9, "patch_rate": 0.2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_20_steps_are_those_of_the_original(case, tmp_path):
    recipe, more, original = CASES[case]
    config = Config(
        recipe=recipe, data="digits", model="vit_pico_patch8_32", out=str(tmp_path), steps=STEPS, batch_size=8, lr=LR,
        min_lr=END_LR, warmup=WARMUP / STEPS, clip=CLIP, layer_decay=(original or {}).get("layer_decay"),
        weight_decay=WEIGHT_DECAY, option=options(**more, weight_decay_end=END_WEIGHT_DECAY),
        set=["embed_dim=16", "depth=2", f"num_heads={HEADS}"],
    )  # fmt: skip
    run = engine.Run(config)
    assert run.per_epoch == 180
    model = run.recipe.double().model
    start = {k: p.detach() for k, p in model.student.named_parameters()}
    fixed = [k for k, p in model.student.named_parameters() if not p.requires_grad]
    assert len(fixed) == (1 if more.get("norm_last_layer") else 0)
    want = DINO(start, fixed, 48) if original is None else DINOv2(start, fixed, 48, **original)
    seen, gradients, batches = {}, {}, run.batches()

    def views(*args, make=run.recipe.views):
        seen.update(make(*args))
        return seen

    def keep(*args, after=run.recipe.gradients):
        gradients.update({k: p.grad.clone() for k, p in model.student.named_parameters() if p.requires_grad})
        after(*args)

    run.recipe.views, run.recipe.gradients = views, keep
    named = {id(p): k for k, p in model.student.named_parameters()}
    clipped = 0
    for step in range(STEPS):
        got = run.step(step, batches)
        loss, wanted = want.step(step, seen)
        assert got["loss"] == pytest.approx(float(loss), rel=1e-9), step
        assert got["lr"] == pytest.approx(want.rates[step], rel=1e-12)
        assert got["teacher_temp"] == pytest.approx(want.temps[step])
        assert got["momentum"] == pytest.approx(want.momenta[step])
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                name = named[id(p)]
                assert group["lr"] == pytest.approx(want.rate(step, name), rel=1e-12), name
                decay = want.decays[step] * want.groups[name][1]
                assert group["weight_decay"] == pytest.approx(decay, rel=1e-12), name
        assert gradients.keys() == wanted.keys()
        scale = max(float(g.abs().max()) for g in wanted.values())
        for name, g in wanted.items():
            torch.testing.assert_close(gradients[name], g, rtol=1e-7, atol=1e-10 * scale, msg=lambda m, n=name: n + m)
        clipped += any(float(g.norm()) > CLIP for g in wanted.values())
        same(run.recipe.loss.center, want.center, "centre")
        if original is not None:
            same(run.recipe.ibot.center, want.patch_center, "centre of patches")
    assert clipped > STEPS / 2
    for name, p in model.teacher.named_parameters():
        same(p, want.teacher[name], f"teacher {name}")
        same(model.student.get_parameter(name), want.student[name], f"student {name}")
        if name not in fixed:
            assert not torch.equal(p, want.student[name]), name
    run.close()


def same(got, want, what):
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-7, atol=1e-9, msg=lambda m: f"{what}: {m}")


def original_mask(wanted, least, rows=14, columns=14):
    """MaskingGenerator of DINOv2 (least = 4) and the loop of iBOT's loader (least = 16)."""
    mask, count = np.zeros((rows, columns), dtype=bool), 0
    while count < wanted:
        left, added = wanted - count, 0
        for _ in range(10):
            area = random.uniform(least, left)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < columns and h < rows:
                top, left_side = random.randint(0, rows - h), random.randint(0, columns - w)
                view = mask[top : top + h, left_side : left_side + w]
                new = h * w - int(view.sum())
                if 0 < new <= left:
                    view[:] = True
                    added = new
            if added:
                break
        if not added:
            break
        count += added
    return mask


@pytest.mark.parametrize("recipe", ["ibot", "dinov2"])
def test_masks_have_the_statistics_of_the_original(recipe):
    """Share of masked patches, masks that are empty, and masked pairs of neighbours, over 600 masks."""
    random.seed(0)
    torch.manual_seed(0)
    count, low, high = 600, 0.1, 0.5
    masks = block_masks(count, (14, 14), (low, high), 0.5, spread=recipe == "dinov2").view(count, 14, 14).numpy()
    if recipe == "dinov2":
        bounds = np.linspace(low, high, count // 2 + 1)
        wanted = [int(196 * random.uniform(*bounds[i : i + 2])) for i in range(count // 2)]
        originals = [original_mask(n, 4) for n in wanted] + [np.zeros((14, 14), dtype=bool)] * (count // 2)
        assert sum(m.any() for m in masks) == count // 2
    else:  # pred_ratio 0 and 0.3, pred_ratio_var 0 and 0.2
        shares = [random.choice((0.0, random.uniform(low, high))) for _ in range(count)]
        originals = [original_mask(196 * share, 16) for share in shares]
    for what in (
        lambda m: m.mean(),
        lambda m: (m[:, 1:] & m[:, :-1]).mean(),
        lambda m: (m[1:] & m[:-1]).mean(),
        lambda m: not m.any(),
    ):
        ours, theirs = (np.array([what(m) for m in each], dtype=float) for each in (masks, np.stack(originals)))
        error = math.hypot(ours.std(), theirs.std()) / math.sqrt(count)
        assert abs(ours.mean() - theirs.mean()) < 4 * error + 1e-12
    shares = np.sort(masks.mean((1, 2)))
    assert shares[-1] <= high


@pytest.mark.parametrize("recipe", ["dino", "dinov2"])
def test_the_tables_of_the_documentation_have_the_defaults(recipe):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    kind = load_recipe(recipe)
    defaults = {name: option.default for name, option in kind.options.items()} | kind.defaults
    defaults |= {"base_lr": kind.base_lr, "base_batch": kind.base_batch}
    section = re.search(rf"^## {kind.__name__}\n(.*?)^## ", page, re.M | re.S)[1]
    told = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and (found := re.match(r"`(\w+)`", cells[0])):
            told.append((found[1], cells[3]))
        elif len(cells) == 3 and (found := re.match(r"`(?:--)?([\w-]+)[= ]([^`]*)`", cells[1])):
            told.append((found[1].replace("-", "_"), found[2]))
    names = {name for name, _ in told} - {"model"}
    for name, value in told:
        if name not in names:
            continue
        wanted = defaults[name]
        assert (value if isinstance(wanted, str) else ast.literal_eval(value)) == wanted, name
    untold = {"distort", "slant", "local_size"}  # augmentations for small and for spoken data
    assert names >= defaults.keys() - untold
