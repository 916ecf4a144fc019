"""The streaming losses against the naive forms: values, every gradient, memory, the compiler, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyvit
from pyvit import library
from pyvit.ops import (
    distillation_cross_entropy,
    info_nce,
    koleo,
    loss_tiles,
    nt_xent,
    pairwise_losses,
    reference_losses,
    sigmoid_contrastive,
    sinkhorn_center,
    sinkhorn_knopp,
)
from pyvit.testing import FORWARD_FACTOR, GRADIENT_FACTOR, check_op, compare, run, served


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few dozen rows make several, the last one ragged."""
    monkeypatch.setattr(loss_tiles, "TILE", 16)


PAIRWISE = {
    "info_nce": (info_nce, {"scale": 5.0}, ("a", "b")),
    "nt_xent": (nt_xent, {"temperature": 0.3}, ("z1", "z2")),
    "sigmoid_contrastive": (sigmoid_contrastive, {"scale": 5.0, "bias": -3.0}, ("a", "b")),
}
SERVED = [(op, s) for op in PAIRWISE for s in served(op, "grad") if s.backend != "reference"]


def inputs(op: str, n: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu", size: float = 1.0):
    _, scalars, names = PAIRWISE[op]
    found = {name: (F.normalize(torch.randn(n, d, device=device), dim=1) * size).to(dtype) for name in names}
    return {
        **found,
        **{
            k: torch.tensor(v, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            for k, v in scalars.items()
        },
    }


@pytest.mark.parametrize("n", [2, 15, 16, 17, 53])
@pytest.mark.parametrize(("op", "where"), SERVED, ids=lambda v: str(v))
def test_against_reference(op, where, n):
    for d in (1, 24) if n > 2 else (24,):  # two unit vectors of one dimension may coincide: no gradient but rounding
        check_op(
            PAIRWISE[op][0],
            inputs(op, n, d, where.dtype, where.device),
            backend=where.backend,
            scores=8.0,
            name=f"{op} n={n} d={d}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(97, 24), (200, 13), (300, 300), (1700, 8)])
@pytest.mark.parametrize("op", PAIRWISE)
def test_compiled_tiles(op, n, d, dtype):
    """Several tiles, several stripes (1700: several tiles a stripe), several blocks of d (300)."""
    check_op(PAIRWISE[op][0], inputs(op, n, d, dtype), backend="cpu", scores=8.0)


@pytest.mark.parametrize("op", PAIRWISE)
def test_a_number_that_is_not_finite_is_not_hidden(op):
    """A NaN in one row reaches the loss and, of the gradients, every row that meets it."""
    tensors = inputs(op, 200, 20)
    first = PAIRWISE[op][2][0]
    tensors[first][150, 3] = math.nan
    loss = PAIRWISE[op][0](**{k: v.requires_grad_() for k, v in tensors.items()}, backend="cpu")
    assert loss.isnan()
    grads = torch.autograd.grad(loss, [tensors[name] for name in PAIRWISE[op][2]])
    assert all(g.isnan().any(1).all() for g in grads[1:])
    assert grads[0][150].isnan().all()


@pytest.mark.skipif(library.problem() is not None, reason="the library is not in use")
def test_the_library_refuses_what_it_cannot_take():
    a, b, sums = torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"pairs: b must be of shape \(\*, 4\), got \(6, 3\)"):
        torch.ops.pyvit.pair_sigmoid(a, b[:, :3], -1, 1.0, 0.0, sums)
    with pytest.raises(RuntimeError, match="top_b must be 6 contiguous float32 numbers"):
        torch.ops.pyvit.pair_softmax(a, b, False, 1.0, sums, sums.clone(), sums.clone(), torch.zeros(6))
    with pytest.raises(RuntimeError, match="rows padded to 16"):
        torch.ops.pyvit.pair_sigmoid_backward(a, b, -1, 1.0, 0.0, sums, torch.zeros(5, 4), torch.zeros(6, 16))


@pytest.mark.parametrize("op", PAIRWISE)
def test_bits_do_not_depend_on_threads(op):
    tensors = {k: v.requires_grad_() for k, v in inputs(op, 500, 20).items()}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = PAIRWISE[op][0](**tensors, backend="cpu")
            found.append([loss.detach(), *torch.autograd.grad(loss, list(tensors.values()))[:2]])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("op", PAIRWISE)
def test_loop_without_the_library(op, monkeypatch):
    monkeypatch.setattr(pairwise_losses, "_fused", lambda a: False)
    for n in (2, 16, 53):
        check_op(PAIRWISE[op][0], inputs(op, n, 24), backend="cpu", scores=8.0)


@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "expanded"])
@pytest.mark.parametrize("op", PAIRWISE)
def test_layouts(op, store):
    # Rows that are all the same have no gradient in exact arithmetic; there the value is checked alone.
    grads = () if store == "expanded" else None
    check_op(PAIRWISE[op][0], inputs(op, 37, 12), backend="cpu", store=store, scores=8.0, grads=grads)


@pytest.mark.parametrize("op", ["info_nce", "nt_xent"])
def test_one_pair_has_nothing_to_tell_apart(op):
    tensors = {k: v.requires_grad_() for k, v in inputs(op, 1, 24).items()}
    loss = PAIRWISE[op][0](**tensors)
    found = torch.autograd.grad(loss, list(tensors.values()))
    assert all(t.abs().max() < 1e-5 for t in (loss, *found))


@pytest.mark.parametrize("op", PAIRWISE)
def test_large_logits(op):
    """Logits of some thousands: no overflow, and bfloat16 embeddings lose nothing more than their own rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(op, 40, 16, dtype, size=20.0)
        check_op(PAIRWISE[op][0], tensors, backend="cpu", scores=8000.0)
        assert math.isfinite(PAIRWISE[op][0](**tensors))


@pytest.mark.parametrize("size", [1e3, 3e4, 1e7, 1e12])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(("op", "where"), SERVED, ids=lambda v: str(v))
def test_logits_of_few_digits(op, where, repeated, size):
    """A probability computed again is at most 1, however much of the logits float32 has rounded away."""
    if where.dtype == torch.float16:
        pytest.skip("no such embeddings")
    tensors = inputs(op, 40, 16, where.dtype, where.device, size=size)
    if repeated:
        for name in PAIRWISE[op][2]:
            tensors[name][20:] = tensors[name][:20].clone()
    leaves = [tensors[name].requires_grad_() for name in PAIRWISE[op][2]]
    found = [torch.autograd.grad(PAIRWISE[op][0](**tensors, backend=b), leaves) for b in (where.backend, "reference")]
    for ours, naive in zip(*found, strict=True):
        assert float(ours.abs().max()) <= 2 * float(naive.abs().max()) + 1e-5 * size


@pytest.mark.parametrize("temperature", [1e-3, 1e-7, 1e-12])
@pytest.mark.parametrize("prototypes", [False, True])
def test_distillation_at_tiny_temperatures(prototypes, temperature):
    """Both networks' probabilities are at most 1, and the row whose scores are all alike keeps its mean."""
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


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("op", PAIRWISE)
def test_no_matrix_is_stored(op):
    n, d = 400, 16
    tensors = {k: v.requires_grad_() for k, v in inputs(op, n, d).items()}
    with Largest() as fused:
        PAIRWISE[op][0](**tensors, backend="cpu").backward()
    assert fused.numel <= 2 * n * d
    with Largest() as naive:
        PAIRWISE[op][0](**tensors, backend="reference")
    assert naive.numel >= n * n


def test_distillation_stores_no_probabilities():
    n, c, k = 64, 4, 70000
    student, weights = torch.randn(2, n, c, requires_grad=True), torch.randn(k, c, requires_grad=True)
    with Largest() as fused:
        distillation_cross_entropy(
            student, student, 0.1, 0.05, student_prototypes=weights, teacher_prototypes=weights
        ).backward()
    assert fused.numel <= 1 << 21
    assert fused.numel < n * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("s", "t", "n", "k"), [(1, 1, 1, 1), (3, 2, 7, 33), (2, 1, 40, 5000), (1, 1, 300, 17)])
def test_distillation_against_reference(dtype, s, t, n, k):
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


def test_distillation_is_cross_entropy():
    """One crop, from its definition with torch's own functions."""
    student, teacher, center = torch.randn(9, 21), torch.randn(9, 21), torch.randn(21)
    want = F.cross_entropy(student / 0.1, ((teacher - center) / 0.04).softmax(-1))
    got = distillation_cross_entropy(student, teacher, 0.1, 0.04, center=center)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("n", [2, 17, 50])
def test_koleo(n):
    x = F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1)
    (got,), (grad,) = run(koleo, {"x": x}, ["x"], [torch.ones((), dtype=torch.float64)], backend="cpu")
    distances = torch.cdist(x, x).fill_diagonal_(math.inf)
    torch.testing.assert_close(got, -distances.amin(1).log().mean(), rtol=1e-6, atol=1e-6)
    (_, (want,)) = run(koleo, {"x": x}, ["x"], [torch.ones((), dtype=torch.float64)], backend="reference")
    torch.testing.assert_close(grad, want)


def test_koleo_of_equal_rows_is_finite():
    x = torch.ones(4, 3).requires_grad_()
    koleo(x).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("b", "k"), [(1, 1), (5, 3), (37, 50), (64, 4)])
def test_sinkhorn(b, k):
    scores = torch.randn(b, k)
    want = reference_losses.sinkhorn_knopp(scores.double(), 0.3, 3)
    naive = reference_losses.sinkhorn_knopp(scores, 0.3, 3)
    compare("sinkhorn", sinkhorn_knopp(scores, 0.3, 3), naive, want, FORWARD_FACTOR, dtype=torch.float32)
    torch.testing.assert_close(want.sum(1), torch.ones(b, dtype=torch.float64))
    features, prototypes = torch.randn(b, 6), torch.randn(k, 6)
    center = sinkhorn_center(features, 0.3, 3, prototypes=prototypes)
    products = features @ prototypes.t()
    torch.testing.assert_close(((products - center) / 0.3).softmax(-1), sinkhorn_knopp(products, 0.3, 3))


def test_sinkhorn_balances():
    """After many rounds every prototype has the same share."""
    share = sinkhorn_knopp(torch.randn(64, 8).double(), 0.5, 200).sum(0)
    torch.testing.assert_close(share, torch.full((8,), 8.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", PAIRWISE)
def test_second_derivatives(op):
    tensors = {k: v.requires_grad_() for k, v in inputs(op, 5, 3, torch.float64).items()}
    assert torch.autograd.gradgradcheck(lambda *args: PAIRWISE[op][0](*args, backend="cpu"), tuple(tensors.values()))


@pytest.mark.parametrize("op", PAIRWISE)
def test_compiler_and_opcheck(op):
    tensors = {k: v.requires_grad_() for k, v in inputs(op, 20, 4).items()}
    torch.library.opcheck(getattr(torch.ops.pyvit, op).default, (*tensors.values(), "cpu"))
    compiled = torch.compile(PAIRWISE[op][0], fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(**tensors), list(tensors.values())) for f in (compiled, PAIRWISE[op][0])]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op", PAIRWISE)
def test_autocast_leaves_precision_alone(op):
    tensors = inputs(op, 20, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = PAIRWISE[op][0](**tensors)
    assert torch.equal(inside, PAIRWISE[op][0](**tensors))


@pytest.mark.parametrize("op", PAIRWISE)
def test_same_bits(op):
    tensors = {k: v.requires_grad_() for k, v in inputs(op, 100, 32).items()}
    twice = [torch.autograd.grad(PAIRWISE[op][0](**tensors), list(tensors.values())) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*twice, strict=True))


def test_explain_names_the_backend():
    report = pyvit.explain(info_nce, torch.randn(4, 2), torch.randn(4, 2), 1.0)
    assert report.chosen == "cpu"
    assert pyvit.explain("koleo", torch.randn(4, 2)).chosen == "cpu"


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(X, X[:3], 1.0), r"b must be of the shape of a, \(4, 3\), got shape \(3, 3\)"),
        (lambda: info_nce(X[0], X, 1.0), r"a must be of shape \(N, D\)"),
        (lambda: info_nce(X[:0], X[:0], 1.0), "a must be of at least one row"),
        (lambda: info_nce(X, X, torch.ones(2)), "scale must be a number or a tensor of one element"),
        (lambda: info_nce(X, X.double(), 1.0), "b must have the dtype of a"),
        (lambda: info_nce(X.long(), X.long(), 1.0), "a must be float32"),
        (lambda: nt_xent(X, X, 0.1, backend="gpu"), "backend must be one of"),
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
        (lambda: koleo(X[:0]), "x must be of at least one row"),
        (lambda: koleo(X, eps=-1.0), "eps must be at least 0"),
        (lambda: sinkhorn_knopp(X, -1.0), "temperature must be positive"),
        (lambda: sinkhorn_knopp(X, 1.0, -1), "iterations must be at least 0"),
        (lambda: sinkhorn_knopp(X, 1.0, 2.5), "iterations must be an int"),
        (lambda: sinkhorn_center(X, 1.0, 0), "iterations must be at least 1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_gradient_rule_is_the_stricter_of_the_two_forms():
    """The helper would notice a wrong gradient: half of the right one fails."""
    tensors = inputs("info_nce", 20, 4)
    cotangent = [torch.ones(())]
    _, right = run(info_nce, tensors, ["a"], cotangent, backend="reference")
    wide = {k: v.double() for k, v in tensors.items()}
    _, exact = run(info_nce, wide, ["a"], cotangent, backend="reference")
    with pytest.raises(AssertionError):
        compare("half", [right[0] / 2], right, exact, GRADIENT_FACTOR)
