"""Self-distillation's cross-entropy (DINO, iBOT, DINOv2) with the prototype product fused: neither probability matrix
is ever stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.ops import checks, loss_tiles, reference_losses
from pyvit.ops.loss_tiles import LogSumExp, in_library, narrow, product, spans, widen

_OP = "distillation_cross_entropy"

#: Scores per tile, counting student and teacher rows alike.
_TILE_SCORES = 1 << 21


def distillation_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_temp: float,
    teacher_temp: float,
    *,
    center: Tensor | None = None,
    student_prototypes: Tensor | None = None,
    teacher_prototypes: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """sum_stn weights[s, t, n] H(softmax((teacher[t, n] - center) / teacher_temp), softmax(student[s, n] /
    student_temp)).

    Args:
        student: logits (S, N, K), one slice per crop, or features (S, N, C) with ``student_prototypes``; (N, .) stands
            for S = 1.
        teacher: logits (T, N, K) or features (T, N, C') with ``teacher_prototypes``; (N, .) stands for T = 1. It gets
            no gradient.
        student_temp, teacher_temp: positive temperatures.
        center: (K,), taken from the teacher's logits: DINO's running centre, or the potentials of
            :func:`pyvit.ops.sinkhorn_center`, with which the teacher's softmax is the Sinkhorn assignment. No gradient.
        student_prototypes, teacher_prototypes: (K, C) and (K, C'); logits = features prototypes^T, a tile of K at a
            time. The teacher's get no gradient.
        weights: (S, T, N) or broadcastable to it; default 1 / (S T N), the mean. Zero excludes a pair (a crop against
            itself). Neither they nor the temperatures have a gradient.
        backend: force one backend.

    Returns:
        a float32 scalar (float64 for float64). With prototypes, memory is O((S + T) N + K C), forward and backward.

    Raises ValueError, TypeError for arguments that do not fit; BackendError when ``backend`` cannot serve.

    Sources: Caron et al., "DINO" (2021), algorithm 1; Zhou et al., "iBOT" (2022), equation 2.
    """
    student, teacher = _crops("student", student), _crops("teacher", teacher)
    student_temp, teacher_temp = _temperatures(student_temp, teacher_temp)
    wide = checks.wide(student.dtype)
    teacher, student_prototypes, teacher_prototypes = (
        _as_wide(t, wide) for t in (teacher, student_prototypes, teacher_prototypes)
    )
    call = _check(student, teacher, center, student_prototypes, teacher_prototypes, weights)
    chosen = dispatch.select(call, backend)
    shape = (student.shape[0], teacher.shape[0], student.shape[1])
    if weights is None:
        weights = torch.full((1, 1, 1), 1 / max(shape[0] * shape[1] * shape[2], 1), dtype=wide, device=student.device)
    weights = weights.detach().to(wide).expand(shape)
    teacher, fixed = teacher.detach(), None if teacher_prototypes is None else teacher_prototypes.detach()
    with dispatch.no_autocast(student):
        args = (student, teacher, student_prototypes, fixed, None if center is None else center.detach(), weights)
        return DISTILL(*args, student_temp, teacher_temp, chosen)[0]


def _crops(name: str, t: Tensor) -> Tensor:
    """(crops, N, C): one crop's (N, C) is a batch of one."""
    checks.dense(_OP, name, t)
    return t[None] if t.dim() == 2 else t


def _as_wide(t: Any, wide: torch.dtype) -> Any:
    """``t`` in the dtype of the sums if that of its own would be another: float32 and float64 multiply in no
    product."""
    return t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() and checks.wide(t.dtype) != wide else t


def _temperatures(student_temp: Any, teacher_temp: Any) -> tuple[float, float]:
    return checks.positive(_OP, "student_temp", student_temp), checks.positive(_OP, "teacher_temp", teacher_temp)


def _check(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_prototypes: Tensor | None,
    teacher_prototypes: Tensor | None,
    weights: Tensor | None,
) -> Call:
    for name, t in (("student", student), ("teacher", teacher)):
        checks.tensor(_OP, name, t, "(crops, N, K) or (N, K)", 3)
        checks.floating(_OP, name, t)
    checks.same(_OP, "teacher", teacher, "student", student, dtype=False)
    if teacher.shape[1] != student.shape[1]:
        checks.fail(_OP, "teacher", f"of {student.shape[1]} samples as student", checks.shape(teacher))
    counts = []
    for name, t, prototypes in (("student", student, student_prototypes), ("teacher", teacher, teacher_prototypes)):
        if prototypes is None:
            counts.append(t.shape[2])
            continue
        checks.tensor(_OP, f"{name}_prototypes", prototypes, "(K, C)", 2)
        checks.floating(_OP, f"{name}_prototypes", prototypes)
        checks.same(_OP, f"{name}_prototypes", prototypes, name, t, dtype=False)
        if prototypes.shape[1] != t.shape[2]:
            checks.fail(
                _OP, f"{name}_prototypes", f"of shape (K, {t.shape[2]}) to fit {name}", checks.shape(prototypes)
            )
        counts.append(prototypes.shape[0])
    if counts[0] != counts[1] or counts[0] == 0:
        checks.fail(_OP, "teacher", f"scored on the student's {counts[0]} prototypes, at least one", counts[1])
    for name, optional in (("center", center), ("weights", weights)):
        if optional is not None:
            checks.beside(_OP, name, optional, "student", student)
    if center is not None and tuple(center.shape) != (counts[0],):
        checks.fail(_OP, "center", f"of shape ({counts[0]},)", checks.shape(center))
    checks.no_gradient(_OP, weights=weights)
    wanted = (student.shape[0], teacher.shape[0], student.shape[1])
    if weights is not None and (
        weights.dim() != 3 or any(h not in (1, w) for h, w in zip(weights.shape, wanted, strict=True))
    ):
        checks.fail(_OP, "weights", f"broadcastable to {wanted}", checks.shape(weights))
    found = loss_tiles.features(student, student_prototypes)
    found += [name for name, given in (("prototypes", student_prototypes), ("center", center)) if given is not None]
    found += ["logits"] if student_prototypes is None or teacher_prototypes is None else []
    return Call(_OP, student.device.type, student.dtype, tuple(found))


@dispatch.describes(distillation_cross_entropy)
def _describe(
    student: Tensor,
    teacher: Tensor,
    student_temp: float,
    teacher_temp: float,
    center: Tensor | None,
    student_prototypes: Tensor | None,
    teacher_prototypes: Tensor | None,
    weights: Tensor | None,
    backend: str | None,
) -> tuple[Call, list[str]]:
    student, teacher = _crops("student", student), _crops("teacher", teacher)
    _temperatures(student_temp, teacher_temp)
    return _check(student, teacher, center, student_prototypes, teacher_prototypes, weights), []


def _check_low(
    student: Tensor,
    teacher: Tensor,
    ws: Tensor | None,
    wt: Tensor | None,
    center: Tensor | None,
    weights: Tensor,
    *temperatures: float,
) -> Call:
    _temperatures(*temperatures)
    call = _check(student, teacher, center, ws, wt, weights)
    for name, t in (("teacher", teacher), ("student_prototypes", ws), ("teacher_prototypes", wt)):
        if t is not None and (t.dtype == torch.float64) != (student.dtype == torch.float64):
            raise TypeError(f"{_OP}: {name} must be float64 if student is, and only then, got {t.dtype}")
    shape = (student.shape[0], teacher.shape[0], student.shape[1])
    checks.exactly(_OP, "weights", weights, shape, checks.wide(student.dtype), student)
    return call


class _Tiles:
    """Scores of a chunk of samples against a chunk of prototypes, for both networks."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        (
            self.student,
            self.teacher,
            self.ws,
            self.wt,
            self.center,
            self.weights,
            self.student_temp,
            self.teacher_temp,
        ) = args
        self.s, self.n = self.student.shape[:2]
        self.t = self.teacher.shape[0]
        self.k = self.student.shape[2] if self.ws is None else self.ws.shape[0]
        columns = min(self.k, 4096)
        self.columns, self.rows = columns, max(1, _TILE_SCORES // (columns * (self.s + self.t)))
        self.buffers: dict[str, Tensor] = {}

    def chunks(self) -> list[slice]:
        return list(spans(self.n, self.rows))

    def scores(self, name: str, x: Tensor, prototypes: Tensor | None, rows: slice, columns: slice) -> Tensor:
        """(crops, rows, columns), before center and temperature."""
        if prototypes is None:
            found = widen(x[:, rows, columns])
            return found.contiguous() if found.device.type == "cpu" else found
        chunk, part = x[:, rows], prototypes[columns]
        out = self.buffer(name, chunk.shape[0] * chunk.shape[1], part.shape[0], checks.wide(x.dtype))
        return product(chunk.reshape(-1, chunk.shape[2]), part, out).view(chunk.shape[0], chunk.shape[1], -1)

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(rows, columns), the same memory for every tile."""
        found = self.buffers.get(name)
        if found is None or found.numel() < rows * columns or found.dtype != dtype:
            found = self.buffers[name] = torch.empty(rows * columns, dtype=dtype, device=self.student.device)
        return found[: rows * columns].view(rows, columns)

    def pairs(self, rows: slice) -> Iterator[tuple[slice, _Pair]]:
        for columns in spans(self.k, self.columns):
            student = self.scores("student", self.student, self.ws, rows, columns)
            teacher = self.scores("teacher", self.teacher, self.wt, rows, columns)
            center = None if self.center is None else self.center[columns].to(teacher.dtype).contiguous()
            yield columns, _Pair(student, teacher, center, self.student_temp, self.teacher_temp)


class _Pair(NamedTuple):
    """A tile of scores of both networks, (S, rows, columns) and (T, rows, columns): each visited once or twice in C++,
    else by torch."""

    student: Tensor
    teacher: Tensor
    center: Tensor | None
    student_temp: float
    teacher_temp: float

    def in_library(self) -> bool:
        return in_library(self.student) and in_library(self.teacher)

    def logits(self) -> tuple[Tensor, Tensor]:
        teacher = self.teacher if self.center is None else self.teacher - self.center
        return self.student / self.student_temp, teacher / self.teacher_temp

    def gradient(self, lse_s: Tensor, lse_t: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """Derivatives of the sum of weights (S, T, rows) times cross-entropies by the student's logits; ``out`` may
        hold them."""
        if self.in_library():
            grad = out.view(self.student.shape)
            torch.ops.pyvit.distillation_tile_backward(*self, lse_s, lse_t, weights, grad)
            return grad
        q, p = self.logits()
        g = (q - lse_s[..., None]).exp_().mul_(weights.sum(1)[..., None])
        p = (p - lse_t[..., None]).exp_()
        for i in range(len(g)):
            for j in range(len(p)):
                g[i].addcmul_(p[j], weights[i, j, :, None], value=-1)
        return g.to(out.dtype)


class _Sums:
    """What a chunk of samples needs of all prototypes, one tile after another: log-sum-exps, and cross (S, T, rows),
    the sums of exp(teacher - top) times student."""

    def __init__(self, s: int, t: int, rows: int, like: Tensor) -> None:
        self.student, self.teacher = LogSumExp(s * rows, like), LogSumExp(t * rows, like)
        self.cross = like.new_zeros(s, t, rows, dtype=self.student.top.dtype)
        self.shapes = (s, rows), (t, rows)

    def add(self, pair: _Pair) -> None:
        student, teacher = self.student, self.teacher
        if pair.in_library():
            state = (student.top, student.total, teacher.top, teacher.total, self.cross)
            torch.ops.pyvit.distillation_tile(*pair, *state)
            return
        q, e = pair.logits()
        student.add(slice(None), q.flatten(0, 1), 1)
        before, top = teacher.top, torch.maximum(teacher.top, e.amax(-1).flatten())
        e, fade = (e - top.view(self.shapes[1])[..., None]).exp_(), (before - top).exp()
        teacher.top, teacher.total = top, teacher.total * fade + e.sum(-1).flatten()
        self.cross *= fade.view(self.shapes[1])
        for i in range(len(q)):
            for j in range(len(e)):
                self.cross[i, j] += (q[i] * e[j]).sum(-1)

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum-exps (S, rows), (T, rows); mean of the student's logits under each teacher (S, T, rows)."""
        mean = self.cross / self.teacher.total.view(self.shapes[1])
        return self.student.value().view(self.shapes[0]), self.teacher.value().view(self.shapes[1]), mean


def _tiled(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _Tiles(args[:-1])
    lse_s = torch.empty(tiles.s, tiles.n, dtype=checks.wide(tiles.student.dtype), device=tiles.student.device)
    lse_t = lse_s.new_empty(tiles.t, tiles.n)
    loss = lse_s.new_zeros(())
    for rows in tiles.chunks():
        sums = _Sums(tiles.s, tiles.t, rows.stop - rows.start, lse_s)
        for _, pair in tiles.pairs(rows):
            sums.add(pair)
        lse_s[:, rows], lse_t[:, rows], mean = sums.values()
        loss += (tiles.weights[..., rows] * (lse_s[:, None, rows] - mean)).sum()
    return loss, lse_s, lse_t


def _tiled_backward(grad: Tensor, lse_s: Tensor, lse_t: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    tiles = _Tiles(args[:-1])
    ws = tiles.ws
    grad_x = torch.zeros(tiles.student.shape, dtype=lse_s.dtype, device=lse_s.device)
    grad_w = lse_s.new_empty(0) if ws is None else (lse_s.new_empty if tiles.n else lse_s.new_zeros)(ws.shape)
    factor = grad / tiles.student_temp
    dtype = tiles.student.dtype if ws is not None and narrow(tiles.student, ws) else lse_s.dtype
    for rows in tiles.chunks():
        of_s, of_t, weights = (t[..., rows].contiguous() for t in (lse_s, lse_t, tiles.weights * factor))
        x = tiles.student[:, rows].flatten(0, 1)
        of_x = tiles.buffer("gradient of x", x.shape[0], x.shape[1], lse_s.dtype)
        for columns, pair in tiles.pairs(rows):
            out = tiles.buffer("gradient", x.shape[0], columns.stop - columns.start, dtype)
            g = pair.gradient(of_s, of_t, weights, out)
            if ws is None:
                grad_x[:, rows, columns] = g
                continue
            flat = g.view(out.shape)
            product(flat, ws[columns].t(), of_x, add=columns.start > 0)
            product(flat.t(), x.t(), grad_w[columns], add=rows.start > 0)
        if ws is not None:
            grad_x[:, rows] = of_x.view(tiles.s, -1, x.shape[1])
    return grad_x.to(tiles.student.dtype), grad_w if ws is None else grad_w.to(ws.dtype)


def _fake(
    student: Tensor, teacher: Tensor, _ws: Any, _wt: Any, _center: Any, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(()), weights.new_empty(student.shape[:2]), weights.new_empty(teacher.shape[:2])


_TILES, _TILES_BACKWARD = (
    "pyvit.ops.distillation_cross_entropy:_tiled",
    "pyvit.ops.distillation_cross_entropy:_tiled_backward",
)

DISTILL_BACKWARD = Gradient(
    _OP,
    formula=reference_losses.distillation_cross_entropy,
    kernels={
        "cpu": _TILES_BACKWARD,
        "cuda": _TILES_BACKWARD,
        "triton": "pyvit.triton_kernels.pairwise_losses:distillation_cross_entropy_backward",
    },
)
DISTILL = Operator(
    _OP,
    reference=reference_losses.distillation_cross_entropy,
    fake=_fake,
    check=_check_low,
    gradient=DISTILL_BACKWARD,
    kernels={
        "cpu": _TILES,
        "cuda": _TILES,
        "triton": "pyvit.triton_kernels.pairwise_losses:distillation_cross_entropy",
    },
)
