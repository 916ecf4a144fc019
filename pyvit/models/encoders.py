"""The image encoder of every registered model, for recipes that train a single image network."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from pyvit.models.clip import clip_vit, siglip_vit
from pyvit.models.dino import HEAD, distilled
from pyvit.models.mae import MaskedAutoencoder
from pyvit.models.registry import settings_of
from pyvit.models.resnet import ResNet
from pyvit.models.simclr import SimCLR
from pyvit.models.swin import SwinTransformer
from pyvit.models.vit import VisionTransformer

#: Settings of models with an encoder that are not the encoder's.
_DECODER = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")
_PROJECTION = ("encoder", "hidden_dim", "out_dim", "batch_norm")
_TEXT = (
    "embed_dim", "vocab_size", "context_length", "text_width", "text_depth", "text_heads", "text_mlp_ratio", "text",
    "eot", "pad",
)  # fmt: skip


class Encoder(NamedTuple):
    """A constructor, its registered settings, and the changed settings, both as the constructor's arguments."""

    constructor: type[nn.Module]
    settings: dict[str, Any]
    changed: dict[str, Any]


def image_encoder(name: str, changed: Mapping[str, Any] | None = None) -> Encoder | None:
    """The image encoder of the registered model ``name`` with changed settings, or None if the model has none.

    For ViT, Swin and ResNet it is the model itself; for ``mae_*``, ``dino_*``, ``ibot_*``, ``dinov2_*`` and
    ``simclr_*`` their encoder; for ``clip_vit_*`` and ``siglip_*`` the image tower. Raises ValueError for an unknown
    name.
    """
    constructor, settings = settings_of(name)
    changed = dict(changed or {})
    without = lambda given, names: {k: v for k, v in given.items() if k not in names}  # noqa: E731
    if constructor is MaskedAutoencoder:
        return Encoder(
            VisionTransformer, without({"pos_embed": "sincos", **settings}, _DECODER), without(changed, _DECODER)
        )
    if constructor is distilled:
        return Encoder(VisionTransformer, without(settings, HEAD), without(changed, HEAD))
    if constructor is SimCLR:
        return image_encoder(settings["encoder"], {**without(settings, _PROJECTION), **without(changed, _PROJECTION)})
    if constructor in (clip_vit, siglip_vit):
        names = (*_TEXT, "tower")
        tower = lambda given: {{"width": "embed_dim"}.get(k, k): v for k, v in given.items() if k not in names}  # noqa: E731
        defaults = {
            p.name: p.default for p in inspect.signature(constructor).parameters.values() if p.default is not p.empty
        }
        kind = (
            {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}
            if constructor is clip_vit
            else {"class_token": False, "global_pool": "map", "activation": "gelu_tanh"}
        )
        made = settings.get("tower", VisionTransformer)
        return Encoder(made, {**kind, **tower({**defaults, **settings})}, tower(changed))
    if isinstance(constructor, type) and issubclass(constructor, VisionTransformer | SwinTransformer | ResNet):
        return Encoder(constructor, settings, changed)
    return None


def defaults(constructor: type[nn.Module]) -> dict[str, Any]:
    """The default values of a constructor's arguments, including those that **kwargs passes to base classes."""
    found: dict[str, Any] = {}
    for each in reversed(inspect.getmro(constructor)):
        if each is not nn.Module and "__init__" in vars(each):
            found |= {p.name: p.default for p in inspect.signature(each.__init__).parameters.values()}
    return found


def parameters(constructor: Any) -> Iterator[str]:
    """Names of a constructor's arguments, including those that **kwargs passes to base classes."""
    for each in inspect.getmro(constructor) if inspect.isclass(constructor) else (constructor,):
        if each in (nn.Module, object):
            return
        given = inspect.signature(each.__init__ if inspect.isclass(each) else each).parameters.values()
        yield from (p.name for p in given if p.kind is not p.VAR_KEYWORD and p.name != "self")
        if not any(p.kind is p.VAR_KEYWORD for p in given):
            return
    if constructor in (clip_vit, siglip_vit):  # their **visual are settings of the image tower
        yield from parameters(VisionTransformer)
