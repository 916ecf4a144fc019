"""timm: ViT and its relatives built of ``Attention`` and ``Mlp``, those with rotary positions (EVA-02, DINOv3,
Perception Encoder), SAM, Swin and Swin V2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.integrations import originals
from pyvit.integrations.common import (
    Rule,
    are_gated,
    are_one,
    biased,
    cosine_table,
    fused_rate,
    fusible,
    fusion_args,
    gated_layers,
    idle,
    known,
    layer_norm,
    multiplied,
    norm_args,
    patch_conv,
    prepacked_layers,
    project,
    rate,
    rms_norm,
    two_layers,
    untouched,
    usable,
    windows_match,
)
from pyvit.integrations.forwards import Forward, Left, Replacement, layout, refuse_int8, served_by
from pyvit.integrations.functional import in_its_own_code, sdpa
from pyvit.nn.position import relative_biases
from pyvit.nn.quantized import QuantizedLinear, quantized, quantized_attention, quantized_window_attention
from pyvit.ops import decomposed_attention, flash_attention, flash_attention_qkvpacked, rope_attention, window_attention
from pyvit.ops.prepacked import Norm, attention_branch, normalize, window_attention_branch

_ALWAYS = "drops attention weights in evaluation too, as timm 0.9.0 to 0.9.2 do"


def attention(module: nn.Module) -> Iterator[Replacement | Left]:
    if hasattr(module, "fused_attn") and "training" not in originals.record(type(module)).reads:
        yield Left(module, _ALWAYS)
        return
    needs = "qkv q_norm k_norm attn_drop proj proj_drop num_heads scale fused_attn"
    may, layers = "head_dim attn_dim norm gate", ("qkv", "proj")
    yield Replacement(module, _attention, "flash_attention", needs=needs, may=may, layers=layers)


def _attention(
    module: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """With ``norm``, ``scale`` and ``residual`` (see :func:`pyvit.ops.linear`) the branch, where the module is
    :func:`_whole_attention`."""
    drop = fused_rate(module) if module.fused_attn else rate(module.attn_drop)
    if (is_causal and attn_mask is not None) or drop is None or not usable(attn_mask):
        options = (
            {"attn_mask": attn_mask, "is_causal": is_causal}
            if is_causal
            else {}
            if attn_mask is None
            else {"attn_mask": attn_mask}
        )
        return type(module).forward(module, x, **options)
    gate, norm_of_heads = getattr(module, "gate", None), getattr(module, "norm", None)
    options = {
        "bias": attn_mask,
        "is_causal": is_causal,
        "scale": None if module.fused_attn else module.scale,
        "dropout_p": drop,
    }
    bare = _nothing(module.q_norm) and _nothing(module.k_norm)
    direct = bare and (norm_of_heads is None or _nothing(norm_of_heads)) and _whole_attention(module)
    if direct and attn_mask is None and drop == 0.0 and module.fused_attn:
        layers = (module.qkv, module.proj, module.num_heads)
        branch = quantized_attention if quantized(module.qkv, module.proj) else attention_branch
        if (fused := branch(x, *layers, is_causal, norm, scale, residual)) is not None:
            return fused
    qkv = project(module.qkv, x, norm=norm).unflatten(-1, (3, module.num_heads, -1))  # (B, N, 3, H, d)
    if bare:
        out = flash_attention_qkvpacked(qkv, **options).flatten(2)
    else:
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, d)
        out = flash_attention(module.q_norm(q), module.k_norm(k), v, **options).transpose(1, 2).flatten(2)
    if norm_of_heads is not None:
        out = norm_of_heads(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return module.proj_drop(project(module.proj, out, scale=scale, residual=residual))


def cross(module: nn.Module) -> Iterator[Replacement]:
    needs = "num_heads scale wq wk wv attn_drop proj proj_drop"
    yield Replacement(module, _cross, "flash_attention", needs=needs)


def _cross(module: Any, x: Tensor) -> Tensor:
    """CrossViT's: the class token attends, (B, N, C) -> (B, 1, C)."""
    drop = rate(module.attn_drop)
    if drop is None:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    heads = (
        project(layer, y).unflatten(-1, (module.num_heads, -1))
        for layer, y in ((module.wq, x[:, :1]), (module.wk, x), (module.wv, x))
    )
    q, k, v = (t.transpose(1, 2) for t in heads)  # (B, H, N, d)
    out = flash_attention(q, k, v, scale=module.scale, dropout_p=drop).transpose(1, 2).flatten(2)  # type: ignore[union-attr]
    return module.proj_drop(project(module.proj, out))


def sam(module: Any) -> Iterator[Replacement]:
    if not module.use_rel_pos:
        yield from sdpa(module)
        return
    needs = "num_heads head_dim scale fused_attn qkv q_norm k_norm attn_drop proj proj_drop use_rel_pos rope"
    may, layers = "rel_pos_h rel_pos_w", ("qkv", "proj")
    yield Replacement(module, _sam, "decomposed_attention", needs=needs, may=may, layers=layers)


def _sam(module: Any, x: Tensor) -> Tensor:
    """SAM's, on a map (B, H, W, C)."""
    if not module.use_rel_pos or rate(module.attn_drop) != 0.0:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    b, h, w, _ = x.shape
    qkv = project(module.qkv, x).view(b, h * w, 3, module.num_heads, -1)
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, d)
    q, k = module.q_norm(q), module.k_norm(k)
    out = decomposed_attention(q, k, v, *relative_biases(q, module.rel_pos_h, module.rel_pos_w, (h, w)))
    return module.proj_drop(project(module.proj, out.transpose(1, 2).reshape(b, h, w, -1)))  # type: ignore[union-attr]


def _nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity and untouched(module)


def _whole_attention(module: Any) -> bool:
    """Whether nothing stands between the branch's ends and its two projections."""
    return (
        served_by(module, _attention)
        and fusible(module.qkv, module.proj)
        and getattr(module, "gate", None) is None
        and idle(module.proj_drop)
        and (module.fused_attn or rate(module.attn_drop) is not None)
    )


_BLOCK = "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2"


def block(module: Any) -> Iterator[Replacement]:
    yield Replacement(module, _block, "fused residual branches, where weights are packed", needs=_BLOCK, optional=True)


def _packed(mlp: Any, projection: nn.Module | None) -> bool:
    """Whether the first layers of both of a block's branches are :func:`prepacked_layers`."""
    fc1 = getattr(mlp, "fc1_x", None) if hasattr(mlp, "fc1_x") else getattr(mlp, "fc1", None)
    return prepacked_layers(projection, fc1)


def _block(module: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    simple = not args and all(value is None or value is False for value in options.values())
    mlp = module.mlp
    simple = simple and _packed(mlp, getattr(module.attn, "qkv", None))
    first = fusion_args(x, module.norm1, module.ls1, module.drop_path1) if simple else None
    second = None if first is None else fusion_args(x, module.norm2, module.ls2, module.drop_path2)
    branch = None if second is None else _mlp if _whole_mlp(mlp) else _gated if _whole_gated(mlp) else None
    if first is None or second is None or branch is None or not _whole_attention(module.attn):
        return type(module).forward(module, x, *args, **options)  # type: ignore[no-any-return]
    x = _attention(module.attn, x, residual=x, **first)
    return branch(mlp, x, residual=x, **second)


_ROPE_NEEDS = (
    "num_heads head_dim num_prefix_tokens scale fused_attn qkv q_proj k_proj v_proj q_norm k_norm attn_drop norm proj "
    "proj_drop"
)
_ROPE_MAY = "attn_dim kv_dim num_kv_heads num_kv_groups q_bias k_bias v_bias qkv_bias_separate rotate_half gate"


def rotary(module: Any) -> Iterator[Replacement]:
    """EvaAttention and AttentionRope. In older versions a rope of three dimensions has one embedding per image, not per
    head; they run their own code."""
    if layout(module, _ROPE_NEEDS, _ROPE_MAY) is not None or "unsqueeze" in originals.record(type(module)).reads:
        yield from sdpa(module)
        return
    packed = module.qkv is not None
    layers = ("qkv", "proj") if packed else ("q_proj k_proj v_proj", "proj")
    int8 = {"layers": layers, "reads_weights": packed and _reads_weight(module)}
    yield Replacement(module, _rotary, "rope_attention", needs=_ROPE_NEEDS, may=_ROPE_MAY, **int8)


def _reads_weight(module: Any) -> bool:
    """Whether the class's own forward multiplies the weight of ``qkv`` itself, with biases that are not the layer's."""
    return getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False)


def _rotary(
    module: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    options = _rotary_options(module, x, rope, attn_mask, is_causal)
    if options is None:
        if module.qkv is not None and _reads_weight(module):
            refuse_int8(module, module.qkv)
        return in_its_own_code(module, x, rope, attn_mask, is_causal)  # type: ignore[no-any-return]
    return _rotary_branch(module, x, options)


def _rotary_options(
    module: Any, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> dict[str, Any] | None:
    """The arguments of :func:`pyvit.ops.rope_attention` for a call; None where it does not compute the call, or where
    it gains nothing: other devices have no kernel that rotates."""
    drop = fused_rate(module) if module.fused_attn else rate(module.attn_drop)
    if not x.is_cpu or x.dim() != 3 or drop != 0.0 or (is_causal and attn_mask is not None) or not usable(attn_mask):
        return None
    if module.qkv is not None and _reads_weight(module) and not multiplied(module.qkv):
        return None
    options = {"bias": attn_mask, "is_causal": is_causal, "scale": None if module.fused_attn else module.scale}
    if rope is None:
        return options
    # Sines, then cosines: (N, 2 d), (H, N, 2 d) or (B, H, N, 2 d); H and B may be 1.
    prefix, heads = module.num_prefix_tokens, module.num_heads
    groups = getattr(module, "num_kv_groups", 1)
    fits = 2 <= rope.dim() <= 4 and tuple(rope.shape[-2:]) == (x.shape[1] - prefix, 2 * module.head_dim)
    fits = fits and (rope.dim() < 3 or rope.shape[-3] == 1 or (rope.shape[-3] == heads and groups == 1))
    fits = fits and (rope.dim() < 4 or rope.shape[0] in (1, x.shape[0]))
    if not fits or rope.dtype not in (torch.float32, torch.bfloat16, torch.float16) or rope.device != x.device:
        return None
    options |= {"rope": rope, "num_prefix_tokens": prefix, "interleaved": not getattr(module, "rotate_half", False)}
    return options


def _rotary_branch(
    module: Any,
    x: Tensor,
    options: dict[str, Any],
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x (B, N, C) -> (B, N, C). With ``norm``, ``scale`` and ``residual`` the branch, where the module is
    :func:`_whole_rotary`."""
    if module.qkv is None:
        y = x if norm is None else normalize(x, norm)
        q, k, v = (
            project(layer, y).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)  # (B, H, N, d)
            for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
    else:
        if getattr(module, "q_bias", None) is None:
            qkv = project(module.qkv, x, norm=norm)
        else:
            qkv = biased(module.qkv, x, torch.cat((module.q_bias, module.k_bias, module.v_bias)), norm)
        q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).transpose(1, 3).unbind(2)
    norms = _head_norms(module.q_norm, module.k_norm, q.dtype)
    if norms is None:
        q, k, norms = module.q_norm(q).type_as(v), module.k_norm(k).type_as(v), {}
    rope = options.get("rope")
    if rope is not None:
        rope = rope if rope.dtype in (torch.float32, q.dtype) else rope.float()
        options = options | {"rope": rope.unflatten(-1, (2, -1))}
    if rope is None and not norms:
        out = flash_attention(q, k, v, **options, enable_gqa=k.shape[1] != q.shape[1])
    else:
        out = rope_attention(q, k, v, **options, **norms, enable_gqa=k.shape[1] != q.shape[1])
    out = module.norm(out.transpose(1, 2).flatten(2))  # type: ignore[union-attr]
    if getattr(module, "gate", None) is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj_drop(project(module.proj, out, scale=scale, residual=residual))  # type: ignore[no-any-return]


def _head_norms(q_norm: Any, k_norm: Any, dtype: torch.dtype) -> dict[str, Any] | None:
    """The norms of queries and keys as arguments of :func:`pyvit.ops.rope_attention`; None where they must be
    called."""
    if _nothing(q_norm) and _nothing(k_norm):
        return {}
    a, b = norm_args(q_norm), norm_args(k_norm)
    if a is None or b is None or len(a) != len(b) or a[-1] != b[-1]:
        return None
    if any(t is not None and t.dtype not in (torch.float32, dtype) for t in (*a[:-1], *b[:-1])):  # type: ignore[union-attr]
        return None
    found: dict[str, Any] = {"qk_norm": "layer" if len(a) == 3 else "rms", "eps": a[-1]}
    found |= {"q_weight": a[0], "k_weight": b[0]}
    return found | ({"q_bias": a[1], "k_bias": b[1]} if len(a) == 3 else {})


def _whole_rotary(module: Any) -> bool:
    """Whether nothing stands between the branch's ends and its projections."""
    first = (module.q_proj, module.k_proj, module.v_proj) if module.qkv is None else (module.qkv,)
    return (
        served_by(module, _rotary)
        and fusible(*first, module.proj)
        and getattr(module, "gate", None) is None
        and idle(module.proj_drop)
    )


_EVA_BLOCK = "norm1 attn gamma_1 drop_path1 norm2 mlp gamma_2 drop_path2"


def eva_block(module: Any) -> Iterator[Replacement]:
    by = "fused residual branches, where weights are packed"
    yield Replacement(module, _eva_block, by, needs=_EVA_BLOCK, may="init_values", optional=True)


def _eva_block(
    module: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    attn, mlp = module.attn, module.mlp
    options = branch = None
    if _packed(mlp, getattr(attn, "qkv", None) or getattr(attn, "q_proj", None)):
        first = fusion_args(x, module.norm1, None, module.drop_path1)
        second = None if first is None else fusion_args(x, module.norm2, None, module.drop_path2)
        branch = None if second is None else _mlp if _whole_mlp(mlp) else _gated if _whole_gated(mlp) else None
        if branch is not None and _whole_rotary(attn):
            options = _rotary_options(attn, x, rope, attn_mask, is_causal)
    if branch is None or options is None:
        return type(module).forward(module, x, rope, attn_mask, is_causal)  # type: ignore[no-any-return]
    x = _rotary_branch(attn, x, options, first["norm"], module.gamma_1, x)  # type: ignore[index]
    return branch(mlp, x, norm=second["norm"], scale=module.gamma_2, residual=x)  # type: ignore[index]


def mlp(module: Any) -> Iterator[Replacement]:
    if isinstance(module.fc1, (nn.Linear, QuantizedLinear)):  # else convolutions, on maps
        needs, layers = "fc1 act drop1 fc2 drop2", ("fc1", "fc2")
        yield Replacement(module, _mlp, "mlp", needs=needs, may="norm", layers=layers)


def _mlp(module: Any, x: Tensor, **around: Any) -> Tensor:
    """With ``norm``, ``scale`` and ``residual`` the branch, where the module is :func:`_whole_mlp`."""
    norm = getattr(module, "norm", None)
    if (norm is None or _nothing(norm)) and idle(module.drop1):
        return module.drop2(two_layers(module.fc1, module.act, module.fc2, x, **around))
    x = module.drop1(project(module.fc1, x, module.act))
    return module.drop2(project(module.fc2, x if norm is None else norm(x)))


def _whole_mlp(module: Any) -> bool:
    norm = getattr(module, "norm", None)
    return (
        served_by(module, _mlp)
        and (norm is None or _nothing(norm))
        and are_one(module.fc1, module.act, module.fc2)
        and idle(module.drop1)
        and idle(module.drop2)
    )


def gated(module: Any) -> Iterator[Replacement]:
    """GluMlp, of which SwiGLUPacked is a case, and SwiGLU."""
    if hasattr(module, "fc1_g"):
        needs, layers = "fc1_g fc1_x act drop1 norm fc2 drop2", ("fc1_g fc1_x", "fc2")
        yield Replacement(module, _gated, "gated_mlp", needs=needs, layers=layers)
    elif isinstance(module.fc1, (nn.Linear, QuantizedLinear)):  # else convolutions, on maps
        needs = "fc1 act drop1 fc2 drop2"
        yield Replacement(
            module, _gated, "gated_mlp", needs=needs, may="chunk_dim gate_last norm", layers=("fc1", "fc2")
        )


def _gated(module: Any, x: Tensor, **around: Any) -> Tensor:
    """With ``norm``, ``scale`` and ``residual`` the branch, where the module is :func:`_whole_gated`."""
    fc1, gate, options = _gate_of(module)
    return module.drop2(gated_layers(x, fc1, module.act, module.fc2, gate=gate, **options, **around))  # type: ignore[no-any-return]


def _gate_of(module: Any) -> tuple[nn.Module, nn.Module | None, dict[str, Any]]:
    options = {"inner": getattr(module, "norm", None), "drop": module.drop1}
    if hasattr(module, "fc1_g"):
        return module.fc1_x, module.fc1_g, options
    # Before gate_last was an option, the gate was the last half.
    return module.fc1, None, options | {"gate_last": getattr(module, "gate_last", True)}


def _whole_gated(module: Any) -> bool:
    if not served_by(module, _gated) or not idle(module.drop2):
        return False
    fc1, gate, options = _gate_of(module)
    return are_gated(fc1, module.act, module.fc2, gate, options["inner"], options["drop"])


def swin(block: Any) -> Iterator[Replacement | Left]:
    attn, cosine = block.attn, hasattr(block.attn, "logit_scale")
    needs = "qkv proj attn_drop proj_drop softmax num_heads window_size "
    needs += (
        "logit_scale cpb_mlp relative_coords_table q_bias k_bias v_bias"
        if cosine
        else "relative_position_bias_table scale fused_attn"
    )
    reason = layout(attn, needs, "relative_position_index qkv_bias_separate window_area dim pretrained_window_size")
    theirs = next((cls for cls in type(attn).__mro__ if cls.__module__.startswith("timm.")), type(attn))
    if reason is None and not cosine and "training" not in originals.record(theirs).reads:
        reason = _ALWAYS
    if reason is not None:
        yield Left(block, f"its attn {reason}")
    elif not multiplied(attn.qkv):
        yield Left(block, "its qkv is not a plain Linear")
    else:
        needs = "attn norm1 drop_path1 norm2 mlp drop_path2 window_size shift_size input_resolution"
        may = "attn_mask window_area target_shift_size always_partition dynamic_mask"
        parts = ("attn", "attn.attn_drop", "attn.softmax")
        by, layers = "window_attention", ("attn.qkv", "attn.proj")
        int8 = {"layers": layers, "reads_weights": cosine}
        yield Replacement(block, _swin, by, "_attn", needs=needs, may=may, parts=parts, **int8)
        if not cosine:  # V2 normalises after its branches
            by = "fused residual branches, where weights are packed"
            yield Replacement(block, _swin_block, by, needs=needs, may=may, optional=True)


def _swin_block(block: Any, x: Tensor) -> Tensor:
    """Of a block of the first version."""
    attn, own = block.attn, vars(block).get("_attn")
    first = fusion_args(x, block.norm1, None, block.drop_path1) if prepacked_layers(attn.qkv, attn.proj) else None
    second = None if first is None else fusion_args(x, block.norm2, None, block.drop_path2)
    whole = (
        type(own) is Forward and own.function is _swin and own.holds() and _drop(attn) is not None and _fits(block, x)
    )
    if (
        first is None
        or second is None
        or not whole
        or not (fusible(attn.qkv, attn.proj) and idle(attn.proj_drop) and _whole_mlp(block.mlp))
    ):
        return type(block).forward(block, x)  # type: ignore[no-any-return]
    x = _swin(block, x, residual=x, **first)
    return _mlp(block.mlp, x, residual=x, **second)


def _drop(attn: Any) -> float | None:
    return fused_rate(attn) if getattr(attn, "fused_attn", False) else rate(attn.attn_drop)


def _fits(block: Any, x: Tensor) -> bool:
    """Whether :func:`pyvit.ops.window_attention` computes what the block does on such a map."""
    attn, size = block.attn, tuple(x.shape[1:3])
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    # timm rolls before it pads, and its stored mask is that of one size.
    stored = getattr(block, "dynamic_mask", False) or size == tuple(block.input_resolution)
    same = not any(shift) or (_divides(size, window) and stored)
    return same and windows_match(size, window, shift) and multiplied(attn.qkv)


def _divides(size: tuple[int, ...], window: tuple[int, ...]) -> bool:
    return all(n % w == 0 for n, w in zip(size, window, strict=True))


def _swin(
    block: Any, x: Tensor, *, norm: Norm | None = None, scale: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Of a block of either version: roll, partition, attention and the reverse, x (B, H, W, C) -> (B, H, W, C); or the
    whole branch."""
    attn, window = block.attn, tuple(block.window_size)
    drop = _drop(attn)
    cosine = hasattr(attn, "logit_scale")
    if drop is None or not _fits(block, x):
        if cosine:
            refuse_int8(block, attn.qkv)
        return type(block)._attn(block, x)
    direct = not cosine and drop == 0.0 and (attn.fused_attn or _usual_scale(attn))
    if direct and fusible(attn.qkv, attn.proj) and idle(attn.proj_drop):
        windows = (window, tuple(block.shift_size), attn.num_heads, attn.relative_position_bias_table, False)
        branch = quantized_window_attention if quantized(attn.qkv, attn.proj) else window_attention_branch
        fused = branch(x, attn.qkv, attn.proj, *windows, norm, scale, residual)
        if fused is not None:
            return fused
    bias = attn.qkv.bias
    if cosine and attn.q_bias is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    qkv = biased(attn.qkv, x, bias, norm)
    pad = None
    if not _divides(tuple(x.shape[1:3]), window):
        pad = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias
    out = window_attention(
        qkv,
        window,
        tuple(block.shift_size),
        num_heads=attn.num_heads,
        bias_table=cosine_table(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads)
        if cosine
        else attn.relative_position_bias_table,
        logit_scale=attn.logit_scale.flatten() if cosine else None,
        pad_qkv=pad,
        scale=None if cosine or attn.fused_attn else attn.scale,
        dropout_p=drop,
    )
    return attn.proj_drop(project(attn.proj, out, scale=scale, residual=residual))


def _usual_scale(attn: Any) -> bool:
    """Whether the scores are divided by the root of the heads' width."""
    width = attn.qkv.out_features // (3 * attn.num_heads)
    return math.isclose(attn.scale, width**-0.5, rel_tol=1e-6)


def merging(module: Any) -> Iterator[Replacement]:
    yield Replacement(module, _merging, "linear", needs="norm reduction", may="dim out_dim")


def _merging(module: Any, x: Tensor) -> Tensor:
    """2 x 2 neighbours to one token, normalised and reduced: (B, H, W, C) -> (B, H/2, W/2, 2C)."""
    b, h, w, c = x.shape
    if h % 2 or w % 2:
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    x = (
        x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
    )  # row offset runs fastest
    around = fusion_args(x, module.norm, None, None)
    if around is None or not fusible(module.reduction):
        return project(module.reduction, module.norm(x))
    return project(module.reduction, x, norm=around["norm"])


def unlike(reason: str) -> Rule:
    """A class that is left, mostly because its attention is not softmax(q k) v over tokens."""

    def rule(module: nn.Module) -> Iterator[Left]:
        yield Left(module, reason)

    return rule


_LINEAR = "linear attention: no softmax of the products of queries and keys"
_CHANNELS = "attends over channels, not tokens"
_TALKING = "talking heads: a linear layer between the scores of its heads"
_SMALL = "small heads, which were not faster on pyvit's kernels in coarse measurements"
_UNMEASURED = "small heads, which have not been tried on pyvit's kernels"
_WRITTEN_OUT = "writes attention out; pyvit's kernels were not faster in its place in coarse measurements at batch 1"
_UNLIKE = {
    "layers.lambda_layer.LambdaLayer": _LINEAR,
    "models.cait.TalkingHeadAttn": _TALKING,
    "models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "models.convit.GPSA": "a gated sum of two attentions",
    "models.davit.ChannelAttention": _CHANNELS,
    "models.davit.ChannelAttentionV2": _CHANNELS,
    "models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "models.efficientformer_v2.Attention2d": _TALKING,
    "models.efficientvim.HSMSSD": "a state space model: no products of queries and keys",
    "models.mobilevit.LinearSelfAttention": _LINEAR,
    "models.efficientformer.Attention": _UNMEASURED,
    "models.efficientformer_v2.Attention2dDownsample": _UNMEASURED,
    "models.efficientvit_msra.CascadedGroupAttention": _SMALL,
    "models.levit.Attention": _SMALL,
    "models.levit.AttentionDownsample": _SMALL,
    "models.shvit.SHSA": _SMALL,
    "models.swiftformer.EfficientAdditiveAttention": _LINEAR,
    "models.tnt.Attention": _SMALL,
    "models.volo.OutlookAttention": "its weights are no products of queries and keys",
    "models.xcit.XCA": _CHANNELS,
    **dict.fromkeys(
        (
            "layers.bottleneck_attn.BottleneckAttn",
            "layers.halo_attn.HaloAttn",
            "models.convit.MHSA",
            "models.gcvit.WindowAttentionGlobal",
            "models.mvitv2.MultiScaleAttention",
            "models.swin_transformer_v2_cr.WindowMultiHeadAttention",
            "models.volo.ClassAttention",
        ),
        _WRITTEN_OUT,
    ),
}

RULES: dict[str, Rule] = {
    "timm.layers.attention.Attention": attention,
    "timm.models.vision_transformer.Attention": attention,
    "timm.models.vision_transformer.Block": block,
    "timm.layers.attention.AttentionRope": rotary,
    "timm.models.eva.EvaAttention": rotary,
    "timm.models.eva.EvaBlock": eva_block,
    "timm.models.crossvit.CrossAttention": cross,
    "timm.models.vision_transformer_sam.Attention": sam,
    "timm.layers.mlp.GluMlp": gated,
    "timm.layers.mlp.Mlp": mlp,
    "timm.layers.mlp.SwiGLU": gated,
    "timm.layers.norm.LayerNorm": layer_norm,
    "timm.layers.norm.RmsNorm": rms_norm,
    "timm.layers.drop.DropPath": known,
    "timm.layers.layer_scale.LayerScale": known,
    "timm.models.vision_transformer.LayerScale": known,
    "timm.layers.patch_embed.PatchEmbed": patch_conv("proj"),
    "timm.layers.patch_embed.PatchEmbedWithSize": patch_conv("proj"),
    "timm.models.swin_transformer.SwinTransformerBlock": swin,
    "timm.models.swin_transformer.WindowAttention": known,
    "timm.models.swin_transformer.PatchMerging": merging,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": swin,
    "timm.models.swin_transformer_v2.WindowAttention": known,
    **{f"timm.{name}": unlike(reason) for name, reason in _UNLIKE.items()},
}
