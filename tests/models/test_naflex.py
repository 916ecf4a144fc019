"""SigLIP 2 for images of any size, against transformers and timm with random weights, and its padded sequences."""

import pytest
import torch

import pyvit
from pyvit.models.infer import model_from_checkpoint
from pyvit.models.naflex import PatchSequences, naflex_size
from tests.models.parity import check_parity, randomise, relative_error, share
from tests.peers import peer

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
OURS = {"width": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 4, "img_size": 20}
TOWER = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 4, "img_size": 20}
SIZES = ((20, 20), (8, 28), (12, 36), (4, 4))


def images():
    return [torch.randn(3, *size) for size in SIZES]


def theirs_inputs(patches):
    """The same patches with values that must not count in the padding, and transformers' mask."""
    values, lengths = patches.values.clone(), patches.sizes.prod(-1)
    mask = torch.arange(values.shape[1])[None] < lengths[:, None]
    values[~mask] = 7.0
    return values, mask


def transformers_model():
    transformers = peer("transformers")
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**TINY, "patch_size": 4, "num_patches": 25}
    config = transformers.Siglip2Config(text_config=text, vision_config=vision, attn_implementation="sdpa")
    return randomise(transformers.Siglip2Model(config))


def test_parity_transformers():
    theirs = transformers_model()
    ours = pyvit.create_model("siglip2_vit_base_patch16_naflex", **OURS, vocab_size=50, context_length=9)
    with torch.no_grad():
        theirs.logit_scale.fill_(1.3)
    share(ours, theirs)
    patches, text = PatchSequences.of(images(), (4, 4)), torch.randint(1, 48, (3, 9))
    values, mask = theirs_inputs(patches)
    expected = theirs(
        input_ids=text, pixel_values=values, pixel_attention_mask=mask, spatial_shapes=patches.sizes, return_dict=True
    )
    padded = PatchSequences(values, patches.sizes)
    found = ours.encode_image(padded)
    check_parity(ours, theirs, ours.logits(padded, text), expected.logits_per_image, (found, expected.image_embeds))
    tokens, packing = ours.visual.features_packed(padded)
    hidden = theirs.vision_model(values, mask, patches.sizes).last_hidden_state
    assert relative_error(tokens, hidden[mask]) < 1e-4
    assert packing.lengths == tuple(patches.sizes.prod(-1).tolist())


@pytest.mark.parametrize("pool", ["map", "avg"])
def test_parity_timm(pool):
    timm = peer("timm")
    cfg = {
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "patch_size": 4,
        "pos_embed_grid_size": (5, 5),
    }
    cfg |= {"global_pool": pool, "fc_norm": False, "pos_embed_interp_mode": "bilinear", "act_layer": "gelu_tanh"}
    cfg |= {"class_token": False}
    theirs = randomise(timm.models.naflexvit.NaFlexVit(timm.models.naflexvit.NaFlexVitCfg(**cfg), num_classes=0))
    ours = pyvit.create_model("naflexvit_base_patch16_siglip", **TOWER, global_pool=pool, fc_norm=False)
    share(ours, theirs)
    patches = PatchSequences.of(images(), (4, 4))
    values, mask = theirs_inputs(patches)
    coordinates = torch.zeros(*values.shape[:2], 2, dtype=torch.long)
    for row, (rows, columns) in zip(coordinates, patches.sizes.tolist(), strict=True):
        row[: rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    expected = theirs({"patches": values, "patch_coord": coordinates, "patch_valid": mask})
    check_parity(ours, theirs, ours(PatchSequences(values, patches.sizes)), expected)


@pytest.mark.parametrize("pool", ["map", "avg"])
def test_packed_equals_one_at_a_time(pool):
    ours = randomise(pyvit.create_model("naflexvit_base_patch16_siglip", **TOWER, global_pool=pool))
    batch = images()
    alone = torch.cat([ours(image[None]) for image in batch])
    assert relative_error(ours(batch), alone) < 1e-5
    assert relative_error(ours(PatchSequences.of(batch, (4, 4))), alone) < 1e-5


def test_from_a_folder(tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    ours, report = model_from_checkpoint(tmp_path)
    assert not report.missing
    assert not report.differs
    patches = PatchSequences.of(images(), (4, 4))
    values, mask = theirs_inputs(patches)
    expected = theirs.get_image_features(pixel_values=values, pixel_attention_mask=mask, spatial_shapes=patches.sizes)
    with torch.no_grad():
        found = ours.eval().encode_image(patches, normalize=False)
        assert relative_error(found, expected.pooler_output) < 1e-4
    again, _ = model_from_checkpoint(ours.state_dict())
    assert type(again.visual) is type(ours.visual)


def test_sizes_are_those_of_transformers():
    peer("transformers")
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    for size in ((640, 480), (33, 1000), (16, 16), (1, 7), (224, 224)):
        for most in (1, 7, 256, 1024):
            assert naflex_size(size, 16, most) == get_image_size_for_max_num_patches(*size, 16, most)


def test_wrong_sequences_are_refused():
    ours = pyvit.create_model("naflexvit_base_patch16_siglip", **TOWER)
    with pytest.raises(ValueError, match=r"multiples of 4 and 4, got \(3, 9, 8\)"):
        ours([torch.randn(3, 9, 8)])
    patches = PatchSequences.of(images(), (4, 4))
    with pytest.raises(ValueError, match=r"sizes must be \(4, 2\), got \(3, 2\)"):
        ours(PatchSequences(patches.values, patches.sizes[:3]))
    with pytest.raises(ValueError, match="1 to 27 patches per image"):
        ours(PatchSequences(patches.values, patches.sizes + 9))
    with pytest.raises(ValueError, match=r"values must be \(B, L, 48\)"):
        ours(PatchSequences(patches.values[..., :47], patches.sizes))
    with pytest.raises(ValueError, match="class_token=False"):
        pyvit.create_model("naflexvit_base_patch16_siglip", **TOWER, class_token=True)
