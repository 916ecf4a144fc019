"""Launchers of attention: the choice of kernels, and their outputs and workspaces."""

from __future__ import annotations

from typing import Any

import torch
from pyvit.triton_kernels.common import (
    BOOL_BIAS,
    FLOAT_BIAS,
    NO_BIAS,
    arch_of,
    dropout_args,
    in_units,
    launch,
    precision,
    processors,
    rows_unit,
)
from pyvit.triton_kernels.flash_attention_backward import backward_dkdv, backward_dq, backward_short
from pyvit.triton_kernels.flash_attention_bias import bias_gradient
from pyvit.triton_kernels.flash_attention_forward import forward_long, forward_persistent, forward_short
from pyvit.triton_kernels.tiles import (
    Config,
    backward_short_fits,
    choose,
    forward_persistent_fits,
    forward_short_fits,
    parts,
)
from torch import Tensor


class _Problem:
    """A call, batched or variable-length, as the kernels see it: (batch or sequence, head, row) strides and lengths."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        cu: tuple[Tensor, Tensor] | None = None,
        longest: tuple[int, int] = (0, 0),
    ) -> None:
        self.q, self.k, self.v = rows_unit(q), rows_unit(k), rows_unit(v)
        self.bias, self.cu, self.scale = bias, cu, scale
        self.d, self.dv = q.shape[-1], v.shape[-1]
        self.arch, self.itemsize = arch_of(q), q.element_size()
        if cu is None:
            self.batch, self.heads, self.n_q, _ = q.shape
            self.kv_heads, self.n_k = k.shape[1], k.shape[2]
        else:
            self.batch, self.heads, self.kv_heads = cu[0].shape[0] - 1, q.shape[1], k.shape[1]
            self.n_q, self.n_k = longest
        self.common: dict[str, Any] = {
            "cu_q": None if cu is None else cu[0].contiguous(),
            "cu_k": None if cu is None else cu[1].contiguous(),
            "H": self.heads,
            "GROUPS": self.heads // max(self.kv_heads, 1),
            "n_q": self.n_q,
            "n_k": self.n_k,
            "scale": float(scale),
            **dropout_args(dropout_p, seed),
            "D": self.d,
            "DV": self.dv,
            "D_PARTS": parts(self.d),
            "DV_PARTS": parts(self.dv),
            "BIAS": (NO_BIAS if bias is None else BOOL_BIAS if bias.dtype == torch.bool else FLOAT_BIAS).value,
            "CAUSAL": is_causal,
            "VARLEN": cu is not None,
            "PRECISION": precision(q),
        }
        # Nothing is added to the scores, so the largest score is the largest product.
        self.raw = {"RAW": (bias is None or bias.dtype == torch.bool) and scale > 0}
        # Without a bias the kernels still add an offset to its pointer, so pass q's; it is not read.
        self.bias_args: dict[str, Any] = {
            "bias": self.q if bias is None else bias,
            "bias_strides": (0, 0, 0, 0)
            if bias is None
            else tuple(s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape, strict=True)),
        }

    def strides(self, t: Tensor) -> tuple[int, int, int]:
        """Batch, head and row strides of q, k, v, the output or their gradients."""
        return (0, t.stride(1), t.stride(0)) if self.cu is not None else (t.stride(0), t.stride(1), t.stride(2))

    def rows(self) -> Tensor:
        """Uninitialised float32, one number per query and head."""
        shape = (self.heads, self.q.shape[0]) if self.cu is not None else (self.batch, self.heads, self.n_q)
        return self.q.new_empty(shape, dtype=torch.float32)

    def row_strides(self, t: Tensor) -> tuple[int, int]:
        return (0, t.stride(0)) if self.cu is not None else (t.stride(0), t.stride(1))

    def like(self, t: Tensor, channels: int) -> Tensor:
        """An uninitialised output with the layout of the operator's contract: (B, N, H, D) in memory, or (T, H, D) for
        varlen."""
        if self.cu is not None:
            return t.new_empty(t.shape[0], t.shape[1], channels)
        return t.new_empty(t.shape[0], t.shape[2], t.shape[1], channels).transpose(1, 2)

    def tensors(self, **named: Tensor) -> dict[str, Any]:
        """Each tensor with its strides, as kernel arguments."""
        args: dict[str, Any] = {}
        for name, t in named.items():
            args[name], args[f"{name}_strides"] = t, self.strides(t)
        return args

    def choose(self, kernel: str) -> Config:
        length = self.n_q if kernel == "backward_short" else self.n_k
        return choose(kernel, self.arch, self.itemsize, max(self.d, self.dv), length)


def _launch(kernel: Any, grid: int, args: dict[str, Any], c: Config) -> None:
    rows = [name for name in args if name.endswith("_strides") and name not in ("bias_strides", "lse_strides")]
    launch(kernel, grid, in_units(args, *rows), c.warps, c.stages)


def _forward(p: _Problem) -> tuple[Tensor, Tensor]:
    out, lse = p.like(p.q, p.dv), p.rows()
    args = (
        p.tensors(q=p.q, k=p.k, v=p.v, out=out)
        | p.bias_args
        | p.common
        | {"lse": lse, "lse_strides": p.row_strides(lse)}
    )
    args |= p.raw
    if forward_short_fits(p.arch, p.itemsize, (p.d, p.dv), p.n_k, p.bias is not None):
        heads = p.batch * p.heads
        plain = p.bias is None and p.cu is None and not (p.common["CAUSAL"] or p.common["DROPOUT"])
        # A single image has few heads: use one program per query tile, to keep all processors busy.
        many = heads >= 2 * processors(p.q)
        if many and plain and forward_persistent_fits(p.arch, p.itemsize, (p.d, p.dv), p.n_q, p.n_k):
            c = p.choose("forward_persistent")
            shape = {"KEY_PARTS": parts(p.n_k), "BLOCK_M": c.block_m, "TILES": -(-p.n_q // c.block_m)}
            shape |= {"heads": heads, "STAGES": c.stages}
            _launch(forward_persistent, min(heads, processors(p.q)), args | shape, c)
            return out, lse
        c = p.choose("forward_short")
        tiles = -(-p.n_q // c.block_m)
        group = c.group if p.batch * p.heads * tiles >= 2 * c.group * processors(p.q) else 1
        grid = -(-tiles // group) * p.heads * p.batch
        _launch(forward_short, grid, args | {"KEY_PARTS": parts(p.n_k), "BLOCK_M": c.block_m, "GROUP": group}, c)
    else:
        c = p.choose("forward_long")
        grid = -(-p.n_q // c.block_m) * p.heads * p.batch
        # A tile of the bias needs registers too.
        widths = (c.block_n if p.bias is None else min(c.block_n, 64), c.edge_n)
        _launch(forward_long, grid, args | {"BLOCK_M": c.block_m, "WIDTHS": widths}, c)
    return out, lse


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, p: _Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = p.like(p.q, p.d), p.like(p.k, p.d), p.like(p.v, p.dv)
    delta, shifts, rests = p.rows(), p.rows(), p.rows()
    grad_out, out = rows_unit(grad_out), rows_unit(out)
    args = p.tensors(grad_out=grad_out, q=p.q, k=p.k, v=p.v) | p.bias_args | p.common
    args |= {"delta": delta, "shifts": shifts, "rests": rests, "lse_strides": p.row_strides(delta)}
    own = {"lse": lse.contiguous(), "grad_lse": None if grad_lse is None else grad_lse.contiguous(), "factor": p.scale}
    outputs = p.tensors(grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, out=out)
    only = lambda *names: {k: v for k, v in outputs.items() if k.removesuffix("_strides") in names}  # noqa: E731
    if p.heads == p.kv_heads and backward_short_fits(
        p.arch, p.itemsize, (p.d, p.dv), p.n_q, p.n_k, p.bias is not None, p.common["DROPOUT"]
    ):
        c = p.choose("backward_short")
        shape = {"BLOCK_M": c.block_m, "TILES": -(-p.n_q // c.block_m), "WIDTHS": (c.block_n, c.edge_n)}
        every = args | own | outputs | shape | p.raw
        del every["GROUPS"]  # not grouped: each query head has its own key head
        _launch(backward_short, p.batch * p.heads, every, c)
    else:
        c = p.choose("backward_dq")
        shape = {"BLOCK_M": c.block_m, "WIDTHS": (c.block_n, c.edge_n)}
        grid = -(-p.n_q // c.block_m) * p.heads * p.batch
        _launch(backward_dq, grid, args | own | only("grad_q", "out") | shape | p.raw, c)
        c = p.choose("backward_dkdv")
        shape = {"BLOCK_M": c.block_n, "BLOCK_N": c.block_m, "factor": p.scale}
        grid = -(-p.n_k // c.block_m) * p.kv_heads * p.batch
        # A single head's addresses stay the same over the loop; those of a head in parts are too many registers to
        # keep.
        grouped = p.heads != p.kv_heads or len(parts(p.d)) > 1
        every = args | only("grad_k", "grad_v") | shape | p.raw | {"GROUPED": grouped}
        _launch(backward_dkdv, grid, every, c)
    if p.bias is None or not bias_grad:
        return grad_q, grad_k, grad_v, p.q.new_empty(0)
    return grad_q, grad_k, grad_v, _bias_backward(args, p)


def _bias_backward(args: dict[str, Any], p: _Problem) -> Tensor:
    """The gradient of the bias. Each program owns a tile and loops over everything the bias was broadcast over; long
    loops are split, and the parts added in order."""
    assert p.bias is not None
    c = p.choose("bias_grad")
    bb, bh, bi, bj = p.bias.shape
    rows, cols = -(-p.n_q // c.block_m), -(-p.n_k // c.block_n)
    reduced = (p.batch if bb == 1 else 1, p.heads if bh == 1 else 1, rows if bi == 1 else 1, cols if bj == 1 else 1)
    steps = reduced[0] * reduced[1] * reduced[2] * reduced[3]
    programs = bb * bh * (1 if bi == 1 else rows) * (1 if bj == 1 else cols)
    splits = max(1, min(steps, 2 * processors(p.q) // max(programs, 1)))
    grad = torch.empty if steps and p.n_q and p.n_k else torch.zeros
    partial = grad((splits, *p.bias.shape), dtype=torch.float32, device=p.q.device)
    shape = {
        "grad_bias": partial,
        "splits": splits,
        "steps": steps,
        "bias_shape": (bb, bh, bi, bj),
        "reduced": reduced,
        "ROWS": bi > 1,
        "COLS": bj > 1,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
    }
    _launch(bias_gradient, programs * splits if steps else 0, args | shape, c)
    return (partial[0] if splits == 1 else partial.sum(0)).to(p.bias.dtype)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """out (B, H, Nq, Dv) and lse (B, H, Nq), as :func:`pyvit.ops.flash_attention` states them."""
    return _forward(_Problem(q, k, v, bias, is_causal, scale, dropout_p, seed))


def flash_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, if requested, of the bias (else empty)."""
    return _backward(
        grad_out, grad_lse, out, lse, bias_grad, _Problem(q, k, v, bias, is_causal, scale, dropout_p, seed)
    )


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
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, Dv) and lse (H, Tq), as :func:`pyvit.ops.flash_attention_varlen` states them."""
    return _forward(
        _Problem(q, k, v, bias, is_causal, scale, cu=(cu_seqlens_q, cu_seqlens_k), longest=(max_seqlen_q, max_seqlen_k))
    )


def flash_attention_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
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
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, if requested, of the bias (else empty)."""
    p = _Problem(q, k, v, bias, is_causal, scale, cu=(cu_seqlens_q, cu_seqlens_k), longest=(max_seqlen_q, max_seqlen_k))
    return _backward(grad_out, grad_lse, out, lse, bias_grad, p)
