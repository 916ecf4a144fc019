"""Vision transformers, Swin, hybrids and ResNets against timm, torchvision and open_clip, with random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

import pyvit
from pyvit.models.checkpoints import recognise, to_native
from pyvit.models.hybrid import HybridVisionTransformer
from pyvit.models.infer import model_from_checkpoint
from pyvit.models.resnet import CLIPResNet, ResNet
from tests import peers
from tests.models.parity import check_both_precisions, check_parity, check_same_names, randomise

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7, "img_size": 64}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_base_r50_s16_224", {"mlp_ratio": 2.0}),
        ("vit_small_r26_s32_224", {"mlp_ratio": 2.0}),
        ("vit_tiny_r_s16_p8_224", {"mlp_ratio": 2.0, "patch_size": 8}),
    ],
)
def test_hybrids(name, settings):
    timm = peers.peer("timm")
    theirs = timm.create_model(name, **VIT, mlp_ratio=2.0)
    check_same_names(pyvit.create_model(name, **VIT, **settings), theirs, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_vision_transformers(name):
    theirs = peers.peer("timm").create_model(name, **VIT, patch_size=8, mlp_ratio=2.0)
    check_same_names(
        pyvit.create_model(name, **VIT, patch_size=8, mlp_ratio=2.0), theirs, torch.randn(2, 3, 64, 64), relu=False
    )


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_224",
        "vit_large_patch14_clip_quickgelu_336",
        "vit_base_patch16_siglip_224",
        "vit_so400m_patch16_siglip_gap_256",
    ],
)
def test_image_towers(name):
    settings = {**VIT, "patch_size": 8, "mlp_ratio": 2.0}
    theirs = peers.peer("timm").create_model(name, **settings)
    check_same_names(pyvit.create_model(name, **settings), theirs, torch.randn(2, 3, 64, 64), relu=False)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin(name):
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 7, "img_size": 64}
    theirs = peers.peer("timm").create_model(name, **sizes)
    check_same_names(pyvit.create_model(name, **sizes), theirs, torch.randn(2, 3, 64, 64), relu=False)


@pytest.mark.parametrize(
    ("layers", "bottleneck", "kind"), [((2, 2, 2, 2), False, "BasicBlock"), ((2, 1, 1, 1), True, "Bottleneck")]
)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_resnet(library, layers, bottleneck, kind):
    if library == "timm":
        timm = peers.peer("timm")
        theirs = timm.models.resnet.ResNet(getattr(timm.models.resnet, kind), layers, num_classes=7)
    else:
        resnet = peers.torchvision().models.resnet
        theirs = resnet.ResNet(getattr(resnet, kind), list(layers), num_classes=7)
    check_same_names(ResNet(layers, bottleneck, num_classes=7), theirs, torch.randn(2, 3, 40, 56))


def test_clip_resnet():
    open_clip = peers.peer("open_clip")
    theirs = open_clip.modified_resnet.ModifiedResNet([1, 2, 1, 1], output_dim=24, heads=4, image_size=64, width=16)
    ours = CLIPResNet((1, 2, 1, 1), embed_dim=24, num_heads=4, img_size=64, width=16)
    check_same_names(ours, theirs, torch.randn(2, 3, 64, 64))


def test_convolutional_stem():
    torchvision = peers.torchvision()
    stem = [torchvision.models.vision_transformer.ConvStemConfig(c, 3, 2) for c in (8, 16)]
    theirs = torchvision.models.VisionTransformer(32, 4, 2, 3, 48, 96, num_classes=7, conv_stem_configs=stem)
    settings = {**VIT, "img_size": 32, "mlp_ratio": 2.0, "patch_size": 1}
    ours = HybridVisionTransformer(conv_channels=(8, 16), **settings)
    theirs = randomise(theirs)
    ours.eval()
    pyvit.load_checkpoint(ours, theirs.state_dict(), strict=False)
    names = {"patch_embed.proj": "conv_proj.conv_last"}
    names |= {
        f"patch_embed.backbone.convs.{3 * i + j}": f"conv_proj.conv_bn_relu_{i}.{j}" for i in (0, 1) for j in (0, 1)
    }
    for name, other in names.items():  # torchvision publishes no weights of it, and no layout here knows its names
        ours.get_submodule(name).load_state_dict(theirs.get_submodule(other).state_dict())

    def translate(gradients):
        known, stem, _ = to_native(gradients, recognise(theirs.state_dict()))
        back = {other: name for name, other in names.items()}
        return known | {
            f"{back[layer]}.{kind}": gradients[f"{layer}.{kind}"]
            for layer, _, kind in (k.rpartition(".") for k in stem)
        }

    check_both_precisions(ours, theirs, torch.randn(2, 3, 32, 32), translate=translate)


def test_siglip_of_open_clip(tmp_path):
    open_clip, timm = peers.peer("open_clip"), peers.peer("timm")
    text = {"context_length": 9, "vocab_size": 50, "width": 24, "heads": 2, "layers": 1, "no_causal_mask": True}
    text |= {"proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    text |= {"act_kwargs": {"approximate": "tanh"}}
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none"}
    theirs = open_clip.model.CustomTextCLIP(48, vision, text, init_logit_bias=-10)
    tower = {**VIT, "num_classes": 0, "patch_size": 16, "act_layer": "gelu_tanh"}
    theirs.visual.trunk = timm.create_model("vit_base_patch16_siglip_224", **tower)
    randomise(theirs)
    with torch.no_grad():
        theirs.logit_scale.fill_(1.3)
    config = {"model_cfg": {"embed_dim": 48, "vision_cfg": {**vision, "image_size": 64}, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    ours, report = model_from_checkpoint(tmp_path, num_heads=3)
    assert report.format == "open_clip with timm's tower"
    assert not report.missing
    ours.eval()
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(1, 50, (3, 9))
    image, words, scale = theirs(images, ids)[:3]
    expected = scale * image @ words.T + theirs.logit_bias
    check_parity(ours, theirs, ours.logits(images, ids), expected)
