"""Supervised training and fine-tuning beside DeiT, Swin and MAE's fine-tuning."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score, precision_recall_fscore_support
from torch.func import functional_call

from pyvit.data import load_data
from pyvit.eval import classification
from pyvit.train import train
from pyvit.train.config import Config
from pyvit.train.engine import BatchSampler, resolve_config
from pyvit.train.recipe import load_recipe
from pyvit.train.runs import load_run
from tests.train.originals import AdamW, Original, close, compare, cosine, run_of

TINY = ["depth=1", "embed_dim=24", "num_heads=2"]
STILL = ["drop_path=0.0", "repeats=3"]


def soft_cross_entropy(model, prefix="model."):
    """timm's SoftTargetCrossEntropy of mixed targets, each smoothed to 1 - s + s / C and s / C."""

    def loss(parameters, views):
        given = {name.removeprefix(prefix): p for name, p in parameters.items()}
        logits = functional_call(model, given, views["images"])
        targets, classes = views["targets"], views["targets"].shape[1]
        on, off = 1 - 0.1 + 0.1 / classes, 0.1 / classes
        return -((targets * on + (1 - targets) * off) * logits.log_softmax(1)).sum(1).mean()

    return loss


def test_deit(tmp_path):
    """AdamW, linear warm-up from 1e-6, cosine to 1e-5; no decay of biases, norms, positions and the class token."""
    run = run_of(tmp_path, recipe="supervised", set=TINY, option=STILL, batch_size=48, warmup=0.25, steps=20)
    peak = 5e-4 * 48 / 512

    def group(name, p):
        plain = p.dim() == 1 or name.endswith((".bias", "pos_embed", "cls_token"))
        return 1.0, 0.0 if plain else 0.05, False

    model = run.recipe.model
    original = Original(
        dict(run.recipe.named_parameters()), soft_cross_entropy(model), group,
        lambda step: cosine(step, 20, peak, 1e-5, 5, 1e-6), AdamW(),
    )  # fmt: skip
    compare(run, original)


def test_swin(tmp_path):
    """As DeiT, with rates for the batch of 512, clipped gradients, and no decay of the position bias tables."""
    run = run_of(
        tmp_path, recipe="supervised", model="swin_pico_patch4_window4_32", option=["drop_path=0.0"], steps=20,
        set=["depths=(1,1)", "embed_dim=24", "num_heads=(1,2)"], warmup=0.25, clip=1.0, batch_size=16,
    )  # fmt: skip

    def group(name, p):
        plain = p.dim() == 1 or name.endswith((".bias", "relative_position_bias_table"))
        return 1.0, 0.0 if plain else 0.05, False

    share = 16 / 512
    original = Original(
        dict(run.recipe.named_parameters()), soft_cross_entropy(run.recipe.model), group,
        lambda step: cosine(step, 20, 5e-4 * share, 5e-6 * share, 5, 5e-7 * share), AdamW(), clip=1.0,
    )  # fmt: skip
    compare(run, original)


def test_mae_fine_tuning(tmp_path):
    """Layer-wise rates, mean of the patches and fc_norm; the run's folder is enough to load it again."""
    tiny = {"data": "synthetic", "image_size": 32, "batch_size": 16, "steps": 1}
    decoder = ["decoder_dim=16", "decoder_depth=1", "decoder_heads=1"]
    mae = Config(recipe="mae", model="vit_pico_patch8_32", set=TINY, option=decoder, **tiny)
    mae.out = str(tmp_path / "mae")
    train(mae)
    settings = {"recipe": "finetune", "init": mae.out, "model": None}
    run = run_of(tmp_path / "run", **settings, option=["drop_path=0.0"], warmup=0.2, steps=20)
    assert run.recipe.model.global_pool == "avg"
    assert isinstance(run.recipe.model.norm, torch.nn.Identity)

    def group(name, p):
        part = name.removeprefix("model.")
        layer = 0 if part.startswith(("cls_token", "pos_embed", "patch_embed")) else 2
        layer = int(part.split(".")[1]) + 1 if part.startswith("blocks.") else layer
        plain = p.dim() == 1 or part in ("cls_token", "pos_embed")
        return 0.65 ** (2 - layer), 0.0 if plain else 0.05, False

    original = Original(
        {n: p for n, p in run.recipe.named_parameters() if p.requires_grad},
        soft_cross_entropy(run.recipe.model), group,
        lambda step: cosine(step, 20, 5e-4 * 16 / 256, 1e-6, 4), AdamW(),
    )  # fmt: skip
    compare(run, original)
    train(Config(**{**tiny, **settings}, out=str(tmp_path / "kept")))
    assert load_run(tmp_path / "kept")[0].model.global_pool == "avg"


@pytest.mark.parametrize(
    ("recipe", "model", "wanted"),
    [
        ("supervised", "deit_tiny_patch16_224", {"drop_path": 0.1, "repeats": 3, "clip": 0.0, "warmup": 5 / 300}),
        ("supervised", "vit_large_patch16_224", {"drop_path": 0.2, "min_lr": 1e-5, "lr": 1e-3}),
        ("supervised", "vit_pico_patch8_32", {"drop_path": 0.0}),
        ("supervised", "swin_tiny_patch4_window7_224", {"drop_path": 0.2, "clip": 5.0, "warmup": 20 / 300, "lr": 1e-3}),
        ("supervised", "swin_small_patch4_window7_224", {"drop_path": 0.3, "min_lr": 1e-5}),
        ("supervised", "swin_base_patch4_window7_224", {"drop_path": 0.5}),
        ("supervised", "resnet50", {"drop_path": 0.0}),
        ("finetune", "vit_base_patch16_224", {"drop_path": 0.1, "layer_decay": 0.65, "lr": 2e-3, "epochs": 100}),
        ("finetune", "vit_large_patch16_224", {"drop_path": 0.2, "layer_decay": 0.75, "lr": 4e-3, "epochs": 50}),
        ("finetune", "swin_base_patch4_window7_224", {"drop_path": 0.2, "min_lr": 1e-6}),
    ],
)
def test_defaults_follow_the_model(recipe, model, wanted, monkeypatch):
    monkeypatch.setattr("pyvit.train.engine.adopt", lambda config, recipe: config)
    config = resolve_config(
        Config(recipe=recipe, model=model, data="synthetic", init="x" if recipe == "finetune" else None)
    )
    found = {**load_recipe(recipe).options_of(config), **vars(config)}
    assert {k: found[k] for k in wanted} == pytest.approx(wanted)
    # What is given stays, and a small rate lowers the smallest.
    config = resolve_config(
        Config(recipe=recipe, model=model, data="synthetic", init=config.init, lr=1e-7, option=["drop_path=0.05"])
    )
    assert load_recipe(recipe).options_of(config)["drop_path"] == 0.05
    assert config.min_lr == 1e-7


def test_drop_path_reaches_the_blocks(tmp_path):
    data = load_data("synthetic", 64, count=8)
    config = resolve_config(
        Config(recipe="supervised", model="vit_tiny_patch16_224", data="synthetic", set=["depth=3"])
    )
    blocks = load_recipe("supervised")(config, data).model.blocks
    assert [block.drop_path2.p for block in blocks] == pytest.approx([0.0, 0.05, 0.1])


def test_repeated_augmentation():
    """DeiT's sampler: each image three times in a row, dealt to the processes in turn; a third of the images an
    epoch."""
    n, batch, world = 23, 12, 2
    ranks = [list(BatchSampler(n, batch, 0, 2, 5, rank, world, repeats=3).picks()) for rank in range(world)]
    whole = list(BatchSampler(n, batch, 0, 2, 5, repeats=3).picks())
    order = [i for indices, _ in BatchSampler(n, n, 0, 1, 5).picks() for i in indices]
    flat = [pair for indices, copies in whole for pair in zip(indices, copies, strict=True)]
    wanted = [(i, c) for i in order for c in range(3)]
    assert flat[:12] == wanted[:12]
    for step in range(2):
        dealt = [list(zip(*ranks[r][step], strict=True)) for r in range(world)]
        both = [pair for two in zip(*dealt, strict=True) for pair in two]
        assert both == list(zip(*whole[step], strict=True))
    assert list(BatchSampler(n, batch, 1, 2, 5, repeats=3).picks()) == whole[1:]
    # Each repetition is another crop, in any process.
    images = load_data("synthetic", 32, count=8).train
    crops = load_recipe("supervised")(
        resolve_config(Config(recipe="supervised", model="vit_pico_patch8_32", data="synthetic")),
        load_data("synthetic", 32),
    ).crops
    three = images.draw([3, 3, 3], crops, 0, 0, [0, 1, 2])["crop"]
    assert not any(torch.equal(three[i], three[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(images.draw([3], crops, 0, 0, [2])["crop"][0], three[2])


def imbalanced(folder, sizes=(30, 6)):
    for name, size in zip("ab", sizes, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(size):
            Image.new("RGB", (16, 16), (7 * i % 256, 80 * (name == "b"), i)).save(folder / name / f"{i}.png")
    return folder


def test_class_weights_and_the_table_of_classes(tmp_path, capsys):
    folder = imbalanced(tmp_path / "data")
    settings = {"recipe": "supervised", "data": str(folder), "model": "vit_pico_patch8_32", "image_size": 16}
    run = run_of(tmp_path / "run", 2, **settings, set=TINY, option=["class_weights=balanced", "augment=none"])
    assert "class weights: a 0.593, b 3.2" in capsys.readouterr().out  # 27 and 5 images of 32
    weights = torch.tensor([32 / (2 * 27), 32 / (2 * 5)], dtype=torch.float32)
    close(run.recipe.class_weights, weights, "weights", 1e-6)
    batches = run.batches()
    model = run.recipe.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    values, views = run.step(0, batches), run.seen["views"]
    log = functional_call(model, start, views["images"]).log_softmax(1)
    smooth = views["targets"] * 0.9 + 0.1 / 2
    close(values["loss"], -(weights.double() * smooth * log).sum(1).mean(), "loss", 1e-6)
    run.close()

    results = train(Config(**settings, set=TINY, batch_size=16, steps=1, out=str(tmp_path / "whole")))
    assert results["classes"].keys() == {"a", "b"}
    recalls = [row["recall"] for row in results["classes"].values()]
    assert results["balanced_accuracy"] == pytest.approx(sum(recalls) / 2)
    assert "precision  recall" in capsys.readouterr().out


def test_measures_are_scikit_learns():
    torch.manual_seed(0)
    scores, labels = torch.randn(200, 3).double(), torch.randint(0, 9, (200,)).clamp(max=2)
    predicted = scores.argmax(1)
    assert classification.balanced_accuracy(scores, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))
    precision, recall, _, support = precision_recall_fscore_support(labels, predicted)
    table = classification.class_table(scores, labels, "abc")
    assert [row["precision"] for row in table.values()] == pytest.approx(100 * precision)
    assert [row["recall"] for row in table.values()] == pytest.approx(100 * recall)
    assert [row["images"] for row in table.values()] == support.tolist()
    targets = (torch.rand(200, 3) < 0.2).long()
    targets[:, 2] = 0
    scores = (scores * 4).round()  # with ties
    found = classification.average_precision(scores, targets)
    assert found[:2].tolist() == pytest.approx([average_precision_score(targets[:, c], scores[:, c]) for c in (0, 1)])
    assert math.isnan(found[2])


def test_several_labels_per_image(tmp_path):
    """A table of labels: binary cross-entropy, mean average precision, and the same classes when it is loaded again."""
    names = ("red", "dark", "wide")
    rows = ["image,labels"]
    for i in range(60):
        has = [i % 2, i // 2 % 2, i // 4 % 2]
        colour = (255 if has[0] else 0, 40 if has[1] else 200, i)
        Image.new("RGB", (32 if has[2] else 16, 16), colour).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'|'.join(name for name, h in zip(names, has, strict=True) if h)}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows))
    data = load_data(str(table), 16)
    assert (data.classes, data.multilabel) == (["dark", "red", "wide"], True)
    assert "any number of them" in data.summary()
    held = [int(str(item).rsplit("/")[-1][:-4]) for item in data.test.items]
    assert data.test.labels == [[i // 2 % 2, i % 2, i // 4 % 2] for i in held]
    settings = {"recipe": "supervised", "data": str(table), "model": "vit_pico_patch8_32", "image_size": 16}
    run = run_of(tmp_path / "run", 2, **settings, set=TINY, option=["augment=none", "class_weights=balanced"])
    model = run.recipe.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    values, views = run.step(0, run.batches()), run.seen["views"]
    logits = functional_call(model, start, views["images"])
    smooth = views["targets"] * 0.9 + 0.05
    weights = run.recipe.class_weights
    terms = weights * smooth * F.logsigmoid(logits) + (1 - smooth) * F.logsigmoid(-logits)
    close(values["loss"], -terms.mean(), "loss")
    run.close()
    results = train(Config(**settings, set=TINY, batch_size=16, steps=1, out=str(tmp_path / "whole")))
    assert 0 <= results["mean_average_precision"] <= 100
    recipe, data = load_run(tmp_path / "whole")
    assert recipe.evaluate(data)["mean_average_precision"] == pytest.approx(results["mean_average_precision"])
    with pytest.raises(ValueError, match="each image must have one label"):
        load_recipe("linear")(
            resolve_config(Config(**{**settings, "recipe": "linear"}, init=str(tmp_path / "whole"))), data
        )
    (tmp_path / "empty.csv").write_text("image,labels\n0.png,\n")
    with pytest.raises(ValueError, match="must have labels"):
        load_data(str(tmp_path / "empty.csv"))


def test_a_table_of_one_label_per_image(tmp_path):
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    table = tmp_path / "t.csv"
    table.write_text("image;label\n" + "\n".join(f"{i}.png;{'ab'[i % 2]}" for i in range(12)))
    data = load_data(str(table), 8)
    assert (data.classes, data.multilabel, len(data.train), len(data.test)) == (["a", "b"], False, 10, 2)
