"""transformers (5 and later): rules for ViT, DeiT, DINOv2, ViTMAE, CLIP, SigLIP, AST, DINOv3, SAM, Swin and
Swin V2."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.integrations import functional, originals, transformers_attention
from pyvit.integrations.common import (
    Rule,
    cosine_table,
    gated_layers,
    known,
    mlp,
    multiplied,
    patch_conv,
    plain,
    project,
    rate,
    share,
    two_layers,
    usable,
    windows_match,
)
from pyvit.integrations.forwards import Left, Replacement, is_idle, layout, servable
from pyvit.nn.attention import rotate
from pyvit.nn.position import relative_biases
from pyvit.ops import decomposed_attention, flash_attention, linear, rope_attention, window_attention

#: Arguments that a model passes to its attention and that have no effect there.
_IDLE = {"output_attentions", "output_hidden_states", "return_dict", "is_causal", "interpolate_pos_encoding"}


def _implementation(module: Any) -> str:
    return module.config._attn_implementation or "eager"


def _weights_wanted(module: Any, config: Any, *, eager: bool) -> bool:
    """Whether the call's attention probabilities are needed: requested, or seen by a hook."""
    if getattr(config, "output_attentions", False):
        return True
    return eager and any(not is_idle(hook) for hook in module._forward_hooks.values())


def _is_own(implementation: str) -> bool:
    """Whether the attention function of that name is one we know: transformers' sdpa, the model's eager function, or
    ours."""
    found = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS.get(implementation)
    if implementation == "eager":
        return found is None
    if implementation in ("pyvit", "pyvit_flash"):
        return found in (transformers_attention.attention, transformers_attention.packed_attention)
    own = getattr(sys.modules.get("transformers.integrations.sdpa_attention"), "sdpa_attention_forward", None)
    return implementation == "sdpa" and found is own is not None and originals.unchanged(originals.numbers.get(own, -1))


_is_own._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see originals.unchanged


_FLASH = "'pyvit_flash' attends by pyvit already; set_attn_implementation('pyvit') first"
_CHOSEN = "the attention implementation {!r} was chosen; set_attn_implementation('sdpa') first"


def attention(module: Any, rotary: bool = False) -> Iterator[Replacement | Left]:
    if not hasattr(module, "q_proj"):
        yield Left(module, "laid out as before transformers 5")
    elif _implementation(module) == "pyvit_flash":
        yield Left(module, _FLASH, True)
    elif _implementation(module) not in ("eager", "sdpa", "pyvit"):
        yield Left(module, _CHOSEN.format(_implementation(module)))
    elif (reason := _foreign(_implementation(module))) is not None:
        yield Left(module, reason)
    else:
        function, by = (_rotary_attention, "rope_attention") if rotary else (_attention, "flash_attention")
        needs = "config head_dim q_proj k_proj v_proj"
        layers = ("q_proj k_proj v_proj", "o_proj" if hasattr(module, "o_proj") else "out_proj")
        yield Replacement(module, function, by, needs=needs, may=_MAY, layers=layers)


def _foreign(implementation: str) -> str | None:
    """Why an attention function is not one that pyvit replaces, or None."""
    if implementation == "sdpa":
        originals.record(sys.modules["transformers.integrations.sdpa_attention"].sdpa_attention_forward)
    return None if _is_own(implementation) else f"the attention function {implementation!r} is not transformers' own"


_MAY = (
    "o_proj out_proj attention_dropout dropout scaling scale is_causal embed_dim num_heads num_attention_heads "
    "num_key_value_groups"
)


def _attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if not _served(module, attention_mask, kwargs):
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    return _fused(module, hidden_states, attention_mask, kwargs.get("is_causal")), None


def _rotary_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    one_for_all = position_embeddings is not None and all(t.dim() == 2 for t in position_embeddings)
    if not one_for_all or position_embeddings is None or not _served(module, attention_mask, kwargs):
        return type(module).forward(module, hidden_states, attention_mask, position_embeddings, **kwargs)
    cos, sin = position_embeddings  # (patches, d), of the last tokens: those before them are not rotated
    rope = torch.stack((sin, cos), 1)
    return _fused(module, hidden_states, attention_mask, kwargs.get("is_causal"), rope), None


def _served(module: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    implementation = _implementation(module)
    if not _is_own(implementation) or any(v is not None for name, v in kwargs.items() if name not in _IDLE):
        return False
    if implementation == "pyvit_flash" and mask is not None:  # a padding mask (B, N)
        return False
    if not usable(mask) or (
        mask is not None and mask.dtype == torch.bool and implementation == "eager"
    ):  # which adds it
        return False
    if _drop(module) is None:
        return False
    return not (
        kwargs.get("output_attentions") or _weights_wanted(module, module.config, eager=implementation == "eager")
    )


def _drop(module: Any) -> float | None:
    return share(module.attention_dropout if hasattr(module, "attention_dropout") else module.dropout, module.training)


def _fused(module: Any, x: Tensor, mask: Tensor | None, causal: bool | None, rope: Tensor | None = None) -> Tensor:
    """x (B, N, C) -> (B, N, C), as sdpa: with the mask, or causal if the call or the module says so. The last tokens
    are rotated by rope (patches, 2, d)."""
    q, k, v = (
        project(layer, x).unflatten(-1, (-1, module.head_dim))
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    options: dict[str, Any] = {
        "bias": mask,
        "is_causal": mask is None
        and _implementation(module) != "eager"
        and bool(module.is_causal if causal is None else causal),
        "scale": module.scaling if hasattr(module, "scaling") else module.scale,
    }
    drop, attend = _drop(module), flash_attention
    if rope is not None:
        prefix = x.shape[1] - rope.shape[0]
        if x.is_cpu and not drop:
            rope = rope if rope.dtype in (torch.float32, q.dtype) else rope.to(q.dtype)
            options |= {"rope": rope, "num_prefix_tokens": prefix}
            attend = rope_attention
        else:
            sin, cos = rope.unbind(1)
            pad = (0, 0, prefix, 0)
            rope = torch.stack((F.pad(sin, pad), F.pad(cos, pad, value=1.0)), 1)
            q, k = rotate(q, rope), rotate(k, rope)
    if attend is flash_attention:
        options["dropout_p"] = drop
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)  # of (B, H, N, d)
    out = out.transpose(1, 2).flatten(2)  # type: ignore[union-attr]
    return project(module.o_proj if hasattr(module, "o_proj") else module.out_proj, out)


_TABLE = "ALL_ATTENTION_FUNCTIONS"
_SEQUENCES = "attends to one sequence of a packed batch at a time, which was not faster in coarse measurements"
_WIDEST = 256  # largest head dimension of the kernels


def calls_interface(kind: type) -> bool:
    """Whether a class's own forward takes its attention function from transformers' table."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    return {_TABLE, "get_interface"} <= {*forward.__code__.co_names} and originals.record(kind).foreign is None


def interface(module: Any) -> Iterator[Replacement | Left]:
    """A class without a rule of its own whose forward takes its attention function from transformers' table: its own
    code runs with pyvit's function."""
    if getattr(module, "config", None) is None:
        return
    implementation = _implementation(module)
    if implementation == "pyvit_flash":
        yield Left(module, _FLASH, True)
    elif implementation not in ("eager", "sdpa", "pyvit"):
        yield Left(module, _CHOSEN.format(implementation))
    elif (reason := _foreign(implementation)) is not None:
        yield Left(module, reason)
    elif "cu_seqlens" in type(module).forward.__code__.co_varnames:
        yield Left(module, _SEQUENCES)
    elif implementation == "eager" and not _is_plain(type(module).forward.__globals__.get("eager_attention_forward")):
        yield Left(module, "its eager attention function is not softmax(q k + mask) v")
    else:
        yield Replacement(module, _in_its_own_code, "flash_attention, in its own code")


def _in_its_own_code(module: Any, *args: Any, **kwargs: Any) -> Any:
    forward, implementation = type(module).forward, _implementation(module)
    eager = implementation == "eager"
    if (
        torch.compiler.is_compiling()  # which reads the class's source
        or implementation not in ("eager", "sdpa")
        or not _is_own(implementation)
        or (eager and (kwargs.get("output_attentions") or any(a is True for a in args)))
        or _weights_wanted(module, module.config, eager=eager)
    ):
        return forward(module, *args, **kwargs)
    names = {**forward.__globals__, _TABLE: _Table(forward.__globals__[_TABLE])}
    ours = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours(module, *args, **kwargs)


class _Table:
    """transformers' table of attention functions, with pyvit's in place of "sdpa" and of a plain "eager" function."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def get_interface(self, implementation: str, default: Any) -> Any:
        theirs = self._theirs.get_interface(implementation, default)
        if implementation == "eager" and not (theirs is default and _is_plain(default)):
            return theirs
        return functools.partial(_either, theirs, implementation == "eager")


def _either(
    theirs: Any,
    eager: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """pyvit's attention if it computes what ``theirs`` computes of these arguments, else ``theirs``."""
    rate = share(dropout, module.training or not eager)
    alike = all(
        servable(t) and t.dim() == 4 and t.dtype == query.dtype and 0 < t.shape[-1] <= _WIDEST
        for t in (query, key, value)
    )
    alike = alike and query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3]
    alike = alike and query.shape[1] % max(key.shape[1], 1) == 0 and query.shape[-1] == key.shape[-1]
    mask = attention_mask
    masked = mask is None or (usable(mask) and mask.dim() == 4 and not (eager and mask.dtype == torch.bool))
    known = all(v is None for name, v in kwargs.items() if name not in _IDLE)
    number = scaling is None or isinstance(scaling, float | int)
    if not (alike and masked and known and number and rate is not None and isinstance(is_causal, bool | None)):
        kwargs |= {} if is_causal is None else {"is_causal": is_causal}
        return theirs(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    causal = False if eager else is_causal
    return transformers_attention.attention(module, query, key, value, mask, rate, scaling, causal)


@functools.lru_cache(maxsize=256)
def _is_plain(function: Any) -> bool:
    """Whether a model's eager attention function computes softmax(scaling q k + mask) v: tried on a small example."""
    if not isinstance(function, types.FunctionType) or originals.record(function).foreign is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
    q, k, v, mask = draw(2, 2, 3, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4), draw(2, 1, 3, 5)
    layer = types.SimpleNamespace(num_key_value_groups=1, training=False, head_dim=4)
    try:
        with torch.no_grad():
            found = function(layer, q, k, v, mask, scaling=0.7, dropout=0.0)[0]
            expected = torch.softmax(0.7 * q @ k.mT + mask, -1) @ v
    except Exception:  # it wants more of its layer
        return False
    # A softmax in float32 within float64.
    return found.shape == (2, 3, 2, 4) and bool((found - expected.transpose(1, 2)).abs().max() < 1e-5)


def up_down(module: nn.Module) -> Iterator[Replacement]:
    """An MLP of up_proj, act_fn and down_proj."""
    layers = ("up_proj", "down_proj")
    yield Replacement(module, _up_down, "mlp", needs="up_proj act_fn down_proj", may="config", layers=layers)


def _up_down(module: Any, x: Tensor) -> Tensor:
    return two_layers(module.up_proj, module.act_fn, module.down_proj, x)


def gate_up_down(module: nn.Module) -> Iterator[Replacement]:
    """A gated MLP of gate_proj, act_fn, up_proj and down_proj; DINOv2's is of other layers before version 5."""
    if hasattr(module, "gate_proj"):
        needs, layers = "gate_proj up_proj act_fn down_proj", ("gate_proj up_proj", "down_proj")
        yield Replacement(module, _gate_up_down, "gated_mlp", needs=needs, may="config", layers=layers)


def _gate_up_down(module: Any, x: Tensor) -> Tensor:
    return gated_layers(x, module.up_proj, module.act_fn, module.down_proj, gate=module.gate_proj)


def _projections(layer: Any, version: int) -> tuple[nn.Module, ...]:
    """q, k, v and the output projection of a Swin layer."""
    attn = layer.attention
    if version == 1:
        return attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
    return attn.self.query, attn.self.key, attn.self.value, attn.output.dense


#: Of a Swin layer of each version, as :func:`_projections`.
_LAYERS = {
    1: ("attention.q_proj attention.k_proj attention.v_proj", "attention.o_proj"),
    2: ("attention.self.query attention.self.key attention.self.value", "attention.output.dense"),
}


def swin(layer: Any, version: int) -> Iterator[Replacement | Left]:
    if version == 1 and not hasattr(layer.attention, "q_proj"):
        yield Left(layer, "laid out as before transformers 5")
        return
    if version == 1:
        inner, needs = (
            layer.attention,
            "config num_attention_heads attention_dropout scaling q_proj k_proj v_proj o_proj relative_position_bias",
        )
        reason = _foreign(_implementation(inner)) or layout(inner, needs, "head_dim is_causal")
        parts = ("attention", "attention.relative_position_bias")
    else:
        inner, needs = (
            layer.attention.self,
            "query key value dropout logit_scale continuous_position_bias_mlp relative_coords_table",
        )
        reason = layout(
            inner,
            needs + " num_attention_heads window_size",
            "relative_position_index all_head_size attention_head_size",
        )
        parts = ("attention", "attention.self", "attention.self.dropout", "attention.output")
    if reason is not None:
        yield Left(layer, f"its attention: {reason}")
    elif not all(map(multiplied, _projections(layer, version))):
        yield Left(layer, "its projections are not plain Linear layers")
    else:
        needs = "attention layernorm_before layernorm_after window_size shift_size drop_path "
        needs += "mlp dropout" if version == 1 else "intermediate output"
        may, function = "input_resolution gradient_checkpointing", _swin if version == 1 else _swin_v2
        layers = _LAYERS[version]
        yield Replacement(layer, function, "window_attention", needs=needs, may=may, parts=parts, layers=layers)


def _windows(layer: Any, x: Tensor, version: int, **options: Any) -> Tensor:
    """Window attention of both versions: pad, roll, partition, attention and the reverse, x (B, H, W, C) -> (B, H, W,
    C)."""
    q, k, v, output = _projections(layer, version)
    bias = (
        None if q.bias is None else torch.cat((q.bias, torch.zeros_like(q.bias) if k.bias is None else k.bias, v.bias))
    )
    if plain(q) and plain(k) and plain(v):
        qkv = linear(x, torch.cat((q.weight, k.weight, v.weight)), bias)
    else:
        qkv = torch.cat([project(each, x) for each in (q, k, v)], -1)
    window = layer.window_size
    if any(n % window for n in x.shape[1:3]):
        options["pad_qkv"] = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias
    return project(output, window_attention(qkv, window, layer.shift_size, **options))


def _same_windows(layer: Any, trained: int, size: tuple[int, int], version: int) -> bool:
    """Whether a layer's windows, which may shrink with the map, have the size of its table and are shifted as pyvit
    shifts, and its linear layers are plain."""
    window, shift = layer.window_size, layer.shift_size
    return (
        window == trained
        and windows_match(size, (window, window), (shift, shift))
        and all(map(multiplied, _projections(layer, version)))
    )


def _checkpointed(layer: Any, call: functools.partial[Any], *args: Any) -> Any:
    """``call`` with gradient checkpointing if the layer is set to, as in its class's forward."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(call, *args)
    return call(*args)


def _swin(
    layer: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
) -> tuple[Tensor, None]:
    if not always_partition:
        layer.set_shift_and_window_size(input_dimensions)
    trained = layer.attention.relative_position_bias.window_size[0]
    if not _served(layer.attention, None, kwargs) or not _same_windows(layer, trained, input_dimensions, 1):
        return type(layer).forward(layer, hidden_states, input_dimensions, always_partition=always_partition, **kwargs)
    return _checkpointed(layer, functools.partial(_swin_block, layer, input_dimensions), hidden_states), None


def _swin_block(layer: Any, size: tuple[int, int], x: Tensor) -> Tensor:
    attn, shortcut = layer.attention, x
    out = _windows(
        layer,
        layer.layernorm_before(x).unflatten(1, size),
        1,
        num_heads=attn.num_attention_heads,
        bias_table=attn.relative_position_bias.relative_position_bias_table,
        scale=attn.scaling,
        dropout_p=_drop(attn),  # type: ignore[arg-type]
    )
    x = shortcut + layer.drop_path(layer.dropout(out.flatten(1, 2)))
    return layer.dropout(layer.mlp(layer.layernorm_after(x))) + x


def _swin_v2(
    layer: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool | None = False
) -> tuple[Tensor, ...]:
    attn = layer.attention.self
    drop = rate(attn.dropout)
    if output_attentions or drop is None or not _same_windows(layer, attn.window_size[0], input_dimensions, 2):
        return type(layer).forward(layer, hidden_states, input_dimensions, output_attentions)
    out = _windows(
        layer,
        hidden_states.unflatten(1, input_dimensions),
        2,
        num_heads=attn.num_attention_heads,
        bias_table=cosine_table(
            attn.continuous_position_bias_mlp, attn.relative_coords_table, attn.num_attention_heads
        ),
        logit_scale=attn.logit_scale.flatten(),
        dropout_p=drop,
    )
    out = layer.attention.output.dropout(out.flatten(1, 2))
    x = hidden_states + layer.drop_path(layer.layernorm_before(out))
    return (x + layer.drop_path(layer.layernorm_after(layer.output(layer.intermediate(x)))),)


def map_attention(module: Any) -> Iterator[Replacement]:
    """SAM's image encoder and what has copied it."""
    if not module.use_rel_pos:
        if functional.calls_sdpa(type(module)):
            yield from functional.sdpa(module)
        return
    needs = "num_attention_heads scale dropout qkv proj use_rel_pos rel_pos_h rel_pos_w"
    function = _map_attention if functional.calls_sdpa(type(module)) else _eager_map_attention
    yield Replacement(module, function, "decomposed_attention", needs=needs, layers=("qkv", "proj"))


def _eager_map_attention(
    module: Any, hidden_states: Tensor, output_attentions: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """Of the classes that return their probabilities."""
    if output_attentions or any(not is_idle(hook) for hook in module._forward_hooks.values()):
        return type(module).forward(module, hidden_states, output_attentions)  # type: ignore[no-any-return]
    return _map_attention(module, hidden_states)


def _map_attention(module: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
    if not module.use_rel_pos or (module.training and module.dropout):
        return type(module).forward(module, hidden_states, output_attentions)  # type: ignore[no-any-return]
    b, h, w, _ = hidden_states.shape
    qkv = project(module.qkv, hidden_states).view(b, h * w, 3, module.num_attention_heads, -1)
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, d)
    out = decomposed_attention(q, k, v, *relative_biases(q, module.rel_pos_h, module.rel_pos_w, (h, w)))
    return project(module.proj, out.transpose(1, 2).reshape(b, h, w, -1)), None  # type: ignore[union-attr]


def intermediate(module: nn.Module) -> Iterator[Replacement]:
    yield Replacement(module, _intermediate, "linear", needs="dense intermediate_act_fn", layers=("dense",))


def _intermediate(module: Any, x: Tensor) -> Tensor:
    act = module.intermediate_act_fn
    return project(module.dense, x, act) if isinstance(act, nn.Module) else act(project(module.dense, x))


def output(module: nn.Module) -> Iterator[Replacement]:
    yield Replacement(module, _output, "linear", needs="dense dropout", layers=("dense",))


def _output(module: Any, x: Tensor) -> Tensor:
    return module.dropout(project(module.dense, x))


def _rules(package: str, prefix: str, **rules: Rule) -> dict[str, Rule]:
    return {f"transformers.models.{package}.modeling_{package}.{prefix}{name}": rule for name, rule in rules.items()}


def _vit(package: str, prefix: str, patches: str = "PatchEmbeddings", conv: str = "projection") -> dict[str, Rule]:
    return _rules(package, prefix, Attention=attention, MLP=mlp, **{patches: patch_conv(conv)})


RULES: dict[str, Rule] = {
    **_vit("vit", "ViT"),
    **_vit("deit", "DeiT"),
    **_vit("dinov2", "Dinov2"),
    **_vit("dinov2_with_registers", "Dinov2WithRegisters"),
    **_rules("dinov2", "Dinov2", SwiGLUFFN=gate_up_down),
    **_rules("dinov2_with_registers", "Dinov2WithRegisters", SwiGLUFFN=gate_up_down),
    **_vit("vit_mae", "ViTMAE"),
    **_vit("audio_spectrogram_transformer", "AST"),
    **_vit("clip", "CLIP", "VisionEmbeddings", "patch_embedding"),
    **_vit("siglip", "Siglip", "VisionEmbeddings", "patch_embedding"),
    **_rules("dinov3_vit", "DINOv3ViT", Attention=functools.partial(attention, rotary=True), MLP=up_down),
    **_rules("dinov3_vit", "DINOv3ViT", Embeddings=patch_conv("patch_embeddings")),
    **_rules("eomt_dinov3", "EomtDinov3", Attention=functools.partial(attention, rotary=True), MLP=up_down),
    **_rules("eomt_dinov3", "EomtDinov3", GatedMLP=gate_up_down, Embeddings=patch_conv("patch_embeddings")),
    **_vit("vit_msn", "ViTMSN"),
    **_vit("ijepa", "IJepa"),
    **_vit("beit", "Beit"),
    **_rules("vivit", "Vivit", Attention=attention, MLP=mlp),
    **_vit("clipseg", "CLIPSeg", "VisionEmbeddings", "patch_embedding"),
    **_vit("altclip", "AltCLIP", "VisionEmbeddings", "patch_embedding"),
    **_vit("metaclip_2", "MetaClip2", "VisionEmbeddings", "patch_embedding"),
    **_vit("owlvit", "OwlViT", "VisionEmbeddings", "patch_embedding"),
    **_vit("owlv2", "Owlv2", "VisionEmbeddings", "patch_embedding"),
    **_vit("siglip2", "Siglip2"),
    **_rules("dinov3_vit", "DINOv3ViT", GatedMLP=gate_up_down),
    **_rules("aimv2", "Aimv2", MLP=gate_up_down),
    **_rules("aimv2", "Aimv2", Attention=attention, VisionEmbeddings=patch_conv("patch_embed")),
    **_vit("chinese_clip", "ChineseCLIPVision", "Embeddings", "patch_embedding"),
    **_vit("git", "GitVision", "Embeddings", "patch_embedding"),
    **_vit("idefics3", "Idefics3Vision", "Embeddings", "patch_embedding"),
    **_rules(
        "swin",
        "Swin",
        Layer=functools.partial(swin, version=1),
        Attention=known,
        MLP=mlp,
        PatchEmbeddings=patch_conv("projection"),
    ),
    **_rules("swin", "Swin", RelativePositionBias=known),
    **_rules(
        "swinv2",
        "Swinv2",
        Layer=functools.partial(swin, version=2),
        Attention=known,
        SelfAttention=known,
        SelfOutput=known,
    ),
    **_rules("sam", "SamVision", Attention=map_attention, SdpaAttention=map_attention),
    **_rules("sam_hq", "SamHQVision", Attention=map_attention, SdpaAttention=map_attention),
    **_rules("deepseek_ocr2", "DeepseekOcr2SamVision", Attention=map_attention, SdpaAttention=map_attention),
    **_rules("unlimited_ocr", "UnlimitedOcrSamVision", Attention=map_attention, SdpaAttention=map_attention),
    **_rules("got_ocr2", "GotOcr2Vision", Attention=map_attention),
    **_rules("slanext", "SLANeXtVision", Attention=map_attention),
    **_rules("pp_formulanet", "PPFormulaNetVision", Attention=map_attention),
    **_rules("swinv2", "Swinv2", Intermediate=intermediate, Output=output, PatchEmbeddings=patch_conv("projection")),
}

transformers_attention.register()
