"""Every operator as naive PyTorch: the definition of right.

Run in float64 these functions are what the tests and the benchmark's gate compare with; run in the caller's dtype they
are the ``reference`` backend, the fallback without compiled kernels, and the formula that double backward
differentiates. Arguments are those of the schemas in :mod:`pyvit.schemas`, less ``backend``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First word of Philox-4x32-10 (Salmon et al., 2011) at counter (c0, c1, c2, 0): int64 values in [0, 2**32).

    ``seed`` (1,) int64 is the 64-bit key. The same numbers as ``triton.language.philox``; every backend draws dropout
    from them.
    """
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # Products wrap modulo 2**64 in int64; masking after the (arithmetic) shift recovers the unsigned high word.
        p0, p1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32, ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return c0


def dropout_keep(seed: Tensor, p: float, heads: int, rows: int, cols: int) -> Tensor:
    """Which probabilities dropout keeps: bool (heads, rows, cols); ``heads`` counts batch x heads (or windows x heads)
    in order.

    Element (h, i, j) is kept when philox(seed, j, i, h) >= p * 2**32. A function of position alone, so the backward
    draws it again.
    """
    at = [torch.arange(n, device=seed.device) for n in (heads, rows, cols)]
    draws = philox(seed, at[2], at[1][:, None], at[0][:, None, None])
    return draws >= int(p * 2**32)


def _softmax_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp in float32 or wider. A row of -inf gives zeros and -inf, and
    finite gradients."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    top = wide.detach().amax(-1, keepdim=True) if wide.shape[-1] else wide.new_zeros(*wide.shape[:-1], 1)
    top = top.masked_fill(top == -math.inf, 0.0)
    e = torch.exp(wide - top)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, -math.inf).squeeze(-1)
    return (e / total).to(scores.dtype), lse


def _drop(p: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Dropout on probabilities (..., rows, cols), leading dimensions flattened in order."""
    if not dropout_p:
        return p
    assert seed is not None
    rows, cols = p.shape[-2:]
    keep = dropout_keep(seed, dropout_p, p.numel() // max(rows * cols, 1), rows, cols).view(p.shape)
    return p * keep / (1.0 - dropout_p)


def _causal(rows: int, cols: int, device: torch.device) -> Tensor:
    """Top-left aligned causal mask, True = attend, as in F.scaled_dot_product_attention."""
    return torch.ones(rows, cols, dtype=torch.bool, device=device).tril()


def _biased(scores: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """Scores with bias and mask, in the wider of both dtypes: a finite float32 bias may be infinite in float16 or
    bfloat16."""
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    if is_causal:
        scores = scores.masked_fill(~_causal(scores.shape[-2], scores.shape[-1], scores.device), -math.inf)
    return scores


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // max(k.shape[1], 1)
    if groups != 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    p, lse = _softmax_lse(_biased(q * scale @ k.transpose(-2, -1), bias, is_causal))
    out = _drop(p.to(v.dtype), dropout_p, seed) @ v
    return out, lse


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    cq, ck = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for s in range(len(cq) - 1):
        qs, ks, vs = (
            t[lo:hi].transpose(0, 1)[None]
            for t, lo, hi in ((q, *cq[s : s + 2]), (k, *ck[s : s + 2]), (v, *ck[s : s + 2]))
        )
        sliced = None
        if bias is not None:  # (S or 1, H or 1, max_q or 1, max_k or 1): each sequence uses its top-left corner
            sliced = bias[s : s + 1] if bias.shape[0] > 1 else bias
            sliced = sliced[:, :, : qs.shape[2] if bias.shape[2] > 1 else 1, : ks.shape[2] if bias.shape[3] > 1 else 1]
        out, lse = flash_attention(qs, ks, vs, sliced, is_causal, scale, 0.0, None)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    if not outs:
        return q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    return torch.cat(outs), torch.cat(lses, 1)


def normalize_and_rotate(
    x: Tensor,
    rope: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    qk_norm: str,
    eps: float,
    num_prefix_tokens: int,
    interleaved: bool,
) -> Tensor:
    """Queries or keys x (B, H, N, D) or (T, H, D) as :func:`pyvit.ops.rope_attention` multiplies them; rope has five
    dimensions."""
    if qk_norm != "none":
        wide = x if weight is None else x.to(weight.dtype)
        if qk_norm == "layer":
            wide = F.layer_norm(wide, wide.shape[-1:], weight, None if bias is None else bias.to(wide.dtype), eps)
        else:
            wide = F.rms_norm(wide, wide.shape[-1:], weight, eps)
        x = wide.to(x.dtype)
    if rope is None:
        return x
    sin, cos = rope.to(x.dtype).unbind(-2)  # (B or 1, H or 1, N - prefix, R)
    if x.dim() == 3:
        sin, cos = sin[0].transpose(0, 1), cos[0].transpose(0, 1)  # (T, H or 1, R)
    front, tokens = x[..., :num_prefix_tokens, :], x[..., num_prefix_tokens:, :] if num_prefix_tokens else x
    out = rotate_pairs(tokens, sin, cos, interleaved)
    return torch.cat((front, out), -2) if num_prefix_tokens else out


def rotate_pairs(x: Tensor, sin: Tensor, cos: Tensor, interleaved: bool) -> Tensor:
    """The first R channels of x (..., D), pairs (2i, 2i + 1) or (i, i + R/2), rotated by sines and cosines (..., R)."""
    channels = sin.shape[-1]
    rotated = x[..., :channels]
    if interleaved:
        a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        quarter = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        quarter = torch.cat((-b, a), -1)
    out = rotated * cos + quarter * sin
    return out if channels == x.shape[-1] else torch.cat((out, x[..., channels:]), -1)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    bias: Tensor | None,
    qk_norm: str,
    eps: float,
    num_prefix_tokens: int,
    interleaved: bool,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q = normalize_and_rotate(q, rope, q_weight, q_bias, qk_norm, eps, num_prefix_tokens, interleaved)
    k = normalize_and_rotate(k, rope, k_weight, k_bias, qk_norm, eps, num_prefix_tokens, interleaved)
    if cu_seqlens is None:
        return flash_attention(q, k, v, bias, is_causal, scale, 0.0, None)
    return flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, bias, is_causal, scale)


def decomposed_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    return flash_attention(q, k, v, bias, False, scale, 0.0, None)


def attention_map(q: Tensor, k: Tensor, rows: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // max(k.shape[1], 1)
    if groups != 1:
        k = k.repeat_interleave(groups, 1)
    at = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    if bias is not None and bias.shape[2] > 1:
        where = rows[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3])
        bias = bias.expand(rows.shape[0], -1, -1, -1).gather(2, where)
    return _softmax_lse(_biased(q.gather(2, at) * scale @ k.transpose(-2, -1), bias, False))[0].to(q.dtype)


def window_padding(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> tuple[int, int, int, int]:
    """Padded height and width, and the shift in force: an axis whose padded map is a single window is not shifted."""
    hp, wp = (-(-n // w) * w for n, w in zip(size, window, strict=True))
    return hp, wp, shift[0] if hp > window[0] else 0, shift[1] if wp > window[1] else 0


def window_partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, Hp, Wp, C) -> (B, windows, window area, C), windows and tokens in row-major order."""
    b, h, w, c = x.shape
    wh, ww = window
    return x.view(b, h // wh, wh, w // ww, ww, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // wh * (w // ww), wh * ww, c)


def window_reverse(x: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`window_partition`: (B, windows, area, C) -> (B, Hp, Wp, C)."""
    b, _, _, c = x.shape
    (wh, ww), (h, w) = window, size
    return x.view(b, h // wh, w // ww, wh, ww, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


def relative_position_index(window: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each (query, key) of a window: (dy + wh - 1) * (2 ww - 1) + (dx + ww - 1), query minus
    key."""
    wh, ww = window
    y, x = torch.meshgrid(torch.arange(wh, device=device), torch.arange(ww, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + wh - 1) * (2 * ww - 1) + dx + ww - 1


def window_mask(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    mask_padding: bool,
    device: torch.device | None = None,
) -> Tensor:
    """Who may attend in each window: bool (windows, area, area), True = attend.

    Tokens attend within their region of the padded map (the cyclic shift brings up to four regions into one window);
    with ``mask_padding`` nothing attends to a padding token.
    """
    hp, wp, sy, sx = window_padding(size, window, shift)
    y, x = torch.arange(hp, device=device), torch.arange(wp, device=device)
    # After the roll, position i holds token (i + s) mod n. The last window of an axis mixes the tokens before the seam
    # with those after it.
    region = (y >= hp - sy).long()[:, None] * 2 + (x >= wp - sx).long()[None, :]
    ids = window_partition(region[None, :, :, None], window)[0, :, :, 0]
    allowed = ids[:, :, None] == ids[:, None, :]
    if mask_padding:
        real = ((y + sy) % hp < size[0])[:, None] & ((x + sx) % wp < size[1])[None, :]
        allowed = allowed & window_partition(real[None, :, :, None], window)[0, :, :, 0][:, None, :]
    return allowed


def _unit(x: Tensor) -> Tensor:
    """Vectors over their length; zero stays zero, also in float16, where the smallest divisor allowed would vanish."""
    return F.normalize(x.float() if x.dtype == torch.float16 else x, dim=-1).to(x.dtype)


def window_attention(
    qkv: Tensor,
    window_size: list[int],
    shift_size: list[int],
    num_heads: int,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, h, w, c3 = qkv.shape
    window, size = (window_size[0], window_size[1]), (h, w)
    hp, wp, sy, sx = window_padding(size, window, (shift_size[0], shift_size[1]))
    n = window[0] * window[1]
    if (hp, wp) != size:
        if pad_qkv is None:
            qkv = F.pad(qkv, (0, 0, 0, wp - w, 0, hp - h))
        else:  # rows below and columns to the right hold the pad value
            fill = pad_qkv.to(qkv.dtype)
            qkv = torch.cat([qkv, fill.expand(b, h, wp - w, c3)], 2)
            qkv = torch.cat([qkv, fill.expand(b, hp - h, wp, c3)], 1)
    x = window_partition(qkv.roll((-sy, -sx), (1, 2)), window)
    q, k, v = (
        x.view(b, x.shape[1], n, 3, num_heads, c3 // 3 // num_heads).permute(3, 0, 1, 4, 2, 5).unbind(0)
    )  # (B, windows, heads, n, d)
    if logit_scale is not None:  # Swin V2: cosine similarity, learned temperature
        q, k = _unit(q), _unit(k)
        scores = q @ k.transpose(-2, -1) * logit_scale.clamp(max=math.log(100.0)).exp().to(q.dtype)[:, None, None]
    else:
        scores = q * scale @ k.transpose(-2, -1)
    if bias_table is not None:
        bias = bias_table[relative_position_index(window, qkv.device)]  # (n, n, heads)
        scores = scores + bias.permute(2, 0, 1)
    allowed = window_mask(size, window, (shift_size[0], shift_size[1]), pad_qkv is None, qkv.device)
    scores = scores.masked_fill(~allowed[:, None], -math.inf)
    p, lse = _softmax_lse(scores)
    out = (_drop(p.to(v.dtype), dropout_p, seed) @ v).transpose(2, 3).reshape(b, x.shape[1], n, c3 // 3)
    out = window_reverse(out, window, (hp, wp)).roll((sy, sx), (1, 2))[:, :h, :w]
    return out.contiguous(), lse


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    x = images.to(weight.dtype)
    if images.dtype == torch.uint8:
        x = x / 255.0
    if mean is not None and std is not None:
        x = (x - mean.to(x.dtype)[:, None, None]) / std.to(x.dtype)[:, None, None]
    tokens = (
        F.conv2d(x, weight, None if bias is None else bias.to(weight.dtype), tuple(stride)).flatten(2).transpose(1, 2)
    )  # (B, N, D)
    if pos_embed is not None:
        tokens = tokens + pos_embed.to(tokens.dtype)
    if keep is not None:
        tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
    if prefix is not None:
        tokens = torch.cat([prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], 1)
    return tokens


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, activation: str
) -> Tensor:
    return F.linear(ACTIVATIONS[activation](F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def norm(x: Tensor, kind: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x where ``kind`` is 0, its layer norm where it is 1, its RMS norm where it is 2."""
    if not kind:
        return x
    return layer_norm(x, weight, bias, eps, x.dtype) if kind == 1 else rms_norm(x, weight, eps, x.dtype)


def gated_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    hidden_norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gate_last: bool,
    activation: str,
) -> Tensor:
    value = F.linear(x, fc1_weight, fc1_bias)
    if gate_weight is not None:
        gate = F.linear(x, gate_weight, gate_bias)
    else:
        first, second = value.chunk(2, -1)
        gate, value = (second, first) if gate_last else (first, second)
    hidden = norm(ACTIVATIONS[activation](gate) * value, hidden_norm, norm_weight, norm_bias, eps)
    return F.linear(hidden, fc2_weight, fc2_bias)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x if weight is None else x.to(weight.dtype)
    return F.rms_norm(wide, x.shape[-1:], weight, eps).to(dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)
