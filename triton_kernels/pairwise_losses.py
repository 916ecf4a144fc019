"""Launchers of the pairwise losses, from the two kernels of :mod:`pyvit.triton_kernels.pairwise_losses_kernels`.

The score matrix is never stored. Memory is used for the inputs, one number per row and split, and the gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from pyvit.triton_kernels.common import arch_of, launch, precision, processors, rows_unit
from pyvit.triton_kernels.pairwise_losses_kernels import SIGMOID, SOFTMAX, pair_gradient, pair_sums
from pyvit.triton_kernels.tiles import Config, choose, parts
from torch import Tensor

#: Weights are at most 2 (3 including the pull). Times this factor they are finite in float16 and mostly not subnormal.
_BOOST = 16384.0
#: ``partner`` of a call without positives; no two indices differ by this.
_NOBODY = -1


def _tiles(kernel: str, x: Tensor) -> tuple[Config, dict[str, Any]]:
    c = choose(kernel, arch_of(x), x.element_size(), x.shape[1], x.shape[0])
    return c, {
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_K": c.edge_n,
        "PRECISION": precision(x),
        "D": x.shape[1],
    }


def _splits(x: Tensor, n_cols: int, block_n: int, programs: int) -> tuple[int, int]:
    """Into how many parts the columns are split, so that short batches fill the GPU, and the columns of each part."""
    blocks = -(-n_cols // block_n)
    wanted = max(1, min(blocks // 4, 2 * processors(x) // max(programs, 1)))
    share = -(-blocks // wanted) * block_n
    return -(-n_cols // share), share


def row_sums(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    kind: int = SOFTMAX.value,
    bias: Tensor | None = None,
    y_offset: Tensor | None = None,
    partner: int = _NOBODY,
    exclude: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """For each row of x (N, D): the log-sum-exp, or with SIGMOID the sum of softplus, of the scores (x y^T - y_offset)
    * scale + bias, (N,).

    With ``partner``, also the score of the pair whose indices differ by it. ``exclude`` leaves out the diagonal. y (M,
    D), scale and bias ().
    """
    x, y = rows_unit(x), rows_unit(y)
    c, blocks = _tiles("pair_sums", x)
    programs = -(-x.shape[0] // c.block_m)
    splits, share = _splits(x, y.shape[0], c.block_n, programs)
    sums = scale.new_empty(splits, x.shape[0])
    positives = None if partner == _NOBODY else scale.new_empty(splits, x.shape[0])
    args = blocks | {
        "x": x,
        "y": y,
        "scale": scale,
        "bias": bias,
        "y_offset": y_offset,
        "sums": sums,
        "positives": positives,
    }
    args |= {
        "x_stride": x.stride(0),
        "y_stride": y.stride(0),
        "n_rows": x.shape[0],
        "n_cols": y.shape[0],
        "share": share,
    }
    args |= {"partner": partner, "KIND": kind, "EXCLUDE": exclude}
    launch(pair_sums, programs * splits, args, c.warps, c.stages)
    merged = sums[0] if splits == 1 else sums.logsumexp(0) if kind == SOFTMAX.value else sums.sum(0)
    return merged, None if positives is None else positives.sum(0)


def gradient(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    scale: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
    *,
    kind: int = SOFTMAX.value,
    bias: Tensor | None = None,
    x_offset: Tensor | None = None,
    y_offset: Tensor | None = None,
    x_lse: Tensor | None = None,
    y_lse: Tensor | None = None,
    y_weight: Tensor | None = None,
    partner: int = _NOBODY,
    pull: float = 0.0,
    exclude: bool = False,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``factor`` () times weights (N, M) values (M, DV), as ``dtype`` (N, DV). The weights are a softmax over columns
    (``x_lse``), over rows (``y_lse``, times ``y_weight``, at most 1), their sum, or a sigmoid; minus ``pull`` at the
    positives.

    With ``statistics`` also the sums of weight times product and of weights, ().
    """
    x, y, values = rows_unit(x), rows_unit(y), rows_unit(values)
    c, blocks = _tiles("pair_gradient", x)
    (n, m), width = (x.shape[0], y.shape[0]), values.shape[1]
    slices = -(-width // (128 * c.group))
    held = parts(-(-width // slices))
    slices = -(-width // sum(held))
    programs = -(-n // c.block_m) * slices
    splits, share = _splits(x, m, c.block_n, programs)
    out = x.new_empty((splits, n, width), dtype=dtype if splits == 1 else torch.float32)
    by_scale, by_bias = (scale.new_empty(splits, n) if statistics else None for _ in range(2))
    args = blocks | {
        "x": x,
        "y": y,
        "values": values,
        "scale": scale,
        "bias": bias,
        "x_offset": x_offset,
        "y_offset": y_offset,
    }
    args |= {
        "x_lse": x_lse,
        "y_lse": y_lse,
        "y_weight": y_weight,
        "factor": factor,
        "out": out,
        "by_scale": by_scale,
        "by_bias": by_bias,
    }
    args |= {
        "x_stride": x.stride(0),
        "y_stride": y.stride(0),
        "values_stride": values.stride(0),
        "n_rows": n,
        "n_cols": m,
        "share": share,
    }
    args |= {
        "partner": partner,
        "pull": pull,
        "KIND": kind,
        "EXCLUDE": exclude,
        "BOOST": _BOOST if x.dtype == torch.float16 else 1.0,
    }
    args |= {"DV": width, "PARTS": held, "WIDE": sum(held)}
    launch(pair_gradient, programs * splits, args, c.warps, c.stages)
    merged = out[0] if splits == 1 else out.sum(0).to(dtype)
    return merged, None if by_scale is None else by_scale.sum(), None if by_bias is None else by_bias.sum()


def info_nce(a: Tensor, b: Tensor, scale: Tensor, backend: str = "triton") -> tuple[Tensor, Tensor, Tensor]:
    """Loss () and both directions' log-sum-exps (N,), as :func:`pyvit.ops.info_nce` states them."""
    lse_a, positive = row_sums(a, b, scale, partner=0)
    lse_b, _ = row_sums(b, a, scale)
    return ((lse_a + lse_b) / 2 - positive).mean(), lse_a, lse_b


def info_nce_backward(
    grad: Tensor, lse_a: Tensor, lse_b: Tensor, a: Tensor, b: Tensor, scale: Tensor, backend: str = "triton"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and scale."""
    weight = grad / (2 * a.shape[0])
    pair: dict[str, Any] = {"scale": scale, "factor": weight * scale, "dtype": a.dtype, "partner": 0, "pull": 2.0}
    grad_a, by_scale, _ = gradient(a, b, b, **pair, x_lse=lse_a, y_lse=lse_b, statistics=True)
    grad_b, _, _ = gradient(b, a, a, **pair, x_lse=lse_b, y_lse=lse_a)
    return grad_a, grad_b, by_scale * weight


def nt_xent(z1: Tensor, z2: Tensor, temperature: Tensor, backend: str = "triton") -> tuple[Tensor, Tensor]:
    """Loss () and log-sum-exps (2N,), as :func:`pyvit.ops.nt_xent` states them."""
    z = torch.cat([z1, z2])
    lse, positive = row_sums(z, z, 1 / temperature, partner=z1.shape[0], exclude=True)
    return (lse - positive).mean(), lse


def nt_xent_backward(
    grad: Tensor, lse: Tensor, z1: Tensor, z2: Tensor, temperature: Tensor, backend: str = "triton"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z1, z2 and temperature. The scores are symmetric, so one launch computes the weights of both
    directions, P_ij + P_ji."""
    z, n = torch.cat([z1, z2]), z1.shape[0]
    weight = grad / (2 * n * temperature)
    both: dict[str, Any] = {"x_lse": lse, "y_lse": lse, "partner": n, "pull": 2.0, "exclude": True}
    grad_z, by_scale, _ = gradient(z, z, z, 1 / temperature, weight, z.dtype, **both, statistics=True)
    return grad_z[:n], grad_z[n:].clone(), -by_scale / 2 * weight / temperature


def sigmoid_contrastive(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, backend: str = "triton") -> Tensor:
    """Loss (), as :func:`pyvit.ops.sigmoid_contrastive` states it. A positive pair's softplus(-l) is computed as
    softplus(l) - l."""
    sums, positive = row_sums(a, b, scale, kind=SIGMOID.value, bias=bias, partner=0)
    return (sums - positive).mean()


def sigmoid_contrastive_backward(
    grad: Tensor, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, backend: str = "triton"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, scale and bias."""
    weight = grad / a.shape[0]
    pair: dict[str, Any] = {
        "scale": scale,
        "factor": weight * scale,
        "dtype": a.dtype,
        "kind": SIGMOID.value,
        "bias": bias,
        "partner": 0,
    }
    grad_a, by_scale, by_bias = gradient(a, b, b, **pair, pull=1.0, statistics=True)
    grad_b, _, _ = gradient(b, a, a, **pair, pull=1.0)
    return grad_a, grad_b, by_scale * weight, by_bias * weight


def _distill(
    student: Tensor,
    teacher: Tensor,
    ws: Tensor | None,
    wt: Tensor | None,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Rows of both networks, their prototypes, inverse temperatures () and the centre in float32."""
    if ws is None or wt is None:
        raise ValueError(
            "distillation_cross_entropy: the triton backend takes features and prototypes of both networks, got logits"
        )
    like: dict[str, Any] = {"dtype": torch.float32, "device": student.device}
    inverse = torch.full((), 1 / student_temp, **like), torch.full((), 1 / teacher_temp, **like)
    given = student.flatten(0, 1), teacher.flatten(0, 1), ws, wt
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in given))
    x, y, ws, wt = (t.to(dtype) for t in given)
    return x, y, ws, wt, *inverse, None if center is None else center.float().contiguous()


def _mean_prototypes(
    teacher: Tensor, wt: Tensor, ws: Tensor, inverse: Tensor, center: Tensor | None, lse: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Student prototypes averaged with the teacher's probabilities, (T, N, C). The loss depends on the teacher only
    through these."""
    one = torch.ones_like(inverse)
    return gradient(teacher, wt, ws, inverse, one, torch.float32, y_offset=center, x_lse=lse.flatten())[0].view(
        *shape, ws.shape[1]
    )


def distillation_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor | None,
    teacher_prototypes: Tensor | None,
    center: Tensor | None,
    weights: Tensor,
    student_temp: float,
    teacher_temp: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () and log-sum-exps (S, N) and (T, N), as :func:`pyvit.ops.distillation_cross_entropy` states them, from
    prototypes.

    The cross term sum_k p_k (w_k . x) is (sum_k p_k w_k) . x: attention of the teacher to the student's prototypes,
    then a dot product.
    """
    x, y, ws, wt, by_student, by_teacher, middle = _distill(
        student, teacher, student_prototypes, teacher_prototypes, center, student_temp, teacher_temp
    )
    lse_s = row_sums(x, ws, by_student)[0].view(student.shape[:2])
    lse_t = row_sums(y, wt, by_teacher, y_offset=middle)[0].view(teacher.shape[:2])
    mean = _mean_prototypes(y, wt, ws, by_teacher, middle, lse_t, (teacher.shape[0], teacher.shape[1]))
    cross = torch.einsum("snc,tnc->stn", student.float(), mean) * by_student
    return (weights * (lse_s[:, None] - cross)).sum(), lse_s, lse_t


def distillation_cross_entropy_backward(
    grad: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor | None,
    teacher_prototypes: Tensor | None,
    center: Tensor | None,
    weights: Tensor,
    student_temp: float,
    teacher_temp: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """Gradients of student and its prototypes."""
    x, y, ws, wt, by_student, by_teacher, middle = _distill(
        student, teacher, student_prototypes, teacher_prototypes, center, student_temp, teacher_temp
    )
    one, factor = torch.ones_like(by_student), grad * by_student
    mean = _mean_prototypes(y, wt, ws, by_teacher, middle, lse_t, (teacher.shape[0], teacher.shape[1]))
    own = gradient(x, ws, ws, by_student, one, torch.float32, x_lse=lse_s.flatten())[0].view_as(student)
    each = weights.sum(1)  # (S, N)
    grad_student = (own * each[..., None] - torch.einsum("stn,tnc->snc", weights, mean)) * factor
    # Weights are divided by the largest, so that their products fit into float16.
    most = each.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    pulled = torch.einsum("stn,snc->tnc", weights / most, student.float()).to(x.dtype).flatten(0, 1)
    weighed: dict[str, Any] = {"y_lse": lse_s.flatten(), "y_weight": (each / most).flatten()}
    grad_ws = gradient(ws, x, x, by_student, factor * most, torch.float32, **weighed)[0]
    grad_ws -= gradient(
        wt, y, pulled, by_teacher, factor * most, torch.float32, x_offset=middle, y_lse=lse_t.flatten()
    )[0]
    return grad_student.to(student.dtype), grad_ws.to(ws.dtype)
