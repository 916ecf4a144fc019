"""MAE, CLIP, MetaCLIP 2, SigLIP, SigLIP 2, DeiT and AST against transformers, with random weights: outputs and all
gradients."""

import math

import pytest
import torch

import pyvit
from pyvit.models.audio import LogMel
from pyvit.models.infer import model_from_checkpoint
from tests.models.parity import check_parity, randomise, relative_error, share
from tests.peers import peer

transformers = peer("transformers")

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
OURS = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


def _mae(norm_pix):
    decoder = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.ViTMAEConfig(
        **TINY,
        image_size=32,
        patch_size=8,
        norm_pix_loss=norm_pix,
        layer_norm_eps=1e-6,
        **{f"decoder_{k}": v for k, v in decoder.items()},
    )
    theirs = randomise(transformers.ViTMAEForPreTraining(config))
    ours = pyvit.create_model(
        "mae_vit_base_patch16_224",
        **OURS,
        img_size=32,
        patch_size=8,
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=2,
        norm_pix_loss=norm_pix,
        interpolate_antialias=False,
    )
    share(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("norm_pix", [False, True])
def test_mae(norm_pix):
    ours, theirs = _mae(norm_pix)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected = theirs(images, noise=noise)
    loss, prediction, mask = ours(images, noise=noise)
    assert torch.equal(mask, expected.mask)
    check_parity(ours, theirs, loss, expected.loss, (prediction, expected.logits))


def test_mae_encoder_on_another_size():  # the decoder there resamples its positions as one row
    ours, theirs = _mae(True)
    images, noise = torch.randn(2, 3, 24, 40), torch.rand(2, 15)
    keep, _, _ = ours.random_masking(2, 15, 0.75, noise)
    expected = theirs.vit(images, noise=noise, interpolate_pos_encoding=True).last_hidden_state
    assert relative_error(ours.forward_features(images, keep=keep), expected) < 1e-4
    assert ours(images, noise=noise)[1].shape == (2, 15, 192)


def test_mae_reconstructs_only_masked_patches():
    ours, _ = _mae(True)
    images, noise = torch.rand(2, 3, 32, 24), torch.rand(2, 12)
    painted, mask = ours.reconstruct(images, noise=noise)
    hidden = mask.bool().expand_as(images)
    assert mask.mean() == 0.75
    assert torch.equal(painted[~hidden], images[~hidden])
    assert (painted[hidden] != images[hidden]).float().mean() > 0.99


COMMON = {
    "img_size": 32,
    "patch_size": 8,
    "width": 48,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "vocab_size": 50,
    "context_length": 9,
}
COMMON["interpolate_antialias"] = False


def _clip(kind):
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 9}
    vision = {**TINY, "image_size": 32, "patch_size": 8}
    settings = {"embed_dim": 24, "text_width": 48, "text_depth": 2, "text_heads": 3}
    if kind == "clip":
        text |= {"eos_token_id": 49, "bos_token_id": 0}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        ours = pyvit.create_model("clip_vit_base_patch32_224", **settings, **COMMON)
        return transformers.CLIPModel(config), ours
    if kind == "metaclip2":  # the end token is not the largest id, and texts have padding behind it
        text |= {"eos_token_id": 2, "bos_token_id": 0}
        config = transformers.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=24)
        ours = pyvit.create_model("metaclip2_vit_huge_patch14_quickgelu_224", **settings, **COMMON)
        return transformers.MetaClip2Model(config), ours
    if kind == "siglip":
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        return transformers.SiglipModel(config), pyvit.create_model("siglip_vit_base_patch16_224", **COMMON)
    text |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "projection_size": 48}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    settings = {"text_width": 32, "text_depth": 1, "text_heads": 4, "text_mlp_ratio": 3.0}
    return transformers.SiglipModel(config), pyvit.create_model(
        "siglip2_vit_giantopt_patch16_256", **settings, **COMMON
    )


@pytest.mark.parametrize("kind", ["clip", "metaclip2", "siglip", "siglip2"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_clip(kind, size):
    theirs, ours = _clip(kind)
    theirs = randomise(theirs)
    with torch.no_grad():
        theirs.logit_scale.fill_(1.3)
    share(ours, theirs)
    text = torch.randint(1, 48, (3, 9))
    text[:, 6:] = 49 if kind == "clip" else 0
    if kind == "metaclip2":
        text = text.clamp_min(3)
        text[:, 6], text[:, 7:] = 2, 1
    images = torch.randn(2, 3, *size)
    expected = theirs(input_ids=text, pixel_values=images, interpolate_pos_encoding=True)
    embeddings = (ours.encode_image(images), expected.image_embeds), (ours.encode_text(text), expected.text_embeds)
    check_parity(ours, theirs, ours.logits(images, text), expected.logits_per_image, *embeddings)


@pytest.mark.parametrize("kind", ["metaclip2", "siglip2"])
def test_clip_from_a_folder(kind, tmp_path):
    theirs, _ = _clip(kind)
    theirs.save_pretrained(tmp_path)
    ours, report = model_from_checkpoint(tmp_path)
    assert not report.missing
    assert not report.differs
    text, images = torch.tensor([[5, 40, 2, 1, 1, 1, 1, 1, 1]]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=text, pixel_values=images).logits_per_image
        assert relative_error(ours.eval().logits(images, text), expected) < 1e-4


def test_deit_distilled():
    config = transformers.DeiTConfig(**TINY, image_size=32, patch_size=8, num_labels=7, layer_norm_eps=1e-6)
    theirs = randomise(transformers.DeiTForImageClassificationWithTeacher(config))
    ours = pyvit.create_model("deit_tiny_distilled_patch16_224", **OURS, img_size=32, patch_size=8, num_classes=7)
    share(ours, theirs)
    images = torch.randn(2, 3, 32, 32)
    check_parity(ours, theirs, ours(images), theirs(images).logits)
    of_class, of_teacher = ours.train()(images)
    assert torch.allclose((of_class + of_teacher) / 2, ours.eval()(images))


def test_ast():
    config = transformers.ASTConfig(
        **TINY, num_mel_bins=26, max_length=60, patch_size=8, frequency_stride=5, time_stride=5, num_labels=6
    )
    theirs = randomise(transformers.ASTForAudioClassification(config))
    settings = {
        "img_size": (26, 60),
        "patch_size": 8,
        "patch_stride": 5,
        "num_classes": 6,
        "norm_eps": config.layer_norm_eps,
    }
    ours = pyvit.create_model("ast_base_patch16_1024x128", **OURS, **settings)
    share(ours, theirs)
    spectrogram = torch.randn(2, 60, 26)
    check_parity(ours, theirs, ours(spectrogram.transpose(1, 2)[:, None]), theirs(spectrogram).logits)


def test_log_mel():
    extractor = transformers.ASTFeatureExtractor()
    seconds = torch.arange(16000 * 3) / 16000
    wave = 0.3 * torch.sin(2 * math.pi * (200 + 900 * seconds) * seconds) + 0.01 * torch.randn(seconds.shape)
    expected = torch.as_tensor(extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_values)
    assert relative_error(LogMel()(wave[None])[:, 0].transpose(1, 2), expected) < 1e-3  # log of weak bands in float32
    assert relative_error(LogMel().double()(wave[None].double())[:, 0].transpose(1, 2), expected) < 2e-4


def test_clip_parameter_counts():
    counts = {
        "clip_vit_base_patch32_224": 151_277_313,
        "clip_vit_base_patch16_224": 149_620_737,
        "clip_vit_large_patch14_224": 427_616_513,
        "siglip2_vit_base_patch32_256": 376_856_066,
        "siglip2_vit_base_patch16_224": 375_187_970,
        "siglip2_vit_large_patch16_256": 881_526_786,
        "siglip2_so400m_patch14_378": 1_136_008_498,
        "siglip2_so400m_patch16_384": 1_136_039_602,
        "siglip2_vit_giantopt_patch16_256": 1_871_393_906,
        "siglip2_vit_base_patch16_naflex": 375_234_050,
        "siglip2_so400m_patch16_naflex": 1_135_670_962,
        "metaclip2_vit_huge_patch14_quickgelu_224": 1_858_783_745,
        "metaclip2_vit_huge_patch14_378": 1_859_389_185,
        "metaclip2_vit_gigantic_patch14_224": 3_630_409_985,
    }
    counts |= {
        "mae_vit_base_patch16_224": 111_907_840,
        "mae_vit_large_patch16_224": 329_541_888,
        "ast_base_patch16_1024x128": 86_594_063,
    }
    for name, count in counts.items():
        with torch.device("meta"):
            model = pyvit.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == count, name
