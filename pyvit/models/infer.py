"""A model from a checkpoint alone: its kind and settings are inferred from the shapes of its weights."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyvit.models import swin, vit
from pyvit.models.aimv2 import Aimv2
from pyvit.models.audio import AudioSpectrogramTransformer
from pyvit.models.checkpoints import LoadReport, Source, load_checkpoint, open_source, recognise, to_native
from pyvit.models.clip import clip_vit, siglip_vit
from pyvit.models.deit import DistilledVisionTransformer
from pyvit.models.encoders import defaults, image_encoder
from pyvit.models.eva import Eva
from pyvit.models.hiera import Hiera
from pyvit.models.mae import MaskedAutoencoder
from pyvit.models.metadata import Metadata, lookup, metadata_of_config, plain
from pyvit.models.naflex import NaFlexVisionTransformer
from pyvit.models.registry import REGISTRY, list_models
from pyvit.models.resnet import ResNet
from pyvit.models.sam import SamEncoder


def model_from_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], **overrides: Any
) -> tuple[nn.Module, LoadReport]:
    """A model with the weights of ``source``, and the report of loading them: a ViT, EVA-02, AIMv2, DeiT, MAE, SAM
    encoder, Swin, ResNet, CLIP or SigLIP.

    Settings that shapes do not show, such as heads and activation, are read from the file's metadata or the
    configuration beside it. Without these, published widths get their published number of heads, and others 64 channels
    per head; give ``num_heads`` if that is wrong. Swin V2's windows are read from buffers (Microsoft's and
    torchvision's checkpoints) or the configuration (transformers); timm's need ``window_size`` (and ``img_size``).
    ``overrides`` have priority.

    Raises ValueError if the layout is of no known kind of model, or of a Swin V2 with an unknown window size.
    """
    opened = open_source(source)
    constructor, settings, told = _inferred(opened)
    if settings.get("version") == 2 and "window_size" not in {**settings, **overrides}:
        raise ValueError(
            "model_from_checkpoint: nothing in this Swin V2 checkpoint tells its window: give window_size (and "
            "img_size)"
        )
    model = constructor(**{**settings, **overrides})
    report = load_checkpoint(model, opened, allow=(r".*num_heads",) if "num_heads" in overrides else ())
    guessed = constructor not in (swin.SwinTransformer, SamEncoder)
    if "num_heads" in settings and guessed and not told | ("num_heads" in overrides):
        report.notes.append(
            f"num_heads={settings['num_heads']} is a guess from the width: nothing in the file names it"
        )
    return model, report


def _inferred(opened: Source) -> tuple[Any, dict[str, Any], bool]:
    """Constructor and settings of the model in a checkpoint, and whether the checkpoint names its number of heads."""
    layout = recognise(opened.state)
    native, _, _ = to_native(opened.state, layout)
    metadata = opened.metadata or metadata_of_config(opened.config, native)
    constructor, settings = infer(native, metadata)
    made, registered = REGISTRY.get(opened.config.get("architecture", ""), (None, {}))
    if made is Eva:  # rotary positions and the place of the norms have no weights
        names = ("img_size", "patch_size", "in_chans", "num_classes", "depth", "embed_dim")
        return Eva, {**registered, **{k: settings[k] for k in names if k in settings}}, True
    if layout.name in ("timm EVA-02", "timm EVA", "timm PE") and constructor is not Eva:
        raise ValueError(
            "model_from_checkpoint: nothing in this checkpoint tells its rotary positions: create the model by name"
        )
    if "NaFlex" in layout.name or any(found.get("naflex") for found in metadata.values()):
        if constructor is vit.VisionTransformer:
            constructor = NaFlexVisionTransformer
            settings["activation"] = "gelu_tanh"
        else:
            settings["tower"] = NaFlexVisionTransformer
    if layout.name.endswith("DINOv3"):
        settings |= {"pos_embed": "rope", "norm_eps": 1e-5}
    if constructor in (SamEncoder, Hiera):
        return constructor, settings, lookup(metadata, "blocks.0.attn", "num_heads") is not None
    told = _told(metadata, constructor, settings)
    settings |= told
    if settings.get("version") == 2:
        settings |= _windows_v2(opened.state, settings) or _windows_named(opened.config)
    return constructor, settings, "num_heads" in told


#: Settings that tell registered models apart.
_TELLING = (
    "patch_size", "embed_dim", "depth", "depths", "num_heads", "class_token", "reg_tokens", "no_embed_class",
    "global_pool", "pos_embed", "version", "window_size", "pretrained_window_sizes", "layers", "bottleneck",
    "width", "small",
)  # fmt: skip


def registered_model(source: Source) -> tuple[str, dict[str, Any], int | None]:
    """The registered model whose image encoder fits a checkpoint best, the settings in which the checkpoint differs
    from it, and the side of the checkpoint's images if known.

    Raises ValueError if the checkpoint is of no known kind of model.
    """
    constructor, settings, _ = _inferred(source)
    if constructor in (clip_vit, siglip_vit):
        native, _, _ = to_native(source.state, recognise(source.state))
        heads, grid = settings["num_heads"], lookup(source.metadata, "visual", "grid")
        constructor = settings.get("tower", vit.VisionTransformer)
        settings = {**_vit(native, "visual.", grid), "num_heads": heads}
    constructor = vit.VisionTransformer if constructor is MaskedAutoencoder else constructor
    if not settings.get("class_token", True):
        del settings["no_embed_class"]  # there is nothing else that could have a position
    side = settings.get("img_size")
    side = side[-1] if isinstance(side, Sequence) else side
    ranked = []
    for name in list_models():
        found = image_encoder(name)
        if found is not None and found.constructor is constructor:
            theirs = {**defaults(constructor), **found.settings}
            differ = {k: settings[k] for k in _TELLING if k in settings and not _same(settings[k], theirs.get(k))}
            usual = name.startswith(("vit_", "deit_", "swin", "resnet", "ast_"))
            rank = (bool(differ) and not usual, len(differ), theirs.get("img_size") != side, not usual, len(name))
            ranked.append((rank, name, differ))
    _, name, differ = min(ranked, key=lambda each: each[:2])
    return name, differ, side


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; one number stands for equal numbers per axis."""
    a, b = plain(a), plain(b)
    return (
        [a] * len(b) == b
        if isinstance(a, int) and isinstance(b, list)
        else (a == [b] * len(a) if isinstance(b, int) and isinstance(a, list) else a == b)
    )


def _told(metadata: Metadata, constructor: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ``constructor`` in the file's metadata or configuration: heads, activation, epsilon, pooling."""
    at = "visual." if constructor in (clip_vit, siglip_vit) else ""
    wanted = {"norm_eps": (at + "norm", "eps"), "global_pool": (at[:-1], "global_pool")}
    if "num_heads" in settings and constructor not in (swin.SwinTransformer, SamEncoder, Hiera):
        wanted |= {
            "num_heads": (at + "blocks.0.attn", "num_heads"),
            "activation": (at + "blocks.0.mlp.fc1", "activation"),
        }
    if "text_heads" in settings:
        wanted["text_heads"] = ("text.blocks.0.attn", "num_heads")
    if constructor is clip_vit and "text_heads" in settings:
        wanted["eot"] = ("text", "eot")
    if (
        settings.get("activation") == "swiglu" or constructor is Aimv2
    ):  # the gate's is SiLU, whatever the configuration calls it
        wanted.pop("activation", None)
    if settings.get("pos_embed") == "rope":
        wanted["rope_base"] = ("rope", "base")
    found = {name: lookup(metadata, path, setting) for name, (path, setting) in wanted.items()}
    return {k: v for k, v in found.items() if v is not None}


def structure(source: Source) -> dict[str, Any]:
    """Settings of a ViT that the weights determine and that a model's name may leave open; {} if the weights are not a
    ViT's."""
    native, _, _ = to_native(source.state, recognise(source.state))
    metadata = source.metadata or metadata_of_config(source.config, native)
    at = "visual." if any(k.startswith("visual.") for k in native) else ""
    if f"{at}blocks.0.attn.qkv.weight" not in native or f"{at}patch_embed.proj.weight" not in native:
        return {}
    shown = _vit(native, at, (1, 1))
    told = {
        "norm_eps": lookup(metadata, at + "blocks.0.norm1", "eps"),
        "activation": lookup(metadata, at + "blocks.0.mlp.fc1", "activation"),
        "global_pool": lookup(metadata, at[:-1], "global_pool"),
    }
    names = (
        "qkv_bias",
        "qk_norm",
        "init_values",
        "reg_tokens",
        "pre_norm",
        "patch_bias",
        "activation",
        "global_pool",
        "mlp_ratio",
    )
    return {**{k: v for k, v in told.items() if v is not None}, **{k: shown[k] for k in names if k in shown}}


def infer(state: Mapping[str, Tensor], metadata: Metadata | None = None) -> tuple[Any, dict[str, Any]]:
    """Constructor and settings for a native state dict; ``metadata`` is the file's metadata."""
    if "visual.patch_embed.proj.weight" in state and "text.token_embedding.weight" in state:
        return _clip(state, lookup(metadata or {}, "visual", "grid"))
    if "patch_embed.proj.weight" in state and any(k.startswith("layers.0.blocks.0.") for k in state):
        return swin.SwinTransformer, _swin(state)
    if "layer4.0.conv1.weight" in state and "attnpool.q_proj.weight" not in state:
        return ResNet, _resnet(state)
    if "blocks.0.attn.qkv.weight" in state and "head.norm.weight" in state:
        return Hiera, _hiera(state, metadata or {})
    if "blocks.0.attn.rel_pos_h" in state and "pos_embed" in state and state["pos_embed"].dim() == 4:
        return SamEncoder, _sam(state)
    if "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state:
        settings = _vit(state, "", lookup(metadata or {}, "", "grid"))
        if settings.get("pos_embed") == "none" and lookup(metadata or {}, "rope", "base") is not None:
            settings["pos_embed"] = "rope"
        if "patch_embed.norm.weight" in state and "blocks.0.norm1.bias" not in state:
            return Aimv2, _aimv2(state, settings)
        if _is_eva(metadata or {}):
            return Eva, settings | _eva(state, settings, metadata or {})
        if "decoder_embed.weight" in state:
            return MaskedAutoencoder, settings | _decoder(state)
        if "dist_token" in state and "fc_norm.weight" in state:
            return AudioSpectrogramTransformer, _spectrogram(settings, metadata or {})
        distilled = "head_dist.weight" in state or ("dist_token" in state and "head.weight" not in state)
        return DistilledVisionTransformer if distilled else vit.VisionTransformer, settings
    raise ValueError(f"model_from_checkpoint: source is not a ViT, Swin or CLIP; its keys begin with {list(state)[:5]}")


def _aimv2(state: Mapping[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an :class:`Aimv2` from those of a ViT: its heads have 128 channels."""
    names = ("patch_size", "in_chans", "embed_dim", "depth", "num_classes", "img_size")
    width, hidden = settings["embed_dim"], state["blocks.0.mlp.fc2.weight"].shape[1]
    found = {k: settings[k] for k in names if k in settings}
    heads = {"num_heads": max(width // 128, 1), "mlp_ratio": _ratio(hidden, width)}
    return {**found, **heads, "native": "pos_embed" not in state}


def _hiera(state: Mapping[str, Tensor], metadata: Metadata) -> dict[str, Any]:
    """Settings of a :class:`Hiera`; the heads are those of the published width if the file does not say."""
    width, chans = state["patch_embed.proj.weight"].shape[:2]
    depth = _count(state, r"blocks\.(\d+)\.")
    starts = [i for i in range(depth) if i == 0 or f"blocks.{i}.proj.weight" in state] + [depth]
    head, pos = state.get("head.fc.weight"), state["pos_embed"]
    found: dict[str, Any] = {
        "in_chans": chans,
        "num_classes": 0 if head is None else head.shape[0],
        "embed_dim": width,
        "num_heads": lookup(metadata, "blocks.0.attn", "num_heads") or {112: 2, 144: 2, 256: 4}.get(width, 1),
        "stages": [b - a for a, b in itertools.pairwise(starts)],
        "mlp_ratio": _ratio(state["blocks.0.mlp.fc1.weight"].shape[0], width),
    }
    if "pos_embed_win" in state:
        window = state["pos_embed_win"].shape[2]
        windows = {"window_sizes": (window, window // 2, 0, 0), "global_pos_size": tuple(pos.shape[2:])}
        return found | windows | {"img_size": 32 * window}
    return found | {"img_size": 4 * math.isqrt(pos.shape[1])}


def _sam(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of a :class:`SamEncoder`. The relative positions of a block show whether it has windows."""
    width, chans, patch, _ = state["patch_embed.proj.weight"].shape
    rows, columns = state["pos_embed"].shape[1:3]
    depth = _count(state, r"blocks\.(\d+)\.")
    sizes = [(state[f"blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    window = min(sizes)
    return {
        "img_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": chans,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // state["blocks.0.attn.rel_pos_h"].shape[1],
        "mlp_ratio": _ratio(state["blocks.0.mlp.fc1.weight"].shape[0], width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "window_size": window,
        "global_blocks": [i for i, size in enumerate(sizes) if size != window],
        "out_channels": state["neck.0.weight"].shape[0] if "neck.0.weight" in state else 0,
    }


def _is_eva(metadata: Metadata) -> bool:
    return lookup(metadata, "rope", "column_first") is not None or bool(lookup(metadata, "blocks.0", "post_norm"))


def _eva(state: Mapping[str, Tensor], settings: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Settings of an :class:`Eva` besides those of a ViT, from our own metadata."""
    width, hidden = settings["embed_dim"], state["blocks.0.mlp.fc2.weight"].shape[1]
    found = {
        "pos_embed": "none" if "pos_embed" not in state else "learn",
        "activation": "gelu",
        "swiglu": settings.get("activation") == "swiglu",
        "mlp_ratio": _ratio(hidden, width),
        "scale_mlp": "blocks.0.mlp.norm.weight" in state,
        "scale_norm": "blocks.0.attn.norm.weight" in state,
        "post_norm": bool(lookup(metadata, "blocks.0", "post_norm")),
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "norm_eps": lookup(metadata, "blocks.0.norm1", "eps") or 1e-6,
        "rope_reference": lookup(metadata, "rope", "reference"),
        "rope_offset": lookup(metadata, "rope", "offset") or 0.0,
        "rope_column_first": bool(lookup(metadata, "rope", "column_first")),
    }
    if "attn_pool.latent" in state:
        found["pool_heads"] = lookup(metadata, "attn_pool", "num_heads")
        found["pool_mlp_ratio"] = _ratio(state["attn_pool.mlp.fc1.weight"].shape[0], width)
    return found


def heads_of(width: int) -> int:
    """Number of attention heads of a published transformer of this width."""
    published = {size["embed_dim"]: size["num_heads"] for size in vit.SIZES.values()}
    return published.get(width, max(width // 64, 1))


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for m in (re.match(pattern, k) for k in state) if m), default=-1)


def _mlp(state: Mapping[str, Tensor], block: str, width: int) -> dict[str, Any]:
    wide, hidden = state[block + "mlp.fc1.weight"].shape[0], state[block + "mlp.fc2.weight"].shape[1]
    return (
        {"activation": "swiglu", "mlp_ratio": hidden * 1.5 / width}
        if wide == 2 * hidden
        else {"mlp_ratio": _ratio(hidden, width)}
    )


def _ratio(hidden: int, width: int) -> float:
    """The ratio for which int(width * ratio) is hidden, despite rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _vit(state: Mapping[str, Tensor], prefix: str, grid: Sequence[int] | None = None) -> dict[str, Any]:
    at = lambda key: state.get(prefix + key)  # noqa: E731
    width, chans, ph, pw = state[prefix + "patch_embed.proj.weight"].shape
    registers, head = at("reg_token"), at("head.weight")
    settings: dict[str, Any] = {
        "patch_size": (ph, pw),
        "in_chans": chans,
        "embed_dim": width,
        "depth": _count(state, re.escape(prefix) + r"blocks\.(\d+)\."),
        "num_heads": heads_of(width),
        "num_classes": 0 if head is None else head.shape[0],
        "qkv_bias": "qv" if at("blocks.0.attn.qkv.q_bias") is not None else at("blocks.0.attn.qkv.bias") is not None,
        "qk_norm": at("blocks.0.attn.q_norm.weight") is not None,
        "init_values": None if at("blocks.0.ls1.gamma") is None else 1.0,
        "class_token": at("cls_token") is not None,
        "dist_token": at("dist_token") is not None,
        "reg_tokens": 0 if registers is None else registers.shape[1],
        "mask_token": at("mask_token") is not None and at("decoder_embed.weight") is None,
        "pre_norm": at("norm_pre.weight") is not None,
        "patch_bias": at("patch_embed.proj.bias") is not None,
        **_mlp(state, prefix + "blocks.0.", width),
    }
    tokens = int(settings["class_token"]) + int(settings["dist_token"])
    if at("attn_pool.latent") is not None:
        settings["global_pool"] = "map"
    elif at("fc_norm.weight") is not None:
        settings["global_pool"] = "avg"
    elif head is not None and head.shape[1] == 2 * width:
        settings["global_pool"] = "token_avg"
    elif not tokens:
        settings["global_pool"] = "avg"
    pos = at("pos_embed")
    if pos is None:
        return settings | {"pos_embed": "none"}
    if grid is not None:
        held = pos.shape[1] - grid[0] * grid[1]
        return settings | {"img_size": (grid[0] * ph, grid[1] * pw), "no_embed_class": held == 0}
    found = [t for t in (tokens, 0) if math.isqrt(pos.shape[1] - t) ** 2 == pos.shape[1] - t]
    if not found:
        raise ValueError(
            f"model_from_checkpoint: {prefix}pos_embed of {pos.shape[1]} positions is not a square grid; create the "
            "model by name"
        )
    side = math.isqrt(pos.shape[1] - found[0])
    return settings | {"img_size": (side * ph, side * pw), "no_embed_class": found[0] == 0}


def _spectrogram(settings: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Settings of an AST. Its two tokens are averaged; its patches may overlap, which no shape shows."""
    grid, stride = lookup(metadata, "", "grid"), lookup(metadata, "patch_embed", "stride")
    if grid is None:
        raise ValueError(
            "model_from_checkpoint: nothing tells the spectrogram's size and the stride of its patches: create the "
            "model by name"
        )
    stride = stride or settings["patch_size"]
    size = tuple((n - 1) * s + p for n, s, p in zip(grid, stride, settings["patch_size"], strict=True))
    return {**settings, "img_size": size, "patch_stride": tuple(stride), "global_pool": "token"}


def _decoder(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width = state["decoder_embed.weight"].shape[0]
    depth = _count(state, r"decoder_blocks\.(\d+)\.")
    return {
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": max(width // 32, 1),
        "num_classes": 0,
    }


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    head = state.get("fc.weight")
    return {
        "layers": [_count(state, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5)],
        "bottleneck": "layer1.0.conv3.weight" in state,
        "in_chans": state["conv1.weight"].shape[1],
        "width": state["conv1.weight"].shape[0],
        "small": state["conv1.weight"].shape[2] == 3,
        "num_classes": 0 if head is None else head.shape[0],
    }


def _swin(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, chans, patch, _ = state["patch_embed.proj.weight"].shape
    stages = _count(state, r"layers\.(\d+)\.blocks")
    first = [f"layers.{s}.blocks.0.attn." for s in range(stages)]
    second = first[0] + "logit_scale" in state
    key = "logit_scale" if second else "relative_position_bias_table"
    heads = [state[f + key].shape[0 if second else 1] for f in first]
    head = state.get("head.fc.weight")
    settings = {
        "patch_size": patch,
        "in_chans": chans,
        "embed_dim": width,
        "depths": [_count(state, rf"layers\.{s}\.blocks\.(\d+)\.") for s in range(stages)],
        "num_heads": heads,
        "num_classes": 0 if head is None else head.shape[0],
        "version": 2 if second else 1,
        "qkv_bias": first[0] + ("q_bias" if second else "qkv.bias") in state,
    } | _mlp(state, "layers.0.blocks.0.", width)
    if not second:
        windows = [(math.isqrt(state[f + key].shape[0]) + 1) // 2 for f in first]
        settings["window_size"] = max(windows)
        # A smaller window in the last stage shows the image size that the model was created for.
        settings["img_size"] = windows[-1] * 2 ** (stages - 1) * patch
    return settings


def _windows_v2(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Swin V2's windows, image size and pre-training windows from the coordinate buffers (1, 2 wh - 1, 2 ww - 1, 2); {}
    without them.

    The largest coordinate, log2(1 + 8 (window - 1) / (trained - 1)) / 3, gives the pre-training window.
    """
    tables = [value for key, value in state.items() if key.endswith("relative_coords_table")]
    if not tables:
        return {}
    depths = settings["depths"]
    windows = []
    trained = []
    for stage in range(len(depths)):
        table = tables[sum(depths[:stage])].float()
        windows.append((table.shape[1] + 1) // 2)
        reach = 2.0 ** (3.0 * float(table.max())) - 1.0
        trained.append(1 + round(8.0 * (windows[-1] - 1) / reach) if reach else 0)
    found = {"window_size": max(windows), "img_size": windows[-1] * 2 ** (len(depths) - 1) * settings["patch_size"]}
    return found | ({} if trained == windows else {"pretrained_window_sizes": trained})


def _windows_named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Swin V2's windows in a configuration of transformers."""
    if "window_size" not in config:
        return {}
    trained = config.get("pretrained_window_sizes") or []
    named = {"pretrained_window_sizes": tuple(trained)} if any(trained) else {}
    return {
        "window_size": config["window_size"],
        **({"img_size": config["image_size"]} if "image_size" in config else {}),
        **named,
    }


def _clip(state: Mapping[str, Tensor], grid: Sequence[int] | None) -> tuple[Any, dict[str, Any]]:
    visual = _vit(state, "visual.", grid)
    words = state["text.token_embedding.weight"].shape
    shared = {
        "img_size": visual["img_size"],
        "patch_size": visual["patch_size"][0],
        "width": visual["embed_dim"],
        "depth": visual["depth"],
        "num_heads": visual["num_heads"],
        "mlp_ratio": visual["mlp_ratio"],
        "vocab_size": words[0],
    }
    if "text.positional_embedding" not in state:
        return clip_vit, shared | {
            "text": "cbow",
            "text_width": words[1],
            "embed_dim": state["text.proj.weight"].shape[0],
        }
    shared["context_length"] = state["text.positional_embedding"].shape[0]
    text: dict[str, Any] = {
        "text_width": words[1],
        "text_depth": _count(state, r"text\.blocks\.(\d+)\."),
        "text_mlp_ratio": _ratio(state["text.blocks.0.mlp.fc1.weight"].shape[0], words[1]),
    }
    if "visual.attn_pool.latent" in state:
        equal = words[1] == shared["width"]
        return siglip_vit, shared | text | ({} if equal else {"text_heads": heads_of(words[1])})
    return clip_vit, shared | text | {
        "text_heads": heads_of(words[1]),
        "embed_dim": state["text.proj.weight"].shape[0],
    }
