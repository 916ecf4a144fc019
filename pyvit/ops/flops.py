"""Floating-point operations of pyvit's operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Counted is what the plain formula multiplies, whose backward takes twice its forward: scores that a kernel computes
again are not work of the model. Layers that are no operators of the dispatcher (linear, mlp, layer norm) run as
PyTorch's own while a counter watches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvit import library, torch_private
from pyvit.dispatch.schema import schema_of

Shape = Sequence[int]


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    b, h, n, d = q
    return 2 * b * h * n * k[2] * (d + v[3])


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, *_: Any, **__: Any
) -> int:
    pairs = (cu_q.numel() - 1) * most_q * most_k  # where the lengths are not known
    if cu_q.device.type != "meta" and type(cu_q) is Tensor:
        pairs = int((cu_q.diff() * cu_k.diff()).sum())
    return 2 * q.shape[1] * pairs * (q.shape[2] + v.shape[2])


_varlen._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes


def _rope(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    cu, most = rest[5:7]
    if cu is None:
        return _attention(q.shape, k.shape, v.shape)
    return _varlen(q, k, v, cu, cu, most, most)


_rope._get_raw = True  # type: ignore[attr-defined]


def _map(q: Shape, k: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    return 2 * q[0] * q[1] * rows[1] * k[2] * q[3]


def _window(qkv: Shape, window_size: Shape, *_: Any, **__: Any) -> int:
    (b, h, w, c3), (wh, ww) = qkv, window_size
    return 4 * b * -(-h // wh) * -(-w // ww) * (wh * ww) ** 2 * (c3 // 3)


def _patches(
    _images: Shape,
    weight: Shape,
    _bias: Any,
    _stride: Any,
    _pos_embed: Any,
    prefix: Shape | None,
    *_: Any,
    out_shape: Shape,
    **__: Any,
) -> int:
    return 2 * out_shape[0] * (out_shape[1] - (0 if prefix is None else prefix[0])) * math.prod(weight)


def _patches_backward(grad: Shape, images_grad: bool, weight_grad: bool, *forward: Any, **_: Any) -> int:
    return (images_grad + weight_grad) * _patches(*forward, out_shape=grad)


def _pairs(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * a[0] * b[0] * a[1]


def _nt_xent(z1: Shape, *_: Any, **__: Any) -> int:
    return 2 * (2 * z1[0]) ** 2 * z1[1]


def _nearest(x: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] ** 2 * x[1]


def _scores(student: Shape, prototypes: Shape | None) -> int:
    return 0 if prototypes is None else 2 * math.prod(student) * prototypes[0]


def _distillation(
    student: Shape, teacher: Shape, prototypes: Shape | None, teachers: Shape | None, *_: Any, **__: Any
) -> int:
    return _scores(student, prototypes) + _scores(teacher, teachers) + _crossed(student, teacher, prototypes)


def _crossed(student: Shape, teacher: Shape, prototypes: Shape | None) -> int:
    return 2 * student[0] * teacher[0] * student[1] * (student[2] if prototypes is None else prototypes[0])


def _distillation_backward(
    _grad: Any,
    _lse_student: Any,
    _lse_teacher: Any,
    student: Shape,
    teacher: Shape,
    prototypes: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _scores(student, prototypes) + _crossed(student, teacher, prototypes)  # nothing of the teacher's


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _mlp(x: Shape, fc1_weight: Shape, _: Any, fc2_weight: Shape, *__: Any, **___: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(fc1_weight) + math.prod(fc2_weight))


def _gated_mlp(
    x: Shape, fc1_weight: Shape, _b: Any, gate_weight: Shape | None, _g: Any, fc2_weight: Shape, *_: Any, **__: Any
) -> int:
    weights = [w for w in (fc1_weight, gate_weight, fc2_weight) if w is not None]
    return 2 * math.prod(x[:-1]) * sum(map(math.prod, weights))


def _linear_int8(x: Shape, _n: Any, _w: Any, _b: Any, _e: Any, weight: Shape, *_: Any, **__: Any) -> int:
    return _linear(x, weight)


def _mlp_int8(x: Shape, _n: Any, _w: Any, _b: Any, _e: Any, weight: Shape, *rest: Any, **__: Any) -> int:
    return _mlp(x, weight, None, rest[4])


def _twice(name: str, forward: Callable[..., int]) -> Callable[..., int]:
    """Of ``<name>_backward``, whose last arguments are the forward's."""
    arguments = len(schema_of(name).arguments)

    def backward(*args: Any, **kwargs: Any) -> int:
        return 2 * forward(*args[-arguments:], **kwargs)

    backward._get_raw = getattr(forward, "_get_raw", False)  # type: ignore[attr-defined]
    return backward


_ops = torch.ops.pyvit
FORMULAS: dict[Any, Callable[..., int]] = {
    _ops.flash_attention: _attention,
    _ops.flash_attention_backward: _twice("flash_attention", _attention),
    _ops.flash_attention_varlen: _varlen,
    _ops.flash_attention_varlen_backward: _twice("flash_attention_varlen", _varlen),
    _ops.rope_attention: _rope,
    _ops.rope_attention_backward: _twice("rope_attention", _rope),
    _ops.decomposed_attention: _attention,
    _ops.decomposed_attention_backward: _twice("decomposed_attention", _attention),
    _ops.attention_map: _map,
    _ops.window_attention: _window,
    _ops.window_attention_backward: _twice("window_attention", _window),
    _ops.patch_embed: _patches,
    _ops.patch_embed_backward: _patches_backward,
    _ops.info_nce: _pairs,
    _ops.info_nce_backward: _twice("info_nce", _pairs),
    _ops.nt_xent: _nt_xent,
    _ops.nt_xent_backward: _twice("nt_xent", _nt_xent),
    _ops.sigmoid_contrastive: _pairs,
    _ops.sigmoid_contrastive_backward: _twice("sigmoid_contrastive", _pairs),
    _ops.distillation_cross_entropy: _distillation,
    _ops.distillation_cross_entropy_backward: _distillation_backward,
    _ops.nearest_neighbor: _nearest,
    _ops.linear: _linear,
    _ops.mlp: _mlp,
    _ops.gated_mlp: _gated_mlp,
}
if library.problem() is None:
    FORMULAS |= {_ops.linear_int8: _linear_int8, _ops.mlp_int8: _mlp_int8}


def register() -> None:
    """Tell torch's counters of these formulas: those that will be made, and those at work.

    Not when pyvit is imported, for their module imports Triton: when it has been, and an operator is called under a
    dispatch mode.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for packet, formula in FORMULAS.items():
        if packet not in module.flop_registry:
            module.register_flop_formula(packet, get_raw=getattr(formula, "_get_raw", False))(formula)
    for mode in torch_private.dispatch_mode_stack():
        if isinstance(counter := getattr(mode, "counter", None), module.FlopCounterMode):
            counter.flop_registry = {
                **{packet: module.flop_registry[packet] for packet in FORMULAS},
                **counter.flop_registry,
            }


register()
