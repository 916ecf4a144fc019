"""Self-distillation's cross-entropy (DINO, iBOT, DINOv2) with the prototype product fused: neither probability matrix is ever stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Operator
from pyvit.ops import checks, reference_losses, streaming
from pyvit.ops.streaming import LogSumExp, narrow, product, spans, widen

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
    """sum_stn weights[s, t, n] H(softmax((teacher[t, n] - center) / teacher_temp), softmax(student[s, n] / student_temp)).

    Args:
        student: logits (S, N, K), one slice per crop, or features (S, N, C) with ``student_prototypes``; (N, .) stands for S = 1.
        teacher: logits (T, N, K) or features (T, N, C') with ``teacher_prototypes``; (N, .) stands for T = 1. It gets no gradient.
        student_temp, teacher_temp: positive temperatures.
        center: (K,), taken from the teacher's logits: DINO's running centre, or the potentials of
            :func:`pyvit.ops.sinkhorn_center`, with which the teacher's softmax is the Sinkhorn assignment. No gradient.
        student_prototypes, teacher_prototypes: (K, C) and (K, C'); logits = features prototypes^T, a tile of K at a time.
        weights: (S, T, N) or broadcastable to it; default 1 / (S T N), the mean. Zero excludes a pair (a crop against itself).
        backend: force one backend.

    Returns:
        a float32 scalar (float64 for float64). With prototypes, memory is O((S + T) N + K C), forward and backward.

    Raises ValueError, TypeError for arguments that do not fit; BackendError when ``backend`` cannot serve.

    Sources: Caron et al., "DINO" (2021), algorithm 1; Zhou et al., "iBOT" (2022), equation 2.
    """
    student, teacher = (t[None] if isinstance(t, Tensor) and t.dim() == 2 else t for t in (student, teacher))
    call = _check(student, teacher, student_temp, teacher_temp, center, student_prototypes, teacher_prototypes, weights)
    chosen = dispatch.select(call, backend)
    shape = (student.shape[0], teacher.shape[0], student.shape[1])
    wide = checks.wide(student.dtype)
    if weights is None:
        weights = torch.full((1, 1, 1), 1 / max(shape[0] * shape[1] * shape[2], 1), dtype=wide, device=student.device)
    weights = weights.detach().to(wide).expand(shape)
    teacher, fixed = teacher.detach(), None if teacher_prototypes is None else teacher_prototypes.detach()
    with torch.autocast(student.device.type, enabled=False):
        args = (student, teacher, student_prototypes, fixed, None if center is None else center.detach(), weights)
        return DISTILL(*args, float(student_temp), float(teacher_temp), chosen)[0]


def _check(
    student: Tensor,
    teacher: Tensor,
    student_temp: float,
    teacher_temp: float,
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
        checks.same(_OP, f"{name}_prototypes", prototypes, name, t, dtype=False)
        if prototypes.shape[1] != t.shape[2]:
            checks.fail(_OP, f"{name}_prototypes", f"of shape (K, {t.shape[2]}) to fit {name}", checks.shape(prototypes))
        counts.append(prototypes.shape[0])
    if counts[0] != counts[1] or counts[0] == 0:
        checks.fail(_OP, "teacher", f"scored on the student's {counts[0]} prototypes, at least one", counts[1])
    if center is not None and tuple(center.shape) != (counts[0],):
        checks.fail(_OP, "center", f"of shape ({counts[0]},)", checks.shape(center))
    for name, value in (("student_temp", student_temp), ("teacher_temp", teacher_temp)):
        if not value > 0:
            checks.fail(_OP, name, "positive", value)
    wanted = (student.shape[0], teacher.shape[0], student.shape[1])
    if weights is not None and (weights.dim() != 3 or any(h not in (1, w) for h, w in zip(weights.shape, wanted, strict=True))):
        checks.fail(_OP, "weights", f"broadcastable to {wanted}", checks.shape(weights))
    found = streaming.features(student, student_prototypes)
    found += [name for name, given in (("prototypes", student_prototypes), ("center", center)) if given is not None]
    found += ["logits"] if student_prototypes is None or teacher_prototypes is None else []
    return Call(_OP, student.device.type, student.dtype, tuple(found))


@dispatch.describes(_OP)
def _describe(student: Tensor, teacher: Tensor, student_temp: float, teacher_temp: float, **kw: Any) -> tuple[Call, list[str]]:
    student, teacher = (t[None] if t.dim() == 2 else t for t in (student, teacher))
    optional = [kw.get(name) for name in ("center", "student_prototypes", "teacher_prototypes", "weights")]
    return _check(student, teacher, student_temp, teacher_temp, *optional), []


class _Tiles:
    """Scores of a chunk of samples against a chunk of prototypes, for both networks."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.student, self.teacher, self.ws, self.wt, self.center, self.weights, self.student_temp, self.teacher_temp = args
        self.s, self.n = self.student.shape[:2]
        self.t = self.teacher.shape[0]
        self.k = self.student.shape[2] if self.ws is None else self.ws.shape[0]
        columns = min(self.k, 4096)
        self.columns, self.rows = columns, max(1, _TILE_SCORES // (columns * (self.s + self.t)))

    def chunks(self) -> list[slice]:
        return list(spans(self.n, self.rows))

    def scores(self, x: Tensor, prototypes: Tensor | None, rows: slice, columns: slice) -> Tensor:
        """(crops, rows, columns), before temperature."""
        chunk = x[:, rows]
        if prototypes is None:
            return widen(chunk[..., columns])
        return product(chunk.reshape(-1, chunk.shape[2]), prototypes[columns]).view(chunk.shape[0], chunk.shape[1], -1)

    def student_scores(self, rows: slice, columns: slice) -> Tensor:
        return self.scores(self.student, self.ws, rows, columns) / self.student_temp

    def teacher_scores(self, rows: slice, columns: slice) -> Tensor:
        scores = self.scores(self.teacher, self.wt, rows, columns)
        if self.center is not None:
            scores = scores - self.center[columns].to(scores.dtype)
        return scores / self.teacher_temp


def _tiled(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _Tiles(args[:-1])
    s, t, n = tiles.s, tiles.t, tiles.n
    lse_s = torch.empty(s, n, dtype=checks.wide(tiles.student.dtype), device=tiles.student.device)
    lse_t = lse_s.new_empty(t, n)
    loss = lse_s.new_zeros(())
    for rows in tiles.chunks():
        m = rows.stop - rows.start
        student, top_t = LogSumExp(s * m, lse_s), lse_s.new_full((t, m), torch.finfo(lse_s.dtype).min)
        total_t, cross = lse_s.new_zeros(t, m), lse_s.new_zeros(s, t, m)  # cross: sum_k e^(teacher - top) student, rescaled as top rises
        for columns in spans(tiles.k, tiles.columns):
            q, e = tiles.student_scores(rows, columns), tiles.teacher_scores(rows, columns)
            top = torch.maximum(top_t, e.amax(-1))
            e = (e - top[..., None]).exp_()
            fade = (top_t - top).exp()
            total_t, top_t = total_t * fade + e.sum(-1), top
            for i in range(s):
                for j in range(t):
                    cross[i, j].mul_(fade[j]).add_((q[i] * e[j]).sum(-1))
            flat = q.reshape(s * m, -1)
            student.add(slice(0, s * m), flat, 1)
        lse_s[:, rows], lse_t[:, rows] = student.value().view(s, m), top_t + total_t.log()
        loss += (tiles.weights[..., rows] * (lse_s[:, None, rows] - cross / total_t)).sum()
    return loss, lse_s, lse_t


def _tiled_backward(grad: Tensor, lse_s: Tensor, lse_t: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    tiles = _Tiles(args[:-1])
    s, t = tiles.s, tiles.t
    fused = tiles.ws is not None
    grad_x = torch.zeros(tiles.student.shape, dtype=lse_s.dtype, device=lse_s.device)
    grad_w = torch.zeros(tiles.ws.shape, dtype=lse_s.dtype, device=lse_s.device) if fused else lse_s.new_empty(0)
    factor = grad / tiles.student_temp
    for rows in tiles.chunks():
        weights = tiles.weights[..., rows] * factor  # (S, T, rows)
        x = tiles.student[:, rows].flatten(0, 1) if fused else None
        for columns in spans(tiles.k, tiles.columns):
            g = (tiles.student_scores(rows, columns) - lse_s[:, rows, None]).exp_().mul_(weights.sum(1)[..., None])
            p = (tiles.teacher_scores(rows, columns) - lse_t[:, rows, None]).exp_()
            for i in range(s):
                for j in range(t):
                    g[i].addcmul_(p[j], weights[i, j, :, None], value=-1)
            if x is None:
                grad_x[:, rows, columns] = g
                continue
            flat, prototypes = g.view(x.shape[0], -1), tiles.ws[columns]
            if narrow(x, prototypes):
                flat = flat.to(x.dtype)
            grad_x[:, rows] += product(flat, prototypes.t()).view(s, -1, x.shape[1])
            grad_w[columns] += product(flat.t(), x.t())
    return grad_x.to(tiles.student.dtype), grad_w.to(tiles.ws.dtype) if fused else grad_w


def _fake(student: Tensor, teacher: Tensor, _ws: Any, _wt: Any, _center: Any, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(()), weights.new_empty(student.shape[:2]), weights.new_empty(teacher.shape[:2])


def _fake_backward(
    grad: Tensor, _s: Tensor, _t: Tensor, student: Tensor, _teacher: Tensor, ws: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return student.new_empty(student.shape), grad.new_empty(0) if ws is None else ws.new_empty(ws.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.student_temp, ctx.teacher_temp, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *tensors)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    grad_student, grad_prototypes = DISTILL_BACKWARD(grad, *saved, ctx.student_temp, ctx.teacher_temp, ctx.backend)
    return grad_student, None, grad_prototypes if saved[4] is not None else None, *(None,) * 6


def _reference_backward(grad: Tensor, _s: Tensor, _t: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted = [0] if args[2] is None else [0, 2]
    found = dispatch.reference_backward(reference_losses.distillation_cross_entropy, (grad,), args, wanted)
    return found[0], found[1] if len(found) == 2 else grad.new_empty(0)  # type: ignore[return-value]


_TILES, _TILES_BACKWARD = "pyvit.ops.distillation:_tiled", "pyvit.ops.distillation:_tiled_backward"

DISTILL_BACKWARD = Operator(
    f"{_OP}_backward",
    reference=_reference_backward,
    fake=_fake_backward,
    kernels={
        "cpu": _TILES_BACKWARD,
        "cuda": _TILES_BACKWARD,
        "triton": "pyvit.triton_kernels.contrastive:distillation_cross_entropy_backward",
    },
    **dispatch.double_backward(reference_losses.distillation_cross_entropy, n_grads=1, n_skipped=2, inputs=(0, 2)),
)
DISTILL = Operator(
    _OP,
    reference=reference_losses.distillation_cross_entropy,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels={"cpu": _TILES, "cuda": _TILES, "triton": "pyvit.triton_kernels.contrastive:distillation_cross_entropy"},
)
