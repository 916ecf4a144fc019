"""Small models of transformers with random weights, each with a call that returns a tensor."""

from __future__ import annotations

import importlib

import torch

from tests.models.parity import randomise
from tests.peers import peer

transformers = peer("transformers")

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
IMAGE = {"image_size": 32, "patch_size": 8}
TEXT = {**TINY, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 49}
QWEN = {
    "depth": 2,
    "hidden_size": 48,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 4,
    "temporal_patch_size": 1,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
}


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def dtype_of(model):
    return next(model.parameters()).dtype


def build(kind, config, head="Model"):
    """A model of random weights with transformers' default attention, sdpa."""
    torch.manual_seed(0)
    return randomise(getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**config)))


def images(kind, config, size=(32, 32), head="Model"):
    pixels = draw(2, 3, *size)
    return build(kind, config, head), lambda m: m(pixels.to(dtype_of(m)))[0]


def spectrogram():
    size = {"patch_size": 8, "frequency_stride": 5, "time_stride": 5, "max_length": 40, "num_mel_bins": 24}
    sound = draw(2, 40, 24)
    return build("AST", {**TINY, **size}), lambda m: m(sound.to(dtype_of(m)))[0]


def image_and_text(kind):
    text = {**TEXT, "pad_token_id": 1, **({"projection_dim": 24} if kind == "CLIP" else {})}
    words, pixels = torch.randint(2, 48, (2, 9), generator=torch.Generator().manual_seed(4)), draw(2, 3, 32, 32)
    words[:, 6:] = 49
    # SigLIP's text is what its last token sees.
    mask = (torch.arange(9) < torch.tensor([[9], [7 if kind == "CLIP" else 9]])).long()

    def call(m):
        out = m(input_ids=words, pixel_values=pixels.to(dtype_of(m)), attention_mask=mask)
        return torch.cat((out.image_embeds, out.text_embeds), 1)

    return build(kind, {"text_config": text, "vision_config": {**TINY, **IMAGE}}), call


def padded_patches():
    patches, shapes = draw(2, 16, 192), torch.tensor([[4, 4], [3, 4]])
    mask = (torch.arange(16) < torch.tensor([[16], [12]])).long()
    model = build("Siglip2Vision", {**TINY, "patch_size": 8, "num_patches": 16})
    call = lambda m: m(patches.to(dtype_of(m)), pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state  # noqa: E731
    return model, lambda m: call(m)[mask.bool()]  # what padding attends to differs, and is of no use


def radio(packed):
    sizes = {name: value for name, value in TINY.items() if name != "intermediate_size"}
    model = build("Radio", {**sizes, "patch_size": 8, "image_size": 32, "max_img_size": 64, "mlp_ratio": 2.0})
    if not packed:
        pixels = draw(2, 3, 32, 24)
        return model, lambda m: m(pixels.to(dtype_of(m))).last_hidden_state
    grid, patches = torch.tensor([[4, 3], [2, 5], [1, 1]]), draw(12 + 10 + 1, 192)
    return model, lambda m: m(patches.to(dtype_of(m)), image_grid_hw=grid).last_hidden_state


def tower(package, kind, **config):
    """A vision tower, without its language model."""
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    kind = getattr(module, kind)
    torch.manual_seed(0)
    return randomise(kind._from_config(kind.config_class(**config)))


def qwen(package, kind, **more):
    model = tower(package, kind, **QWEN, **more)  # of images of 6 x 8 and 2 x 4 patches
    grid, patches = torch.tensor([[1, 6, 8], [1, 2, 4]]), draw(48 + 8, 3 * 4 * 4)
    return model, lambda m: m(patches.to(dtype_of(m)), grid_thw=grid).pooler_output


def pixtral():
    model = tower("pixtral", "PixtralVisionModel", **TINY, image_size=32, patch_size=8, head_dim=16)
    pixels, sizes = draw(2, 3, 32, 32), [(32, 32), (16, 24)]
    return model, lambda m: m(pixels.to(dtype_of(m)), image_sizes=sizes).last_hidden_state


SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2, "image_size": 32}
MODELS = {
    "ViT": lambda: images("ViT", {**TINY, **IMAGE}),
    "DINOv2": lambda: images("Dinov2", {"hidden_size": 72, "num_hidden_layers": 1, "num_attention_heads": 1, **IMAGE}),
    "DINOv3": lambda: images("DINOv3ViT", {**TINY, **IMAGE, "num_register_tokens": 2}, (24, 40)),
    "BEiT": lambda: images("Beit", {**TINY, **IMAGE, "use_relative_position_bias": True}),
    "Swin": lambda: images("Swin", SWIN, (29, 43)),
    "AST": spectrogram,
    "CLIP": lambda: image_and_text("CLIP"),
    "SigLIP": lambda: image_and_text("Siglip"),
    "SigLIP 2, padded": padded_patches,
    "RADIO": lambda: radio(False),
    "RADIO, packed": lambda: radio(True),
    "Qwen2-VL": lambda: qwen("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", embed_dim=48, mlp_ratio=2),
    "Qwen2.5-VL, windows": lambda: qwen(
        "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", window_size=16, fullatt_block_indexes=[1]
    ),
    "Qwen3-VL": lambda: qwen(
        "qwen3_vl", "Qwen3VLVisionModel", num_position_embeddings=64, deepstack_visual_indexes=[0]
    ),
    "Pixtral": pixtral,
}
#: Models that add a bias to the scores, and models whose images or padded batches "pyvit_flash" attends to as packed
#: sequences.
DENSE = ("Swin", "BEiT")
PACKED = ("RADIO, packed", "Qwen2-VL", "Qwen2.5-VL, windows", "Qwen3-VL", "Pixtral", "SigLIP 2, padded")
