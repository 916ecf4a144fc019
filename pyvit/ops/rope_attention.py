"""Attention whose queries and keys are normalised per head and rotated as they are loaded: contract, fake kernels and
gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, reference
from pyvit.ops.flash_attention import asked, check_results, flash_attention, prepare
from pyvit.ops.flash_attention_varlen import flash_attention_varlen

_OP = "rope_attention"
NORMS = ("layer", "rms")


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor | None = None,
    *,
    interleaved: bool = False,
    num_prefix_tokens: int = 0,
    qk_norm: str | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pyvit.ops.flash_attention` of rotate(norm(q)), rotate(norm(k)) and v, whose normalised and rotated copies
    never reach main memory on the backend ``cpu``.

    The backend ``torch``, which serves every device, computes the norm and the rotation by PyTorch's operators, and
    then :func:`pyvit.ops.flash_attention` or :func:`pyvit.ops.flash_attention_varlen`, which choose a backend of their
    own.

    Args:
        q: queries (B, H, N, D), any strides: those of a projection's output need no copy.
        k: keys (B, Hkv, N, D); without ``rope`` they may be of another number of tokens.
        v: values (B, Hkv, N, Dv).
        rope: sines and cosines of every channel that is rotated, as :class:`pyvit.nn.RotaryEmbedding` gives them: any
            broadcast of (B, H, N - num_prefix_tokens, 2, R), so (N, 2, R) or per head (H, N, 2, R). Float32 or the
            dtype of q, with a gradient. R is even and at most D: channels from R on are left as they are. Angles per
            head need Hkv = H. None: no rotation.
        interleaved: channels 2i and 2i + 1 form a pair; otherwise i and i + R/2 do.
        num_prefix_tokens: tokens at the front that are not rotated and have no row in ``rope``.
        qk_norm: "layer" or "rms": the norm over the D channels of each head that precedes the rotation.
        q_weight, k_weight: (D,), of the norm; float32 or the dtype of q; None for ones.
        q_bias, k_bias: (D,), of the layer norm; None for zeros.
        eps: of the norm; by default 1e-5 for "layer" and ``torch.finfo(q.dtype).eps`` for "rms", as PyTorch's.
        cu_seqlens: packed sequences, as in :func:`pyvit.ops.flash_attention_varlen`: (S + 1,) int32 or int64, ascending
            from 0 to T, for queries and keys. Then q is (T, H, D), k (T, Hkv, D), v (T, Hkv, Dv), and rope any
            broadcast of (H, T, 2, R); tokens that are not rotated have sines 0 and cosines 1.
        max_seqlen: with ``cu_seqlens``, at least the longest sequence.
        bias, is_causal, scale, enable_gqa, return_lse, backend: as in :func:`pyvit.ops.flash_attention`.

    Returns:
        out (B, H, N, Dv), stored as (B, N, H, Dv), or (T, H, Dv); with ``return_lse`` also lse (B, H, N) or (H, T)
        float32.

    Raises ValueError, TypeError, BackendError as :func:`pyvit.ops.flash_attention`.

    Sources: Su et al., "RoFormer" (2021); Heo et al., "Rotary Position Embedding for Vision Transformer" (2024);
    Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023).
    """
    call, args = _prepare(
        q, k, v, rope, interleaved, num_prefix_tokens, qk_norm, q_weight, q_bias, k_weight, k_bias, eps, cu_seqlens,
        max_seqlen, bias, is_causal, scale, enable_gqa, return_lse,
    )  # fmt: skip
    chosen = dispatch.select(call, backend)
    if chosen == "torch":
        return _by_parts(*args, return_lse=return_lse)
    out, lse = ROPE_ATTENTION(*args, chosen)
    return (out, lse) if return_lse else out


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor | None,
    interleaved: bool,
    num_prefix_tokens: Any,
    qk_norm: str | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: Any,
    cu_seqlens: Tensor | None,
    max_seqlen: Any,
    bias: Tensor | None,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
    return_lse: bool,
) -> tuple[Call, tuple[Any, ...]]:
    """The call, and the arguments of the operator less ``backend``."""
    q, k, v, bias = prepare(_OP, q, k, v, bias)
    if rope is not None:
        checks.dense(_OP, "rope", rope)
        for _ in range(5 - rope.dim() if rope.dim() >= 3 else 0):
            rope = rope.unsqueeze(0)
    elif interleaved:
        checks.fail(_OP, "interleaved", "False without rope", interleaved)
    if qk_norm is not None and qk_norm not in NORMS:
        checks.fail(_OP, "qk_norm", f"None or one of {', '.join(NORMS)}", repr(qk_norm))
    if eps is None:
        eps = 1e-5 if qk_norm != "rms" else torch.finfo(q.dtype).eps if q.is_floating_point() else 0.0
    elif qk_norm is None:
        checks.fail(_OP, "eps", "None without qk_norm", eps)
    if (cu_seqlens is None) != (max_seqlen is None):
        missing = "max_seqlen" if max_seqlen is None else "cu_seqlens"
        checks.fail(_OP, "cu_seqlens and max_seqlen", "given together", f"no {missing}")
    max_seqlen = 0 if max_seqlen is None else checks.whole(_OP, "max_seqlen", max_seqlen, 0)
    prefix = checks.whole(_OP, "num_prefix_tokens", num_prefix_tokens, 0)
    eps = checks.number(_OP, "eps", eps)
    norm = qk_norm or "none"
    given = (q, k, v, rope, q_weight, q_bias, k_weight, k_bias, cu_seqlens, max_seqlen, bias, norm, prefix, interleaved)
    call = _check(*given, is_causal, enable_gqa, return_lse)
    scale = checks.scale(_OP, scale, q.shape[-1])
    *front, norm, prefix, interleaved = given
    return call, (*front, norm, eps, prefix, interleaved, is_causal, scale)


def _check(
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
    prefix: int,
    interleaved: bool,
    is_causal: bool,
    gqa: bool,
    return_lse: bool,
) -> Call:
    packed = cu_seqlens is not None
    if packed:
        checks.tensor(_OP, "q", q, "(T, H, D)", 3)
        checks.tensor(_OP, "k", k, "(T, Hkv, D)", 3)
        checks.tensor(_OP, "v", v, "(T, Hkv, Dv)", 3)
    else:
        checks.tensor(_OP, "q", q, "(B, H, N, D)", 4)
        checks.tensor(_OP, "k", k, "(B, Hkv, N, D)", 4)
        checks.tensor(_OP, "v", v, "(B, Hkv, N, Dv)", 4)
    checks.floating(_OP, "q", q)
    checks.same(_OP, "k", k, "q", q)
    checks.same(_OP, "v", v, "q", q)
    d, dv, h, hk = q.shape[-1], v.shape[-1], q.shape[1], k.shape[1]
    at = 0 if packed else 2
    n, nk = q.shape[at], k.shape[at]
    if k.shape[-1] != d or (not packed and k.shape[0] != q.shape[0]) or (nk != n and (packed or rope is not None)):
        of = f"({n}, Hkv, {d})" if packed else f"({q.shape[0]}, Hkv, {n if rope is not None else 'Nk'}, {d})"
        checks.fail(_OP, "k", f"of shape {of} to fit q", checks.shape(k))
    if v.shape[:-1] != k.shape[:-1]:
        checks.fail(_OP, "v", f"of shape ({', '.join(map(str, k.shape[:-1]))}, Dv) to fit k", checks.shape(v))
    if hk != h and not gqa:
        checks.fail(_OP, "k", f"with {h} heads like q (or pass enable_gqa=True)", f"{hk} heads")
    if hk != h and (hk == 0 or h % hk):
        checks.fail(_OP, "k", f"with a number of heads that divides q's {h}", hk)
    if d == 0 or dv == 0:
        checks.fail(_OP, "q, k and v", "of at least one channel per head", f"D = {d}, Dv = {dv}")
    _check_norm(q, d, qk_norm, q_weight, q_bias, k_weight, k_bias)
    _check_rope(q, rope, packed, 1 if packed else q.shape[0], h, hk, n, d, prefix)
    checks.flag(_OP, "interleaved", interleaved)
    checks.flag(_OP, "is_causal", is_causal)
    batch = q.shape[0]
    if cu_seqlens is not None:
        _check_lengths(q, cu_seqlens, max_seqlen)
        batch, n, nk = cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen
    if bias is not None:
        checks.bias(_OP, bias, q, (batch, h, n, nk))
    features = asked(q, k, v, bias, is_causal, 0.0, hk != h, return_lse)
    if torch.is_grad_enabled():
        grad = "lse_grad" if return_lse else "grad"
        parameters = (rope, q_weight, q_bias, k_weight, k_bias)
        if grad not in features and any(t is not None and t.requires_grad for t in parameters):
            features = (*features, grad)
    device = q.device.type
    dims = (d,) if d == dv else (d, dv)
    return Call(_OP, device, q.dtype, features, dims, dispatch.sizes(device, batch, h, hk, n, nk, max(d, dv)))


def _check_norm(
    q: Tensor,
    d: int,
    qk_norm: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
) -> None:
    if qk_norm not in ("none", *NORMS):
        checks.fail(_OP, "qk_norm", f"none or one of {', '.join(NORMS)}", repr(qk_norm))
    for name, t in (("q_weight", q_weight), ("q_bias", q_bias), ("k_weight", k_weight), ("k_bias", k_bias)):
        if t is None:
            continue
        bias = name.endswith("bias")
        if qk_norm == "none" or (bias and qk_norm != "layer"):
            checks.fail(_OP, name, "None unless qk_norm is " + ("'layer'" if bias else "given"), "a tensor")
        _check_parameter(name, t, f"({d},)", 1, q)
        if t.shape[0] != d:
            checks.fail(_OP, name, f"of shape ({d},)", checks.shape(t))


def _check_parameter(name: str, t: Any, shape: str, dims: int, q: Tensor) -> None:
    checks.tensor(_OP, name, t, shape, dims)
    if t.dtype is not torch.float32 and t.dtype != q.dtype:
        raise TypeError(f"{_OP}: {name} must be float32 or of the dtype of q, {q.dtype}, got {t.dtype}")
    checks.same(_OP, name, t, "q", q, dtype=False)


def _check_rope(
    q: Tensor, rope: Tensor | None, packed: bool, b: int, h: int, hk: int, n: int, d: int, prefix: int
) -> None:
    if prefix and (rope is None or packed):
        other = "with cu_seqlens (give such tokens sines 0 and cosines 1)" if rope is not None else "without rope"
        checks.fail(_OP, "num_prefix_tokens", f"0 {other}", prefix)
    if rope is None:
        return
    if prefix > n:
        checks.fail(_OP, "num_prefix_tokens", f"at most the {n} tokens of q", prefix)
    _check_parameter("rope", rope, "broadcastable to " + ("(H, T, 2, R)" if packed else "(B, H, N, 2, R)"), 5, q)
    rb, rh, rn, two, channels = rope.shape
    if rb not in (1, b) or rh not in (1, h) or rn != n - prefix or two != 2:
        wanted = f"({h}, {n}, 2, R)" if packed else f"({b}, {h}, {n - prefix}, 2, R)"
        tokens = f", for {n} tokens" + (f" of which {prefix} are not rotated" if prefix else "")
        checks.fail(_OP, "rope", f"broadcastable to {wanted}{tokens}", checks.shape(rope))
    if channels % 2 or not 0 < channels <= d:
        checks.fail(_OP, "rope", f"of an even number of channels, at most the {d} of q", channels)
    if rh != 1 and hk != h:
        checks.fail(_OP, "rope", f"the same for all heads where k has {hk} heads and q {h}", checks.shape(rope))


def _check_lengths(q: Tensor, cu: Tensor, longest: int) -> None:
    checks.tensor(_OP, "cu_seqlens", cu, "(S + 1,)", 1)
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_OP}: cu_seqlens must be int32 or int64, got {cu.dtype}")
    checks.same(_OP, "cu_seqlens", cu, "q", q, dtype=False)
    if cu.shape[0] < 1:
        checks.fail(_OP, "cu_seqlens", "of at least 1 element", cu.shape[0])
    if cu.device.type == "cpu" and not torch.compiler.is_compiling() and not checks.is_fake(cu):
        ends = cu.tolist()
        lengths = [hi - lo for lo, hi in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != q.shape[0] or min(lengths, default=0) < 0:
            shown = ends if len(ends) < 12 else [*ends[:5], "...", *ends[-5:]]
            checks.fail(_OP, "cu_seqlens", f"ascending from 0 to {q.shape[0]}", shown)
        if max(lengths, default=0) > longest:
            checks.fail(_OP, "max_seqlen", f"at least the longest sequence, {max(lengths)}", longest)


def _by_parts(
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
    *,
    return_lse: bool,
) -> Any:
    """The backend "torch": the norm and the rotation by PyTorch's operators, then attention by its own dispatch."""
    q = reference.normalize_and_rotate(q, rope, q_weight, q_bias, qk_norm, eps, num_prefix_tokens, interleaved)
    k = reference.normalize_and_rotate(k, rope, k_weight, k_bias, qk_norm, eps, num_prefix_tokens, interleaved)
    options: dict[str, Any] = {"bias": bias, "is_causal": is_causal, "scale": scale, "return_lse": return_lse}
    if cu_seqlens is None:
        return flash_attention(q, k, v, enable_gqa=True, **options)
    return flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


@dispatch.describes(rope_attention)
def _describe(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None, **given: Any) -> tuple[Call, list[str]]:
    call, _ = _prepare(q, k, v, **given)
    notes = dispatch.copy_notes(q=q, k=k, v=v, rope=given["rope"])
    if dispatch.select(call, backend) == "torch":
        inner = "flash_attention" if given["cu_seqlens"] is None else "flash_attention_varlen"
        notes.append(f"torch: norm and rotation by PyTorch's operators, then {inner}, which chooses its own backend")
    return call, notes


def _check_low(
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
    _eps: float,
    num_prefix_tokens: int,
    interleaved: bool,
    is_causal: bool,
    _scale: float,
) -> Call:
    if not 0 <= max_seqlen < 2**31:
        checks.fail(_OP, "max_seqlen", "at least 0 and below 2**31", max_seqlen)
    if num_prefix_tokens < 0:
        checks.fail(_OP, "num_prefix_tokens", "at least 0", num_prefix_tokens)
    front = (q, k, v, rope, q_weight, q_bias, k_weight, k_bias, cu_seqlens, max_seqlen, bias, qk_norm)
    return _check(*front, num_prefix_tokens, interleaved, is_causal, True, True)


def _check_low_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rope_grad: bool,
    bias_grad: bool,
    *forward: Any,
) -> Call:
    call = _check_low(*forward)
    q, _, v, rope = forward[:4]
    cu_seqlens, bias = forward[8], forward[10]
    if cu_seqlens is None:
        shapes = (*q.shape[:3], v.shape[3]), q.shape[:3]
    else:
        shapes = (*q.shape[:2], v.shape[2]), (q.shape[1], q.shape[0])
    check_results(grad_out, grad_lse, out, lse, bias_grad, bias, *shapes, q)
    if rope_grad and rope is None:
        checks.fail(_OP, "rope_grad", "False without a rope", rope_grad)
    return call


def _heads_like(t: Tensor, d: int, packed: bool) -> Tensor:
    if packed:
        return t.new_empty(*t.shape[:2], d)
    return t.new_empty(t.shape[0], t.shape[2], t.shape[1], d).transpose(1, 2)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    packed = cu_seqlens is not None
    lse = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    return _heads_like(q, v.shape[-1], packed), q.new_empty(lse, dtype=checks.wide(q.dtype))


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rope_grad: bool,
    bias_grad: bool,
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
    *_: Any,
) -> tuple[Tensor, ...]:
    def like(t: Tensor | None, wanted: bool = True) -> Tensor:
        return t.new_empty(t.shape) if t is not None and wanted else q.new_empty(0)

    heads = [_heads_like(t, t.shape[-1], cu_seqlens is not None) for t in (q, k, v)]
    parameters = [like(t) for t in (q_weight, q_bias, k_weight, k_bias)]
    return (*heads, like(rope, rope_grad), *parameters, like(bias, bias_grad))


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference.rope_attention(*args)
    return (out.transpose(1, 2).contiguous().transpose(1, 2) if out.dim() == 4 else out), lse


def _plain(*args: Any) -> Any:
    return _by_parts(*args[:-1], return_lse=True)


ROPE_ATTENTION_BACKWARD = Gradient(
    _OP, formula=reference.rope_attention, fake=_fake_backward, check=_check_low_backward
)
ROPE_ATTENTION = Operator(
    _OP,
    reference=_reference,
    fake=_fake,
    check=_check_low,
    gradient=ROPE_ATTENTION_BACKWARD,
    autocast=("q", "k", "v"),
    plain=_plain,
)
