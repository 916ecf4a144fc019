"""The streaming losses as naive PyTorch: the definition of right, and what they are measured against. Each holds its
whole matrix.

Arguments are those of :data:`pyvit.schemas.PYTHON_SCHEMAS`, less ``backend``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.ops.checks import wide


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = scale * (a.to(wide(a.dtype)) @ b.to(wide(b.dtype)).t())
    lse_a, lse_b = logits.logsumexp(1), logits.logsumexp(0)
    return ((lse_a + lse_b) / 2 - logits.diagonal()).mean(), lse_a, lse_b


def nt_xent(z1: Tensor, z2: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.cat([z1, z2]).to(wide(z1.dtype))
    n = z1.shape[0]
    logits = (z @ z.t()) / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), -math.inf)
    lse = logits.logsumexp(1)
    positive = torch.cat([logits.diagonal(n), logits.diagonal(-n)])
    return (lse - positive).mean(), lse


def sigmoid_contrastive(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * (a.to(wide(a.dtype)) @ b.to(wide(b.dtype)).t()) + bias
    sign = 2 * torch.eye(a.shape[0], dtype=logits.dtype, device=a.device) - 1
    return -F.logsigmoid(sign * logits).sum() / a.shape[0]


def distillation_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor | None,
    teacher_prototypes: Tensor | None,
    center: Tensor | None,
    weights: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(student.dtype)
    s, t = student.to(dtype), teacher.detach().to(dtype)
    if student_prototypes is not None:
        s = s @ student_prototypes.to(dtype).t()
    if teacher_prototypes is not None:
        t = t @ teacher_prototypes.detach().to(dtype).t()
    if center is not None:
        t = t - center.detach().to(dtype)
    s, t = s / student_temp, t / teacher_temp
    lse_s, lse_t = s.logsumexp(-1), t.logsumexp(-1)
    log_p, p = s - lse_s[..., None], (t - lse_t[..., None]).exp()
    cross = -torch.einsum("snk,tnk->stn", log_p, p)
    return (weights.to(dtype) * cross).sum(), lse_s, lse_t


def nearest_neighbor(x: Tensor) -> Tensor:
    x = x.to(wide(x.dtype))
    return (x @ x.t()).fill_diagonal_(-math.inf).argmax(1)


def sinkhorn_knopp(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """Alternate normalisation of exp(scores / temperature) (B, K): columns to 1 / K, then rows to 1 / B; rows of the
    result sum to 1."""
    x = scores.to(wide(scores.dtype)) / temperature
    q = (x - x.logsumexp((0, 1))).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]
