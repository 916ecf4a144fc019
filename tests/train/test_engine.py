"""Image order, schedules, parameter groups, data sets, settings."""

from __future__ import annotations

import math

import pytest
import torch

import pyvit
from pyvit.data import ByteTokenizer, load_data
from pyvit.data.audio import HIGH, LOW, MEAN, STD, spectrogram
from pyvit.models.audio import AudioSpectrogramTransformer, LogMel
from pyvit.train import RECIPES, Config, schedules, train
from pyvit.train.augment import Spectrogram
from pyvit.train.config import parse
from pyvit.train.engine import BatchSampler
from pyvit.train.optim import LARS, parameter_groups
from pyvit.train.recipe import load_recipe
from pyvit.train.runs import load_run


def test_plan_covers_each_epoch_once_and_differs():
    epochs = [
        [i for batch in list(BatchSampler(20, 5, 0, 8, seed=1))[e * 4 : e * 4 + 4] for i in batch] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


def test_plan_resumes_and_splits():
    whole = list(BatchSampler(50, 12, 0, 10, seed=3))
    assert list(BatchSampler(50, 12, 7, 10, seed=3)) == whole[7:]
    ranks = [list(BatchSampler(50, 12, 0, 10, seed=3, rank=r, world=2, accumulate=3)) for r in range(2)]
    joined = [[i for m in range(3) for r in range(2) for i in ranks[r][s * 3 + m]] for s in range(10)]
    assert joined == whole


def test_cosine_with_warmup():
    rates = [schedules.cosine(s, 100, 1.0, 0.1, 10) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 89)) / 2)
    assert schedules.linear(5, 10, 0.0, 1.0) == 0.5
    assert schedules.linear(50, 10, 0.0, 1.0) == 1.0


@pytest.mark.parametrize("name", ["vit_pico_patch4_32", "swin_pico_patch4_window4_32"])
def test_layer_decay(name):
    model = pyvit.create_model(name, num_classes=3)
    groups = parameter_groups(model, model, 0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["decays"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert set(scale) == {id(p) for p in named.values()}
    depth = 4
    head, first, embedding = ("head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight")
    if name.startswith("swin"):
        head, first = "head.fc.weight", "layers.0.blocks.0.attn.qkv.weight"
        assert scale[id(named["layers.1.blocks.0.attn.qkv.weight"])] == 0.5 ** (depth + 1 - 3)
    assert scale[id(named[head])] == 1.0
    assert scale[id(named[first])] == 0.5**depth
    assert scale[id(named[embedding])] == 0.5 ** (depth + 1)
    assert not any(
        decays[id(p)] for n, p in named.items() if n.endswith("bias") or "norm" in n or n in ("cls_token", "pos_embed")
    )
    assert decays[id(named[head])]


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("resnet18", {}, {"conv1.weight": 0, "layer1.0.bn1.weight": 1, "layer3.1.conv2.weight": 6, "fc.weight": 9}),
        (
            "vit_small_r26_s32_224",
            {"depth": 3},
            {
                "patch_embed.backbone.stages.2.blocks.1.conv1.weight": 0,
                "pos_embed": 0,
                "blocks.2.norm1.weight": 3,
                "norm.weight": 4,
            },
        ),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 64, "embed_dim": 16, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 2, 1)},
            {"layers.2.downsample.reduction.weight": 3, "layers.2.blocks.1.attn.logit_scale": 4, "norm.weight": 6},
        ),
    ],
)
def test_layers_of_other_backbones(name, settings, wanted):
    model = pyvit.create_model(name, **{"num_classes": 3, **settings})
    scale = {id(p): g["lr_scale"] for g in parameter_groups(model, model, 0.5) for p in g["params"]}
    named, last = dict(model.named_parameters()), max(wanted.values())
    for key, layer in wanted.items():
        assert scale[id(named[key])] == 0.5 ** (last - layer), key


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "swinv2_tiny_window8_256",
        "siglip_pico_patch8_32",
        "clip_pico_patch8_32",
        "clip_resnet50_224",
    ],
)
def test_what_does_not_decay(name):
    """Vectors, positions, tokens, registers, bias tables, temperatures."""
    with torch.device("meta"):
        model = pyvit.create_model(name)
    decays = {id(p): g["decays"] for g in parameter_groups(model, model, 1.0) for p in g["params"]}
    for key, p in model.named_parameters():
        spared = ("pos", "token", "latent", "logit_", "bias_table", "cpb")
        exempt = p.dim() < 2 or (any(word in key for word in spared) and "token_embedding" not in key)
        assert decays[id(p)] != exempt, key


def test_lars_leaves_positions_to_their_norm():
    """They have no weight decay, but their step is proportional to their norm."""
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    p.grad = torch.tensor([[0.0, 2.0]])
    LARS([{"params": [p], "decays": False}], lr=1.0, weight_decay=10.0, trust=0.1).step()
    torch.testing.assert_close(p.data, torch.tensor([[3.0, 3.5]]))


def test_clip_sets_its_scale_back_after_the_step(tmp_path):
    """A scale above 100 has a gradient and is clamped afterwards; SigLIP keeps 118.2."""
    from pyvit.train.engine import Run

    tiny = ["width=24", "depth=1", "num_heads=1", "patch_size=8"]
    for name, more, bound in (("clip", ["text_depth=1"], math.log(100.0)), ("siglip", [], None)):
        settings = {"data": "digits", "steps": 4, "batch_size": 8, "set": [*tiny, *more], "option": ["context=24"]}
        run = Run(Config(recipe=name, out=str(tmp_path / name), **settings))
        scale, seen = run.recipe.model.logit_scale, []
        scale.data.fill_(math.log(118.2))
        assert float(run.recipe.model.scale().detach()) == pytest.approx(118.2, rel=1e-4)
        run.recipe.gradients = lambda step, steps, seen=seen, scale=scale: seen.append(float(scale.grad))
        run.step(0, run.batches())
        assert seen[0] != 0
        if bound is None:
            assert float(scale.detach().exp()) == pytest.approx(118.2, rel=1e-2)
        else:
            assert float(scale.detach()) == pytest.approx(bound)
        run.close()


def test_note_about_parts_that_depend_on_the_micro_batch(tmp_path, capsys):
    tiny = ["embed_dim=24", "depth=1", "num_heads=1", "patch_size=8"]
    options = ["prototypes=40", "hidden=16", "bottleneck=8", "local_crops=0"]
    settings = {"data": "digits", "steps": 1, "batch_size": 8, "accumulate": 2, "set": tiny, "option": options}
    train(Config(recipe="dinov2", out=str(tmp_path), **settings))
    assert "note: Sinkhorn-Knopp and KoLeo see each of the 2 micro-batches separately" in capsys.readouterr().out


def test_one_class_is_nothing_to_learn():
    data = load_data("digits")
    data.classes = ["all"]
    for name in ("supervised", "finetune", "linear"):
        with pytest.raises(ValueError, match=f"{name}: data must have at least 2 classes"):
            load_recipe(name)(Config(recipe=name, init="x", model="vit_pico_patch8_32"), data)


def test_masks_that_hide_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mask_ratio must hide some of the 16 patches and leave some, 0\.99 leaves 0"):
        train(Config(recipe="mae", data="digits", batch_size=8, steps=1, option=["mask_ratio=0.99"], out=str(tmp_path)))


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), 5.0])
def test_rates_of_models_are_checked(rate):
    """Also if a single block would never use the rate."""
    for name, more in (
        ("vit_pico_patch8_32", {"depth": 1}),
        ("swin_pico_patch4_window4_32", {"depths": (1,), "num_heads": (1,)}),
    ):
        with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\)"):
            pyvit.create_model(name, drop_path_rate=rate, **more)
        if rate != 1.0:
            with pytest.raises(ValueError, match=r"attn_drop must be in \[0, 1\]"):
                pyvit.create_model(name, attn_drop_rate=rate, **more)


def test_lars_step():
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    p.grad = torch.tensor([[0.0, 2.0]])
    LARS([p], lr=2.0, momentum=0.9, weight_decay=0.0, trust=0.1).step()
    torch.testing.assert_close(p.data, torch.tensor([[3.0, 4.0 - 2.0 * 0.1 * 5 / 2 * 2]]))


def test_parse():
    assert parse(["a=4", "b=x", "c=(1,2)", "d=0.5"], "set") == {"a": 4, "b": "x", "c": (1, 2), "d": 0.5}
    with pytest.raises(ValueError, match="set must be KEY=VALUE, got 'x'"):
        parse(["x"], "set")


@pytest.mark.parametrize("recipe", RECIPES)
def test_unknown_options_are_refused(recipe, tmp_path):
    (tmp_path / "none").write_text("")
    with pytest.raises(ValueError, match="option must be one of"):
        load_recipe(recipe)(
            Config(recipe=recipe, option=["nonsense=1"], init="x", model="vit_pico_patch4_32"), load_data("digits")
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"epochs": -1.0}, "epochs must be above 0, got -1.0"),
        ({"recipe": "sleep"}, "recipe must be one of"),
        ({"data": "nowhere"}, "data: must be a folder"),
        ({"data": ""}, "data: must name a folder"),
        ({"batch_size": 5000}, "batch_size must be at most the 1442 images"),
        ({"batch_size": 15, "accumulate": 2}, "batch_size must be"),
        ({"model": "vit_huge"}, "name must be a registered model"),
        ({"recipe": "finetune"}, "init must name"),
        (
            {"recipe": "clip", "data": "synthetic", "model": "vit_pico_patch4_32", "image_size": 32, "batch_size": 8},
            "an image and a text tower",
        ),
        ({"option": ["augment=wild"]}, "option augment must be one of"),
        ({"epochs": 1.0}, "epochs and steps: give one of them"),
    ],
)
def test_bad_settings_are_refused_before_training(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(Config(**{"out": str(tmp_path), "steps": 1, "batch_size": 16, **settings}))


def test_digits_are_split_without_overlap():
    data = load_data("digits")
    assert (len(data.train), len(data.test)) == (1442, 355)
    train_images, test_images = ({t.numpy().tobytes() for t in part.images} for part in (data.train, data.test))
    assert len(train_images & test_images) <= 1  # the set itself has few repeated drawings


def test_validation_is_a_part_of_the_training_images(tmp_path):
    whole, chosen = load_data("digits"), load_data("digits", validation=0.25)
    assert (len(chosen.train), len(chosen.test)) == (1082, 360)
    drawn = torch.cat([part.fetch(range(len(part)))["image"] for part in (chosen.train, chosen.test)])
    key = lambda images: sorted(image.numpy().tobytes() for image in images)  # noqa: E731
    assert key(drawn) == key(whole.train.images)
    assert chosen.test.fetch([5])["label"] == chosen.test.labels[5]
    assert chosen.test.fetch([5])["caption"] == [chosen.test.captions[5]]
    for share in (1.0, 1e-9, -0.5):
        with pytest.raises(ValueError, match="validation: must leave some of the 1442 training images on both sides"):
            load_data("digits", validation=share)
    settings = {"steps": 1, "batch_size": 16, "set": ["embed_dim=24", "depth=1", "num_heads=1"], "validation": 0.25}
    train(Config(**settings, out=str(tmp_path)))
    assert len(load_run(tmp_path)[1].test) == 360


def test_scenes_say_what_they_show():
    data = load_data("scenes", 64, count=30)
    captions, parts = data.test.captions, data.extra["parts"]
    places = ("top left", "top right", "bottom left", "bottom right")
    for caption, objects in zip(captions, parts, strict=True):
        for phrase, quarter in objects:
            assert f"{phrase} in the {places[quarter]}" in caption


def test_words_are_learnable_spectrograms():
    data = load_data("words", 64, per_word=5, voice="tones")
    assert data.train.images.shape == (32, 1, 128, 64)
    assert len(data.test) == 8
    flat = data.train.images.float().flatten(1)
    within = torch.stack([flat[data.train.labels == c].std(0).mean() for c in range(8)]).mean()
    assert within < flat.std(0).mean()


def test_words_train_the_spectrogram_transformer(tmp_path):
    train(Config(data="words", steps=2, batch_size=16, set=["depth=1"], out=str(tmp_path)))
    recipe, data = load_run(tmp_path)
    assert isinstance(recipe.model, AudioSpectrogramTransformer)
    assert data.size == (128, 64)
    for name, settings in (("simclr", {}), ("clip", {"model": "clip_pico_patch8_32"})):
        with pytest.raises(ValueError, match=r"must be images|must take spectrograms"):
            train(Config(recipe=name, data="words", steps=1, batch_size=16, out=str(tmp_path / name), **settings))


def test_spectrograms_keep_the_units_of_the_front_end():
    """To half a step of a byte, at any sample rate: a tone resampled from 44.1 kHz is the same tone."""
    tone = lambda rate: 0.3 * torch.sin(2 * math.pi * 1000 * torch.arange(rate) / rate)  # noqa: E731
    want = LogMel(128, 98)(tone(16000)[None])[0]
    back = (spectrogram(tone(16000), 16000, 98) / 255 - MEAN[0]) / STD[0]
    assert (back - want).abs().max() <= 1.001 * (HIGH - LOW) / 255 / 2
    resampled = (spectrogram(tone(44100), 44100, 98) / 255 - MEAN[0]) / STD[0]
    loud = want > want.max() - 1
    assert (resampled - want)[loud].abs().max() < 0.03


def test_masked_spectrograms():
    torch.manual_seed(0)
    x = torch.full((8, 1, 40, 60), 255, dtype=torch.uint8)
    hidden = (Spectrogram(0.25)(x) == 0.25)[:, 0]
    rows, columns = hidden.all(2).sum(1), hidden.all(1).sum(1)
    assert 0 < rows.max() <= 15  # 3/8 of 40
    assert 0 < columns.max() <= 12  # 3/16 of 60, and the two ends
    assert hidden.sum((1, 2)).eq(rows * 60 + columns * 40 - rows * columns).all()


def test_csv_and_byte_tokenizer(tmp_path):
    from PIL import Image

    rows = ["image,caption"]
    for i in range(10):
        Image.new("RGB", (30, 20), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(f'{i}.png,"shade, number {i}"')
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    data = load_data(str(tmp_path / "pairs.csv"), 16)
    batch = data.train.fetch([2, 5])
    assert batch["caption"] == ["shade, number 2", "shade, number 5"]
    assert batch["image"][:, 0, 8, 8].tolist() == [40, 100]
    ids = ByteTokenizer(8)(["Hé", "a long caption"])
    assert ids.tolist()[0] == [256, 104, 195, 169, 257, 0, 0, 0]
    assert ids[1].argmax() == 7
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns image and caption, got a, b"):
        load_data(str(tmp_path / "bad.csv"))


def test_wave_folder(tmp_path):
    import wave

    for kind, pitch in (("low", 200), ("high", 1500)):
        (tmp_path / kind).mkdir()
        for i in range(10):
            tone = (torch.sin(torch.arange(8000) * 2 * math.pi * pitch / 16000) * 20000).to(torch.int16)
            with wave.open(str(tmp_path / kind / f"{i}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16000)
                file.writeframes(tone.numpy().tobytes())
    data = load_data(str(tmp_path), 32)
    assert data.classes == ["high", "low"]
    assert not data.flip
    assert data.sound
    assert data.size == (128, 32)
    batch = data.train.fetch([0, len(data.train) - 1])
    rows = batch["image"][:, 0, :, 10].float().argmax(1)
    assert rows[0] > rows[1] + 20  # low bands come first


def test_hugging_face_folder(tmp_path):
    pytest.importorskip("datasets")
    from PIL import Image

    for kind in ("a", "b"):
        (tmp_path / "set" / "train" / kind).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20), (i, 0, 9)).save(tmp_path / "set" / "train" / kind / f"{i}.png")
    data = load_data(f"hf:{tmp_path / 'set'}", 16)
    assert data.classes == ["a", "b"]
    assert len(data.train) + len(data.test) == 12
    assert data.train.fetch([0])["image"].shape == (1, 3, 16, 16)


def test_few_training_images():
    """Equally many of each class, always the same, of those that the validation split leaves."""
    whole, few = load_data("digits"), load_data("digits", train_images=25)
    assert torch.as_tensor(few.train.labels).bincount().tolist() == [3] * 5 + [2] * 5
    assert len(few.test) == len(whole.test)
    assert torch.equal(few.train.images, load_data("digits", train_images=25).train.images)
    chosen = load_data("digits", validation=0.2, train_images=25)
    assert len(chosen.test) == len(load_data("digits", validation=0.2).test) > 250
    assert len(chosen.train) == 25
    with pytest.raises(ValueError, match="train_images: 9 images need 0 of each of 10 classes, and at least 1"):
        load_data("digits", train_images=9)
    with pytest.raises(ValueError, match="train_images: must be in 1"):
        load_data("digits", train_images=2000)
