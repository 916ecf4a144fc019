"""SimCLR beside the paper (Chen et al., 2020): the NT-Xent loss, the projection head and LARS."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from pyvit.eval.features import embed
from pyvit.train.config import Config
from pyvit.train.engine import resolve_config
from tests.train.originals import LARS, AdamW, Original, compare, cosine, run_of

SET = ["depth=1", "embed_dim=24", "num_heads=2"]
HEAD = ["hidden=16", "out=8"]


def batch_norm(x, weight=1.0, bias=0.0):
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * weight + bias


class Features(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return embed(self.model, images)


def simclr_loss(model, temperature=0.1):
    """Algorithm 1 of the paper, pair by pair."""

    def loss(p, views):
        inner = {name: value for name, value in p.items() if name.startswith("model.")}
        h = functional_call(Features(model), inner, torch.cat([views["one"], views["two"]]))
        z = batch_norm(h @ p["head.0.weight"].T, p["head.1.weight"], p["head.1.bias"]).relu()
        z = F.normalize(batch_norm(z @ p["head.3.weight"].T, p["head.4.weight"]), dim=1)
        n = len(z) // 2
        total = 0.0
        for i in range(2 * n):
            positive = (i + n) % (2 * n)
            others = [k for k in range(2 * n) if k != i]
            logits = z[others] @ z[i] / temperature
            total = total - logits.log_softmax(0)[others.index(positive)]
        return total / (2 * n)

    return loss


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_simclr(optimizer, tmp_path):
    """LARS with rate 0.3 x batch / 256, decay 1e-6; biases and batch norms are neither decayed nor adapted."""
    given = "lars" if optimizer == "lars" else None
    run = run_of(tmp_path, recipe="simclr", set=SET, option=HEAD, optimizer=given, batch_size=8, warmup=0.25, steps=20)
    decay, base, method = (1e-6, 0.3, LARS()) if optimizer == "lars" else (0.1, 1.5e-4, AdamW())

    def group(name, p):
        token = name.endswith(("cls_token", "pos_embed"))
        return 1.0, 0.0 if p.dim() == 1 or token else decay, p.dim() > 1

    last = run.recipe.head[4]
    trained = {name: p for name, p in run.recipe.named_parameters() if p.requires_grad}
    assert "head.4.bias" not in trained
    assert not last.bias.any()
    original = Original(
        trained, simclr_loss(run.recipe.model), group, lambda step: cosine(step, 20, base * 8 / 256, 0.0, 5), method
    )
    compare(run, original)


@pytest.mark.parametrize(
    ("model", "given", "wanted"),
    [
        ("resnet50", None, ("lars", 4.8, 1e-6)),
        ("vit_small_patch16_224", None, ("adamw", 2.4e-3, 0.1)),
        ("swin_tiny_patch4_window7_224", None, ("adamw", 2.4e-3, 0.1)),
        ("simclr_resnet18", None, ("lars", 4.8, 1e-6)),
        ("vit_small_patch16_224", "lars", ("lars", 4.8, 1e-6)),
        ("resnet18", "adamw", ("adamw", 2.4e-3, 0.1)),
    ],
)
def test_the_optimizer_follows_the_model(model, given, wanted):
    config = resolve_config(Config(recipe="simclr", model=model, data="synthetic", optimizer=given))
    assert config.optimizer == wanted[0]
    assert (config.lr, config.weight_decay) == pytest.approx(wanted[1:])
