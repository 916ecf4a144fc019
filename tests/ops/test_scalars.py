"""Scalar arguments: a tensor is converted to a number as in torch's functions, gets its gradient, or is refused by
name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyvit import explain, ops
from pyvit.losses import DINOLoss, NTXentLoss
from pyvit.nn.residual import DropPath

torch.manual_seed(0)
Q = torch.randn(2, 2, 5, 8)
X = torch.randn(6, 8)
CU = torch.tensor([0, 2, 5])
QKV = torch.randn(1, 4, 4, 48)

#: Operator, its tensors, and its scalars without a gradient, each with a value.
PLAIN: list[tuple[Callable[..., Any], dict[str, Any], dict[str, float]]] = [
    (ops.flash_attention, {"q": Q, "k": Q, "v": Q}, {"scale": 0.3, "dropout_p": 0.0}),
    (ops.scaled_dot_product_attention, {"query": Q, "key": Q, "value": Q}, {"scale": 0.3, "dropout_p": 0.0}),
    (ops.flash_attention_qkvpacked, {"qkv": torch.randn(2, 5, 3, 2, 8)}, {"scale": 0.3, "dropout_p": 0.0}),
    (
        ops.flash_attention_varlen,
        {
            "q": Q[0].mT.mT.transpose(0, 1),
            "k": Q[0].transpose(0, 1),
            "v": Q[0].transpose(0, 1),
            "cu_seqlens_q": CU,
            "cu_seqlens_k": CU,
        }
        | {"max_seqlen_q": 3, "max_seqlen_k": 3},
        {"scale": 0.3},
    ),
    (ops.attention_map, {"q": Q, "k": Q, "rows": 0}, {"scale": 0.3}),
    (ops.window_attention, {"qkv": QKV, "window_size": 2, "num_heads": 2}, {"scale": 0.3, "dropout_p": 0.0}),
    (ops.layer_norm, {"x": X}, {"eps": 1e-3}),
    (ops.rms_norm, {"x": X}, {"eps": 1e-3}),
    (ops.koleo, {"x": X}, {"eps": 1e-3}),
    (ops.sinkhorn_knopp, {"scores": X, "temperature": 0.5}, {"temperature": 0.5}),
    (ops.sinkhorn_center, {"features": X, "temperature": 0.5}, {"temperature": 0.5}),
    (
        ops.distillation_cross_entropy,
        {"student": X, "teacher": X, "student_temp": 0.5, "teacher_temp": 0.3},
        {"student_temp": 0.4, "teacher_temp": 0.6},
    ),
]
ROWS = [(op, tensors, name, value) for op, tensors, numbers in PLAIN for name, value in numbers.items()]
#: Scalars with a gradient.
LEARNED: list[tuple[Callable[..., Any], dict[str, Any], str, float]] = [
    (ops.info_nce, {"a": X, "b": X.flip(0)}, "scale", 3.0),
    (ops.nt_xent, {"z1": X, "z2": X.flip(0)}, "temperature", 0.5),
    (ops.sigmoid_contrastive, {"a": X, "b": X.flip(0), "bias": -1.0}, "scale", 3.0),
    (ops.sigmoid_contrastive, {"a": X, "b": X.flip(0), "scale": 3.0}, "bias", -1.0),
]
EXPLAINED = {"scaled_dot_product_attention", "sinkhorn_knopp", "sinkhorn_center"}  # no operators of their own


def _ids(row: Any) -> str:
    return row.__name__ if callable(row) else row if isinstance(row, str) else ""


@pytest.mark.parametrize(("op", "tensors", "name", "value"), ROWS, ids=_ids)
def test_a_number_without_a_gradient(op: Callable[..., Any], tensors: dict[str, Any], name: str, value: float) -> None:
    want = op(**{**tensors, name: value})
    for other in (torch.tensor(value, dtype=torch.float64), np.float64(value)):
        torch.testing.assert_close(op(**{**tensors, name: other}), want)
    learned = nn.Parameter(torch.tensor(value))
    for other in (learned, learned * 1, torch.tensor([value]), torch.tensor(value + 0j), str(value), None, [value]):
        if other is None and (name == "scale" or op is ops.rms_norm):  # the default
            continue
        for call in (op, None if op.__name__ in EXPLAINED else lambda **kw: explain(op, **kw)):
            if call is not None:
                with pytest.raises(TypeError, match=f"{name} must be a number"):
                    call(**{**tensors, name: other})
    with torch.no_grad(), pytest.raises(TypeError, match=name):  # as torch, which looks at the tensor alone
        op(**{**tensors, name: learned})


@pytest.mark.parametrize(("op", "tensors", "name", "value"), [row for row in ROWS if row[2] == "scale"], ids=_ids)
def test_a_compiled_call_is_refused_too(
    op: Callable[..., Any], tensors: dict[str, Any], name: str, value: float
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda number: op(**{**tensors, name: number}), backend="eager")
    torch.testing.assert_close(compiled(value), op(**{**tensors, name: value}))
    with pytest.raises(Exception, match=f"{name} must be a number"):
        compiled(nn.Parameter(torch.tensor(value)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(("op", "tensors", "name", "value"), LEARNED, ids=_ids)
def test_a_learned_number_has_its_gradient(
    op: Callable[..., Any], tensors: dict[str, Any], name: str, value: float, shape: tuple[int, ...]
) -> None:
    given = torch.full(shape, value, requires_grad=True)
    loss = op(**{**tensors, name: given})
    torch.testing.assert_close(loss, op(**{**tensors, name: value}))
    (grad,) = torch.autograd.grad(loss, given)
    wide = {k: t.double() if isinstance(t, Tensor) else t for k, t in tensors.items()}
    step = 1e-5
    want = (
        op(**{**wide, name: value + step}, backend="reference")
        - op(**{**wide, name: value - step}, backend="reference")
    ) / (2 * step)
    assert grad.shape == shape
    torch.testing.assert_close(grad.double().reshape(()), want, rtol=1e-3, atol=1e-4)
    for other in (torch.ones(2), torch.tensor(1j), "1", None):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be a number"):
            op(**{**tensors, name: other})


def test_tensors_that_get_no_gradient_must_not_ask_for_one() -> None:
    images, weight, ask = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4), torch.rand(3, requires_grad=True)
    for mean, std, name in ((ask, torch.ones(3), "mean"), (torch.zeros(3), ask, "std")):
        with pytest.raises(TypeError, match=f"patch_embed: {name} must not require a gradient"):
            ops.patch_embed(images, weight, mean=mean, std=std)
    with torch.no_grad():
        ops.patch_embed(images, weight, mean=ask, std=ask)
    with pytest.raises(TypeError, match="weights must not require a gradient"):
        ops.distillation_cross_entropy(X, X, 0.1, 0.1, weights=torch.rand(1, 1, 6, requires_grad=True))


def test_modules() -> None:
    """A learned temperature gets gradients, or is refused when it is used."""
    loss = NTXentLoss(nn.Parameter(torch.tensor(0.5)))  # type: ignore[arg-type]
    loss(X, X.flip(0)).backward()
    assert loss.temperature.grad.abs() > 0  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="DropPath: p must be a number"):
        DropPath(nn.Parameter(torch.tensor(0.5)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="student_temp must be a number"):
        DINOLoss(8, student_temp=nn.Parameter(torch.tensor(0.5)))(X[None], torch.stack([X, X]), 0.1)  # type: ignore[arg-type]
