"""SAM 2's image encoder against timm and transformers, with random weights: outputs and all gradients."""

import torch

import pyvit
from tests.models.checkpoint_models import SAM2, sam2
from tests.models.parity import check_parity, check_same_names, randomise, share
from tests.peers import peer


def test_parity_timm():
    names = {"window_sizes": "window_spec", "global_blocks": "global_att_blocks"}
    settings = {names.get(k, k): v for k, v in SAM2.items() if k != "img_size"}
    theirs = peer("timm").models.hieradet_sam2.HieraDet(**settings, num_classes=5)
    ours = pyvit.create_model("sam2_hiera_tiny", **{**SAM2, "num_classes": 5})
    check_same_names(ours, theirs, torch.randn(2, 3, 64, 96), relu=False)


def test_parity_transformers():
    transformers = peer("transformers")
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        blocks_per_stage=[1, 2, 3, 2],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 6, 5],
        global_attention_blocks=[4],
        window_positional_embedding_background_size=[5, 5],
        image_size=[64, 64],
    )
    config = transformers.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16], fpn_hidden_size=24
    )
    theirs = randomise(transformers.Sam2VisionModel(config))
    ours = sam2()
    share(ours, theirs)
    images = torch.randn(2, 3, 64, 64)
    found, expected = ours(images), theirs(images).fpn_hidden_states
    assert [m.shape for m in found] == [m.shape for m in expected]
    joined, theirs_joined = (torch.cat([m.flatten(1) for m in maps], 1) for maps in (found, expected))
    check_parity(ours, theirs, joined, theirs_joined, *zip(found, expected, strict=True))


def test_other_parts_of_a_checkpoint_are_left_out():
    names = {"trunk.": "image_encoder.trunk.", "neck.": "image_encoder.neck.", "mlp.fc1": "mlp.layers.0"}
    names |= {"mlp.fc2": "mlp.layers.1"}
    state = {}
    for key, value in sam2().state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if "neck" in key:
            key = key.replace(".weight", ".conv.weight").replace(".bias", ".conv.bias")
        state[key] = value
    state["memory_encoder.out_proj.weight"] = torch.zeros(1)
    report = pyvit.load_checkpoint(sam2(), {"model": state})
    assert report.format == "facebookresearch SAM 2"
    assert report.unused == ["memory_encoder.out_proj.weight"]
