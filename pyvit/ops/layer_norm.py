"""Layer norm over the last dimension, which may round its result to the dtype that the next layer multiplies in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvit import dispatch
from pyvit.dispatch import Call, Gradient, Operator
from pyvit.dispatch.capabilities import PLAIN
from pyvit.ops import checks, reference, row_norm
from pyvit.ops.tracing import traced


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, with mean and biased variance of the last dimension. Ba et al.
    (2016).

    Args:
        x: (..., C).
        weight, bias: (C,), of x's dtype or float32; None for ones and zeros.
        eps: added to the variance.
        dtype: of the result (default: x's). With bfloat16 or float16, rows of float32 are rounded as they are written,
            and their gradient is taken from the rounded one's: a cast that costs no pass of its own.
        backend: "cpu", "reference" (PyTorch's), or None: "cpu" where it can serve.

    Statistics are float32 (float64 for float64). Returns (..., C). Raises ValueError or TypeError naming the argument
    that does not fit, BackendError where ``backend`` cannot serve.
    """
    chosen = dispatch.select(row_norm.check("layer_norm", x, weight, bias, dtype), backend)
    eps, dtype = checks.number("layer_norm", "eps", eps), x.dtype if dtype is None else dtype
    if chosen in PLAIN or traced(x):  # compilers fuse the plain formula with what is around it
        return reference.layer_norm(x, weight, bias, eps, dtype)
    return LAYER_NORM.eager(x.contiguous(), weight, bias, eps, dtype, chosen)[0]


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Call:
    return row_norm.check("layer_norm", x, weight, bias)


@dispatch.describes(layer_norm)
def _describe(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Any, dtype: torch.dtype | None, backend: str | None
) -> tuple[Call, list[str]]:
    checks.number("layer_norm", "eps", eps)
    return row_norm.check("layer_norm", x, weight, bias, dtype), dispatch.copy_notes(x=x)


def _check_low(x: Tensor, weight: Tensor | None, bias: Tensor | None, _eps: float, dtype: torch.dtype) -> Call:
    return row_norm.check("layer_norm", x, weight, bias, dtype)


def _fake(x: Tensor, _weight: Any, _bias: Any, _eps: float, dtype: torch.dtype, _backend: str) -> tuple[Tensor, Tensor]:
    return row_norm.fake(x, dtype, 2)


LAYER_NORM = Operator(
    "layer_norm",
    reference=row_norm.layer_norm_reference,
    fake=_fake,
    check=_check_low,
    gradient=Gradient(
        "layer_norm", formula=reference.layer_norm, kernels={"cpu": "pyvit.ops.row_norm:layer_norm_backward"}
    ),
    kernels={"cpu": "pyvit.ops.row_norm:layer_norm"},
    inference={"cpu": row_norm.layer_norm_inference},
)
