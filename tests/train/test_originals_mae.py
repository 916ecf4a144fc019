"""MAE beside the paper (He et al., 2022): a network, masks, loss and optimiser of its own."""

import math

import torch
import torch.nn.functional as F

from pyvit.data import load_data
from pyvit.train.config import Config
from pyvit.train.engine import resolve_config
from pyvit.train.recipe import load_recipe
from tests.train.originals import AdamW, Original, close, compare, cosine, run_of

PATCH, SIDE, HEADS = 8, 32, 2


def position(dim, n):
    """Sine and cosine of the column, then of the row, of each patch of an n x n grid (Vaswani et al., 2017)."""
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*[torch.arange(n, dtype=torch.float64)] * 2, indexing="ij")
    parts = [(at.flatten()[:, None] * frequency) for at in (column, row)]
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], 1)


def block(p, name, x):
    """A pre-norm transformer block with ``HEADS`` heads."""

    def norm(which, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.{which}.weight"], p[f"{name}.{which}.bias"], 1e-6)

    def linear(which, x):
        return x @ p[f"{name}.{which}.weight"].T + p[f"{name}.{which}.bias"]

    b, n, d = x.shape
    q, k, v = linear("attn.qkv", norm("norm1", x)).view(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(d // HEADS)).softmax(-1)
    x = x + linear("attn.proj", (weights @ v).transpose(1, 2).reshape(b, n, d))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


def mae_loss(fixed, mask_ratio=0.75):
    """Section 3. ``fixed``: the positions, which are not trained."""

    def loss(parameters, views):
        p = {name.removeprefix("model."): value for name, value in {**fixed, **parameters}.items()}
        images, noise = views["images"], views["noise"]
        b, side = len(images), SIDE // PATCH
        cut = images.view(b, 3, side, PATCH, side, PATCH)
        pixels = cut.permute(0, 2, 4, 1, 3, 5).reshape(b, side**2, -1)  # the projection's order: channel, row, column
        x = pixels @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"] + p["pos_embed"][:, 1:]
        kept = int(side**2 * (1 - mask_ratio))
        loss, count = 0.0, 0
        for i in range(b):  # one image at a time, by sets of patches
            order = sorted(range(side**2), key=lambda n, i=i: float(noise[i, n]))
            visible, hidden = order[:kept], order[kept:]
            seen = torch.cat([p["cls_token"][0] + p["pos_embed"][0, :1], x[i, visible]])[None]
            seen = block(p, "blocks.0", seen)
            seen = F.layer_norm(seen, seen.shape[-1:], p["norm.weight"], p["norm.bias"], 1e-6)
            seen = seen @ p["decoder_embed.weight"].T + p["decoder_embed.bias"]
            full = p["mask_token"][0].expand(side**2, -1).clone()
            full[visible] = seen[0, 1:]
            y = torch.cat([seen[0, :1], full])[None] + p["decoder_pos_embed"]
            y = block(p, "decoder_blocks.0", y)
            y = F.layer_norm(y, y.shape[-1:], p["decoder_norm.weight"], p["decoder_norm.bias"], 1e-6)
            y = (y @ p["decoder_pred.weight"].T + p["decoder_pred.bias"])[0, 1:]
            target = cut[i].permute(1, 3, 2, 4, 0).reshape(side**2, -1)  # row, column, channel
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
            for n in hidden:
                loss, count = loss + (y[n] - target[n]).square().mean(), count + 1
        return loss / count

    return loss


def test_mae(tmp_path):
    decoder = ["decoder_dim=16", "decoder_depth=1", f"decoder_heads={HEADS}"]
    settings = {"set": ["depth=1", "embed_dim=24", f"num_heads={HEADS}"], "option": decoder, "batch_size": 8}
    run = run_of(tmp_path, recipe="mae", **settings, warmup=0.25, steps=20)
    trained, fixed = {}, {}
    for name, p in run.recipe.named_parameters():
        (trained if p.requires_grad else fixed)[name] = p
    side = SIDE // PATCH
    assert set(fixed) == {"model.pos_embed", "model.decoder_pos_embed"}
    for name, dim in (("model.pos_embed", 24), ("model.decoder_pos_embed", 16)):
        close(fixed[name][0, 1:], position(dim, side), name, 1e-6)
        assert not fixed[name][0, 0].any()
    assert run.recipe.betas == (0.9, 0.95)

    def group(name, p):
        plain = p.dim() == 1 or name.endswith(("cls_token", "mask_token"))
        return 1.0, 0.0 if plain else 0.05, False

    peak = 1.5e-4 * 8 / 256
    original = Original(
        trained, mae_loss(fixed), group, lambda step: cosine(step, 20, peak, 0.0, 5), AdamW(betas=(0.9, 0.95))
    )
    compare(run, original)


def test_masks_are_uniform():
    """Each image hides 12 of its 16 patches, each patch equally often, and never the same ones."""
    data = load_data("synthetic", SIDE, count=8)
    config = Config(recipe="mae", data="synthetic", model="vit_pico_patch8_32", set=["depth=1"])
    recipe = load_recipe("mae")(resolve_config(config), data)
    torch.manual_seed(0)
    views = recipe.views({"image": torch.zeros(256, 3, SIDE, SIDE, dtype=torch.uint8)}, 0, 1)
    _, _, mask = recipe.model.random_masking(256, 16, 0.75, views["noise"])
    assert (mask.sum(1) == 12).all()
    assert (abs(mask.mean(0) - 0.75) < 4.5 * math.sqrt(0.75 * 0.25 / 256)).all()
    assert len(mask.unique(dim=0)) > 200
