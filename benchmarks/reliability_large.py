"""Calls beyond the limits of 32-bit arithmetic: more than 2**31 elements, more than 65,535 batch x heads, 65,536
tokens, a map of 8192 x 8192. Each part returns its :class:`Check` list; none needs more than 12 GiB.

A result is compared with float64 by the numerics rule (:mod:`pyvit.testing`), completely where the reference fits, else
on sampled rows, tokens or windows. Where the batch is an expanded view, all of it is compared bit by bit with its first
image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyvit import ops
from pyvit.testing import GRADIENT_FACTOR, Comparison, check_op, compare

GIB = 2**30


class Check(NamedTuple):
    """One call: what was computed, the elements of its largest tensor or of the scores, which are not stored,
    and the largest error relative to its limit."""

    call: str
    elements: int
    of_limit: float
    compared: str


def worst(found: Sequence[Comparison]) -> float:
    return max(c.error / c.limit for c in found)


def pieces(n: int, size: int) -> Iterator[slice]:
    return (slice(low, min(low + size, n)) for low in range(0, n, size))


def repeated(name: str, out: Tensor) -> None:
    """Raises AssertionError unless every out[i] has the bits of out[0]."""
    step = max(1, (64 << 20) // out[0].numel())
    for part in pieces(len(out), step):
        if not torch.equal(out[part], out[:1].expand_as(out[part])):
            wrong = next(i for i in range(part.start, part.stop) if not torch.equal(out[i], out[0]))
            raise AssertionError(f"{name}: image {wrong} of {len(out)} differs from image 0, which has the same input")


def _expanded(name: str, call: Callable[..., Tensor], x: Tensor, batch: int, *rest: Tensor) -> Check:
    """``call(x, *rest)`` of one image x (1, ...) expanded to ``batch``."""
    with torch.no_grad():
        one = [call(x, *rest, backend="reference"), call(x.double(), *(t.double() for t in rest), backend="reference")]
        out = call(x.expand(batch, *x.shape[1:]), *rest)
        found = compare(name, out[:1], *one, dtype=x.dtype)
        repeated(name, out)
    return Check(f"{name}, {_shape(out)}", out.numel(), worst(found), "all images")


def _shape(t: Tensor) -> str:
    return f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"


def elements(scale: float = 1.0) -> list[Check]:
    """Outputs, inputs and gradients of more than 2**31 elements. ``scale``: of the batches, to try the code."""
    bf16, least = torch.bfloat16, int(2**31 * scale)

    def batch(per_image: int) -> int:
        return least // per_image + 3

    x = torch.randn(1, 256, 32, dtype=bf16)
    weight, norm = torch.randn(64, 32, dtype=bf16) / 6, torch.randn(32, dtype=bf16)
    found = [
        _expanded("linear", ops.linear, x, batch(256 * 64), weight),
        _expanded("layer_norm", ops.layer_norm, x, batch(256 * 32), norm),
        _expanded("rms_norm", ops.rms_norm, x, batch(256 * 32), norm),
    ]
    q, k, v = (torch.randn(1, 8, n, 64, dtype=bf16) for n in (128, 32, 32))
    n = batch(q.numel())

    def attend(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        return ops.flash_attention(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1), backend=backend)

    found.append(_expanded("flash_attention", attend, q, n, k, v))
    found.append(_attention_gradients(q, k, v, n))
    images, kernel = torch.randn(1, 1, 64, 64, dtype=bf16), torch.randn(64, 1, 4, 4, dtype=bf16) / 4
    found.append(_expanded("patch_embed", ops.patch_embed, images, batch(256 * 64), kernel))
    found.append(_bytes(batch(3 * 224 * 224)))
    return found


def _attention_gradients(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Check:
    """Gradients of which that of q has more than 2**31 elements."""
    cotangent = torch.randn_like(q)

    def gradients(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = ops.flash_attention(*leaves, backend=backend)
        return torch.autograd.grad(out, leaves, cotangent.to(q.dtype).expand_as(out))

    want = gradients(q.double(), k.double(), v.double(), "reference")
    same = gradients(q, k, v, "reference")
    got = gradients(*(t.expand(batch, -1, -1, -1) for t in (q, k, v)))
    labels = ["grad_q", "grad_k", "grad_v"]
    firsts = [g[:1] for g in got]
    found = compare("flash_attention", firsts, same, want, GRADIENT_FACTOR, labels=labels)
    for gradient in got:
        repeated("flash_attention's gradients", gradient)
    return Check(f"gradients of flash_attention, {_shape(got[0])}", got[0].numel(), worst(found), "all images")


def _bytes(batch: int) -> Check:
    """Pixels of more than 2**31 bytes in memory, the last images other than the first."""
    images = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8)
    samples = [0, 1, batch // 2, batch - 2, batch - 1]
    images[samples] = torch.randint(256, (len(samples), 3, 224, 224), dtype=torch.uint8)
    weight = torch.randn(8, 3, 32, 32) / 55
    with torch.no_grad():
        out = ops.patch_embed(images, weight)[samples]
        same = ops.patch_embed(images[samples], weight, backend="reference")
        want = ops.patch_embed(images[samples], weight.double(), backend="reference")
    found = compare("patch_embed", out, same, want)
    return Check(f"patch_embed, {_shape(images)}", images.numel(), worst(found), f"{len(samples)} images")


def heads(scale: float = 1.0) -> list[Check]:
    """More than 65,535 batch x heads, windows x heads and sequences x heads, with all gradients: the limit of the
    second and third dimension of a CUDA grid, and of 16 bits."""
    n = int(65_536 * scale)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        t = {key: torch.randn(n // 16 + 5, 16, 9, 16, dtype=dtype) for key in "qkv"}
        checked = check_op(ops.flash_attention, t, backend="cpu")
        found.append(Check(f"flash_attention, {_shape(t['q'])}", t["q"].numel(), worst(checked), "all, with gradients"))
    side = 4 * (math.isqrt(n) // 2 + 1)
    t = {"qkv": torch.randn(1, side, side, 3 * 4 * 8), "bias_table": torch.randn(9, 4)}

    def windows(qkv: Tensor, bias_table: Tensor, backend: str) -> Tensor:
        return ops.window_attention(qkv, 2, 1, num_heads=4, bias_table=bias_table, backend=backend)

    checked = check_op(windows, t, backend="cpu", name="window_attention")
    call = f"window_attention, {(side // 2) ** 2} windows x 4 heads, {_shape(t['qkv'])}"
    found.append(Check(call, t["qkv"].numel(), worst(checked), "all, with gradients"))
    lengths = torch.arange(n // 16 * 4 + 4) % 4  # 0, 1, 2, 3, 0, ...
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    t = {key: torch.randn(int(cu[-1]), 4, 16) for key in "qkv"}

    def varlen(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        out = ops.flash_attention_varlen(q, k, v, cu, cu, 3, 3, backend=backend)
        assert isinstance(out, Tensor)
        return out

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sequences of one length as a batch; the naive form of varlen has a loop over all."""
        grouped = [t.view(-1, 6, 4, 16).transpose(1, 2) for t in (q, k, v)]  # 6 tokens: 1, 2 and 3
        parts = [
            ops.flash_attention(*(t[:, :, part] for t in grouped), backend="reference")
            for part in (slice(0, 1), slice(1, 3), slice(3, 6))
        ]
        return torch.cat(parts, 2).transpose(1, 2).reshape(q.shape)

    checked = check_op(varlen, t, backend="cpu", naive=naive, name="flash_attention_varlen")
    call = f"flash_attention_varlen, {len(lengths)} sequences x 4 heads"
    found.append(Check(call, t["q"].numel(), worst(checked), "all, with gradients"))
    return found


def _attention_by_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, lse: Tensor, delta: Tensor, cotangent: Tensor, at: Tensor
) -> list[Tensor]:
    """Gradients (Q, D) of k and v at the keys ``at``, by the formula of attention in the dtype of q (N, D):
    ``lse`` and ``delta``, the sums of out times its gradient, are (N,)."""
    p = (q * scale @ k[at].T - lse[:, None]).exp()  # (N, Q)
    ds = p * (cotangent @ v[at].T - delta[:, None])
    return [(ds.T @ q) * scale, p.T @ cotangent]


def tokens(scale: float = 1.0) -> list[Check]:
    """Attention over 65,536 tokens: every row of the output, and sampled rows of the gradients."""
    n, d = int(65_536 * scale), 64
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, cotangent = (torch.randn(n, d, dtype=dtype) for _ in range(4))
        leaves = [t[None, None].requires_grad_() for t in (q, k, v)]
        attended = ops.flash_attention(*leaves)
        assert isinstance(attended, Tensor)
        grads = [g[0, 0] for g in torch.autograd.grad(attended, leaves, cotangent[None, None])]
        out, factor = attended.detach()[0, 0], d**-0.5
        q64, k64, v64, c64 = (t.detach().double() for t in (q, k, v, cotangent))
        want, lse = torch.empty(n, d, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
        for part in pieces(n, 1024):
            scores = q64[part] * factor @ k64.T  # (1024, N)
            lse[part] = scores.logsumexp(1)
            want[part] = (scores - lse[part, None]).exp_() @ v64
        delta = (want * c64).sum(1)
        at = torch.cat([torch.tensor([0, 1, n // 2, n - 2, n - 1]), torch.randint(n, (59,))])
        rows = [t.detach()[at][None, None].requires_grad_() for t in (q, q.double())]
        keys = [[t.detach()[None, None].to(row.dtype) for t in (k, v)] for row in rows]
        naive = [ops.flash_attention(row, *kv, backend="reference") for row, kv in zip(rows, keys, strict=True)]
        dq = [
            torch.autograd.grad(o, r, cotangent[at][None, None].to(o.dtype))[0][0, 0]
            for o, r in zip(naive, rows, strict=True)
        ]
        arguments = (q.detach(), k.detach(), v.detach(), factor, lse.to(dtype), delta.to(dtype), cotangent, at)
        same_kv = _attention_by_rows(*arguments)
        want_kv = _attention_by_rows(q64, k64, v64, factor, lse, delta, c64, at)
        checked = compare("out at rows", out[at], naive[0].detach()[0, 0], want[at])
        limit = checked[0].limit  # of the sampled rows, for all
        checked.append(Comparison("out", float((out.double() - want).abs().max()), 0.0, limit, 1.0))
        checked += compare(
            "gradients",
            [g[at] for g in grads],
            [dq[0], *same_kv],
            [dq[1], *want_kv],
            GRADIENT_FACTOR,
            labels=["grad_q", "grad_k", "grad_v"],
            raises=False,
        )
        if not all(c.passed for c in checked):
            raise AssertionError("\n".join(map(str, checked)))
        call = f"flash_attention, {_shape(attended)}"
        found.append(Check(call, n * n, worst(checked), f"all rows; gradients at {len(at)} rows"))
    return found


def _windows_at(side: int, window: int) -> list[tuple[int, int]]:
    """Rows and columns of windows' first tokens on the shifted map: corners, edges and the middle."""
    last, middle = side - window, side // 2 // window * window
    return [(0, 0), (0, last), (last, 0), (last, last), (middle, 0), (middle, last), (middle, middle), (0, middle)]


def map_8k(scale: float = 1.0) -> list[Check]:
    """Windows on a map of 8192 x 8192: the output with 2**31 elements and more in qkv, and the gradients with half as
    many. Windows of 8 shifted by 4."""
    side, window, shift = int(8192 * scale) // 8 * 8, 8, 4
    found = []
    for heads, d, gradients in ((2, 8, False), (1, 8, True)):
        qkv = torch.empty(1, side, side, 3 * heads * d, dtype=torch.bfloat16)
        for part in pieces(side, 256):
            qkv[:, part] = torch.randn(1, part.stop - part.start, side, 3 * heads * d).bfloat16()
        table = torch.randn((2 * window - 1) ** 2, heads)
        qkv.requires_grad_(gradients)
        out = ops.window_attention(qkv, window, shift, num_heads=heads, bias_table=table)
        cotangent = torch.randn(1, 1, 1, heads * d, dtype=torch.bfloat16).expand(1, side, side, -1)
        got = torch.autograd.grad(out, qkv, cotangent)[0] if gradients else None
        out, qkv = out.detach(), qkv.detach()
        checked = []
        for y, x in _windows_at(side, window):
            checked += _window(qkv, table, out, got, cotangent, (y, x), window, shift, heads)
        if not all(c.passed for c in checked):
            raise AssertionError("\n".join(map(str, checked)))
        name = "window_attention" + (" and the gradient of qkv" if gradients else "")
        found.append(
            Check(f"{name}, {_shape(qkv)}", qkv.numel(), worst(checked), f"{len(_windows_at(side, window))} windows")
        )
    return found


def _window(
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    got: Tensor | None,
    cotangent: Tensor,
    at: tuple[int, int],
    window: int,
    shift: int,
    heads: int,
) -> list[Comparison]:
    """The window whose first token is ``at`` on the shifted map, beside its formula.

    Its tokens come from both ends of an axis where it lies at that axis' end; then only tokens of the same end attend
    to each other. A map of 2 x 2 windows has the same regions, so the formula is applied to one.
    """
    side = qkv.shape[1]
    ys, xs = ((torch.arange(window) + first + shift) % side for first in at)
    small = 2 * window
    # Of the small map's windows, the one at the same ends; its tokens there, after the shift.
    places = [small - window if first + window == side else 0 for first in at]
    sy, sx = ((torch.arange(window) + first + shift) % small for first in places)
    results = []
    for dtype in (qkv.dtype, torch.float64):
        patch = torch.zeros(1, small, small, qkv.shape[3], dtype=dtype)
        patch[0, sy[:, None], sx] = qkv[0, ys[:, None], xs].to(dtype)
        patch.requires_grad_(got is not None)
        o = ops.window_attention(patch, window, shift, num_heads=heads, bias_table=table.to(dtype), backend="reference")
        g = None if got is None else torch.autograd.grad(o, patch, cotangent[:, :small, :small].to(dtype))[0]
        results.append((o.detach()[0, sy[:, None], sx], None if g is None else g[0, sy[:, None], sx]))
    (same, same_g), (want, want_g) = results
    name = f"window at {at}"
    checked = compare(name, out[0, ys[:, None], xs], same, want, raises=False)
    if got is not None and same_g is not None and want_g is not None:
        checked += compare(
            name, got[0, ys[:, None], xs], same_g, want_g, GRADIENT_FACTOR, labels=["grad_qkv"], raises=False
        )
    return checked


def pairs(scale: float = 1.0) -> list[Check]:
    """info_nce of a batch whose similarity matrix has 2**32 elements: the loss, and sampled rows of the gradients."""
    n, d, temperature = int(65_536 * scale), 32, 10.0
    a, b = (torch.nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
    loss = ops.info_nce(a, b, temperature)
    grads = torch.autograd.grad(loss, (a, b))
    at = torch.cat([torch.tensor([0, n - 1]), torch.randint(n, (62,))])
    computed = []
    for dtype in (torch.float32, torch.float64):
        x, y = a.detach().to(dtype), b.detach().to(dtype)
        rows, columns = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        for part in pieces(n, 1024):
            rows[part] = (temperature * x[part] @ y.T).logsumexp(1)
            columns[part] = (temperature * y[part] @ x.T).logsumexp(1)
        value = (rows + columns - 2 * temperature * (x * y).sum(1)).mean() / 2
        gradients = []
        for one, other, own, others in ((x, y, rows, columns), (y, x, columns, rows)):
            s = temperature * one[at] @ other.T  # (64, N)
            p = (s - own[at, None]).exp() + (s - others).exp()
            gradients.append((p @ other - 2 * other[at]) * temperature / (2 * n))
        computed.append([value, *gradients])
    checked = compare(
        "info_nce",
        [loss.detach(), *(g[at] for g in grads)],
        *computed,
        GRADIENT_FACTOR,
        labels=["loss", "grad_a", "grad_b"],
    )
    return [Check(f"info_nce, {n} pairs, float32", n * n, worst(checked), f"the loss; gradients at {len(at)} rows")]


#: The parts: their names, what they compute, and the memory that each needs in GiB.
PARTS: dict[str, tuple[Callable[[float], list[Check]], float]] = {
    "heads": (heads, 4),
    "tokens": (tokens, 4),
    "pairs": (pairs, 4),
    "map": (map_8k, 11),
    "elements": (elements, 11),
}
