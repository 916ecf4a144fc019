"""The pairwise losses on Triton against the reference, forward and all gradients: partial blocks, split columns, sliced
widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyvit.ops import distillation_cross_entropy, info_nce, nt_xent, sigmoid_contrastive
from pyvit.testing import check_op

contrastive = pytest.importorskip("pyvit.triton_kernels.pairwise_losses")
tiles = pytest.importorskip("pyvit.triton_kernels.tiles")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest):
    """Blocks of 16 and gradients of 128 channels at a time, so that small shapes have several of each."""
    if request.node.get_closest_marker("slow"):
        yield
        return
    for name in ("pair_sums", "pair_gradient"):
        tiles.force(name, tiles.Config(block_m=16, block_n=16, edge_n=16, group=1))
    yield
    for name in ("pair_sums", "pair_gradient"):
        tiles.force(name, None)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU large enough that many columns are split; into how many parts they were, call by call."""
    found, split = [], contrastive._splits

    def recorded(*args: object) -> tuple[int, int]:
        found.append(split(*args)[0])
        return split(*args)

    monkeypatch.setattr(contrastive, "processors", lambda _: 40)
    monkeypatch.setattr(contrastive, "_splits", recorded)
    return found


def _pair(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = (torch.nn.functional.normalize(torch.randn(n, d), dim=1).to(dtype) for _ in range(2))
    return a, b


@DTYPES
@pytest.mark.parametrize(("n", "d"), [(1, 8), (37, 24), (40, 150), (200, 8)])
def test_info_nce(n: int, d: int, dtype: torch.dtype, splits: list[int]) -> None:
    a, b = _pair(n, d, dtype)
    check_op(info_nce, {"a": a, "b": b, "scale": torch.tensor(14.0)}, backend="triton", dtype=dtype, scores=14)
    assert max(splits) == (3 if n == 200 else 1)


@DTYPES
@pytest.mark.parametrize(("n", "d"), [(1, 8), (19, 24), (20, 150), (70, 8)])
def test_nt_xent(n: int, d: int, dtype: torch.dtype, splits: list[int]) -> None:
    z1, z2 = _pair(n, d, dtype)
    check_op(nt_xent, {"z1": z1, "z2": z2, "temperature": torch.tensor(0.1)}, backend="triton", dtype=dtype, scores=10)
    assert max(splits) == (2 if n == 70 else 1)


@DTYPES
@pytest.mark.parametrize(("n", "d"), [(1, 8), (37, 24), (40, 150), (130, 8)])
def test_sigmoid_contrastive(n: int, d: int, dtype: torch.dtype, splits: list[int]) -> None:
    a, b = _pair(n, d, dtype)
    tensors = {"a": a, "b": b, "scale": torch.tensor(10.0), "bias": torch.tensor(-10.0)}
    check_op(sigmoid_contrastive, tensors, backend="triton", dtype=dtype, scores=20)
    assert max(splits) == (2 if n == 130 else 1)


@DTYPES
@pytest.mark.parametrize(("k", "centred"), [(75, False), (130, True)])
def test_distillation(k: int, centred: bool, dtype: torch.dtype, splits: list[int]) -> None:
    s, t, n, c = 3, 2, 11, 20
    weights = torch.rand(s, t, n)
    weights[0, 0] = 0  # a crop against itself
    tensors = {"student": torch.randn(s, n, c).to(dtype), "student_prototypes": (torch.randn(k, c) / 3).to(dtype)}
    fixed = {"teacher": torch.randn(t, n, c + 3).to(dtype), "teacher_prototypes": (torch.randn(k, c + 3) / 3).to(dtype)}
    centre = torch.randn(k, 2)[:, 0] if centred else None

    def op(student: Tensor, student_prototypes: Tensor, backend: str) -> Tensor:
        wide = {key: value.to(student.dtype) for key, value in fixed.items()}
        rest = {"center": centre, "weights": weights, "student_prototypes": student_prototypes, "backend": backend}
        return distillation_cross_entropy(student, wide.pop("teacher"), 0.5, 0.2, **wide, **rest)

    check_op(op, tensors, backend="triton", dtype=dtype, scores=30)
    assert max(splits) == (2 if k == 130 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("tuned_tiles")
def test_pairs_with_the_tiles_in_use(dtype: torch.dtype) -> None:
    a, b = _pair(200, 136, dtype)
    check_op(info_nce, {"a": a, "b": b, "scale": torch.tensor(14.0)}, backend="triton", dtype=dtype, scores=14)


@pytest.mark.parametrize("store", ["transposed", "sliced", "stepped"])
def test_layouts(store: str) -> None:
    a, b = _pair(21, 24, F32)
    check_op(info_nce, {"a": a, "b": b, "scale": torch.tensor(14.0)}, backend="triton", scores=14, store=store)


def test_scores_that_would_overflow() -> None:
    """e^200 is not a float32 number; the log-sum-exp of scores of 200 is."""
    a, b = _pair(20, 16, F32)
    check_op(info_nce, {"a": a, "b": b, "scale": torch.tensor(200.0)}, backend="triton", scores=200)
    check_op(nt_xent, {"z1": a, "z2": b, "temperature": torch.tensor(0.005)}, backend="triton", scores=200)


def test_small_probabilities_keep_their_digits_in_float16() -> None:
    """Weights of 1 / N^2 and less would be subnormal in float16 without scaling."""
    a, b = torch.randn(30, 16).to(F16), torch.randn(30, 16).to(F16)
    tensors = {"a": a, "b": b, "scale": torch.tensor(0.1), "bias": torch.tensor(-15.0)}

    def negatives(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, backend: str) -> Tensor:
        return sigmoid_contrastive(a, b, scale, bias, backend=backend)

    check_op(negatives, tensors, backend="triton", dtype=F16, scores=20)


def test_same_bits_again() -> None:
    a, b = _pair(50, 40, BF16)
    scale = torch.tensor(14.0)
    first, second = (contrastive.info_nce(a, b, scale) for _ in range(2))
    grads = [contrastive.info_nce_backward(torch.tensor(1.0), *first[1:], a, b, scale) for _ in range(2)]
    assert all(torch.equal(g, h) for g, h in zip((*first, *grads[0]), (*second, *grads[1]), strict=True))


@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "sigmoid_contrastive", "distillation_cross_entropy"])
def test_opcheck(loss: str) -> None:
    """Schema, fake kernel against the real one, autograd registration, and tracing of both directions with static and
    dynamic shapes."""
    (a, b), number = _pair(5, 8, F32), torch.tensor(0.5)
    args = {
        "info_nce": (a, b, number),
        "nt_xent": (a, b, number),
        "sigmoid_contrastive": (a, b, number, torch.tensor(-1.0)),
    }
    args["distillation_cross_entropy"] = (
        torch.randn(2, 3, 8),
        torch.randn(1, 3, 8),
        *_pair(7, 8, F32),
        None,
        torch.rand(2, 1, 3),
        0.5,
        0.2,
    )
    given = [
        v.requires_grad_(i in (0, 2) or loss != "distillation_cross_entropy") if isinstance(v, Tensor) else v
        for i, v in enumerate(args[loss])
    ]
    torch.library.opcheck(getattr(torch.ops.pyvit, loss).default, (*given, "triton"))


def test_logits_are_refused() -> None:
    from pyvit import BackendError

    with pytest.raises(BackendError, match="does not support logits"):
        distillation_cross_entropy(torch.randn(2, 3, 8), torch.randn(2, 3, 8), 0.1, 0.04, backend="triton")
