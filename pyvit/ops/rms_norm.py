"""RMS norm over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit.dispatch import Call, Gradient, Operator, copy_notes, describes, select
from pyvit.dispatch.capabilities import PLAIN
from pyvit.ops import checks, reference, row_norm
from pyvit.ops.tracing import traced


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, with the mean over the last dimension. Zhang and Sennrich (2019), equation 4.

    Args:
        x: (..., C).
        weight: (C,), of x's dtype or float32; None for ones.
        eps: added to the mean square; by default ``torch.finfo(x.dtype).eps``.
        dtype, backend: as in :func:`pyvit.ops.layer_norm`.

    The mean square is float32 (float64 for float64). Returns (..., C). Raises as :func:`pyvit.ops.layer_norm`.
    """
    chosen = select(_check(x, weight, eps, dtype), backend)
    eps = checks.number("rms_norm", "eps", torch.finfo(x.dtype).eps if eps is None else eps)
    dtype = x.dtype if dtype is None else dtype
    if chosen in PLAIN or traced(x):  # compilers fuse the plain formula with what is around it
        return reference.rms_norm(x, weight, eps, dtype)
    return RMS_NORM.eager(x.contiguous(), weight, eps, dtype, chosen)[0]


def _check(x: Tensor, weight: Tensor | None, eps: float | None, dtype: torch.dtype | None) -> Call:
    checks.number("rms_norm", "eps", 0.0 if eps is None else eps)
    return row_norm.check("rms_norm", x, weight, None, dtype)


@describes(rms_norm)
def _describe(x: Tensor, weight: Tensor | None, eps: Any, dtype: Any, backend: str | None) -> tuple[Call, list[str]]:
    return _check(x, weight, eps, dtype), copy_notes(x=x)


RMS_NORM = Operator(
    "rms_norm",
    reference=row_norm.rms_norm_reference,
    fake=lambda x, weight, eps, dtype, backend: row_norm.fake(x, dtype, 1),
    check=_check,
    gradient=Gradient("rms_norm", formula=reference.rms_norm, kernels={"cpu": "pyvit.ops.row_norm:rms_norm_backward"}),
    kernels={"cpu": "pyvit.ops.row_norm:rms_norm"},
    inference={"cpu": row_norm.rms_norm_inference},
)
