"""CLIP and SigLIP beside their originals: 20 steps of the engine in float64 against the formulas of open_clip and
big_vision, on the same views from the same weights."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pyvit
from pyvit.data import load_data
from pyvit.eval.zero_shot import TEMPLATES, text_classifier
from pyvit.train import Config
from pyvit.train.engine import Run, resolve_config
from pyvit.train.presets import PRESETS
from pyvit.train.recipe import load_recipe
from pyvit.train.runs import load_run

STEPS, BATCH = 20, 12
VIT = ["width=24", "depth=1", "num_heads=1", "patch_size=8"]
RESNET = ["layers=(1,1,1,1)", "width=8", "num_heads=4", "embed_dim=16", "text=cbow", "text_width=24"]
CASES = {
    "clip": {"recipe": "clip", "model": "clip_pico_patch8_32", "set": [*VIT, "text_depth=1"]},
    "resnet": {"recipe": "clip", "model": "clip_resnet_pico_64", "image_size": 32, "set": RESNET},
    "siglip": {"recipe": "siglip", "model": "siglip_pico_patch8_32", "set": VIT, "warmup": 0.25},
}


class OpenClip:
    """The loss, schedule, optimizer and clamp of open_clip, whose settings are those of CLIP's paper (tables 18 to
    20)."""

    lr, weight_decay, clip = 5e-4, 0.2, math.inf

    def __init__(self, resnet: bool) -> None:
        self.betas, self.eps = ((0.9, 0.999), 1e-8) if resnet else ((0.9, 0.98), 1e-6)

    def loss(self, model, views):
        images, text = (F.normalize(x, dim=1) for x in (model.visual(views["images"]), model.text(views["text"])))
        logits = model.logit_scale.exp() * images @ text.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def rate(self, step):
        warmup = STEPS // 10
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) * self.lr

    def decay(self, name, p):
        # open_clip lets the positions of the ResNet's pooling decay, unlike all others.
        unweighted = p.ndim < 2 or name.endswith(("pos_embed", "cls_token", "positional_embedding"))
        return 0.0 if unweighted else self.weight_decay * self.rate(self.step)

    def clamp(self, model):
        model.logit_scale.clamp_(0, math.log(100))


class BigVision(OpenClip):
    """The same of big_vision: its weight decay is not multiplied by the learning rate."""

    lr, weight_decay, clip, betas, eps = 1e-3, 1e-4, 1.0, (0.9, 0.95), 1e-8

    def __init__(self) -> None:
        pass

    def loss(self, model, views):
        images, text = (F.normalize(x, dim=1) for x in (model.visual(views["images"]), model.text(views["text"])))
        logits = images @ text.T * model.logit_scale.exp() + model.logit_bias
        return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum(1).mean()

    def rate(self, step):
        warmup = 5
        progress = min(max((step - warmup) / (STEPS - warmup), 0.0), 1.0)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress)) * min(1.0, step / warmup)

    def decay(self, name, p):
        kernel = p.ndim > 1 and name.endswith("weight") and name != "text.token_embedding.weight"
        return self.weight_decay * self.rate(self.step) / self.lr if kernel else 0.0

    def clamp(self, model):
        pass


@torch.no_grad()
def update(original, model, moments, step):
    """Adam with decoupled weight decay. Returns the gradients before clipping."""
    original.step, (b1, b2) = step, original.betas
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    for name, p in model.named_parameters():
        if name not in found:
            continue
        g = found[name] * min(1.0, original.clip / float(norm))
        m, v = moments.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m.mul_(b1).add_((1 - b1) * g)
        v.mul_(b2).add_((1 - b2) * g * g)
        change = m / (1 - b1 ** (step + 1)) / ((v / (1 - b2 ** (step + 1))).sqrt() + original.eps)
        p.sub_(original.rate(step) * change + original.decay(name, p) * p)
    original.clamp(model)
    return found


@pytest.fixture(autouse=True)
def _no_presets(monkeypatch):
    """The recipes' own defaults."""
    for recipe in ("clip", "siglip"):
        monkeypatch.delitem(PRESETS, (recipe, "digits"))


@pytest.mark.parametrize(
    ("name", "accumulate", "scale"),
    [("clip", 1, 4.7), ("clip", 2, 4.7), ("resnet", 1, -0.01), ("siglip", 1, 4.7), ("siglip", 2, math.log(10))],
)
def test_twenty_steps_are_those_of_the_original(tmp_path, name, accumulate, scale):
    """Loss, gradients, temperature, learning rate and weights. With ``accumulate``, the original has the whole batch in
    one pass, and the recipe GradCache. The initial scales test both clamps of CLIP, and that SigLIP has none."""
    settings = {"data": "digits", "steps": STEPS, "batch_size": BATCH, "accumulate": accumulate, "out": str(tmp_path)}
    run = Run(Config(**settings, **{"option": ["context=24"], **CASES[name]}))
    run.recipe.double()
    model = run.recipe.model
    model.logit_scale.data.fill_(scale)
    other, moments = copy.deepcopy(model), {}
    original = BigVision() if name == "siglip" else OpenClip(name == "resnet")
    seen, gradients, views = [], {}, run.recipe.views

    def recorded(*args):
        found = views(*args)
        seen.append({"images": found["images"].double(), "text": found["text"]})
        return seen[-1]

    run.recipe.views = recorded
    run.recipe.gradients = lambda step, steps: gradients.update(
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    )
    # optax divides by the norm, torch by the norm + 1e-6.
    rtol = 1e-5 if original.clip < math.inf else 1e-8
    batches = run.batches()
    for step in range(STEPS):
        seen.clear()
        found = run.step(step, batches)
        other.zero_grad(set_to_none=True)
        loss = original.loss(other, {key: torch.cat([each[key] for each in seen]) for key in seen[0]})
        loss.backward()
        expected = update(original, other, moments, step)
        assert found["loss"] == pytest.approx(float(loss.detach()), rel=rtol)
        assert found["lr"] == pytest.approx(original.rate(step), rel=1e-12)
        assert gradients.keys() == expected.keys()
        most = max(float(g.abs().max()) for g in expected.values())
        for key, want in expected.items():
            torch.testing.assert_close(gradients[key], want, rtol=rtol, atol=rtol * most, msg=lambda m, k=key: k + m)
    run.close()
    start, bound = math.exp(scale), float(other.logit_scale.detach().exp())
    assert (bound > 100.5) if (name, start > 100) == ("siglip", True) else bound < 100.0001
    for key, want in other.state_dict().items():
        atol = 20 * original.lr * rtol
        if key.endswith("qkv.bias"):  # the gradient of a bias of keys is rounding, which Adam turns into full steps
            continue
        torch.testing.assert_close(model.state_dict()[key], want, rtol=rtol, atol=atol, msg=lambda m, k=key: k + m)


def test_warm_up_has_steps():
    """2000 of a long run, as in the paper; a tenth of a short one; a given share has priority."""
    for warmup, steps, expected in ((None, 390_625, 2000), (None, 300, 30), (0.5, 300, 150)):
        settings = {**CASES["clip"], "data": "digits", "steps": steps, "batch_size": 8, "warmup": warmup}
        config = resolve_config(Config(**settings))
        recipe = load_recipe("clip")(config, load_data("digits"))
        rates = [recipe.schedule(s, steps)["lr"] for s in (expected - 2, expected - 1, expected)]
        assert rates[0] < rates[1] == rates[2] == config.lr


@pytest.mark.parametrize("text", ["transformer", "cbow"])
@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_towers_and_learned_tokens(tmp_path, image, text):
    """The paper's image and text encoders in all pairs, trained with learned tokens, which are kept with the run."""
    sizes = [f"text={text}", "text_width=24", *(["text_depth=1"] if text == "transformer" else [])]
    case = CASES["clip" if image == "vit" else "resnet"]
    sizes = [*(s for s in case["set"] if not s.startswith("text")), *sizes]
    options = ["tokenizer=bpe", "context=12"]
    settings = {**case, "set": sizes, "option": options, "steps": 1, "batch_size": 8, "out": str(tmp_path)}
    run = Run(Config(data="digits", **settings))
    run.run()
    before = run.recipe.tokenizer(["a handwritten seven", "9"])
    run.close()
    recipe, _ = load_run(tmp_path)
    assert torch.equal(recipe.tokenizer(["a handwritten seven", "9"]), before)
    assert type(recipe.model.visual).__name__ == {"vit": "VisionTransformer", "resnet": "CLIPResNet"}[image]
    assert type(recipe.model.text).__name__ == {"transformer": "TextTransformer", "cbow": "TextCBOW"}[text]
    assert recipe.model.text.vocab_size == recipe.tokenizer.vocab_size > 300


def test_initial_weights_of_siglip():
    """Standard deviations of big_vision: Xavier's sqrt(2 / (inputs + outputs)) of each matrix, LeCun's
    sqrt(1 / inputs)."""
    torch.manual_seed(0)
    model = pyvit.create_model("siglip_pico_patch8_64", vocab_size=500)
    state = model.state_dict()
    wanted = {
        "visual.blocks.1.attn.qkv.weight": 96**-0.5,
        "visual.attn_pool.kv.weight": 96**-0.5,
        "text.blocks.3.attn.proj.weight": 96**-0.5,
        "text.blocks.0.mlp.fc1.weight": (2 / 480) ** 0.5,
        "visual.blocks.0.mlp.fc2.bias": 1e-6,
        "visual.patch_embed.proj.weight": 192**-0.5,
        "visual.pos_embed": 96**-0.5,
        "text.positional_embedding": 96**-0.5,
        "text.token_embedding.weight": 96**-0.5,
        "text.proj.weight": 96**-0.5,
    }
    for key, deviation in wanted.items():
        assert float(state[key].std()) == pytest.approx(deviation, rel=0.03 if state[key].dim() > 1 else 0.3), key
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(10))
    assert float(model.logit_bias.detach()) == -10


def test_class_embeddings_are_the_paper_s():
    """Each prompt's embedding is normalised, then their mean is (section 3.1.4)."""
    assert len(set(TEMPLATES)) == 80
    assert all(t.count("{}") == 1 for t in TEMPLATES)
    table = torch.randn(5, 4)

    class Model(torch.nn.Linear):
        def encode_text(self, ids):
            return F.normalize(table[ids], dim=-1)

    said = []

    def tokenizer(texts):
        said.extend(texts)
        return torch.tensor([len(t) % 5 for t in texts])

    found = text_classifier(Model(1, 1), tokenizer, ["red_fox", "ox"], TEMPLATES)
    assert "a photo of many red fox." in said
    for row, name in zip(found, ("red fox", "ox"), strict=True):
        rows = torch.stack([table[len(t.format(name)) % 5] for t in TEMPLATES])
        mean = (rows / rows.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_the_table_has_the_defaults(name):
    """Settings in the first column of docs/recipes.md have the values in the third."""
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    section = re.split(r"^## ", text.split(f"\n## {name}\n")[1], flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| `([^`]*)`", section, re.MULTILINE)
    recipe = load_recipe(name.lower())
    known = {**recipe.defaults, **{key: option.default for key, option in recipe.options.items()}}
    known |= {"betas": recipe.betas, "eps": recipe.eps, "optimizer": recipe.optimizer}
    assert dict(rows) == {key: str(known[key]) for key in known if key != "tokenizer"}
