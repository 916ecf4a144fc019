"""The numerics rule itself: it must detect wrong results."""

from __future__ import annotations

import math

import pytest
import torch

from pyvit import testing
from pyvit.testing import NumericsError, check_op, compare, layout, poisoned


def _three(n: int = 100, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ref = torch.randn(n, dtype=torch.float64)
    return ref.to(dtype), ref.to(dtype), ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes_and_more_fails(dtype: torch.dtype) -> None:
    op, naive, ref = _three(dtype=dtype)
    compare("exact", op, naive, ref)
    step = torch.finfo(dtype).eps * float(ref.abs().max())
    op = (ref + 20 * step).to(dtype)
    with pytest.raises(NumericsError, match="FAIL off"):
        compare("off", op, naive, ref)
    compare("as bad as naive", op, (ref - 12 * step).to(dtype), ref)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_must_agree(bad: float) -> None:
    op, naive, ref = _three()
    op[3] = bad
    with pytest.raises(NumericsError, match=r"worst at \(3,\)"):
        compare("x", op, naive, ref)
    ref[3] = naive[3] = bad
    compare("x", op, naive, ref)
    op[3] = 0.0
    with pytest.raises(NumericsError):
        compare("x", op, naive, ref)


def test_overflow_of_the_naive_form_does_not_widen_the_limit() -> None:
    op, naive, ref = _three()
    naive[0], op[1] = math.inf, 5.0
    with pytest.raises(NumericsError):
        compare("x", op, naive, ref)


def test_shapes_and_dtypes_must_agree() -> None:
    op, naive, ref = _three()
    with pytest.raises(NumericsError, match="wanted"):
        compare("x", op[None], naive, ref)
    with pytest.raises(NumericsError, match="bfloat16"):
        compare("x", op.bfloat16(), naive, ref)
    with pytest.raises(ValueError, match="2 outputs, 1 naive"):
        compare("x", [op, op], [naive], [ref])


def test_a_gradient_that_is_zero_is_measured_against_its_group() -> None:
    zero, tiny = torch.zeros(4), torch.full((4,), 1e-7)
    compare("alone", [zero], [zero], [zero.double()])
    with pytest.raises(NumericsError):
        compare("alone", [tiny], [zero], [zero.double()])
    compare("group", [tiny, zero + 1], [zero, zero + 1], [zero.double(), zero.double() + 1])


def test_check_op_finds_a_wrong_value_and_a_wrong_gradient() -> None:
    def op(x: torch.Tensor, backend: str, wrong: str = "") -> torch.Tensor:
        y = x.sin()
        if backend == "reference":
            return y
        if wrong == "gradient":
            return y.detach() + x - x.detach()
        return torch.empty_like(y) if wrong == "unwritten" else y * (1.001 if wrong == "value" else 1.0)

    tensors = {"x": torch.randn(5, 5)}
    assert [c.name for c in check_op(op, tensors, backend="cpu")] == ["op out", "op grad_x"]
    for wrong, where in (("value", "op out"), ("gradient", "op grad_x"), ("unwritten", "op out")):
        with pytest.raises(NumericsError, match=f"FAIL {where}"):
            check_op(
                lambda x, backend, w=wrong: op(x, backend, w),
                tensors,
                backend="cpu",
                name="op",
                grads=() if wrong == "unwritten" else None,
            )


@pytest.mark.parametrize("n", [3, 1000, 1 << 20])
def test_fresh_memory_is_poisoned(n: int) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.empty(n).isnan().all()
        torch.use_deterministic_algorithms(False)  # what a C++ kernel allocates does not pass through torch.empty
        assert torch.empty(n, dtype=torch.bfloat16).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("how", testing.LAYOUTS)
def test_layouts_hold_the_same_values(how: str) -> None:
    t = torch.randn(2, 3, 4, 5)
    stored = layout(t, how)
    assert torch.equal(stored, t[:1].expand(t.shape) if how == "expanded" else t)
    assert (stored.is_contiguous(), stored.storage_offset()) == {"contiguous": (True, 0), "shifted": (True, 1)}.get(
        how, (False, stored.storage_offset())
    )
    assert torch.equal(layout(t[0, 0] > 0, how), layout(t[0, 0], how) > 0)
