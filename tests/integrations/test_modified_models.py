"""Modifications by users, before or after accelerate, give the original's results and are reported."""

from __future__ import annotations

import functools
import types

import pytest
from torch import nn

from tests.integrations.checks import check_changed, mine, other


def instance_forward(module, stack):
    module.forward = mine(module.forward)


def instance_method(module, stack):
    forward = mine(type(module).forward)
    module.forward = types.MethodType(lambda self, *args, **kwargs: forward(self, *args, **kwargs), module)


def partial_forward(module, stack):
    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(mine(module._old_forward)), module._old_forward)


def of_a_subclass(module, stack):
    kind = type(module)
    body = {"forward": mine(kind.forward), "__module__": __name__}
    if kind.__name__ == "MultiheadAttention":
        body["__constants__"] = []
    module.__class__ = type("Mine", (kind,), body)


def of_a_subclass_with_call(module, stack):
    module.__class__ = type("Mine", (type(module),), {"__call__": mine(type(module).__call__), "__module__": __name__})


def class_forward(module, stack):
    kind = type(module)
    definer = next(c for c in kind.__mro__ if "forward" in vars(c))
    stack.callback(setattr, definer, "forward", definer.forward)
    definer.forward = mine(definer.forward)


def class_forward_wrapped(module, stack):
    kind = type(module)
    definer = next(c for c in kind.__mro__ if "forward" in vars(c))
    stack.callback(setattr, definer, "forward", definer.forward)
    definer.forward = functools.wraps(definer.forward)(mine(definer.forward))


def forward_hook(module, stack):
    module.register_forward_hook(lambda module, args, out: other(out))


def forward_pre_hook(module, stack):
    module.register_forward_pre_hook(lambda module, args: other(args) if args else None)


def global_hook(module, stack):
    hook = nn.modules.module.register_module_forward_hook(
        lambda called, args, out: other(out) if called is module else None
    )
    stack.callback(hook.remove)


CHANGES = [
    instance_forward,
    of_a_subclass,
    class_forward,
    forward_hook,
    global_hook,
    *(
        pytest.param(change, marks=pytest.mark.slow)
        for change in (
            instance_method,
            partial_forward,
            of_a_subclass_with_call,
            class_forward_wrapped,
            forward_pre_hook,
        )
    ),
]


#: Modules that a replacement bypasses or replaces.
PLACES = [
    ("timm vit", "blocks.0"),
    ("timm vit", "blocks.0.attn"),
    ("timm vit", "blocks.0.attn.qkv"),
    ("timm vit", "blocks.0.attn.proj"),
    ("timm vit", "blocks.0.attn.q_norm"),
    ("timm vit", "blocks.0.mlp"),
    ("timm vit", "blocks.0.mlp.act"),
    ("timm vit", "blocks.0.mlp.fc2"),
    ("timm vit", "blocks.0.mlp.drop1"),
    ("timm vit", "blocks.0.norm1"),
    ("timm vit", "patch_embed.proj"),
    ("timm vit unfused", "blocks.0.attn.attn_drop"),
    ("timm swin", "layers.0.blocks.1"),
    ("timm swin", "layers.0.blocks.1.attn"),
    ("timm swin", "layers.0.blocks.1.attn.qkv"),
    ("timm swin", "layers.0.blocks.1.attn.proj"),
    ("timm swin", "layers.0.blocks.1.attn.softmax"),
    ("timm swin", "layers.0.blocks.1.attn.attn_drop"),
    ("timm swin", "layers.1.downsample.reduction"),
    ("timm swin v2", "layers.0.blocks.1.attn"),
    ("timm swin v2", "layers.0.blocks.1.attn.cpb_mlp.0"),
    ("timm eva", "blocks.0.attn"),
    ("timm eva", "blocks.0.attn.proj"),
    ("transformers mlcd", "encoder.layers.0.self_attn"),
    ("transformers mlcd", "encoder.layers.0.self_attn.q_proj"),
    ("transformers mlcd eager", "encoder.layers.0.self_attn"),
    ("transformers vit", "layers.0.attention"),
    ("transformers vit", "layers.0.attention.q_proj"),
    ("transformers vit", "layers.0.attention.o_proj"),
    ("transformers vit", "layers.0.mlp.activation_fn"),
    ("transformers swin", "encoder.layers.0.blocks.1"),
    ("transformers swin", "encoder.layers.0.blocks.1.attention"),
    ("transformers swin", "encoder.layers.0.blocks.1.attention.v_proj"),
    ("transformers swin", "encoder.layers.0.blocks.1.attention.relative_position_bias"),
    ("transformers swin v2", "encoder.layers.0.blocks.1.attention"),
    ("transformers swin v2", "encoder.layers.0.blocks.1.attention.self"),
    ("transformers swin v2", "encoder.layers.0.blocks.1.attention.self.dropout"),
    ("transformers swin v2", "encoder.layers.0.blocks.1.attention.output"),
    ("transformers swin v2", "encoder.layers.0.blocks.1.attention.output.dense"),
    ("torchvision vit", "encoder.layers.encoder_layer_0.self_attention"),
    ("torchvision vit", "encoder.layers.encoder_layer_0.mlp.0"),
    ("torchvision vit", "encoder.layers.encoder_layer_0.mlp.1"),
    ("torchvision swin", "features.1.1.attn"),
    ("torchvision swin", "features.1.1.mlp.0"),
    ("open_clip", "visual.transformer.resblocks.0.attn"),
    ("open_clip", "visual.transformer.resblocks.0.mlp.gelu"),
    ("open_clip custom", "attn"),
    ("open_clip custom", "attn.out_proj"),
    ("open_clip custom", "attn.ln_q"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "place"), PLACES, ids=str)
def test_changed_modules(name, place, change, when):
    effect, report = check_changed(name, lambda model, stack: change(model.get_submodule(place), stack), when)
    if (name, place.rpartition(".")[2], change.__name__) not in WITHOUT_EFFECT:
        assert effect > 1e-3
    if (
        place.rpartition(".")[2] in ("attn", "attention", "self_attention", "self_attn")
        and "hook" not in change.__name__
    ):
        assert any(place.startswith(row.path) for row in report.left), report


WITHOUT_EFFECT = {
    # They are given nothing, or only keyword arguments.
    ("transformers swin", "relative_position_bias", "forward_pre_hook"),
    ("transformers mlcd", "self_attn", "forward_pre_hook"),
    ("transformers mlcd eager", "self_attn", "forward_pre_hook"),
}
