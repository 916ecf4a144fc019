"""The compiled library's matrix product: every layout, however the work is cut up, in every dtype."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyvit import library
from pyvit.ops import linear, matmul, matmul_rules
from pyvit.testing import layout, poisoned

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: (n, m, k): ragged tiles, nothing at all, one stretch of k per thread (k long, result small), several stretches after
#: one another, columns in several goes, few rows and many
SHAPES = [
    (1, 1, 1),
    (7, 5, 3),
    (50, 130, 33),
    (13, 64, 257),
    (4, 6, 0),
    (0, 3, 4),
    (3, 0, 4),
    (20, 35, 4099),
    (90, 33, 9001),
    (11, 70, 6700),
    (5, 1100, 3100),
    (530, 70, 6500),
]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, add: bool = False) -> Tensor:
    torch.ops.pyvit.product(a, b, bias, out, add)
    return out


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: f"cpu-{d}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numerics(threads: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, m, k = shape
    a, b, bias = (
        (torch.randn(n, k) * max(k, 1) ** -0.5).to(dtype),
        torch.randn(k, m).to(dtype),
        torch.randn(m).to(dtype),
    )
    exact = a.double() @ b.double() + bias.double()
    rounding = torch.finfo(dtype).eps
    for x, y in itertools.product((a, a.t().contiguous().t()), (b, b.t().contiguous().t())):
        with poisoned():
            found = product(x, y, bias, torch.empty(n, m, dtype=dtype))
            wide = product(x, y, bias, torch.empty(n, m))
        torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.double(), exact, rtol=0.51 * rounding, atol=1e-5)
        again = product(x, y, bias, torch.empty(n, m, dtype=dtype))
        assert torch.equal(again, found)
        rounded = product(x, y.float(), bias.float(), torch.empty(n, m))
        torch.testing.assert_close(rounded, wide, rtol=1e-5, atol=1e-5)
        added = product(x, y, bias, torch.full((n, m), 2.0), add=True)
        torch.testing.assert_close(added.double(), exact + 2, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_wide_operands_are_rounded_to_what_is_multiplied(dtype: torch.dtype) -> None:
    """Or not at all, where nothing narrower than float32 is."""
    a, b, bias = torch.randn(20, 70).to(dtype), torch.randn(70, 37), torch.randn(37)
    exact = torch.stack([a.double() @ t.double() + bias.double() for t in (b, b.to(dtype))])
    for y in (b, b.t().contiguous().t()):
        found = product(a, y, bias, torch.empty(20, 37))
        assert (found - exact).abs().amax((1, 2)).min() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("store", ["sliced", "shifted"])
def test_parts_of_larger_tensors(store: str, dtype: torch.dtype) -> None:
    """Nothing beyond the operands is read into the result, and nothing beyond the result is written."""
    for n, m, k in ((14, 37, 21), (9, 20, 4500)):
        a, b = torch.randn(n, k).to(dtype), torch.randn(k, m).to(dtype)
        exact = a.double() @ b.double()
        held = torch.full((n + 1, m + 5), 7.0)
        for x, y in itertools.product(
            (layout(a, store), layout(a.t(), store).t()), (layout(b, store), layout(b.t(), store).t())
        ):
            product(x, y, None, held[:n, :m])
            torch.testing.assert_close(held[:n, :m].double(), exact, rtol=1e-5, atol=1e-3)
            assert (held[n:] == 7).all()
            assert (held[:, m:] == 7).all()


def test_what_is_not_finite_passes() -> None:
    a, b = torch.randn(10, 5000), torch.randn(5000, 8)
    a[3, 4000] = float("nan")
    for x in (a, a.t().contiguous().t()):
        found = product(x, b, None, torch.empty(10, 8))
        assert found[3].isnan().all()
        assert found[[0, 1, 2, 4, 9]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.zeros(4, 6), torch.zeros(6, 5)
    for arguments, said in (
        ((a, b.t(), None, torch.zeros(4, 5)), "fit each other"),
        ((a, b.bfloat16(), None, torch.zeros(4, 5)), "b of the dtype of a or float32"),
        ((a, b, None, torch.zeros(4, 6)), r"out must be of shape \(4, 5\)"),
        ((a, b, None, torch.zeros(5, 4).t()), "contiguous rows"),
        ((a, b, None, torch.zeros(4, 5, dtype=torch.bfloat16)), "float32 or"),
        ((a, b, torch.zeros(4), torch.zeros(4, 5)), "of 5 elements"),
        ((torch.zeros(8, 12)[::2, ::2], b, None, torch.zeros(4, 5)), "rows or the columns"),
    ):
        with pytest.raises(RuntimeError, match=said):
            product(*arguments)
    with pytest.raises(RuntimeError, match="if not added to"):
        product(a.bfloat16(), b.bfloat16(), None, torch.zeros(4, 5, dtype=torch.bfloat16), add=True)


def test_a_slow_way_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"torch": 1.0, "pyvit": 0.9, "slow": 3.0}
    now, calls = [0.0], []

    def way(name: str) -> matmul.Way:
        def run(x: Tensor, w: Tensor) -> Tensor:
            calls.append((name, x.shape[0]))
            now[0] += times.get(name, 0.1)
            return x @ w.t()

        return run

    monkeypatch.setattr(matmul.time, "perf_counter", lambda: now[0])
    ways = {name: way(name) for name in ("slow", "pyvit", "torch")}
    x, weight = torch.randn(300, 8), torch.randn(6, 8)
    found, how = matmul._measured(ways, lambda rows: (x[:rows], weight), 300, weight.numel())
    assert found == "pyvit"
    assert how == "measured on 300 rows: slow 3000.000 ms, pyvit 900.000 ms, torch 1000.000 ms"
    assert calls.count(("slow", 300)) == 1
    assert calls.count(("torch", 300)) == 3


SAME = """
import hashlib, sys, torch, pyvit
torch.manual_seed(0)
sums = hashlib.sha256()
for name, settings in (("vit_tiny_patch16_224", {}), ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)})):
    model = pyvit.create_model(name, num_classes=0, img_size=56 if settings else 64, **settings)
    images = torch.randn(2, 3, model.img_size[0], model.img_size[1])
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = model(images)
        tensors = [out, *torch.autograd.grad(out.float().square().sum(), model.parameters())]
        pyvit.pack_weights(model.eval())
        with torch.no_grad():
            tensors += [model(images), model(images)]
        for t in tensors:
            sums.update(t.detach().float().contiguous().numpy().tobytes())
print(sums.hexdigest())
"""


def test_processes_give_the_same_bits() -> None:
    """Also those that are disturbed: which product runs is not for a clock to say."""
    disturbed = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    environment = {**os.environ, "PYVIT_LINEAR": "", "OMP_NUM_THREADS": "1"}
    try:
        runs = [
            subprocess.Popen([sys.executable, "-c", SAME], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        found = [run.communicate()[0].strip() for run in runs]
    finally:
        disturbed.kill()
        disturbed.wait()
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(found[0]) == 64
    assert len(set(found)) == 1


def test_what_came_before_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the order of calls nor their values, nor a vector before a matrix."""
    monkeypatch.setattr(matmul, "_policy", "auto")
    x, weight, bias = torch.randn(33, 40), torch.randn(24, 40), torch.randn(24)
    found = []
    for first in (x[:20], x[0], torch.full_like(x, float("nan")), x[:0], None):
        monkeypatch.setattr(matmul, "_chosen", {})
        if first is not None:
            linear(first, weight, bias)
        found.append(linear(x, weight, bias))
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules_name_candidates(dtype: torch.dtype) -> None:
    """A rule names candidates of its kinds, and for every product there is a rule whose last choice always serves."""
    there = {"forward": matmul.FORWARD, "grad_input": matmul.GRAD_INPUT, "grad_weight": matmul.GRAD_WEIGHT}
    there |= {"prepacked": ("onednn", "pyvit", "torch")}
    assert set(there) == set(matmul_rules.KINDS)
    for rule in matmul_rules.RULES:
        assert {*rule.kinds} <= {*matmul_rules.KINDS}
        assert {*rule.isas} <= {*matmul_rules.ISAS}
        assert {*rule.dtypes} <= {"float32", "bfloat16", "float16"}
        assert {*rule.preferred} <= {name for kind in rule.kinds or there for name in there[kind]}
    for isa, rows, out, inner in itertools.product(matmul_rules.ISAS, (2, 256, 32768), (96, 4096), (96, 4096)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matmul_rules, "cpu_isa", lambda _, isa=isa: isa)
            for kind, candidates in there.items():
                assert any(
                    name in candidates
                    for name in matmul_rules.preference(kind, dtype, matmul_rules.Shape(rows, out, inner))
                )


def test_no_product_waits_for_another_process() -> None:
    """Of a group whose other processes are gone, or were never there."""
    command = """
import torch, pyvit, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
x, layer = torch.randn(64, 96, requires_grad=True), pyvit.nn.Mlp(96, 192)
layer(x).sum().backward()
pyvit.pack_weights(layer)
with torch.no_grad():
    layer(x)
"""
    for policy in ("auto", "measure"):
        run = subprocess.run(
            [sys.executable, "-c", command], env={**os.environ, "PYVIT_LINEAR": policy}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
