"""Linear layers with int8 weights, for inference.

**Weights.** A row w of a weight (an output channel) is stored as w / s, rounded to the nearest integer in -127 .. 127,
with its scale s = max|w| / 127.

**Rows of the input** are brought to 8 bits in each call: the range [l, h] of a row, widened to contain 0, is divided
into 255 steps of s_x = (h - l) / 255; with the zero point z = round(-l / s_x) an element is q = round(x / s_x + z),
255 at most. Rounding is to the nearest, ties to even, and 1 / s_x is computed as 255 / (h - l).

**The product** is exact in int32, and then y = float(sum of (q - z) w) * s_w * s_x + bias in float32, in this order.
Then follow the activation (in float32; of "gelu" the absolute error is below 1.6e-4, of the others the relative error
below 1e-5), scale and residual.

The result has the same bits on every instruction set and with any number of threads, layer norm and activation
included. A row with an element that is not finite, or whose range is not, gives a row of NaN. A row whose range is
below 2^-118 counts as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit import library
from pyvit.ops import checks, prepacked, reference
from pyvit.ops.prepacked import Norm

#: What the kernels take, beside the int8 weights.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Products of 255 and 127 whose sum is below 2^31.
MAX_COLUMNS = 65536
LARGEST = 127


class Int8Layer(NamedTuple):
    """weight (M, K) int8, scale (M,) float32, bias (M,) or None, and the packed weight: see :func:`pack`."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    packed: Tensor | None


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (M, K) to int8 (M, K) and scales (M,) float32: weight is about int8 * scale.

    Raises ValueError where a weight is not finite or has more than 65536 columns.
    """
    checks.tensor("quantize_weight", "weight", weight, "(M, K)", 2)
    if weight.shape[1] > MAX_COLUMNS:
        checks.fail("quantize_weight", "weight", f"of at most {MAX_COLUMNS} columns", checks.shape(weight))
    wide = weight.detach().float()
    largest = wide.abs().amax(1) if wide.numel() else wide.new_zeros(wide.shape[0])
    if not weight.is_meta and not bool(largest.isfinite().all()):
        checks.fail("quantize_weight", "weight", "finite", "values that are not")
    # In float64, so that the scale of a row of subnormal numbers is one too, and no quotient is past 127.
    scale = (largest.double() / LARGEST).float()
    steps = wide.double() / torch.where(scale > 0, scale, torch.ones_like(scale)).double()[:, None]
    return steps.round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The integers q - z of the rows of x (..., K), in x's dtype, and the rows' scales (..., 1), as defined above."""
    low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
    span = high - low
    some = span >= 2.0**-118
    inverse = torch.full_like(span, 255.0) / span  # a number over a tensor is computed as a product
    inverse = torch.where(some & span.isfinite(), inverse, torch.zeros_like(span))
    zero = (-low * inverse).round().double()
    # In float64, where the sum is exact.
    steps = (((x * inverse).double() + zero).round().clamp(max=255) - zero).to(x.dtype)
    scale = torch.where(some, span / 255.0, torch.zeros_like(span))
    return steps, torch.where(span.isfinite(), scale, torch.full_like(scale, float("nan")))


def pack(weight: Tensor) -> Tensor | None:
    """The weight in the order in which the kernels here multiply it, or None where there are none for it.

    The kernels compare it with the weight in each call, and pack it anew where the weight has changed (or where another
    machine packed it).
    """
    plain = type(weight) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if library.problem() is not None or not plain or not weight.is_cpu or weight.numel() < 8:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.pyvit.int8_pack.default(weight.contiguous())  # type: ignore[no-any-return]


def linear_int8(
    x: Tensor,
    layer: Int8Layer,
    *,
    activation: str | None = None,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * activation(norm(x) W^T + bias) with the int8 weight of ``layer``.

    Args:
        x: (..., K); norm, scale, residual, activation: as of :func:`pyvit.ops.linear`.

    Returns (..., M) of the dtype of x. Raises ValueError naming the argument that does not fit. Nothing is recorded by
    autograd.
    """
    return _call("linear_int8", x, (layer,), activation, norm, scale, residual)


def mlp_int8(
    x: Tensor,
    fc1: Int8Layer,
    fc2: Int8Layer,
    *,
    activation: str = "gelu",
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * fc2(activation(fc1(norm(x)))): a feed-forward layer with int8 weights, a block of rows at a
    time in cache. The hidden rows are brought to 8 bits as those of x are. Arguments as of :func:`linear_int8`."""
    return _call("mlp_int8", x, (fc1, fc2), activation, norm, scale, residual)


def _call(
    op: str,
    x: Tensor,
    layers: Sequence[Int8Layer],
    activation: str | None,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    dtype = x.dtype
    for layer in layers:
        if layer.packed is None or not x.is_cpu or dtype not in DTYPES:
            return _slow(op, x, layers, activation, norm, scale, residual)
        if layer.bias is not None and layer.bias.dtype is not dtype:
            return _slow(op, x, layers, activation, norm, scale, residual)
    for t in (scale, residual):
        if t is not None and t.dtype is not dtype:
            return _slow(op, x, layers, activation, norm, scale, residual)
    try:
        return _kernel(x, layers, activation, norm, scale, residual)
    except RuntimeError:
        _check(op, x, layers, activation, scale, residual)
        raise


def _kernel(
    x: Tensor,
    layers: Sequence[Int8Layer],
    activation: str | None,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    weight, weight_scale, bias, packed = layers[0]
    first = (x, *_norm(norm, x), weight, packed, weight_scale, bias, activation or "")
    if len(layers) == 1:
        return torch.ops.pyvit.linear_int8.default(*first, scale, residual)  # type: ignore[no-any-return]
    weight, weight_scale, bias, packed = layers[1]
    return torch.ops.pyvit.mlp_int8.default(*first, weight, packed, weight_scale, bias, scale, residual)  # type: ignore[no-any-return]


def _slow(
    op: str,
    x: Tensor,
    layers: Sequence[Int8Layer],
    activation: str | None,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """By the formula where there are no kernels; tensors of other dtypes are cast to that of x first, but the residual,
    which is added in the common one."""
    _check(op, x, layers, activation, scale, residual)
    fused = residual if residual is None or residual.dtype is x.dtype else None
    if any(layer.packed is None for layer in layers) or x.dtype not in DTYPES or not x.is_cpu:
        out = formula(x, layers, activation, norm, scale, fused)
    else:
        cast = [layer._replace(bias=_as(layer.bias, x)) for layer in layers]
        out = _kernel(x, cast, activation, norm, _as(scale, x), fused)
    return out if residual is fused else residual + out  # type: ignore[operator]


def _norm(norm: Norm | None, x: Tensor) -> tuple[bool, Tensor | None, Tensor | None, float]:
    if norm is None:
        return False, None, None, 0.0
    if len(norm) != 3:
        raise ValueError("linear_int8: norm must be (weight, bias, eps) of a layer norm or None")
    weight, bias, eps = norm
    for t in (weight, bias):
        if t is not None and t.dtype is not x.dtype and t.dtype is not torch.float32:
            return True, _as(weight, x), _as(bias, x), eps
    return True, weight, bias, eps


def _as(t: Tensor | None, x: Tensor) -> Tensor | None:
    return t if t is None or t.dtype is x.dtype else t.to(x.dtype)


def _check(
    op: str,
    x: Tensor,
    layers: Sequence[Int8Layer],
    activation: str | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> None:
    if activation is not None and activation not in reference.ACTIVATIONS:
        checks.fail(op, "activation", f"None or one of {', '.join(reference.ACTIVATIONS)}", repr(activation))
    width = layers[0].weight.shape[1]
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != width:
        checks.fail(op, "x", f"floating-point of shape (..., {width})", f"{x.dtype} {checks.shape(x)}")
    if x.device != layers[0].weight.device:
        checks.fail(op, "x", f"on the device of the weight, {layers[0].weight.device}", str(x.device))
    out = layers[-1].weight.shape[0]
    for name, t, shape in (("scale", scale, (out,)), ("residual", residual, (*x.shape[:-1], out))):
        if t is not None and t.shape != shape:
            checks.fail(op, name, f"of shape {tuple(shape)}", checks.shape(t))


def formula(
    x: Tensor,
    layers: Sequence[Int8Layer],
    activation: str | None = None,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What the operators compute, in PyTorch's: the reference, and what serves where there are no kernels. In float64
    for float64, else in float32."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        _, *parameters, eps = _norm(norm, y)
        weight, bias = (t if t is None else t.to(y.dtype) for t in parameters)  # type: ignore[union-attr]
        y = F.layer_norm(y, y.shape[-1:], weight, bias, eps)
    for i, layer in enumerate(layers):
        steps, row_scale = quantize_rows(y)
        y = F.linear(steps, layer.weight.to(y.dtype)) * layer.scale.to(y.dtype) * row_scale
        y = y if layer.bias is None else y + layer.bias.to(y.dtype)
        if i == 0 and activation is not None:
            y = reference.ACTIVATIONS[activation](y)
    y = y if scale is None else y * scale.to(y.dtype)
    y = y if residual is None else residual.to(y.dtype) + y
    return y.to(x.dtype)


def attention_branch(
    x: Tensor,
    qkv: Int8Layer,
    proj: Int8Layer,
    num_heads: int,
    is_causal: bool,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor | None:
    """As :func:`pyvit.ops.prepacked.attention_branch`: both projections on int8 weights, attention in x's dtype."""
    if x.dim() != 3 or qkv.weight.shape[0] > 3 * 256 * num_heads:
        return None
    layers = _branch(x, qkv, proj, norm, scale, residual)
    if layers is None:
        return None
    return torch.ops.pyvit.attention_int8.default(  # type: ignore[no-any-return]
        x, *_norm(norm, x), *layers[0], num_heads, is_causal, *layers[1], scale, residual
    )


def window_attention_branch(
    x: Tensor,
    qkv: Int8Layer,
    proj: Int8Layer,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    num_heads: int,
    bias_table: Tensor,
    mask_padding: bool,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor | None:
    """As :func:`pyvit.ops.prepacked.window_attention_branch`: see :func:`attention_branch`."""
    if x.dim() != 4 or not x.shape[1] > 0 or not x.shape[2] > 0:
        return None
    layers = _branch(x, qkv, proj, norm, scale, residual)
    if layers is None:
        return None
    windows = (window_size, shift_size, num_heads, bias_table, mask_padding)
    return torch.ops.pyvit.window_attention_int8.default(  # type: ignore[no-any-return]
        x, *_norm(norm, x), *layers[0], *windows, *layers[1], scale, residual
    )


def _branch(
    x: Tensor, qkv: Int8Layer, proj: Int8Layer, norm: Norm | None, scale: Tensor | None, residual: Tensor | None
) -> list[tuple[Any, ...]] | None:
    """The layers as arguments; None where the call is not one of inference in one dtype on packed weights."""
    if qkv.packed is None or proj.packed is None or x.dtype not in DTYPES or x.shape[-1] != qkv.weight.shape[1]:
        return None
    if any(t is not None and t.dtype is not x.dtype for t in (qkv.bias, proj.bias, scale, residual)):
        return None
    parameters = (None, None) if norm is None else norm[:2]
    if not prepacked.inference(x, qkv.bias, proj.bias, *parameters, scale, residual):
        return None
    return [(each.weight, each.packed, each.scale, each.bias) for each in (qkv, proj)]


if library.problem() is None:

    @torch.library.register_fake("pyvit::int8_pack")
    def _fake_pack(weight: Tensor) -> Tensor:
        raise NotImplementedError("pyvit: int8 weights are packed outside of compiled graphs")

    @torch.library.register_fake("pyvit::linear_int8")
    def _fake_linear(x: Tensor, _n: Any, _w: Any, _b: Any, _e: Any, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake("pyvit::mlp_int8")
    def _fake_mlp(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[9].shape[0])

    @torch.library.register_fake("pyvit::attention_int8")
    def _fake_attention(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[10].shape[0])

    @torch.library.register_fake("pyvit::window_attention_int8")
    def _fake_window(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[13].shape[0])
