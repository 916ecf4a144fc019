"""Patched functions, and layers modified by adapters, quantisation and reparametrisation, give the original's
results."""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyvit
from tests.integrations.checks import Quantised, check_changed, made, mine
from tests.models.parity import relative_error

#: Functions that forwards call, and a model whose results each affects.
FUNCTIONS = [
    ("timm vit", "torch.nn.functional", "scaled_dot_product_attention"),
    ("timm vit", "torch.nn.functional", "linear"),
    ("timm vit", "torch.nn.functional", "gelu"),
    ("timm vit", "torch.nn.functional", "layer_norm"),
    ("timm vit", "torch.nn.functional", "conv2d"),
    ("timm eva", "torch.nn.functional", "scaled_dot_product_attention"),
    ("timm eva", "timm.models.eva", "apply_rot_embed_cat"),
    ("timm vit unfused", "timm.layers.attention", "maybe_add_mask"),
    ("timm swin", "timm.models.swin_transformer", "window_partition"),
    ("transformers mlcd", "torch.nn.functional", "scaled_dot_product_attention"),
    ("transformers mlcd", "transformers.models.mlcd.modeling_mlcd", "apply_rotary_pos_emb_vision"),
    ("transformers mlcd eager", "transformers.models.mlcd.modeling_mlcd", "eager_attention_forward"),
    ("timm swin v2", "timm.models.swin_transformer_v2", "window_reverse"),
    ("transformers vit", "torch.nn.functional", "scaled_dot_product_attention"),
    ("transformers vit", "transformers.integrations.sdpa_attention", "use_gqa_in_sdpa"),
    ("transformers vit eager", "transformers.models.vit.modeling_vit", "eager_attention_forward"),
    ("transformers swin", "transformers.models.swin.modeling_swin", "window_partition"),
    ("torchvision vit", "torch.nn.functional", "multi_head_attention_forward"),
    ("torchvision vit", "torch.nn.functional", "scaled_dot_product_attention"),
    ("torchvision swin", "torchvision.models.swin_transformer", "shifted_window_attention"),
    ("open_clip custom", "torch.nn.functional", "scaled_dot_product_attention"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "module", "function"), FUNCTIONS, ids=str)
def test_patched_functions(name, module, function, when):
    def change(model, stack):
        home = importlib.import_module(module)
        stack.callback(setattr, home, function, getattr(home, function))
        setattr(home, function, mine(getattr(home, function)) if function != "use_gqa_in_sdpa" else lambda *_: False)

    effect, report = check_changed(name, change, when)
    assert effect > 1e-3 or function == "use_gqa_in_sdpa"
    assert bool(report.left) == (function not in ("linear", "gelu")), report  # whose layers are called as they are


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["registered", "local", "set on the config"])
@pytest.mark.parametrize("name", ["transformers vit", "transformers swin"])
def test_overridden_attention_functions(name, how, when):
    from transformers import modeling_utils

    table = modeling_utils.ALL_ATTENTION_FUNCTIONS

    def change(model, stack):
        function = mine(table["sdpa"])
        if how == "local":
            stack.callback(table._local_mapping.clear)
            table["sdpa"] = function
        elif how == "registered":
            stack.callback(table.register, "sdpa", table["sdpa"])
            table.register("sdpa", function)
        else:
            table.register("mine", function)
            stack.callback(table._global_mapping.pop, "mine")
            stack.callback(setattr, model.config, "_attn_implementation", "sdpa")
            model.config._attn_implementation = "mine"

    model, run = made(name)
    model, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        plain = run(other)
        if when == "after":
            pyvit.accelerate(model)
        change(model, stack)
        if how == "set on the config":
            other.config._attn_implementation = "mine"
        expected = run(other)
        if when == "before":
            assert any("attention" in row.note for row in pyvit.accelerate(model).left)
        assert relative_error(run(model), expected) < 1e-4
    assert relative_error(plain, expected) > 1e-3


class Adapter(nn.Module):
    """Replaces a linear layer and contains it, as adapters do."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.down, self.up = layer, nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def _replace(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class Twice(nn.Module):
    def forward(self, weight):
        return weight * 2


def adapted(model, path):
    torch.manual_seed(0)
    _replace(model, path, Adapter(model.get_submodule(path)))


def parametrised(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", Twice())


def weight_normed(model, path):
    parametrizations.weight_norm(model.get_submodule(path))
    model.get_submodule(path).parametrizations.weight.original0.data.mul_(2)


def weight_normed_by_a_hook(model, path):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.get_submodule(path))
    model.get_submodule(path).weight_g.data.mul_(2)


def spectrally_normed(model, path):
    torch.manual_seed(0)
    nn.utils.spectral_norm(model.get_submodule(path)).eval()


def pruned(model, path):
    prune.l1_unstructured(model.get_submodule(path), "weight", 0.5)


def quantised(model, path):
    layer = model.get_submodule(path)
    layer.weight = nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)


def of_another_class(model, path):
    layer = model.get_submodule(path)
    other = nn.Bilinear(1, layer.in_features, layer.out_features)
    other.forward = lambda x: other.__class__.forward(other, x.new_ones(*x.shape[:-1], 1), x)
    _replace(model, path, other)


LAYERS = [
    ("timm vit", "blocks.0.attn.qkv"),
    ("timm vit", "blocks.0.attn.proj"),
    ("timm vit", "blocks.0.mlp.fc1"),
    ("timm swin", "layers.0.blocks.1.attn.qkv"),
    ("timm swin", "layers.0.blocks.1.attn.proj"),
    ("timm swin", "layers.1.downsample.reduction"),
    ("transformers mlcd", "encoder.layers.0.self_attn.v_proj"),
    ("transformers vit", "layers.0.attention.v_proj"),
    ("transformers vit", "layers.0.mlp.fc2"),
    ("transformers swin", "encoder.layers.0.blocks.1.attention.q_proj"),
    ("transformers swin", "encoder.layers.0.blocks.1.attention.o_proj"),
    ("transformers swin v2", "encoder.layers.0.blocks.1.attention.self.value"),
    ("torchvision vit", "encoder.layers.encoder_layer_0.mlp.0"),
    ("open_clip", "visual.transformer.resblocks.0.mlp.c_fc"),
    ("open_clip custom", "attn.out_proj"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        adapted,
        parametrised,
        weight_normed,
        weight_normed_by_a_hook,
        spectrally_normed,
        pruned,
        quantised,
        of_another_class,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(("name", "path"), LAYERS, ids=str)
def test_changed_layers(name, path, change, when):
    effect = check_changed(name, lambda model, stack: (torch.manual_seed(0), change(model, path)), when)[0]
    assert effect > 1e-3
