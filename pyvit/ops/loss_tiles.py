"""What the streaming losses share: matrix products by tile, an online log-sum-exp, and the exchange of blocks between
ranks.

A loss over all pairs of N embeddings needs, of the N x N similarities, only sums. Each tile is computed, reduced and
overwritten by the next; the backward computes it again. Tiles are float32 whatever the inputs are, so a similarity of
100 keeps its digits in bfloat16 training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyvit import library
from pyvit.ops import checks, matmul

#: Rows and columns of a tile: its operands and two float32 copies of it stay near a CPU's last-level cache.
TILE = 512


def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's float32 product, which torch exposes privately, or None. On some processors torch.matmul (MKL) has half
    its speed."""
    return matmul.onednn() if "onednn" in matmul.forward_candidates(torch.float32, torch.float32, None) else None


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the library multiplies ``dtype`` by the processor's own products, which torch would round the result
    of."""
    return dtype == torch.bfloat16 and library.problem() is None and torch.ops.pyvit.cpu_isa() == "avx512bf16"


def narrow(*tensors: Tensor) -> bool:
    """Whether :func:`product` takes these as they are, in half the time of float32 copies."""
    return all(t.device.type == "cpu" and t.dtype == tensors[0].dtype for t in tensors) and _multiplies(
        tensors[0].dtype
    )


def product(x: Tensor, w: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x (M, K) w (N, K)^T -> (M, N), at least float32; either may be a transposed view.

    With ``out``, whose rows are contiguous, written or with ``add`` added there: large tensors cost more to allocate
    than to fill, for the kernel clears their pages.
    """
    if narrow(x, w) or (out is not None and _plain(x) and _plain(w)):
        if out is None:
            out = torch.empty(x.shape[0], w.shape[0], dtype=torch.float32, device="cpu")
        x, w = (t if 1 in t.stride() else t.contiguous() for t in (x, w))
        torch.ops.pyvit.product(x, w.t(), None, out, add)
        return out
    x, w = widen(x), widen(w)
    op = _onednn() if x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() and w.numel() else None
    if op is not None:
        found = op(x, w, None, "none", [], "")
        return found if out is None else out.add_(found) if add else out.copy_(found)
    if out is None:
        return x @ w.t()
    return out.addmm_(x, w.t()) if add else torch.mm(x, w.t(), out=out)


def _plain(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.float32 and library.problem() is None


def widen(t: Tensor) -> Tensor:
    """``t`` in the dtype that tiles are computed in."""
    return t.to(checks.wide(t.dtype))


def spans(n: int, size: int | None = None) -> Iterator[slice]:
    """[0, n) in slices of ``size``, default TILE."""
    size = size or TILE
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def in_library(scores: Tensor) -> bool:
    """Whether the library's C++ visits this tile, in one pass where torch's operators take several."""
    return (
        scores.device.type == "cpu"
        and scores.dtype == torch.float32
        and scores.is_contiguous()
        and library.problem() is None
    )


class LogSumExp:
    """Running log(sum(exp(scores))) of ``n`` rows, one tile at a time."""

    def __init__(self, n: int, like: Tensor) -> None:
        dtype = checks.wide(like.dtype)
        # The least finite number, not -inf: a row whose first tile is masked whole then stays at total 0 instead of
        # becoming NaN.
        self.top = torch.full((n,), torch.finfo(dtype).min, dtype=dtype, device=like.device)
        self.total = torch.zeros_like(self.top)

    @classmethod
    def of(cls, top: Tensor, total: Tensor) -> LogSumExp:
        """One whose state is kept elsewhere."""
        found = cls.__new__(cls)
        found.top, found.total = top, total
        return found

    def add(self, rows: slice, scores: Tensor, dim: int) -> None:
        """Take in the tile ``scores``, reduced over ``dim``, for ``rows``."""
        if in_library(scores):
            torch.ops.pyvit.log_sum_exp(scores, dim, self.top[rows], self.total[rows])
            return
        top = torch.maximum(self.top[rows], scores.amax(dim))
        sums = torch.sub(scores, top.unsqueeze(dim)).exp_().sum(dim)
        self.total[rows] = self.total[rows] * torch.exp(self.top[rows] - top) + sums
        self.top[rows] = top

    def value(self) -> Tensor:
        return self.top + self.total.log()


class Ring:
    """Sends the blocks of all ranks around a ring: a rank receives the next block while it computes with this one.

    With ``group`` None there is one rank and nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if group is not None and self.size > 1:
            self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
            self._previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def check_equal(self, op: str, argument: str, n: int, device: torch.device) -> None:
        """Every rank must hold as many rows; the exchange would hang or mix rows otherwise."""
        if self.size == 1:
            return
        extremes = torch.tensor([n, -n], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        most, least = int(extremes[0]), -int(extremes[1])
        if most != least:
            checks.fail(
                op,
                argument,
                "of the same number of rows on every rank of group",
                f"{n} here, between {least} and {most} over the ranks",
            )

    def sum(self, t: Tensor) -> Tensor:
        """The sum of ``t`` over ranks, on every rank."""
        if self.size > 1:
            t = t.contiguous().clone()
            dist.all_reduce(t, group=self.group)
        return t

    def start(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Send ``tensors`` to the next rank while receiving the previous one's; the result waits for them."""
        if self.size == 1:
            return lambda: tensors
        sent = [t.contiguous() for t in tensors]
        received = [torch.empty_like(t) for t in sent]
        ops = [dist.P2POp(dist.isend, t, self._next, self.group) for t in sent]
        ops += [dist.P2POp(dist.irecv, t, self._previous, self.group) for t in received]
        works = dist.batch_isend_irecv(ops)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            del sent[:]
            return received

        return wait

    def visit(self, blocks: list[Tensor], carry: list[Tensor], compute: Callable[..., None]) -> list[Tensor]:
        """Call ``compute(owner, *blocks, *carry)`` with the blocks of every rank.

        ``carry`` belongs to the blocks, is updated in place by ``compute``, travels with them, and comes home in the
        result.
        """
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            arriving = self.start(blocks) if step + 1 < self.size else None
            compute(owner, *blocks, *carry)
            if carry:
                carry = self.start(carry)()
            if arriving is not None:
                blocks = arriving()
        return carry


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return Ring(group).sum(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Ring(ctx.group).sum(grad), None


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ring = Ring(group)
        parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(ctx.ring.size)]
        dist.all_gather(parts, t.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ring.sum(grad).chunk(ctx.ring.size)[ctx.ring.rank], None


def all_sum(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``t`` over ranks, with the gradient of the sum of every rank's copy."""
    return _AllSum.apply(t, group)


def all_rows(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank in order of rank, with the gradient of the sum of every rank's copy."""
    return _AllRows.apply(t, group)


def check_scalars(op: str, **values: Any) -> None:
    """Each must be a number or a real tensor of one element."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            checks.number(op, name, value)
            continue
        checks.dense(op, name, value)
        if value.numel() != 1:
            checks.fail(op, name, "a number or a tensor of one element", f"{value.dtype} of {checks.shape(value)}")
        if value.dtype not in checks.FLOATS:
            raise TypeError(f"{op}: {name} must be a number or a real tensor of one element, got {value.dtype}")


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a one-element tensor as a 0-d tensor in the accumulation dtype; gradients flow to it."""
    dtype = checks.wide(like.dtype)
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.device, dtype)
    return torch.full((), float(value), dtype=dtype, device=like.device)


def embeddings(op: str, **pair: Any) -> None:
    """The two arguments must be (N, D), N at least 1, alike in shape, dtype and device."""
    (first, a), (second, b) = pair.items()
    for name, t in pair.items():
        checks.tensor(op, name, t, "(N, D)", 2)
        checks.floating(op, name, t)
    if a.shape[0] == 0:
        checks.fail(op, first, "of at least one row", checks.shape(a))
    if a.shape != b.shape:
        checks.fail(op, second, f"of the shape of {first}, {tuple(a.shape)}", checks.shape(b))
    checks.same(op, second, b, first, a)


def features(*tensors: Tensor | None, group: Any = None) -> list[str]:
    """What a call asks of a backend."""
    found = ["grad"] if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors) else []
    return found + (["group"] if group is not None else [])
