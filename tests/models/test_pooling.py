"""Pooling of all model families, against timm and transformers with the same weights."""

from __future__ import annotations

import pytest
import torch

import pyvit
from pyvit.eval.features import embed
from pyvit.eval.visualize import patch_features
from pyvit.models.checkpoints import load_checkpoint
from pyvit.models.deit import DistilledVisionTransformer
from pyvit.models.infer import model_from_checkpoint
from tests.peers import peer

timm = peer("timm")
transformers = pytest.importorskip("transformers")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


TIMM = {
    "class token": ({}, {}),
    "average": ({"global_pool": "avg"}, {"global_pool": "avg"}),
    "average, norm before": ({"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg", "fc_norm": False}),
    "average beside registers": ({"global_pool": "avg", "reg_tokens": 3}, {"global_pool": "avg", "reg_tokens": 3}),
    "registers": ({"reg_tokens": 3}, {"reg_tokens": 3}),
    "registers without positions": (
        {"reg_tokens": 3, "no_embed_class": True},
        {"reg_tokens": 3, "no_embed_class": True},
    ),
    "attention": ({"global_pool": "map", "class_token": False}, {"global_pool": "map", "class_token": False}),
    "norm before the blocks": ({"pre_norm": True}, {"pre_norm": True, "patch_bias": False}),
    "LayerScale": ({"init_values": 0.1}, {"init_values": 0.1}),
    "no class token": ({"class_token": False, "global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timms_vits(kind):
    theirs_settings, ours_settings = TIMM[kind]
    theirs = randomised(timm.models.vision_transformer.VisionTransformer(**SMALL, **theirs_settings))
    ours = pyvit.create_model("vit_tiny_patch16_224", **{**SMALL, **ours_settings}).eval()
    load_checkpoint(ours, theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    wanted = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    close(ours(images), theirs(images))
    close(embed(ours, images), wanted)
    close(ours.forward_features(images), theirs.forward_features(images))
    ((patches, prefix),) = ours.get_intermediate_layers(images, 1, return_prefix_tokens=True)
    (there,) = theirs.get_intermediate_layers(images, 1, norm=True)
    close(patches, there)
    close(torch.cat((prefix, patches), 1), ours.forward_features(images))
    close(patch_features(ours, images).flatten(1, 2), theirs.forward_features(images)[:, theirs.num_prefix_tokens :])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_timms_distilled_deit():
    theirs = randomised(timm.models.deit.VisionTransformerDistilled(**SMALL))
    ours = pyvit.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    load_checkpoint(ours, theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    close(ours(images), theirs(images))
    close(embed(ours, images), theirs.forward_head(theirs.forward_features(images), pre_logits=True))
    without = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head")}
    model, _ = model_from_checkpoint(without, num_heads=2)
    assert isinstance(model, DistilledVisionTransformer)
    close(model.eval()(images), embed(ours, images))


HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"])
def test_transformers(kind, tmp_path):
    """From a folder of save_pretrained: settings are inferred from shapes and configuration."""
    names = {k: v for k, v in HF.items() if not kind.startswith("Dinov2") or k != "intermediate_size"}
    config = getattr(transformers, f"{kind}Config")(
        **names, num_labels=5, **({"num_register_tokens": 3} if kind.endswith("s") else {})
    )
    head = "ForImageClassificationWithTeacher" if kind == "DeiT" else "ForImageClassification"
    theirs = randomised(getattr(transformers, kind + head)(config))
    theirs.save_pretrained(tmp_path)
    ours, report = model_from_checkpoint(tmp_path)
    assert not report.missing
    assert not report.notes
    images = torch.randn(2, 3, 32, 32)
    close(ours.eval()(images), theirs(images).logits)


@pytest.mark.parametrize("stride", [8, 6])
def test_transformers_spectrograms(stride, tmp_path):
    """Mean of both prefix tokens, then the norm. Only the configuration has the stride of the patches."""
    names = {k: v for k, v in HF.items() if k != "image_size"}
    more = {"frequency_stride": stride, "time_stride": stride, "max_length": 56, "num_mel_bins": 32, "num_labels": 5}
    theirs = randomised(transformers.ASTForAudioClassification(transformers.ASTConfig(**names, **more)))
    theirs.save_pretrained(tmp_path)
    ours, report = model_from_checkpoint(tmp_path)
    assert not report.missing
    sound = torch.randn(2, 1, 32, 56)
    wanted = theirs(sound[:, 0].transpose(1, 2)).logits
    close(ours.eval()(sound), wanted)
    close(ours.head(embed(ours, sound)), wanted)
    with pytest.raises(ValueError, match="create the model by name"):
        model_from_checkpoint(dict(theirs.state_dict()))
    named = pyvit.create_model("ast_base_patch16_1024x128", **{**SMALL, "img_size": (32, 56)}, patch_stride=4)
    with pytest.raises(ValueError, match=r"patch_embed\.stride .* in the file, \[4, 4\] in the model"):
        load_checkpoint(named, tmp_path)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_maps_are_averaged(name):
    settings = {"resnet18": {"width": 8}}.get(
        name, {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    )
    model = randomised(pyvit.create_model(name, **settings, num_classes=5))
    images = torch.randn(2, 3, 64, 64)
    features = patch_features(model, images)  # (B, rows, columns, D)
    close(embed(model, images), features.mean((1, 2)))
    head = model.fc if name == "resnet18" else model.head.fc
    close(model(images), head(embed(model, images)))
