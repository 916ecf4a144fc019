"""distillation_cross_entropy against the naive form: values, gradients, memory, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyvit.ops import distillation_cross_entropy, loss_tiles
from pyvit.testing import check_op
from tests.ops.pairwise_losses import LargestTensor


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few dozen rows make several tiles, of which the last is not full."""
    monkeypatch.setattr(loss_tiles, "TILE", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("s", "t", "n", "k"), [(1, 1, 1, 1), (3, 2, 7, 33), (2, 1, 40, 5000), (1, 1, 300, 17)])
def test_against_reference(dtype, s, t, n, k):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    features = [F.normalize(torch.randn(i, n, 6), dim=-1).to(dtype) for i in (s, t)]
    prototypes = [F.normalize(torch.randn(k, 6), dim=-1).to(dtype) for _ in range(2)]
    center, weights = torch.randn(k, dtype=wide) * 0.1, torch.rand(s, t, n, dtype=wide)

    def op(student, student_prototypes, backend=None):
        fixed = features[1].to(student.dtype), prototypes[1].to(student.dtype)
        options = {"center": center.to(student.dtype) if student.dtype == torch.float64 else center, "weights": weights}
        return distillation_cross_entropy(
            student,
            fixed[0],
            0.1,
            0.07,
            student_prototypes=student_prototypes,
            teacher_prototypes=fixed[1],
            backend=backend,
            **options,
        )

    check_op(op, {"student": features[0], "student_prototypes": prototypes[0]}, backend="cpu", scores=20.0)

    def from_logits(student, backend=None):
        teacher = (features[1].double() @ prototypes[1].double().t()).to(student.dtype)
        return distillation_cross_entropy(student, teacher, 0.1, 0.07, weights=weights, backend=backend)

    check_op(
        from_logits,
        {"student": (features[0].double() @ prototypes[0].double().t()).to(dtype)},
        backend="cpu",
        scores=20.0,
    )


def test_against_torchs_cross_entropy():
    """One crop, from its definition with torch's own functions."""
    student, teacher, center = torch.randn(9, 21), torch.randn(9, 21), torch.randn(21)
    want = F.cross_entropy(student / 0.1, ((teacher - center) / 0.04).softmax(-1))
    got = distillation_cross_entropy(student, teacher, 0.1, 0.04, center=center)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("temperature", [1e-3, 1e-7, 1e-12])
@pytest.mark.parametrize("prototypes", [False, True])
def test_tiny_temperatures(prototypes, temperature):
    """Probabilities of both networks are at most 1, and a row with equal scores keeps its mean."""
    student, teacher = torch.randn(2, 9, 24), torch.randn(1, 9, 24)
    student[:, 3] = teacher[:, 3] = 0.7
    extra = {n: torch.randn(24, 24) for n in ("student_prototypes", "teacher_prototypes")} if prototypes else {}
    student.requires_grad_()
    grads = []
    for backend in ("cpu", "reference"):
        loss = distillation_cross_entropy(student, teacher, temperature, temperature, **extra, backend=backend)
        grads.append(torch.autograd.grad(loss, student)[0])
    bound = 2 * float(grads[1].abs().max()) + 1e-5 / temperature
    assert float(grads[0].abs().max()) <= bound


def test_no_probabilities_are_stored():
    n, c, k = 64, 4, 70000
    student, weights = torch.randn(2, n, c, requires_grad=True), torch.randn(k, c, requires_grad=True)
    with LargestTensor() as fused:
        distillation_cross_entropy(
            student, student, 0.1, 0.05, student_prototypes=weights, teacher_prototypes=weights
        ).backward()
    assert fused.numel <= 1 << 21
    assert fused.numel < n * k


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distillation_cross_entropy(X, X[:2], 0.1, 0.1), "teacher must be of 4 samples"),
        (lambda: distillation_cross_entropy(X, X, 0.0, 0.1), "student_temp must be positive"),
        (lambda: distillation_cross_entropy(X, X, 0.1, 0.1, center=torch.zeros(2)), r"center must be of shape \(3,\)"),
        (
            lambda: distillation_cross_entropy(X, X, 0.1, 0.1, student_prototypes=torch.randn(5, 3)),
            "teacher must be scored on the student's 5",
        ),
        (
            lambda: distillation_cross_entropy(X, X, 0.1, 0.1, student_prototypes=torch.randn(5, 2)),
            "student_prototypes must be of shape",
        ),
        (lambda: distillation_cross_entropy(X, X, 0.1, 0.1, weights=torch.ones(2)), "weights must be broadcastable"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
