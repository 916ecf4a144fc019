"""Models of other libraries with the weights of :mod:`benchmarks.baselines`, which have timm's names."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from typing import Any

from torch import Tensor, nn

from benchmarks import baselines
from benchmarks.peers import import_peer, import_timm

State = dict[str, Tensor]


def timm_model(name: str, state: State) -> nn.Module:
    model = import_timm().create_model(name, drop_path_rate=0.0)
    model.load_state_dict(state)
    return model


def _renamed(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    """Keys by the first pattern that matches them; the others stay."""
    found = {}
    for key, value in state.items():
        for pattern, name in rules:
            new, count = re.subn(pattern, name, key)
            if count:
                key = new
                break
        found[key] = value
    return found


# transformers (version 5)
_HF_BLOCK = (
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."),
    (".attn.relative_position_bias_table", ".attention.relative_position_bias.relative_position_bias_table"),
)


def _hf_state(state: State, swin: bool) -> State:
    root, found = ("swin", {}) if swin else ("vit", {})
    for key, value in state.items():
        if ".attn.qkv." in key:
            stem, leaf = key.split(".attn.qkv.")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{stem}.attention.{letter}_proj.{leaf}"] = part
            continue
        for old, new in _HF_BLOCK if "blocks." in key else ():
            key = key.replace(old, new)
        found[key] = value

    # timm's downsample is at the start of a stage, transformers' at the end of the previous one
    def previous(layer: re.Match[str]) -> str:
        return f"layers.{int(layer[1]) - 1}.downsample"

    found = {re.sub(r"^layers\.(\d+)\.downsample", previous, key): value for key, value in found.items()}
    return _renamed(
        found,
        (
            (r"^patch_embed\.proj\.", f"{root}.embeddings.patch_embeddings.projection."),
            (r"^patch_embed\.norm\.", f"{root}.embeddings.norm."),
            (r"^blocks\.", f"{root}.layers."),
            (r"^layers\.", f"{root}.encoder.layers."),
            (r"^norm\.", f"{root}.layernorm."),
            (r"^head\.(fc\.)?", "classifier."),
            (r"^cls_token$", f"{root}.embeddings.cls_token"),
            (r"^pos_embed$", f"{root}.embeddings.position_embeddings"),
        ),
    )


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def transformers_model(name: str, state: State) -> nn.Module:
    transformers = (
        import_peer("transformers")
        if importlib.util.find_spec("torchvision")
        else importlib.import_module("transformers")
    )
    _, config = baselines.CONFIGS[name]
    swin = name.startswith("swin")
    if swin:
        kind = transformers.SwinForImageClassification
        options = transformers.SwinConfig(
            embed_dim=config["width"],
            depths=list(config["depths"]),
            num_heads=list(config["heads"]),
            num_labels=1000,
            drop_path_rate=0.0,
        )
    else:
        kind = transformers.ViTForImageClassification
        options = transformers.ViTConfig(
            hidden_size=config["width"],
            num_hidden_layers=config["depth"],
            num_attention_heads=config["heads"],
            intermediate_size=4 * config["width"],
            layer_norm_eps=1e-6,
            num_labels=1000,
        )
    model = kind(options)
    model.set_attn_implementation("sdpa")
    model.load_state_dict(_hf_state(state, swin))
    return _Logits(model)


_TORCHVISION_VIT = (
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
)


def _torchvision_swin_state(state: State, model: nn.Module) -> State:
    found = {}
    for key, value in state.items():
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"features.{2 * int(m[1])}.", key)
        key = re.sub(r"^layers\.(\d+)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", key)
        found[key.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.3.")] = value
    found = _renamed(
        found,
        (
            (r"^patch_embed\.proj\.", "features.0.0."),
            (r"^patch_embed\.norm\.", "features.0.2."),
            (r"^head\.fc\.", "head."),
        ),
    )
    index = {key: value for key, value in model.state_dict().items() if key.endswith("relative_position_index")}
    return {**found, **index}


def torchvision_model(name: str, state: State) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    _, config = baselines.CONFIGS[name]
    width, model = config["width"], None
    if name.startswith("swin"):
        depths, heads = list(config["depths"]), list(config["heads"])
        norm = functools.partial(nn.LayerNorm, eps=1e-5)
        model = models.SwinTransformer([4, 4], width, depths, heads, [7, 7], stochastic_depth_prob=0.0, norm_layer=norm)
        model.load_state_dict(_torchvision_swin_state(state, model))
    else:
        model = models.VisionTransformer(224, 16, config["depth"], config["heads"], width, 4 * width)
        model.load_state_dict(_renamed(state, _TORCHVISION_VIT))
    return model


_OPEN_CLIP = (
    (r"^blocks\.(\d+)\.norm(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^norm\.", "ln_post."),
)


class _OpenClip(nn.Module):
    """open_clip's image tower. Its projection has no bias; the classifier's is added here."""

    def __init__(self, tower: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.tower, self.bias = tower, nn.Parameter(bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images) + self.bias


def open_clip_model(name: str, state: State) -> nn.Module:
    """The image tower of CLIP without the layer norm before the first block, and with GELU: a plain ViT. Its patch
    convolution has no bias, which the position embeddings of the patches take on."""
    _, config = baselines.CONFIGS[name]
    if name.startswith("swin"):
        raise ValueError("open_clip has no Swin of its own")
    vision: Any = import_peer("open_clip.transformer")
    width = config["width"]
    tower = vision.VisionTransformer(
        224,
        16,
        width,
        config["depth"],
        config["heads"],
        4.0,
        output_dim=1000,
        no_ln_pre=True,
        norm_layer=functools.partial(vision.LayerNorm, eps=1e-6),
    )
    given = _renamed(state, _OPEN_CLIP)
    bias, head_bias = given.pop("conv1.bias"), given.pop("head.bias")
    position = given["positional_embedding"][0].clone()
    position[1:] += bias
    given |= {
        "class_embedding": given["class_embedding"].flatten(),
        "positional_embedding": position,
        "proj": given.pop("head.weight").t().contiguous(),
    }
    tower.load_state_dict(given)
    return _OpenClip(tower, head_bias.clone())


#: Library -> a function of a name of :data:`benchmarks.baselines.CONFIGS` and its weights.
MODELS = {
    "timm": timm_model,
    "transformers": transformers_model,
    "torchvision": torchvision_model,
    "open_clip": open_clip_model,
}
