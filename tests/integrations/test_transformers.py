"""transformers' models: each family before and after accelerate, with all options that must keep working."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import pyvit
from tests.integrations.checks import check_accelerated, counts
from tests.models.parity import randomise, relative_error
from tests.peers import peer

transformers = peer("transformers")

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
IMAGE = {"image_size": 32, "patch_size": 8}
SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "patch_size": 2,
    "image_size": 32,
    "num_labels": 7,
}


def make(kind, config, head="ForImageClassification", **extra):
    torch.manual_seed(0)
    return randomise(getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**config, **extra)))


def vit(**extra):
    return make("ViT", {**TINY, **IMAGE, "intermediate_size": 96, "num_labels": 7}, **extra)


def pixels(model, *size):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, *size, generator=generator).to(model.dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"])
def test_image_models(kind, attention):
    size = {"mlp_ratio": 2} if "Dino" in kind else {"intermediate_size": 96}
    model = make(kind, {**TINY, **IMAGE, **size, "num_labels": 7}, attn_implementation=attention)
    prefix = "Dinov2WithRegisters" if kind == "Dinov2WithRegisters" else kind
    check_accelerated(
        model, lambda m: m(pixels(m, 32, 32)).logits, {"Conv2d": 1, f"{prefix}Attention": 2, f"{prefix}MLP": 2}
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_rotary(size, attention):
    sizes = {**TINY, **IMAGE, "intermediate_size": 96, "num_register_tokens": 2}
    model = make("DINOv3ViT", sizes, head="Model", attn_implementation=attention)
    check_accelerated(
        model,
        lambda m: m(pixels(m, *size)).last_hidden_state,
        {"Conv2d": 1, "DINOv3ViTAttention": 2, "DINOv3ViTMLP": 2},
    )
    with pyvit.accelerate(model), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(pixels(model, *size)).last_hidden_state
        assert relative_error(compiled, model(pixels(model, *size)).last_hidden_state) < 1e-4


SAM = {**TINY, "image_size": 32, "patch_size": 4, "output_channels": 24, "global_attn_indexes": [1], "window_size": 3}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["SamVision", "SamHQVision"])
def test_sam(kind, attention):
    """Windows that reach over the edge of 8 x 8 patches, and a global block."""
    model = make(kind, {**SAM, "attention_dropout": 0.5}, head="Model", attn_implementation=attention).eval()
    name = f"{kind}SdpaAttention" if attention == "sdpa" else f"{kind}Attention"
    call = lambda m: m(pixels(m, 32, 32)).last_hidden_state  # noqa: E731
    check_accelerated(model, call, {name: 2})
    report = pyvit.accelerate(model)
    assert [row.note for row in report.replaced if row.kind.endswith(name)] == ["decomposed_attention"] * 2
    if attention == "eager":  # its probabilities are those of transformers' code
        assert model(pixels(model, 32, 32), output_attentions=True).attentions[1].shape == (6, 64, 64)
    layer = next(m for m in model.modules() if type(m).__name__ == name)
    layer.train()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(call(model))
        pyvit.restore(model)
    torch.testing.assert_close(*results)


def test_calls_of_rotary_attention(monkeypatch):
    """Rotation within attention, or before it where attention weights are dropped; masks; embeddings of another
    dtype."""
    rules = importlib.import_module("pyvit.integrations.transformers")
    sizes = {**TINY, **IMAGE, "num_register_tokens": 2, "attention_dropout": 0.5}
    model = make("DINOv3ViT", sizes, head="Model").eval()
    attention = next(m for m in model.modules() if type(m).__name__ == "DINOv3ViTAttention")
    x, angles, mask = torch.randn(2, 15, 48), torch.randn(12, 16), torch.randn(2, 1, 15, 15)
    embeddings = (angles.cos(), angles.sin())
    options = [
        {},
        {"attention_mask": mask},
        {"attention_mask": mask > 0},
        {"is_causal": True},
        {"position_embeddings": tuple(t.bfloat16() for t in embeddings)},
    ]
    calls = [{"position_embeddings": embeddings} | each for each in options]
    expected = [attention(x, **each)[0] for each in calls]
    pyvit.accelerate(model)
    ran, kernel = [], rules.rope_attention
    monkeypatch.setattr(rules, "rope_attention", lambda *a, **k: ran.append(k) or kernel(*a, **k))
    for each, out in zip(calls, expected, strict=True):
        assert relative_error(attention(x, **each)[0], out) < 1e-5, each
    assert len(ran) == len(calls)
    each = torch.randn(2, 1, 12, 16)  # of each image: the class's own code
    own = attention(x, position_embeddings=(each.cos(), each.sin()))[0]
    for i in range(2):
        alone = attention(x[i : i + 1], position_embeddings=(each[i, 0].cos(), each[i, 0].sin()))[0]
        assert relative_error(own[i : i + 1], alone) < 1e-5
    assert len(ran) == len(calls) + 2
    attention.train()
    again = []
    for _ in range(2):
        torch.manual_seed(7)
        again.append(attention(x, **calls[0])[0])
    assert torch.equal(*again)
    assert not torch.equal(attention(x, **calls[0])[0], again[0])
    mean = sum(attention(x, **calls[0])[0] for _ in range(400)) / 400
    assert relative_error(mean, expected[0]) < 0.25
    assert len(ran) == len(calls) + 2


def test_rotary_segmentation():
    sizes = {**TINY, **IMAGE, "intermediate_size": 96, "num_register_tokens": 2}
    heads = {"num_labels": 7, "num_blocks": 1, "num_queries": 5, "num_upscale_blocks": 1}
    model = make("EomtDinov3", {**sizes, **heads}, head="ForUniversalSegmentation").eval()
    images = pixels(model, 32, 32)
    with torch.no_grad():
        expected = model(images)
        report = pyvit.accelerate(model)
        found = model(images)
    assert {row.kind.rpartition(".")[2] for row in report.replaced} >= {"EomtDinov3Attention", "EomtDinov3MLP"}
    for name in ("masks_queries_logits", "class_queries_logits"):
        assert relative_error(found[name], expected[name]) < 1e-4


_WIDTHS = {**TINY, **IMAGE, "intermediate_size": 96}
_MORE = {
    "ViTMSN": ({}, {"Conv2d": 1, "ViTMSNAttention": 2, "ViTMSNMLP": 2}),
    "IJepa": ({}, {"Conv2d": 1, "IJepaAttention": 2, "IJepaMLP": 2}),
    "Beit": ({"use_relative_position_bias": True}, {"Conv2d": 1, "BeitAttention": 2, "BeitMLP": 2}),
    "CLIPSegVision": ({}, {"Conv2d": 1, "CLIPSegAttention": 2, "CLIPSegMLP": 2}),
    "AltCLIPVision": ({}, {"Conv2d": 1, "AltCLIPAttention": 2, "AltCLIPMLP": 2}),
    "MetaClip2Vision": ({}, {"Conv2d": 1, "MetaClip2Attention": 2, "MetaClip2MLP": 2}),
    "OwlViTVision": ({}, {"Conv2d": 1, "OwlViTAttention": 2, "OwlViTMLP": 2}),
    "Owlv2Vision": ({}, {"Conv2d": 1, "Owlv2Attention": 2, "Owlv2MLP": 2}),
    "Aimv2Vision": ({"use_head": False}, {"Conv2d": 1, "Aimv2Attention": 2, "Aimv2MLP": 2}),
    "ChineseCLIPVision": ({}, {"Conv2d": 1, "ChineseCLIPVisionAttention": 2, "ChineseCLIPVisionMLP": 2}),
    "GitVision": ({}, {"Conv2d": 1, "GitVisionAttention": 2, "GitVisionMLP": 2}),
}


@pytest.mark.parametrize("kind", _MORE)
def test_more_image_models(kind):
    options, replaced = _MORE[kind]
    model = make(kind, {**_WIDTHS, **options}, head="Model")
    check_accelerated(model, lambda m: m(pixels(m, 32, 32)).last_hidden_state, replaced)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_gated_mlps(kind):
    options = (
        {"use_gated_mlp": True, "num_register_tokens": 2}
        if kind == "DINOv3ViT"
        else {"use_swiglu_ffn": True, "mlp_ratio": 2}
    )
    replaced = f"{kind}GatedMLP" if kind == "DINOv3ViT" else f"{kind}SwiGLUFFN"
    model = make(kind, {**_WIDTHS, **options}, head="Model")
    if not hasattr(next(m for m in model.modules() if type(m).__name__ == replaced), "gate_proj"):
        pytest.skip("this version has other layers")
    call = lambda m: m(pixels(m, 32, 32)).last_hidden_state  # noqa: E731
    check_accelerated(model, call, {"Conv2d": 1, f"{kind}Attention": 2, replaced: 2})


def test_videos():
    model = make("Vivit", {**_WIDTHS, "num_frames": 4, "tubelet_size": [2, 8, 8]}, head="Model")
    video = torch.randn(1, 4, 3, 32, 32)
    check_accelerated(model, lambda m: m(video.to(m.dtype)).last_hidden_state, {"VivitAttention": 2, "VivitMLP": 2})


def test_packed_images_with_padding():
    widths = {name: value for name, value in _WIDTHS.items() if name != "image_size"}
    model = make("Siglip2Vision", {**widths, "num_patches": 16}, head="Model")
    patches, shapes = torch.randn(2, 16, 192), torch.tensor([[4, 4], [3, 4]])
    mask = (torch.arange(16) < torch.tensor([[16], [12]])).long()
    call = lambda m: m(pixel_values=patches.to(m.dtype), pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output  # noqa: E731
    check_accelerated(model, call, {"Siglip2Attention": 2, "Siglip2MLP": 3, "MultiheadAttention": 1})


def test_the_vision_tower_of_a_language_model():
    from transformers.models.idefics3 import modeling_idefics3 as idefics

    torch.manual_seed(0)
    model = randomise(idefics.Idefics3VisionTransformer(idefics.Idefics3VisionConfig(**_WIDTHS)))
    replaced = {"Conv2d": 1, "Idefics3VisionAttention": 2, "Idefics3VisionMLP": 2}
    check_accelerated(model, lambda m: m(pixels(m, 32, 32)).last_hidden_state, replaced)


def test_mae():
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    extra = {f"decoder_{name}": value for name, value in decoder.items()}
    model = make("ViTMAE", {**TINY, **IMAGE, "intermediate_size": 96, **extra}, head="ForPreTraining")
    noise = torch.rand(2, 16)
    call = lambda m: m(pixels(m, 32, 32), noise=noise.to(m.dtype)).logits  # noqa: E731
    check_accelerated(model, call, {"Conv2d": 1, "ViTMAEAttention": 3, "ViTMAEMLP": 3})


def test_spectrograms():  # overlapping patches
    sizes = {
        "intermediate_size": 96,
        "patch_size": 8,
        "frequency_stride": 5,
        "time_stride": 5,
        "max_length": 40,
        "num_mel_bins": 24,
    }
    model = make("AST", {**TINY, **sizes, "num_labels": 5}, head="ForAudioClassification")
    sound = torch.randn(2, 40, 24)
    check_accelerated(model, lambda m: m(sound.to(m.dtype)).logits, {"Conv2d": 1, "ASTAttention": 2, "ASTMLP": 2})


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_image_and_text(kind):
    sizes = {**TINY, "intermediate_size": 96}
    text = {
        **sizes,
        "vocab_size": 50,
        "max_position_embeddings": 9,
        "bos_token_id": 0,
        "eos_token_id": 49,
        "pad_token_id": 1,
    }
    if kind == "CLIP":
        text["projection_dim"] = 24
    model = make(kind, {"text_config": text, "vision_config": {**sizes, **IMAGE}}, head="Model")
    words = torch.randint(2, 48, (2, 9))
    words[:, 6:] = 49
    mask = (torch.arange(9) < torch.tensor([[9], [7]])).long()

    def call(m):
        out = m(input_ids=words, pixel_values=pixels(m, 32, 32), attention_mask=mask)
        return torch.cat((out.image_embeds, out.text_embeds, out.logits_per_image), 1)

    pool = {"MultiheadAttention": 1} if kind == "Siglip" else {}
    check_accelerated(model, call, {"Conv2d": 1, f"{kind}Attention": 4, f"{kind}MLP": 4 + len(pool), **pool})


@pytest.mark.parametrize("size", [(32, 32), (29, 43), (24, 40)], ids=str)
@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_swin(kind, size):
    mlp = {"SwinMLP": 4} if kind == "Swin" else {"Swinv2Intermediate": 4, "Swinv2Output": 4}
    check_accelerated(make(kind, SWIN), lambda m: m(pixels(m, *size)).logits, {"Conv2d": 1, f"{kind}Layer": 4, **mlp})


def test_swin_keeps_its_own_rules_for_small_maps():
    model, small = (
        make("Swin", SWIN),
        (16, 16),
    )  # 8 x 8 then 4 x 4: the last stage is one window, and stays unshifted after
    other = copy.deepcopy(model)
    pyvit.accelerate(model)
    for size in (small, (32, 32)):
        assert relative_error(model(pixels(model, *size)).logits, other(pixels(other, *size)).logits) < 1e-4
    assert [layer.shift_size for layer in model.swin.encoder.layers[1].blocks] == [0, 0]
    v2, small = make("Swinv2", SWIN), (16, 8)  # maps narrower than the image's, which version 2 goes on shifting
    with torch.no_grad():
        expected = v2(pixels(v2, *small)).logits
        pyvit.accelerate(v2)
        assert relative_error(v2(pixels(v2, *small)).logits, expected) < 1e-4


def test_probabilities_are_returned_when_asked_for():
    model = vit(attn_implementation="eager")
    expected = model(pixels(model, 32, 32), output_attentions=True)
    pyvit.accelerate(model)
    found = model(pixels(model, 32, 32), output_attentions=True)
    assert len(found.attentions) == 2
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(found.attentions, expected.attentions, strict=True))
    plain = model(pixels(model, 32, 32))  # transformers' collectors stay in place, and idle
    assert relative_error(plain.logits, expected.logits) < 1e-4
    assert not torch.equal(plain.logits, expected.logits)
    swin = make("Swin", SWIN, attn_implementation="eager")
    expected = swin(pixels(swin, 32, 32), output_attentions=True).attentions
    pyvit.accelerate(swin)
    found = swin(pixels(swin, 32, 32), output_attentions=True).attentions
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))


def test_hooks_still_see_what_they_saw():
    model, seen = vit(attn_implementation="eager"), []
    pyvit.accelerate(model)
    handles = [
        model.vit.layers[0].attention.register_forward_hook(lambda *call: seen.append(call[2][1].shape)),
        model.vit.layers[1].attention.q_proj.register_forward_hook(lambda *call: seen.append(call[2].shape)),
        model.vit.layers[1].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].shape)),
    ]
    model(pixels(model, 32, 32))
    assert seen == [(2, 3, 17, 17), (2, 17, 48), (2, 17, 96)]
    for handle in handles:
        handle.remove()
    swin, seen = make("Swin", SWIN), []
    pyvit.accelerate(swin)
    swin.swin.encoder.layers[0].blocks[1].attention.v_proj.register_forward_hook(
        lambda *call: seen.append(call[2].shape)
    )
    swin(pixels(swin, 32, 32))
    assert seen == [(32, 16, 16)]  # windows


def test_an_adapter_in_a_projection_stays_in_effect():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = vit()
    model.vit.layers[0].attention.v_proj = Adapter(48, 48)
    expected = model(pixels(model, 32, 32)).logits
    pyvit.accelerate(model, strict=True)
    assert relative_error(model(pixels(model, 32, 32)).logits, expected) < 1e-4
    swin = make("Swin", SWIN)
    swin.swin.encoder.layers[0].blocks[0].attention.v_proj = Adapter(16, 16)
    report = pyvit.accelerate(swin)
    assert [(row.path, row.note) for row in report.left] == [
        ("swin.encoder.layers.0.blocks.0", "its projections are not plain Linear layers")
    ]
    assert counts(report)["SwinLayer"] == 3


def test_strict_gives_the_reasons_and_changes_nothing():
    model = vit()
    model.set_attn_implementation("flex_attention")
    report = pyvit.accelerate(model)
    assert {row.note for row in report.left} == {
        "the attention implementation 'flex_attention' was chosen; set_attn_implementation('sdpa') first"
    }
    assert "vit.layers.0.attention" in str(report)
    pyvit.restore(model)
    with pytest.raises(pyvit.integrations.AccelerateError, match="flex_attention"):
        pyvit.accelerate(model, strict=True)
    assert not any("forward" in vars(m) for m in model.modules())


def test_dropout_in_training():
    model = vit(attention_probs_dropout_prob=0.5).train()
    pyvit.accelerate(model)
    images = pixels(model, 32, 32)
    assert not torch.equal(model(images).logits, model(images).logits)
    assert torch.equal(model.eval()(images).logits, model(images).logits)


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
def test_gradient_checkpointing(kind):
    model = (vit() if kind == "ViT" else make("Swin", SWIN)).train()
    pyvit.accelerate(model)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(pixels(model, 32, 32)).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_pickled_and_as_a_context():
    model = vit()
    expected = model(pixels(model, 32, 32)).logits
    with pyvit.accelerate(model) as report:
        assert counts(report) == {"Conv2d": 1, "ViTAttention": 2, "ViTMLP": 2}
        found = model(pixels(model, 32, 32)).logits
        other = pickle.loads(pickle.dumps(model))
        assert other.vit.layers[0].attention.forward.module is other.vit.layers[0].attention
        assert torch.equal(other(pixels(model, 32, 32)).logits, found)
    assert torch.equal(model(pixels(model, 32, 32)).logits, expected)


def test_accelerating_twice_is_as_once():
    model = vit()
    first, second = pyvit.accelerate(model), pyvit.accelerate(model)
    assert first.replaced == second.replaced
    pyvit.restore(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ViT", "Swin", "Swinv2"])
def test_compiles_without_a_break(kind):
    model = vit() if kind == "ViT" else make(kind, SWIN)
    expected = model(pixels(model, 32, 32)).logits
    pyvit.accelerate(model)
    found = torch.compile(model, fullgraph=True)(pixels(model, 32, 32)).logits
    assert relative_error(found, expected) < 1e-4
    found.square().sum().backward()


def test_pyvit_alone_imports_no_other_library():
    others = ("transformers", "timm", "torchvision", "open_clip")
    code = f"import sys, pyvit; assert pyvit.accelerate; print([n for n in {others} if n in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
