"""Metadata: what the shapes of weights do not show but outputs depend on (heads, activations, position grids, windows,
end tokens).

Metadata is {module: {name: value}}, such as {"blocks.0.attn": {"num_heads": 3}}. State dicts of models contain it
(:class:`WithMetadata`), as does the header of weights saved by ``pyvit train``. Other libraries have a configuration
beside the weights (:func:`metadata_of_config`); module names are then regular expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Metadata = dict[str, dict[str, Any]]

#: Attributes of pyvit's modules that are metadata.
NAMES = (
    "num_heads", "activation", "eps", "grid", "stride", "window_size", "pretrained_window_size", "base", "causal",
    "pool", "eot", "pad", "global_pool", "naflex",
    "reference", "offset", "column_first", "post_norm",
)  # fmt: skip
KEY = "pyvit"

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu",
    "swish": "silu",
}  # fmt: skip


def describe(model: nn.Module) -> Metadata:
    """The metadata of a pyvit model."""
    found: Metadata = {}
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("pyvit.") and not isinstance(module, nn.LayerNorm):
            continue
        held = {
            name: plain(getattr(module, name))
            for name in NAMES
            if hasattr(module, name) and not callable(getattr(module, name))
        }
        if not held.get("activation", True):  # a linear layer has none
            del held["activation"]
        if (
            hasattr(module, "patch_size") and "stride" in held
        ):  # only for overlapping patches; otherwise it is the patch size
            held["stride"] = None if module.stride == module.patch_size else held["stride"]
        if held:
            found[path] = held
    return found


def plain(value: Any) -> Any:
    """Tuples to lists, as JSON stores them."""
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


class WithMetadata(nn.Module):
    """A model whose state dicts contain its metadata, where ``torch`` keeps the versions of modules. Keys and files do
    not change."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (notes := getattr(destination, "_metadata", None)) is not None:
            notes.setdefault(prefix[:-1], {})[KEY] = describe(self)


def metadata_in(state: Any, header: Mapping[str, Any]) -> Metadata:
    """The metadata in a state dict or in the header of a safetensors file."""
    found: Metadata = {}
    if KEY in header:
        found |= json.loads(header[KEY])
    for path, notes in (getattr(state, "_metadata", None) or {}).items():
        for inner, metadata in (notes.get(KEY) or {}).items():
            found[".".join(filter(None, (path, inner)))] = metadata
    return found


def header_of(model: nn.Module) -> dict[str, str]:
    """The safetensors header for ``model``'s weights, read by :func:`metadata_in`."""
    return {KEY: json.dumps(describe(model))}


def square(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _image_grid(image: Any, weight: Tensor | None) -> dict[str, Any]:
    if image is None or weight is None:
        return {}
    return {"grid": [n // p for n, p in zip(square(image), weight.shape[2:], strict=True)]}


def _tower(
    config: Mapping[str, Any], at: str, layer: str = r"blocks\.\d+", act: str = "gelu", eps: float | None = None
) -> Metadata:
    """Heads, activation and epsilon of a transformers tower."""
    activation = config.get("hidden_act", act)
    metadata: Metadata = {rf"{at}{layer}\.mlp(\.fc1)?": {"activation": _ACTIVATIONS.get(activation, activation)}}
    if isinstance(heads := config.get("num_attention_heads"), int):
        metadata[rf"{at}{layer}\.attn"] = {"num_heads": heads}
    if (eps := config.get("layer_norm_eps", eps)) is not None:
        metadata[rf"{at}(.*\.)?(ln_final|norm\d?|norm_pre|fc_norm)"] = {"eps": eps}
    return metadata


def metadata_of_config(config: Mapping[str, Any], native: Mapping[str, Tensor]) -> Metadata:
    """The metadata in a configuration of transformers, timm or open_clip for weights with the native names
    ``native``."""
    kind, patch = str(config.get("model_type", "")), "patch_embed.proj.weight"
    if "model_cfg" in config:
        return _open_clip(config["model_cfg"], native)
    if "vision_config" in config and "text_config" in config:
        return _two_towers(config, native)
    if "architecture" in config:
        return _timm(config, native.get(patch))
    if kind in ("clip_vision_model", "siglip_vision_model", "metaclip_2_vision_model"):
        act, eps = ("quick_gelu", 1e-5) if "clip" in kind else ("gelu_tanh", 1e-6)
        grid = _image_grid(config.get("image_size"), native.get("visual." + patch))
        return {**_tower(config, r"visual\.", act=act, eps=eps), "visual": grid}
    if kind == "audio-spectrogram-transformer":
        size, steps = (
            (config.get("num_mel_bins", 128), config.get("max_length", 1024)),
            ("frequency_stride", "time_stride"),
        )
        side, strides = config.get("patch_size", 16), [config.get(name, 10) for name in steps]
        return {
            **_tower(config, ""),
            "": {"grid": [(n - side) // s + 1 for n, s in zip(size, strides, strict=True)]},
            "patch_embed": {"stride": None if strides == square(side) else strides},
        }
    if kind in ("swin", "swinv2"):
        metadata = _tower({**config, "num_attention_heads": None}, "", r"layers\.\d+\.blocks\.\d+")
        trained = config.get("pretrained_window_sizes") or []
        for s, heads in enumerate(config.get("num_heads", ())):
            metadata[rf"layers\.{s}\.blocks\.\d+\.attn"] = {"num_heads": heads}
            if s < len(trained) and trained[s]:
                metadata[rf"layers\.{s}\.blocks\.\d+\.attn"]["pretrained_window_size"] = square(trained[s])
        return metadata
    if kind == "aimv2_vision_model":
        grid = {} if config.get("is_native") else _image_grid(config.get("image_size", 224), native.get(patch))
        metadata = {r"blocks\.\d+\.attn": {"num_heads": config.get("num_attention_heads", 8)}, "": grid}
        return metadata | {r"(.*\.)?norm\d?": {"eps": config.get("rms_norm_eps", 1e-5)}}
    if kind == "hiera":
        return {r"blocks\.0\.attn": {"num_heads": (config.get("num_heads") or [1])[0]}}
    if kind == "dinov3_vit":
        base = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 100.0)
        return {**_tower(config, "", eps=1e-5), "rope": {"base": base}}
    if kind in ("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae", "vitdet", "vit_msn"):
        image = config.get("pretrain_image_size") or config.get("image_size")
        if config.get("use_swiglu_ffn"):  # hidden_act is then not used
            config = {**config, "hidden_act": "silu"}
        return {**_tower(config, ""), "": _image_grid(image, native.get(patch))}
    return {}


def _two_towers(config: Mapping[str, Any], native: Mapping[str, Tensor]) -> Metadata:
    siglip = str(config.get("model_type", "")).startswith("siglip")
    vision, text = config["vision_config"] or {}, config["text_config"] or {}
    act, eps = ("gelu_tanh", 1e-6) if siglip else ("quick_gelu", 1e-5)
    metadata = {
        **_tower(vision, r"visual\.", act=act, eps=eps),
        **_tower(text, r"text\.", act=act, eps=eps),
        "visual": _image_grid(vision.get("image_size"), native.get("visual.patch_embed.proj.weight")),
    }
    if not siglip:
        end = text.get("eos_token_id")
        end = end[0] if isinstance(end, list) and len(end) == 1 else end
        if isinstance(end, int):
            # transformers' CLIP pools the largest id if eos_token_id is 2, as in its first configurations.
            first = end == 2 and not str(config.get("model_type", "")).startswith("metaclip")
            metadata["text"] = {"eot": None if first else end}
    return metadata


def _open_clip(config: Mapping[str, Any], native: Mapping[str, Tensor]) -> Metadata:
    vision, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}
    quick = "quick_gelu" if config.get("quick_gelu") else "gelu"
    tanh = (text.get("act_kwargs") or {}).get("approximate") == "tanh"
    metadata: Metadata = {r"text\.blocks\.\d+\.mlp(\.fc1)?": {"activation": "gelu_tanh" if tanh else quick}}
    if "timm_model_name" not in vision:  # the activation of timm's models is not in the file
        metadata[r"visual\.blocks\.\d+\.mlp(\.fc1)?"] = {"activation": quick}
    if isinstance(width := vision.get("width"), int):
        metadata[r"visual\.blocks\.\d+\.attn"] = {"num_heads": width // vision.get("head_width", 64)}
    if isinstance(heads := text.get("heads"), int):
        metadata[r"text\.blocks\.\d+\.attn"] = {"num_heads": heads}
    metadata["visual"] = _image_grid(vision.get("image_size"), native.get("visual.patch_embed.proj.weight"))
    return metadata


def _timm(config: Mapping[str, Any], weight: Tensor | None) -> Metadata:
    from pyvit.models.registry import REGISTRY

    size = (
        config.get("model_args", {}).get("img_size")
        or (config.get("pretrained_cfg", config).get("input_size") or [None] * 3)[1:]
    )
    metadata: Metadata = {"": _image_grid(size if size and size != [None, None] else None, weight)}
    settings = {**REGISTRY.get(config["architecture"], (None, {}))[1], **config.get("model_args", {})}
    if isinstance(heads := settings.get("num_heads"), int):
        metadata[r"blocks\.\d+\.attn"] = {"num_heads": heads}
    return metadata


def compare(theirs: Metadata, ours: Metadata) -> Iterator[tuple[str, str, Any, Any]]:
    """(module, name, theirs, ours) for each setting that both have and that differs."""
    for module, mine in ours.items():
        for path, metadata in theirs.items():
            if path == module or ("\\" in path and re.fullmatch(path, module)):
                for name, value in metadata.items():
                    if name in mine and plain(value) != mine[name]:
                        yield module, name, value, mine[name]


def lookup(metadata: Metadata, module: str, name: str) -> Any:
    """One setting of a module, or None."""
    for path, held in metadata.items():
        if name in held and (path == module or ("\\" in path and re.fullmatch(path, module))):
            return held[name]
    return None
