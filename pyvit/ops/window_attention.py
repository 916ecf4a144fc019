"""Shifted-window attention on the whole feature map: contract, fake kernels and gradient.

Cyclic shift, partition, relative-position bias, shift mask, softmax and the reverse are index arithmetic inside the
kernels; no window tensor and no mask tensor exists in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, reference


def window_attention(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = (0, 0),
    *,
    num_heads: int,
    bias_table: Tensor | None = None,
    logit_scale: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention within (shifted) windows of a feature map: everything of a Swin block between its qkv and output
    projections.

    Args:
        qkv: (B, H, W, 3C), the qkv projection of the unpadded map, channels ordered (3, heads, d). Any H and W, also
            below the window's.
        window_size: (wh, ww) tokens.
        shift_size: (sy, sx) with 0 <= s < window: the map is rolled by -shift before it is cut into windows, and tokens
            attend only within their region. An axis whose padded map is a single window is not shifted.
        num_heads: heads; C = heads * d.
        bias_table: relative-position bias ((2 wh - 1) (2 ww - 1), heads), row (dy + wh - 1) (2 ww - 1) + dx + ww - 1
            for query minus key. -inf keeps a query from a key, a finite number does not; a query without keys gives
            zeros.
        logit_scale: (heads,), the raw logarithm: Swin V2's cosine attention, normalised q and k times
            exp(min(logit_scale, ln 100)).
        pad_qkv: (3C,), what the padding tokens of a map that does not divide by the window hold (the qkv bias gives
            torchvision's and transformers' result). None masks them out. Padding comes before the shift, on the bottom
            and right.
        scale: factor on the scores, default 1/sqrt(d); not with ``logit_scale``.
        dropout_p: probability of dropping an attention weight.
        backend: force one backend.

    Returns:
        (B, H, W, C), before the output projection. bias_table, logit_scale and pad_qkv have gradients; none uses
        atomics.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. BackendError: ``backend`` cannot serve
            the call.

    Sources: Liu et al., "Swin Transformer" (2021), section 3.2, and "Swin Transformer V2" (2022), section 3.
    """
    qkv = _prepare(qkv)
    dropout_p = checks.dropout("window_attention", dropout_p)
    call, window, shift, scale = _check(
        qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv, scale, dropout_p
    )
    chosen = dispatch.select(call, backend)
    seed = checks.dropout_seed(dropout_p, qkv)
    return WINDOW(qkv, window, shift, num_heads, bias_table, logit_scale, pad_qkv, scale, dropout_p, seed, chosen)[0]


def _prepare(qkv: Tensor) -> Tensor:
    """qkv in autocast's dtype."""
    device = checks.device("window_attention", "qkv", qkv)
    (qkv,) = dispatch.autocast(device, qkv)
    return qkv


def _check(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int],
    num_heads: int,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> tuple[Call, tuple[int, int], tuple[int, int], float]:
    op = "window_attention"
    checks.tensor(op, "qkv", qkv, "(B, H, W, 3C)", 4)
    checks.floating(op, "qkv", qkv)
    window, shift = checks.pair(op, "window_size", window_size, 1), checks.pair(op, "shift_size", shift_size, 0)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        checks.fail(op, "shift_size", f"smaller than window_size {window}", shift)
    b, h, w, c3 = qkv.shape
    if h == 0 or w == 0:
        checks.fail(op, "qkv", "a map of at least one token", checks.shape(qkv))
    if checks.whole(op, "num_heads", num_heads) < 1 or c3 == 0 or c3 % (3 * num_heads):
        checks.fail(op, "num_heads", f"a divisor of C = {c3 / 3:g} (qkv has {c3} = 3C channels)", num_heads)
    d = c3 // 3 // num_heads
    if logit_scale is not None and scale is not None:
        checks.fail(op, "scale", "None together with logit_scale, which is the scale of cosine attention", scale)
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    for name, t, wanted in (
        ("bias_table", bias_table, (rows, num_heads)),
        ("logit_scale", logit_scale, (num_heads,)),
        ("pad_qkv", pad_qkv, (c3,)),
    ):
        if t is None:
            continue
        checks.dense(op, name, t)
        if tuple(t.shape) != wanted:
            checks.fail(op, name, f"of shape {wanted}", checks.shape(t))
        if t.dtype not in (torch.float32, qkv.dtype):
            raise TypeError(f"{op}: {name} must be float32 or of the dtype of qkv, {qkv.dtype}, got {t.dtype}")
        checks.same(op, name, t, "qkv", qkv, dtype=False)
    tensors = (qkv, bias_table, logit_scale, pad_qkv)
    features = [
        name
        for name, t in (("bias_table", bias_table), ("logit_scale", logit_scale), ("pad_qkv", pad_qkv))
        if t is not None
    ]
    if shift != (0, 0):
        features.append("shift")
    if h % window[0] or w % window[1]:
        features.append("padding")
    if dropout_p:
        features.append("dropout")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        features.append("grad")
    device = qkv.device.type
    call = Call(op, device, qkv.dtype, tuple(features), (d,), dispatch.sizes(device, b, h, w, *window, num_heads, d))
    return call, window, shift, checks.scale(op, scale, d)


@dispatch.describes(window_attention)
def _describe(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int],
    num_heads: int,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    scale: float | None,
    dropout_p: Any,
    backend: str | None,
) -> tuple[Call, list[str]]:
    qkv = _prepare(qkv)
    dropout_p = checks.dropout("window_attention", dropout_p)
    call, *_ = _check(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv, scale, dropout_p)
    return call, dispatch.copy_notes(qkv=qkv)


def _check_low(
    qkv: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    num_heads: int,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    _scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Call:
    op = "window_attention"
    dropout_p = checks.dropout(op, dropout_p)
    call, *_ = _check(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv, None, dropout_p)
    checks.seed(op, seed, dropout_p, qkv)
    return call


def _check_low_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    num_heads: int,
    *rest: Any,
) -> Call:
    call = _check_low(qkv, window_size, shift_size, num_heads, *rest)
    op = "window_attention_backward"
    (b, h, w, c3), (wh, ww) = qkv.shape, window_size
    for name, t in (("grad_out", grad_out), ("out", out)):
        checks.exactly(op, name, t, (b, h, w, c3 // 3), qkv.dtype, qkv)
    checks.exactly(op, "lse", lse, (b, -(-h // wh) * -(-w // ww), num_heads, wh * ww), checks.wide(qkv.dtype), qkv)
    return call


def _fake(
    qkv: Tensor, window_size: Sequence[int], shift_size: Sequence[int], num_heads: int, *_: Any
) -> tuple[Tensor, Tensor]:
    b, h, w, c3 = qkv.shape
    wh, ww = window_size
    windows = ((h + wh - 1) // wh) * ((w + ww - 1) // ww)
    return qkv.new_empty(b, h, w, c3 // 3), qkv.new_empty(b, windows, num_heads, wh * ww, dtype=checks.wide(qkv.dtype))


_TRITON = "pyvit.triton_kernels.window_attention:"

WINDOW_BACKWARD = Gradient(
    "window_attention",
    formula=reference.window_attention,
    check=_check_low_backward,
    kernels={"triton": _TRITON + "window_attention_backward"},
)
WINDOW = Operator(
    "window_attention",
    reference=reference.window_attention,
    fake=_fake,
    check=_check_low,
    gradient=WINDOW_BACKWARD,
    autocast=("qkv",),
    kernels={"triton": _TRITON + "window_attention"},
)
