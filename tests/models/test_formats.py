"""Checkpoint layouts, read and written. The keys of libraries that need not be installed are recorded here."""

from __future__ import annotations

import pytest
import torch

from pyvit.models.checkpoints import from_native, load_checkpoint, recognise, to_native
from tests.models.checkpoint_models import MODELS, dinov2, swin, vit


@pytest.mark.parametrize("layout", MODELS)
def test_round_trip(layout):
    source, target = MODELS[layout](), MODELS[layout]()
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn_like(p))
    foreign = from_native(source.state_dict(), layout)
    assert recognise(foreign).name == layout
    report = load_checkpoint(target, foreign)
    assert not report.missing
    assert not report.unexpected
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


# Keys with shapes of one block (and of everything outside the blocks) as the libraries write them.
RECORDED = {
    "torchvision ViT": (
        vit,
        {
            "class_token": (1, 1, 32),
            "conv_proj.weight": (32, 3, 8, 8),
            "conv_proj.bias": (32,),
            "encoder.pos_embedding": (1, 17, 32),
            "encoder.layers.encoder_layer_{i}.ln_1.weight": (32,),
            "encoder.layers.encoder_layer_{i}.ln_1.bias": (32,),
            "encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight": (96, 32),
            "encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias": (96,),
            "encoder.layers.encoder_layer_{i}.self_attention.out_proj.weight": (32, 32),
            "encoder.layers.encoder_layer_{i}.self_attention.out_proj.bias": (32,),
            "encoder.layers.encoder_layer_{i}.ln_2.weight": (32,),
            "encoder.layers.encoder_layer_{i}.ln_2.bias": (32,),
            "encoder.layers.encoder_layer_{i}.mlp.0.weight": (128, 32),
            "encoder.layers.encoder_layer_{i}.mlp.0.bias": (128,),
            "encoder.layers.encoder_layer_{i}.mlp.3.weight": (32, 128),
            "encoder.layers.encoder_layer_{i}.mlp.3.bias": (32,),
            "encoder.ln.weight": (32,),
            "encoder.ln.bias": (32,),
            "heads.head.weight": (5, 32),
            "heads.head.bias": (5,),
        },
    ),
    "transformers<5 ViT": (
        vit,
        {
            "vit.embeddings.cls_token": (1, 1, 32),
            "vit.embeddings.position_embeddings": (1, 17, 32),
            "vit.embeddings.patch_embeddings.projection.weight": (32, 3, 8, 8),
            "vit.embeddings.patch_embeddings.projection.bias": (32,),
            **{
                f"vit.encoder.layer.{{i}}.attention.attention.{n}.{p}": (32, 32) if p == "weight" else (32,)
                for n in ("query", "key", "value")
                for p in ("weight", "bias")
            },
            "vit.encoder.layer.{i}.attention.output.dense.weight": (32, 32),
            "vit.encoder.layer.{i}.attention.output.dense.bias": (32,),
            "vit.encoder.layer.{i}.intermediate.dense.weight": (128, 32),
            "vit.encoder.layer.{i}.intermediate.dense.bias": (128,),
            "vit.encoder.layer.{i}.output.dense.weight": (32, 128),
            "vit.encoder.layer.{i}.output.dense.bias": (32,),
            "vit.encoder.layer.{i}.layernorm_before.weight": (32,),
            "vit.encoder.layer.{i}.layernorm_before.bias": (32,),
            "vit.encoder.layer.{i}.layernorm_after.weight": (32,),
            "vit.encoder.layer.{i}.layernorm_after.bias": (32,),
            "vit.layernorm.weight": (32,),
            "vit.layernorm.bias": (32,),
            "classifier.weight": (5, 32),
            "classifier.bias": (5,),
        },
    ),
    "OpenAI CLIP": (
        MODELS["OpenAI CLIP"],
        {
            "positional_embedding": (8, 24),
            "text_projection": (24, 16),
            "logit_scale": (),
            "input_resolution": (),
            "context_length": (),
            "vocab_size": (),
            "visual.class_embedding": (32,),
            "visual.positional_embedding": (17, 32),
            "visual.proj": (32, 16),
            "visual.conv1.weight": (32, 3, 8, 8),
            "visual.ln_pre.weight": (32,),
            "visual.ln_pre.bias": (32,),
            "visual.ln_post.weight": (32,),
            "visual.ln_post.bias": (32,),
            "token_embedding.weight": (20, 24),
            "ln_final.weight": (24,),
            "ln_final.bias": (24,),
            **{
                f"{tower}.resblocks.{block}.{key}": shape
                for tower, w, block in (("visual.transformer", 32, "{i}"), ("transformer", 24, "0"))
                for key, shape in {
                    "attn.in_proj_weight": (3 * w, w),
                    "attn.in_proj_bias": (3 * w,),
                    "attn.out_proj.weight": (w, w),
                    "attn.out_proj.bias": (w,),
                    "ln_1.weight": (w,),
                    "ln_1.bias": (w,),
                    "mlp.c_fc.weight": (4 * w, w),
                    "mlp.c_fc.bias": (4 * w,),
                    "mlp.c_proj.weight": (w, 4 * w),
                    "mlp.c_proj.bias": (w,),
                    "ln_2.weight": (w,),
                    "ln_2.bias": (w,),
                }.items()
            },
        },
    ),
}


@pytest.mark.parametrize("layout", RECORDED)
def test_recorded_keys(layout):
    make, keys = RECORDED[layout]
    state = {
        k.replace("{i}", str(i)): torch.randn(shape) for k, shape in keys.items() for i in range(2 if "{i}" in k else 1)
    }
    model = make()
    report = load_checkpoint(model, state)
    assert report.format == layout
    assert not report.missing
    assert len(report.loaded) == len(model.state_dict())


def test_torchvision_swin_keys():
    state = from_native(swin().state_dict(), "torchvision Swin")
    assert {
        "features.0.0.weight",
        "features.0.2.bias",
        "features.1.0.attn.qkv.weight",
        "features.2.reduction.weight",
    } <= set(state)
    assert {
        "features.5.1.mlp.3.bias",
        "features.6.norm.weight",
        "features.7.0.attn.relative_position_bias_table",
        "head.weight",
    } <= set(state)
    state["features.1.0.attn.relative_position_index"] = torch.zeros(16, dtype=torch.long)
    report = load_checkpoint(swin(), state)
    assert report.unused == ["features.1.0.attn.relative_position_index"]


def test_microsoft_swin_keys():
    state = from_native(swin().state_dict(), "Microsoft Swin")
    assert "layers.0.downsample.reduction.weight" in state
    assert "layers.3.downsample.reduction.weight" not in state
    assert "head.weight" in state
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    assert len(load_checkpoint(swin(), {"model": state, "epoch": 3}).unused) == 2


def test_chunked_dinov2_in_wrappers(tmp_path):
    model = dinov2(reg_tokens=4)
    state = from_native(model.state_dict(), "facebookresearch DINOv2")
    chunked = {("blocks." + k.split(".")[1] + k[6:] if k.startswith("blocks") else k): v for k, v in state.items()}
    path = tmp_path / "checkpoint.pth"
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in chunked.items()} | heads}, path)
    report = load_checkpoint(dinov2(reg_tokens=4), path)
    assert report.unused == ["dino_head.mlp.0.weight"]
    assert not report.missing


def test_gated_mlps_are_written_under_their_own_names():
    state = dinov2(activation="swiglu").state_dict()
    assert "encoder.layer.0.mlp.weights_in.weight" in {
        k.removeprefix("dinov2.") for k in from_native(state, "transformers<5 DINOv2")
    }
    assert "dinov2.encoder.layer.1.mlp.gate_proj.bias" in from_native(state, "transformers DINOv2")
    written = from_native(state, "facebookresearch DINOv2")
    assert "blocks.0.mlp.w12.weight" in written
    assert not load_checkpoint(dinov2(activation="swiglu"), written).missing


def test_unknown_key_of_a_layout_is_reported():
    state = from_native(vit().state_dict(), "torchvision ViT")
    state["encoder.layers.encoder_layer_0.extra"] = torch.zeros(1)
    _, unknown, _ = to_native(state, recognise(state))
    assert unknown == ["encoder.layers.encoder_layer_0.extra"]


@pytest.mark.parametrize(("settings", "mark"), [({"dist_token": True}, "deit."), ({}, "vit.")])
def test_bases_are_written_by_what_the_model_has(settings, mark):
    assert any(k.startswith(mark) for k in from_native(vit(num_classes=0, **settings).state_dict(), "transformers ViT"))
    written = from_native(dinov2(reg_tokens=4).state_dict(), "transformers DINOv2")
    assert any(k.startswith("dinov2_with_registers.") for k in written)
