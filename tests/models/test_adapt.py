"""Resampling weights of another grid, window, patch size, number of channels or text length, or refusing them."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

import pyvit
from pyvit.models.adapt import adapt_channels, resample_patch
from pyvit.models.checkpoints import CheckpointError, from_native, load_checkpoint
from pyvit.models.metadata import header_of
from pyvit.nn import resample_positions
from tests.peers import peer

VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "num_classes": 3}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 64, "num_classes": 3}
CLIP = {
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 8,
    "text_width": 24,
    "text_depth": 1,
    "text_heads": 2,
    "vocab_size": 20,
}


def vit(name="vit_small_patch16_224", **more):
    model = pyvit.create_model(name, **{**VIT, **more})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model


def patches(model):
    return model.pos_embed.detach()[0, model.pos_embed.shape[1] - math.prod(model.grid) :]


def saved(model, form, path):
    """The weights of a model as load_checkpoint gets them."""
    if form == "state dict":
        return model.state_dict()
    if form == "file":
        torch.save({"model": torch.nn.DataParallel(torch.compile(model, backend="eager")).state_dict()}, path / "a.pth")
        return path / "a.pth"
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), path / "a.safetensors", header_of(model))
    return path / "a.safetensors"


@pytest.mark.parametrize("form", ["state dict", "file", "run"])
@pytest.mark.parametrize(
    ("old", "new"),
    [((4, 4), (2, 8)), ((2, 8), (4, 4)), ((2, 8), (8, 2)), ((2, 8), (2, 8)), ((2, 6), (3, 4)), ((2, 6), (4, 4))],
)
def test_positions_come_from_the_grid_of_the_file(old, new, form, tmp_path):
    a, b = (vit(img_size=(8 * grid[0], 8 * grid[1])) for grid in (old, new))
    report = load_checkpoint(b, saved(a, form, tmp_path))
    assert torch.allclose(patches(b), resample_positions(patches(a), old, new), atol=1e-6)
    assert torch.equal(a.pos_embed[:, 0], b.pos_embed[:, 0])
    assert report.adapted == ([] if old == new else [f"pos_embed {old[0]}x{old[1]} -> {new[0]}x{new[1]}"])


def test_positions_of_a_grid_that_nothing_names():
    a, b = dict(vit(img_size=32).state_dict()), vit(img_size=(16, 64))
    before = b.pos_embed.clone()
    with pytest.raises(
        CheckpointError, match=r"pos_embed of 16 patches: the file does not say whether they are 4x4 or 2x8; give grid="
    ):
        load_checkpoint(b, a)
    assert torch.equal(b.pos_embed, before)
    load_checkpoint(b, a, grid=(2, 8))
    assert torch.equal(b.pos_embed, a["pos_embed"])
    load_checkpoint(b, a, grid=(4, 4))
    assert torch.allclose(patches(b), resample_positions(a["pos_embed"][0, 1:], (4, 4), (2, 8)), atol=1e-6)


def test_other_libraries_positions_are_square():
    a, b = vit(img_size=32), vit(img_size=(16, 64))
    for layout in ("transformers ViT", "torchvision ViT"):
        assert load_checkpoint(b, from_native(a.state_dict(), layout)).adapted == ["pos_embed 4x4 -> 2x8"]


def test_a_configuration_names_the_grid(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    a, b = vit(img_size=(16, 64)), vit(img_size=32)
    safetensors.save_file(
        {k: v.contiguous() for k, v in from_native(a.state_dict(), "transformers ViT").items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "image_size": [16, 64], "num_attention_heads": 2})
    )
    assert load_checkpoint(b, tmp_path).adapted == ["pos_embed 2x8 -> 4x4"]
    assert torch.allclose(patches(b), resample_positions(patches(a), (2, 8), (4, 4)), atol=1e-6)


@pytest.mark.parametrize("frames", [64, 96, 128])
def test_spectrograms_of_another_length(frames):
    make = lambda n: vit("ast_base_patch16_1024x128", patch_size=16, img_size=(64, n))  # noqa: E731
    a, b = make(96), make(frames)
    load_checkpoint(b, a.state_dict())
    assert torch.allclose(patches(b), resample_positions(patches(a), a.grid, b.grid), atol=1e-6)
    assert torch.equal(a.pos_embed[:, :2], b.pos_embed[:, :2])


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (2, 9)), ((3, 3), (2, 4)), ((2, 4), (4, 2)), ((2, 4), (2, 4)), ((3, 3), (4, 4))]
)
def test_windows_come_from_the_window_of_the_file(old, new):
    a, b = (
        pyvit.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "window_size": window, "img_size": 128})
        for window in (old, new)
    )
    load_checkpoint(b, a.state_dict())
    spans = [tuple(2 * w - 1 for w in m.layers[0].blocks[0].attn.window_size) for m in (a, b)]
    tables = [m.layers[0].blocks[0].attn.relative_position_bias_table.detach() for m in (a, b)]
    assert torch.allclose(tables[1], resample_positions(tables[0], *spans, antialias=False), atol=1e-6)


def test_windows_that_nothing_names():
    a, b = (
        pyvit.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "window_size": w, "img_size": 256})
        for w in ((2, 5), (2, 5))
    )
    state = dict(a.state_dict())  # 3 * 9 = 27 rows: no square
    assert not load_checkpoint(b, state).adapted


def test_swin_v2s_window_at_pre_training():
    """Its position network gets offsets relative to that window. Another window gives other biases, even with equal
    shapes."""
    make = lambda w, trained=None: pyvit.create_model(  # noqa: E731
        "swinv2_tiny_window8_256", **{**SWIN, "window_size": w, "pretrained_window_sizes": trained}
    )
    a = make(4)
    with pytest.raises(CheckpointError, match=r"pretrained_window_size \[4, 4\] in the file, \[8, 8\] in the model"):
        load_checkpoint(make(8), a.state_dict())
    load_checkpoint(make(8, (4, 4)), a.state_dict())


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize(
    ("old", "new"),
    [("cls", "cls"), ("distilled", "cls"), ("cls", "no_embed"), ("no_embed", "cls"), ("distilled", "distilled")],
)
def test_prefix_tokens(old, new, registers):
    kinds = {"cls": {}, "distilled": {"dist_token": True}, "no_embed": {"no_embed_class": True}}
    a = vit(img_size=32, reg_tokens=registers, num_classes=0, **kinds[old])
    b = vit(img_size=48, reg_tokens=registers, num_classes=0, **kinds[new])
    report = load_checkpoint(b, a.state_dict())
    assert torch.allclose(patches(b), resample_positions(patches(a), (4, 4), (6, 6)), atol=1e-6)
    assert torch.allclose(
        b.prefix(b.positions((6, 6))[1])[0], a.prefix(a.positions((4, 4))[1])[0]
    )  # the class token with its position
    if (old, new) == ("distilled", "cls"):
        assert report.unused == ["dist_token"]
        assert "positions of 1 more prefix token left out" in report.adapted[0]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"reg_tokens": 4}, "reg_token"),
        ({"init_values": 0.5}, "blocks.0.ls1.gamma"),
        ({"dist_token": True}, "dist_token"),
    ],
)
def test_tokens_and_scales_of_one_side_alone_are_refused(more, key):
    a, b = vit(img_size=32), vit(img_size=32, **more)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(b, a.state_dict())
    assert key in caught.value.report.missing
    if key != "dist_token":
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(a, b.state_dict())
        assert key in caught.value.report.unexpected


def test_pooling_that_a_classifier_was_trained_with():
    a, b = vit(img_size=32, global_pool="token_avg"), vit(img_size=32, global_pool="avg", fc_norm=False)
    with pytest.raises(CheckpointError):
        load_checkpoint(b, a.state_dict())
    with pytest.raises(CheckpointError, match=r"global_pool 'avg' in the file, 'token' in the model"):
        load_checkpoint(vit(img_size=32), b.state_dict())


@pytest.mark.parametrize("old", [1, 3, 4])
@pytest.mark.parametrize("new", [1, 3, 5])
def test_channels(old, new):
    """Grey images, with equal channels, give the same result."""
    weight = torch.randn(6, old, 4, 4)
    grey = torch.randn(2, 1, 8, 8)
    before, after = (F.conv2d(grey.expand(-1, w.shape[1], -1, -1), w) for w in (weight, adapt_channels(weight, new)))
    if old == 1 or new == 1 or old == new:
        assert torch.allclose(before, after, atol=1e-4)
    for name in ("vit_small_patch16_224", "vit_base_conv_s16_224", "resnet18", "swin_tiny_patch4_window7_224"):
        if {old, new} == {1, 3}:
            more = {
                "vit_base_conv_s16_224": {**VIT, "patch_size": 1, "conv_channels": (8, 16), "img_size": 32},
                "resnet18": {"width": 8},
            }
            settings = more.get(name, {**VIT, "img_size": 32} if name.startswith("vit") else {**SWIN, "window_size": 4})
            a, b = (pyvit.create_model(name, **settings, in_chans=n).eval() for n in (old, new))
            report = load_checkpoint(b, a.state_dict())
            assert any(f"{old} -> {new} channels" in note for note in report.adapted)
            images = torch.randn(2, 1, 64, 64)
            assert torch.allclose(a(images.expand(-1, old, -1, -1)), b(images.expand(-1, new, -1, -1)), atol=1e-4)


def test_channels_like_timms():
    peer("timm")
    from timm.models._manipulate import adapt_input_conv

    weight = torch.randn(6, 3, 4, 4)
    for n in (1, 2, 4, 7):
        assert torch.allclose(adapt_channels(weight, n), adapt_input_conv(n, weight.clone()), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [((8, 8), (16, 16)), ((16, 16), (8, 8)), ((8, 8), (6, 10))])
def test_patches_like_timms(old, new):
    timm = peer("timm")
    weight = torch.randn(5, 3, *old)
    assert torch.allclose(resample_patch(weight, new), timm.layers.resample_patch_embed(weight, list(new)), atol=1e-4)


def test_another_patch_size():
    a, b = vit(img_size=32, patch_size=8), vit(img_size=64, patch_size=16)
    assert load_checkpoint(b, a.state_dict()).adapted == ["patch_embed.proj.weight patch 8x8 -> 16x16"]
    small = torch.randn(2, 3, 32, 32)
    large = F.interpolate(small, scale_factor=2, mode="nearest")
    assert torch.nn.functional.cosine_similarity(a.eval()(small), b.eval()(large)).min() > 0.8


def test_the_decoder_of_an_autoencoder():
    make = lambda size: pyvit.create_model(  # noqa: E731
        "mae_vit_base_patch16_224",
        **{**VIT, "num_classes": 0},
        img_size=size,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    assert load_checkpoint(make(48), make(32).state_dict()).adapted == [
        "pos_embed 4x4 -> 6x6",
        "decoder_pos_embed 4x4 -> 6x6",
    ]


def test_a_detectors_relative_positions():
    make = lambda size: pyvit.create_model(  # noqa: E731
        "vitdet_base_patch16_1024",
        embed_dim=32,
        depth=4,
        num_heads=2,
        img_size=size,
        pretrain_img_size=64,
        window_size=2,
        global_blocks=(1,),
    )
    report = load_checkpoint(make(96), make(64).state_dict())
    assert report.adapted == ["blocks.1.attn.rel_pos_h 7 -> 11", "blocks.1.attn.rel_pos_w 7 -> 11"]


def test_a_residual_clips_map():
    make = lambda size: pyvit.create_model(  # noqa: E731
        "clip_resnet50_224",
        layers=(1, 1, 1, 1),
        width=8,
        num_heads=2,
        text_width=16,
        text_depth=1,
        text_heads=2,
        vocab_size=20,
        img_size=size,
    )
    assert load_checkpoint(make(96), make(64).state_dict()).adapted == [
        "visual.attnpool.positional_embedding 2x2 -> 3x3"
    ]


def test_texts_of_another_length():
    make = lambda n: pyvit.create_model("clip_vit_base_patch32_224", **CLIP, img_size=32, context_length=n)  # noqa: E731
    long, short = make(12), make(8)
    assert load_checkpoint(short, long.state_dict()).adapted == ["text.positional_embedding the first 8 of 12"]
    text = torch.tensor([[18, 3, 4, 19, 0, 0, 0, 0]])
    assert torch.allclose(short.eval().encode_text(text), long.eval().encode_text(F.pad(text, (0, 4))), atol=1e-5)
    with pytest.raises(CheckpointError, match=r"text.positional_embedding of 8 tokens, the model's context is 12"):
        load_checkpoint(long, short.state_dict())


def test_the_towers_of_a_clip():
    clip = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, img_size=32, context_length=8, embed_dim=3)
    tower = {**VIT, "img_size": 32, "pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "norm_eps": 1e-5}
    model = vit(**tower)
    head = model.head.weight.clone()
    report = load_checkpoint(model, clip.state_dict(), allow=("head.*",))
    assert torch.equal(model.blocks[0].attn.qkv.weight, clip.visual.blocks[0].attn.qkv.weight)
    assert torch.equal(model.head.weight, head)  # of the projection's shape, and no classifier
    assert "visual.head.weight" in report.unused
    other = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, img_size=32, context_length=8, embed_dim=3)
    for part in ("visual", "text"):
        assert not load_checkpoint(getattr(other, part), clip.state_dict()).missing
    assert all(torch.equal(a, b) for k, a in clip.state_dict().items() for b in [other.state_dict()[k]])


def test_openais_activation():
    clip = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, img_size=32, context_length=8)
    gelu = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, img_size=32, context_length=8, activation="gelu")
    state = from_native(clip.state_dict(), "OpenAI CLIP")
    assert "the file does not say whether its activation is quick_gelu" in load_checkpoint(gelu, state).notes[0]
    state |= {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(8),
        "vocab_size": torch.tensor(20),
    }  # OpenAI's archives
    with pytest.raises(CheckpointError, match=r"activation 'quick_gelu' in the file, 'gelu' in the model"):
        load_checkpoint(gelu, state)
    assert not load_checkpoint(clip, state).notes
