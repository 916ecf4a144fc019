"""The pairwise and distillation losses: naive forms, which store the logits, and pyvit's, which do not.

The naive forms round as autocast does: products in the inputs' dtype, softmax and sums in float32. On a CPU without
bfloat16 products, where torch is twenty times slower in bfloat16, they multiply float32 copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import pyvit
from benchmarks.cases import Case
from benchmarks.specs import Provider, Spec, Tensors, compiled
from benchmarks.workload import OURS
from pyvit.ops.checks import wide


def _pairs(n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Unit embeddings whose pairs are more similar than others, as early in training."""
    rng = torch.Generator().manual_seed(11)
    a = torch.randn(n, d, generator=rng)
    b = a + 3 * torch.randn(n, d, generator=rng)
    return tuple(F.normalize(x, dim=1).to(device, dtype) for x in (a, b))  # type: ignore[return-value]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y^T."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        x, y = x.float(), y.float()
    return x @ y.T


def _spec(
    tensors: Tensors,
    naive: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    grads: Sequence[str],
    flops: float,
    back: float,
) -> Spec:
    providers = [Provider(OURS, ours), Provider("naive", naive), Provider("compile", compiled(naive))]
    return Spec(tensors, naive, providers, grads, flops, back, 1)


def _info_nce(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    n, d = case.shape["batch"], case.shape["dim"]
    a, b = _pairs(n, d, dtype, device)
    tensors = {"a": a, "b": b, "scale": torch.tensor(1 / 0.07, device=device, dtype=dtype)}

    def naive(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        logits = _product(scale * a, b).to(wide(a.dtype))
        labels = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return _spec(tensors, naive, pyvit.ops.info_nce, tuple(tensors), 2 * n * n * d, 2.0)


def _nt_xent(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    n, d = case.shape["batch"], case.shape["dim"]
    z1, z2 = _pairs(n, d, dtype, device)
    tensors = {"z1": z1, "z2": z2, "temperature": torch.tensor(0.1, device=device, dtype=dtype)}

    def naive(z1: Tensor, z2: Tensor, temperature: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        logits = (_product(z, z) / temperature).fill_diagonal_(-math.inf)
        partners = torch.arange(2 * len(z1), device=z.device).roll(len(z1))
        return F.cross_entropy(logits.to(wide(z.dtype)), partners)

    # The matrix (2n, 2n) is symmetric: the forward needs half of its products.
    return _spec(tensors, naive, pyvit.ops.nt_xent, tuple(tensors), (2 * n) ** 2 * d, 2.0)


def _sigmoid_contrastive(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    n, d = case.shape["batch"], case.shape["dim"]
    a, b = _pairs(n, d, dtype, device)
    tensors = {"a": a, "b": b, "scale": torch.tensor(10.0, device=device, dtype=dtype)}
    tensors["bias"] = torch.tensor(-10.0, device=device, dtype=dtype)

    def naive(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = _product(scale * a, b) + bias
        sign = 2 * torch.eye(len(a), device=a.device, dtype=a.dtype) - 1
        return -F.logsigmoid(sign * logits).sum(dtype=wide(a.dtype)) / len(a)

    return _spec(tensors, naive, pyvit.ops.sigmoid_contrastive, tuple(tensors), 2 * n * n * d, 2.0)


def _distillation(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    """DINO's loss from features and prototypes: every student crop with every teacher crop of its image."""
    crops, views, n, d, k = (case.shape[key] for key in ("crops", "views", "batch", "dim", "prototypes"))
    rng = torch.Generator().manual_seed(12)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=rng), dim=-1).to(device, dtype)  # noqa: E731
    tensors = {"student": unit(crops, n, d), "teacher": unit(views, n, d), "ws": unit(k, d), "wt": unit(k, d)}

    def naive(student: Tensor, teacher: Tensor, ws: Tensor, wt: Tensor) -> Tensor:
        log_p = (_product(student, ws) / 0.1).log_softmax(-1, dtype=wide(ws.dtype))
        p = (_product(teacher, wt) / 0.04).softmax(-1, dtype=wide(wt.dtype))
        return -(p.sum(0) * log_p.sum(0)).sum() / (crops * views * n)

    def ours(student: Tensor, teacher: Tensor, ws: Tensor, wt: Tensor) -> Tensor:
        return pyvit.ops.distillation_cross_entropy(
            student, teacher, 0.1, 0.04, student_prototypes=ws, teacher_prototypes=wt
        )

    # Only the student gets gradients: two products of its part.
    return _spec(tensors, naive, ours, ("student", "ws"), 2 * (crops + views) * n * d * k, 2 * crops / (crops + views))


SPECS: dict[str, Callable[[Case, str, torch.dtype, str], Spec]] = {
    "info_nce": _info_nce,
    "nt_xent": _nt_xent,
    "sigmoid_contrastive": _sigmoid_contrastive,
    "distillation_cross_entropy": _distillation,
}
