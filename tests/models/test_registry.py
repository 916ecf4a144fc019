"""Names, parameter counts and errors of the registry."""

import pytest
import torch

import pyvit
from pyvit.models.encoders import parameters
from pyvit.models.registry import settings_of

PARAMETERS = {  # torchvision's num_params, timm's results table, the papers, and transformers with released settings
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch32_224": 88_224_232,
    "vit_base_patch16_384": 86_859_496,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch16_384": 304_715_752,
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_large_patch4_window12_384": 196_735_516,
    "swinv2_tiny_window8_256": 28_347_154,
    "swinv2_small_window8_256": 49_728_418,
    "swinv2_base_window8_256": 87_918_816,
    "vit_small_patch14_dinov2": 22_056_576,
    "vit_base_patch14_dinov2": 86_580_480,
    "vit_giant_patch14_dinov2": 1_136_480_768,
    "vit_base_patch16_clip_224": 86_568_424,
    "vit_giant_patch14_clip_224": 1_012_612_840,
    "vit_base_patch16_siglip_224": 92_884_224,
    "vit_base_patch16_siglip_gap_224": 85_797_120,
    "vit_so400m_patch14_siglip_378": 428_225_600,
    "vit_giantopt_patch16_siglip_256": 1_163_168_256,
    "eva02_tiny_patch14_224": 5_502_144,
    "eva02_base_patch14_448": 87_117_544,
    "eva02_large_patch14_clip_336": 304_432_832,
    "eva02_enormous_patch14_clip_224": 4_350_556_928,
    "vit_pe_core_base_patch16_224": 93_673_984,
    "vit_pe_core_large_patch14_336": 317_152_256,
    "vit_pe_core_gigantic_patch14_448": 1_882_033_920,
    "vit_pe_lang_large_patch14_448": 291_415_040,
    "vit_pe_spatial_gigantic_patch14_448": 1_851_887_104,
    "aimv2_large_patch14_224": 309_197_824,
    "aimv2_huge_patch14_336": 681_343_488,
    "aimv2_1b_patch14_224": 1_234_958_336,
    "aimv2_3b_patch14_448": 2_723_017_728,
    "samvit_base_patch16": 89_670_912,
    "samvit_large_patch16": 308_278_272,
    "samvit_huge_patch16": 637_026_048,
    "hiera_tiny_224": 27_910_216,
    "hiera_base_plus_224": 69_896_616,
    "sam2_hiera_tiny": 26_851_008,
    "sam2_encoder_hiera_tiny": 27_219_136,
    "sam2_encoder_hiera_large": 212_703_280,
    "naflexvit_base_patch16_siglip": 92_930_304,
    "vit_small_patch16_dinov3_qkvb": 21_596_544,
    "vit_small_plus_patch16_dinov3_qkvb": 28_692_864,
    "vit_base_patch16_dinov3_qkvb": 85_660_416,
    "vit_large_patch16_dinov3_qkvb": 303_129_600,
    "vit_huge_plus_patch16_dinov3_qkvb": 840_592_640,
    "vit_7b_patch16_dinov3": 6_716_035_072,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = pyvit.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_model_is_constructible():
    for name in pyvit.list_models():
        constructor, _ = settings_of(name)
        short = {k: 1 for k in ("depth", "text_depth") if k in parameters(constructor)}  # blocks are alike
        with torch.device("meta"):
            pyvit.create_model(name, **short)


def test_list_models_filters():
    swins = pyvit.list_models("swin_*")
    assert swins
    assert all(name.startswith("swin_") for name in swins)
    assert set(swins) < set(pyvit.list_models())


def test_unknown_name_suggests():
    with pytest.raises(ValueError, match=r"did you mean.*vit_base_patch16_224"):
        pyvit.create_model("vit_base_patch16_244")


def test_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="windowsize"):
        pyvit.create_model("swin_tiny_patch4_window7_224", windowsize=4)
