"""Tests shared by the losses over all pairs of two batches: info_nce, nt_xent and sigmoid_contrastive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyvit.ops import loss_tiles, pairwise_losses
from pyvit.testing import Served, check_op, served


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


class PairwiseLossTests:
    """A subclass names the operator, its two embedding arguments and the values of its scalar arguments."""

    op: Callable[..., Tensor]
    embeddings: tuple[str, str]
    scalars: dict[str, float]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test with the argument ``on`` runs for every kernel of the operator that has gradients."""
        if "on" in metafunc.fixturenames:
            kernels = [on for on in served(self.op.__name__, "grad") if on.backend != "reference"]
            metafunc.parametrize("on", kernels, ids=str)

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tiles of 16, so that a few dozen rows make several tiles, of which the last is not full."""
        monkeypatch.setattr(loss_tiles, "TILE", 16)

    def inputs(
        self, n: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu", size: float = 1.0
    ) -> dict[str, Tensor]:
        """Embeddings (n, d) of length ``size`` and the scalars, as tensors."""
        rows = {name: F.normalize(torch.randn(n, d, device=device), dim=1) * size for name in self.embeddings}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scalars = {name: torch.tensor(value, device=device, dtype=wide) for name, value in self.scalars.items()}
        return {name: t.to(dtype) for name, t in rows.items()} | scalars

    @staticmethod
    def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.requires_grad_() for name, t in tensors.items()}

    @pytest.mark.parametrize("n", [2, 15, 16, 17, 53])
    def test_against_reference(self, on: Served, n: int) -> None:
        # Two unit vectors of one dimension may coincide: their gradient would be rounding alone.
        for d in (1, 24) if n > 2 else (24,):
            tensors = self.inputs(n, d, on.dtype, on.device)
            check_op(self.op, tensors, backend=on.backend, scores=8.0, name=f"n={n} d={d}")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("n", "d"), [(97, 24), (200, 13), (300, 300), (1700, 8)])
    def test_compiled_tiles(self, n: int, d: int, dtype: torch.dtype) -> None:
        """Several tiles, several stripes (1700: several tiles per stripe), several blocks of d (300)."""
        check_op(self.op, self.inputs(n, d, dtype), backend="cpu", scores=8.0)

    def test_nan_propagates(self) -> None:
        """A NaN in one row reaches the loss and the gradients of every row that is compared with it."""
        tensors = self.inputs(200, 20)
        tensors[self.embeddings[0]][150, 3] = math.nan
        loss = self.op(**self.leaves(tensors), backend="cpu")
        assert loss.isnan()
        first, second = torch.autograd.grad(loss, [tensors[name] for name in self.embeddings])
        assert second.isnan().any(1).all()
        assert first[150].isnan().all()

    def test_bits_do_not_depend_on_threads(self, threads: Callable[[int], None]) -> None:
        tensors = self.leaves(self.inputs(500, 20))
        found = []
        for n in (1, 2, 3):
            threads(n)
            loss = self.op(**tensors, backend="cpu")
            found.append([loss.detach(), *torch.autograd.grad(loss, list(tensors.values()))[:2]])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pairwise_losses, "_fused", lambda a: False)
        for n in (2, 16, 53):
            check_op(self.op, self.inputs(n, 24), backend="cpu", scores=8.0)

    @pytest.mark.parametrize("store", ["transposed", "sliced", "stepped", "expanded"])
    def test_strides(self, store: str) -> None:
        # Rows that are all the same have no gradient in exact arithmetic: only the value is checked.
        grads = () if store == "expanded" else None
        check_op(self.op, self.inputs(37, 12), backend="cpu", store=store, scores=8.0, grads=grads)

    def test_large_logits(self) -> None:
        """Logits of some thousands: no overflow, and bfloat16 embeddings lose no more than their own rounding."""
        for dtype in (torch.float32, torch.bfloat16):
            tensors = self.inputs(40, 16, dtype, size=20.0)
            check_op(self.op, tensors, backend="cpu", scores=8000.0)
            assert math.isfinite(self.op(**tensors))

    @pytest.mark.parametrize("size", [1e3, 3e4, 1e7, 1e12])
    @pytest.mark.parametrize("repeated", [False, True])
    def test_very_large_logits(self, on: Served, repeated: bool, size: float) -> None:
        """A recomputed probability is at most 1, however many digits of the logits float32 has rounded away."""
        if on.dtype == torch.float16:
            pytest.skip("float16 has no such embeddings")
        tensors = self.inputs(40, 16, on.dtype, on.device, size=size)
        if repeated:
            for name in self.embeddings:
                tensors[name][20:] = tensors[name][:20].clone()
        leaves = [tensors[name].requires_grad_() for name in self.embeddings]
        found = [torch.autograd.grad(self.op(**tensors, backend=b), leaves) for b in (on.backend, "reference")]
        for ours, naive in zip(*found, strict=True):
            assert float(ours.abs().max()) <= 2 * float(naive.abs().max()) + 1e-5 * size

    def test_no_matrix_is_stored(self) -> None:
        n, d = 400, 16
        tensors = self.leaves(self.inputs(n, d))
        with LargestTensor() as fused:
            self.op(**tensors, backend="cpu").backward()
        assert fused.numel <= 2 * n * d
        with LargestTensor() as naive:
            self.op(**tensors, backend="reference")
        assert naive.numel >= n * n

    def test_second_derivatives(self) -> None:
        tensors = self.leaves(self.inputs(5, 3, torch.float64))
        assert torch.autograd.gradgradcheck(lambda *args: self.op(*args, backend="cpu"), tuple(tensors.values()))

    def test_compile_and_opcheck(self) -> None:
        tensors = self.leaves(self.inputs(20, 4))
        torch.library.opcheck(getattr(torch.ops.pyvit, self.op.__name__).default, (*tensors.values(), "cpu"))
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        grads = [torch.autograd.grad(f(**tensors), list(tensors.values())) for f in (compiled, self.op)]
        torch.testing.assert_close(*grads)

    def test_autocast_does_not_change_the_precision(self) -> None:
        tensors = self.inputs(20, 4)
        with torch.autocast("cpu", torch.bfloat16):
            inside = self.op(**tensors)
        assert torch.equal(inside, self.op(**tensors))

    def test_same_bits(self) -> None:
        tensors = self.leaves(self.inputs(100, 32))
        twice = [torch.autograd.grad(self.op(**tensors), list(tensors.values())) for _ in range(2)]
        assert all(torch.equal(x, y) for x, y in zip(*twice, strict=True))

    def check_single_pair(self) -> None:
        """A pair without negatives has no loss and no gradient."""
        tensors = self.leaves(self.inputs(1, 24))
        loss = self.op(**tensors)
        found = torch.autograd.grad(loss, list(tensors.values()))
        assert all(t.abs().max() < 1e-5 for t in (loss, *found))
