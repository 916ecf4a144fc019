"""What the libraries' replacements share: when a submodule may be bypassed, and the parts most of them are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyvit import ops
from pyvit.integrations import originals
from pyvit.integrations.forwards import (
    Left,
    Replacement,
    exporting,
    kind,
    ordinary_weights,
    servable,
    served_by,
    watched,
)
from pyvit.nn.linear import hooked, ordinary
from pyvit.nn.linear import plain as is_plain
from pyvit.nn.quantized import QuantizedLinear, quantized, quantized_mlp
from pyvit.ops import flash_attention, linear, patch_embed, prepacked
from pyvit.ops.patch_embed import grid_size
from pyvit.ops.prepacked import Norm, normalize

#: What to replace in an instance of a class.
Rule = Callable[[Any], Iterator[Replacement | Left]]

_LINEAR, _DROPOUT = originals.number(nn.Linear), originals.number(nn.Dropout)


def plain(module: nn.Module) -> bool:
    """A torch Linear with nothing in or around it: its weights may be used directly."""
    return is_plain(module, nn.Linear) and originals.unchanged(_LINEAR)


def multiplied(layer: nn.Module) -> bool:
    """Whether :func:`project` and :func:`biased` compute what ``layer`` does: it is :func:`plain`, or has int8
    weights."""
    return type(layer) is QuantizedLinear or plain(layer)


def fusible(*layers: nn.Module) -> bool:
    """Whether :func:`project` takes :func:`fusion_args` for these layers: as :func:`multiplied`, and nobody watches."""
    return all(quantized(layer) or plain(layer) for layer in layers)


def untouched(module: nn.Module) -> bool:
    """Whether a call of ``module`` would run its class's code as its library wrote it, and nobody would see it."""
    if type(module) not in originals.numbers and not torch.compiler.is_compiling():
        originals.record(type(module))
    number = originals.numbers.get(type(module), -1)
    return (
        number >= 0
        and not hooked(module)
        and "forward" not in vars(module)
        and ordinary_weights(module)
        and originals.unchanged(number)
    )


def rate(drop: nn.Module) -> float | None:
    """The share that a dropout drops now, if it need not be called; else None."""
    if hooked(drop) or "forward" in vars(drop):
        return None
    if type(drop) is nn.Identity:
        return 0.0
    if type(drop) is not nn.Dropout or not (originals.unchanged(_DROPOUT) or exporting()):
        return None
    return share(drop.p, drop.training)


def share(p: float, training: bool) -> float | None:
    """What our attention is asked to drop; None where that is everything, which it refuses."""
    return 0.0 if not training else p if p < 1.0 else None


def fused_rate(module: Any) -> float | None:
    """What ``F.scaled_dot_product_attention`` is asked to drop by ``module.attn_drop.p if module.training else 0.0``,
    as :func:`share`."""
    return share(getattr(module.attn_drop, "p", 0.0), module.training)


def idle(drop: nn.Module | None) -> bool:
    """Whether ``drop`` drops nothing, and nothing watches it."""
    return drop is None or rate(drop) == 0.0


def prepacked_layers(*layers: nn.Module | None) -> bool:
    """Whether these linear layers have prepacked or int8 weights, without which a block gains nothing from fusing its
    residual branches."""
    return all(quantized(layer) or prepacked.is_packed(getattr(layer, "weight", None)) for layer in layers)


_DROP_PATHS = {"timm.layers.drop.DropPath"}
_LAYER_SCALES = {"timm.layers.layer_scale.LayerScale", "timm.models.vision_transformer.LayerScale"}


def fusion_args(
    x: Tensor, norm: nn.Module, scale: nn.Module | None, drop_path: nn.Module | None
) -> dict[str, Any] | None:
    """``norm`` and ``scale`` of x + drop_path(scale(branch(norm(x)))) as arguments of a branch that computes all of it.

    In inference on a CPU, where nothing is dropped and these modules are what they seem; None otherwise.
    """
    if torch.is_grad_enabled() or not x.is_cpu or (given := norm_args(norm)) is None:
        return None
    for module, known in ((drop_path, _DROP_PATHS), (scale, _LAYER_SCALES)):
        if module is not None and not ((type(module) is nn.Identity or kind(module) in known) and untouched(module)):
            return None
    if getattr(drop_path, "drop_prob", 0.0) and drop_path.training:  # type: ignore[union-attr]
        return None
    return {"norm": given, "scale": getattr(scale, "gamma", None)}


def norm_args(norm: Any) -> Norm | None:
    """A norm as an argument of a layer that computes it too, None where it is not what it seems."""
    if getattr(norm, "_fast_norm", False):
        return None
    if served_by(norm, _layer_norm):
        return norm.weight, norm.bias, norm.eps
    return (norm.weight, norm.eps) if served_by(norm, _rms_norm) else None


def project(layer: nn.Module, x: Tensor, activation: nn.Module | None = None, **around: Any) -> Tensor:
    """activation(layer(x)), in one product where both are what they seem; :func:`fusion_args` only go with a
    :func:`fusible` layer."""
    name = None if activation is None else activation_name(activation)
    if quantized(layer) and (activation is None) == (name is None):
        return layer.multiply(x, name, layer.bias, **around)  # type: ignore[operator, no-any-return]
    if not plain(layer) or (activation is not None and name is None):
        x = layer(x) if not plain(layer) else linear(x, layer.weight, layer.bias)
        return x if activation is None else activation(x)
    return linear(x, layer.weight, layer.bias, activation=name, **around)


def biased(layer: nn.Module, x: Tensor, bias: Tensor | None, norm: Norm | None = None) -> Tensor:
    """norm(x) W^T + bias with the weight of a :func:`multiplied` layer and another bias than its own."""
    if plain(layer):
        return linear(x, layer.weight, bias, norm=norm)  # type: ignore[arg-type]
    if quantized(layer):
        return layer.multiply(x, None, bias, norm)  # type: ignore[operator, no-any-return]
    out = layer(x if norm is None else normalize(x, norm))
    difference = bias if layer.bias is None or bias is None else bias - layer.bias  # type: ignore[operator]
    return out if difference is None else out + difference


_ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
}


def activation_name(module: nn.Module) -> str | None:
    """The name by which :func:`pyvit.ops.linear` knows an activation, or None."""
    gelu = {"none": "gelu", "tanh": "gelu_tanh"}
    name = gelu.get(module.approximate) if type(module) is nn.GELU else _ACTIVATIONS.get(kind(module))
    return name if name is not None and untouched(module) else None


def mlp(module: nn.Module) -> Iterator[Replacement]:
    """fc1, activation_fn, fc2."""
    layers = ("fc1", "fc2")
    yield Replacement(module, _mlp, "mlp", needs="fc1 activation_fn fc2", may="config", layers=layers)


def _mlp(module: Any, x: Tensor) -> Tensor:
    return two_layers(module.fc1, module.activation_fn, module.fc2, x)


def two_layers(
    fc1: nn.Module,
    activation: nn.Module,
    fc2: nn.Module,
    x: Tensor,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """fc2(activation(fc1(x))), as one where all three :func:`are_one`; only then with :func:`fusion_args`."""
    name = activation_name(activation)
    if name is not None and quantized(fc1, fc2) and fc2.smoothing is None:
        return quantized_mlp(x, fc1, fc2, name, norm, scale, residual)  # type: ignore[arg-type]
    if name is not None and plain(fc1) and plain(fc2):
        weights: Any = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return ops.mlp(x, *weights, activation=name, norm=norm, scale=scale, residual=residual)
    first, second = {"norm": norm}, {"scale": scale, "residual": residual}
    hidden = project(fc1, x, activation, **(first if norm is not None else {}))
    return project(fc2, hidden, **(second if residual is not None else {}))


def gated_layers(
    x: Tensor,
    fc1: nn.Module,
    activation: nn.Module,
    fc2: nn.Module,
    *,
    gate: nn.Module | None = None,
    gate_last: bool = False,
    inner: nn.Module | None = None,
    drop: nn.Module | None = None,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """fc2(inner(drop(activation(a) * b))), with b = fc1(x) and a = gate(x) or, without a ``gate``, the halves a, b of
    fc1(x), in that order or ``gate_last``. As one where all :func:`are_gated`; only then with :func:`fusion_args`."""
    if are_gated(fc1, activation, fc2, gate, inner, drop):
        layers: Any = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        own: Any = {"gate_last": gate_last} if gate is None else {"gate_weight": gate.weight, "gate_bias": gate.bias}
        within = None if inner is None or type(inner) is nn.Identity else norm_args(inner)
        own |= {"activation": activation_name(activation), "hidden_norm": within}
        return ops.gated_mlp(x, *layers, **own, norm=norm, scale=scale, residual=residual)
    if gate is None:
        a, b = project(fc1, x).chunk(2, -1)
        a, b = (b, a) if gate_last else (a, b)
    else:
        a, b = project(gate, x), project(fc1, x)
    hidden = activation(a) * b
    hidden = hidden if drop is None else drop(hidden)
    return project(fc2, hidden if inner is None else inner(hidden))


def are_gated(
    fc1: nn.Module,
    activation: nn.Module,
    fc2: nn.Module,
    gate: nn.Module | None,
    inner: nn.Module | None,
    drop: nn.Module | None,
) -> bool:
    """Whether :func:`gated_layers` are what :func:`pyvit.ops.gated_mlp` computes."""
    nothing = inner is None or (type(inner) is nn.Identity and untouched(inner))
    return (
        all(plain(layer) for layer in (fc1, fc2, gate) if layer is not None)
        and activation_name(activation) is not None
        and (nothing or (norm_args(inner) is not None and not watched(inner)))
        and idle(drop)
    )


def are_one(fc1: nn.Module, activation: nn.Module, fc2: nn.Module) -> bool:
    """Whether two layers and what stands between them are what they seem."""
    return fusible(fc1, fc2) and activation_name(activation) is not None


def sequential(module: nn.Sequential) -> Iterator[Replacement]:
    """Linear layers, each with the activation after it, among others."""
    layers = tuple(name for name, layer in module.named_children() if isinstance(layer, nn.Linear))
    yield Replacement(module, _sequential, "linear", layers=layers)


def _sequential(module: nn.Sequential, x: Tensor) -> Tensor:
    layers = list(module)
    while layers:
        layer = layers.pop(0)
        if not multiplied(layer):
            x = layer(x)
            continue
        activation = layers.pop(0) if layers and activation_name(layers[0]) is not None else None
        second = _next_quantized(layers) if activation is not None and quantized(layer) else None
        if second is None or activation is None:
            x = project(layer, x, activation)
        else:
            x = two_layers(layer, activation, second, x)
    return x


def _next_quantized(layers: list[nn.Module]) -> nn.Module | None:
    """The next layer, if it has int8 weights and only idle dropout is before it; both are then taken off the list."""
    skipped = 0
    while skipped < len(layers) and type(layers[skipped]) is nn.Dropout and idle(layers[skipped]):
        skipped += 1
    if skipped == len(layers) or not quantized(layers[skipped]):
        return None
    found = layers[skipped]
    del layers[: skipped + 1]
    return found


def patch_conv(name: str) -> Rule:
    """The convolution ``name`` of a module, if it cuts an image into patches."""

    def rule(module: nn.Module) -> Iterator[Replacement]:
        conv = getattr(module, name, None)
        if (
            type(conv) is not nn.Conv2d
            or conv.groups != 1
            or conv.dilation != (1, 1)
            or conv.padding not in ((0, 0), "valid")
        ):
            return
        if conv.kernel_size != (1, 1) and all(s <= k for s, k in zip(conv.stride, conv.kernel_size, strict=True)):
            yield Replacement(conv, _patch_conv, "patch_embed")

    return rule


def _patch_conv(conv: nn.Conv2d, images: Tensor) -> Tensor:
    size, patch, stride = images.shape[-2:], conv.kernel_size, conv.stride
    cut = any(s == p and n % p for n, p, s in zip(size, patch, stride, strict=True))
    if cut or images.dim() != 4 or images.dtype == torch.uint8:
        return nn.Conv2d.forward(conv, images)
    tokens = patch_embed(images, conv.weight, conv.bias, stride=stride)
    # In this order: of transpose and unflatten one image gets strides that torch's BatchNorm misreads in its backward.
    return tokens.unflatten(1, grid_size(size, patch, stride)).permute(0, 3, 1, 2)


def windows_match(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> bool:
    """Whether every shifted axis of a map has more than one window: pyvit does not shift one that is a single
    window."""
    return all(s == 0 or n > w for n, w, s in zip(size, window, shift, strict=True))


def cosine_table(network: nn.Module, coords: Tensor, heads: int) -> Tensor:
    """Swin V2's bias table ((2 wh - 1) (2 ww - 1), heads) from its network and its coordinates (1, 2 wh - 1, 2 ww - 1,
    2)."""
    return 16 * torch.sigmoid(network(coords).view(-1, heads))


def usable(mask: Tensor | None) -> bool:
    """Whether a mask is none, or one that our kernels read as torch does: torch refuses integers."""
    return mask is None or (ordinary(mask) and (mask.dtype == torch.bool or mask.is_floating_point()))


def torch_mask(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of torch's MultiheadAttention, (L, S) or (B H, L, S), with True where attention is forbidden, for q (B, H,
    L, d)."""
    if mask.dtype == torch.bool:
        mask = ~mask
    elif mask.is_floating_point() and mask.dtype != torch.float32:  # -1e9 in float32 would be -inf in 16 bits
        mask = mask.to(q.dtype)
    return mask if mask.dim() == 2 else mask.unflatten(0, q.shape[:2])


def multihead(module: nn.MultiheadAttention) -> Iterator[Replacement | Left]:
    if not module._qkv_same_embed_dim:
        yield Left(module, "keys or values are of another width than queries")
    elif module.bias_k is not None or module.add_zero_attn:
        yield Left(module, "add_bias_kv or add_zero_attn")
    else:
        by = "flash_attention, in calls with need_weights=False"
        yield Replacement(module, _multihead, by, parts=("out_proj",), layers=("in_proj", "out_proj"))


def _multihead(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    drop, shaped = (
        share(module.dropout, module.training),
        query.dim() == 3 and (attn_mask is None or attn_mask.dim() in (2, 3)),
    )
    served = shaped and drop is not None and servable(key) and servable(value) and usable(attn_mask)
    if need_weights or key_padding_mask is not None or not served or (is_causal and attn_mask is None):
        return nn.MultiheadAttention.forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if query is key and key is value:
        q, k, v = linear(query, weight, bias).chunk(3, -1)
    else:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True))
    batch = 0 if module.batch_first else 1
    # (B, N, C) or (N, B, C) to (B, H, N, d)
    q, k, v = (
        t.unflatten(-1, (module.num_heads, module.head_dim)).movedim(batch, 0).transpose(1, 2) for t in (q, k, v)
    )
    bias = None if attn_mask is None else torch_mask(attn_mask, q)
    out = flash_attention(q, k, v, bias=bias, dropout_p=drop or 0.0)
    out = out.transpose(1, 2).flatten(2).movedim(0, batch)  # type: ignore[union-attr]
    return linear(out, module.out_proj.weight, module.out_proj.bias), None


def layer_norm(module: nn.LayerNorm) -> Iterator[Replacement]:
    if len(module.normalized_shape) == 1:
        yield Replacement(module, _layer_norm, "layer_norm")


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    if not x.is_cpu or getattr(module, "_fast_norm", False):  # timm's own, in the dtype of autocast
        return type(module).forward(module, x)
    return ops.layer_norm(x, module.weight, module.bias, module.eps)


def rms_norm(module: Any) -> Iterator[Replacement]:
    if len(module.normalized_shape) == 1:
        yield Replacement(module, _rms_norm, "rms_norm")


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    weight = module.weight
    mixed = weight is not None and torch.promote_types(weight.dtype, x.dtype) != x.dtype  # the result is of the wider
    if not x.is_cpu or mixed or getattr(module, "_fast_norm", False):  # timm's own, in the dtype of autocast
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return ops.rms_norm(x, weight, module.eps)


def known(module: nn.Module) -> Iterator[Replacement]:
    """A class that is nothing by itself: its parts, or what holds it, are replaced."""
    return iter(())


RULES: dict[str, Rule] = {
    "torch.nn.modules.activation.MultiheadAttention": multihead,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    "torch.nn.modules.normalization.RMSNorm": rms_norm,
}
