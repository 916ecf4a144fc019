"""The order of CUDA and Triton: by measurement, by prediction, by declaration. On fake GPUs; nothing runs."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyvit
from benchmarks import gpu_backends, gpu_cases
from pyvit import library, ops
from pyvit.dispatch import Call, cost_model, gpu_choice, select
from pyvit.dispatch.capabilities import CAPABILITIES, MISSING, preference

BF16 = torch.bfloat16
LONG = Call("flash_attention", "cuda", BF16, (), (64,), (64, 12, 12, 577, 577, 64))
WINDOWS = Call("window_attention", "cuda", BF16, ("bias_table",), (32,), (128, 56, 56, 7, 7, 3, 32))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Both backends and the named GPU."""

    def use(gpu: str | None) -> None:
        monkeypatch.setitem(MISSING, ("cuda", "cuda"), None)
        monkeypatch.setitem(MISSING, ("triton", "cuda"), None)
        monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})
        monkeypatch.setattr(gpu_choice, "current_gpu", lambda: gpu)

    gpu_choice.compare.cache_clear()
    gpu_choice.stale.cache_clear()
    yield use
    gpu_choice.compare.cache_clear()
    gpu_choice.stale.cache_clear()


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Callable[[gpu_choice.Measured], gpu_choice.Measured]:
    """Makes a row a measurement of the kernels at hand."""
    digests = pytest.importorskip("pyvit.triton_kernels.digests")
    monkeypatch.setattr(library, "cuda_digests", lambda: dict.fromkeys(CAPABILITIES, "c0"))
    triton_version = pytest.importorskip("triton").__version__
    return lambda row: replace(row, digests=("c0", digests.operator(row.op)), triton_version=triton_version)


def test_predictions_decide(on: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """577 tokens: CUDA's warps need less padding than Triton's tiles; on Hopper, Triton's tiles use faster
    instructions."""
    monkeypatch.setattr(gpu_choice, "MEASURED", ())
    on("A100")
    assert select(LONG) == "cuda"
    on("H100")
    assert select(LONG) == "triton"


def test_the_nearest_measurement_decides(
    on: Callable[[str | None], None], current: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper, were the rows of 2026-11-26 of today's kernels: CUDA for windows of 12, Triton for windows of 7, the
    nearer one for those between. Predictions for fp32 and distant lengths."""
    monkeypatch.setattr(gpu_choice, "MEASURED", tuple(map(current, gpu_choice.MEASURED)))
    sides = {side: WINDOWS._replace(sizes=(128, 56, 56, side, side, 3, 32)) for side in (6, 7, 9, 11, 12, 24)}
    for gpu in ("H100", "H200"):
        on(gpu)
        assert [select(call) for call in sides.values()] == ["triton", "triton", "triton", "cuda", "cuda", "cuda"]
    compare = lambda dtype, sizes: gpu_choice.compare("window_attention", dtype, ("bias_table",), sizes, "H100").basis  # noqa: E731
    assert compare(BF16, sides[7].sizes) == "measured (2026-11-26)"
    assert compare(torch.float16, sides[9].sizes) == "measured (2026-11-26) at 8x8x32 on H100"
    assert compare(torch.float32, sides[7].sizes) == compare(BF16, (128, 56, 56, 3, 3, 3, 32)) == "predicted"


def test_measurements_of_former_kernels_decide_nothing(
    on: Callable[[str | None], None], current: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row decides while both kernels and Triton are as measured; the basis says why another does not. The rows of
    2026-11-26 do not say what they are of."""
    on("H100")
    assert all(gpu_choice.stale(row) for row in gpu_choice.MEASURED if row.source == "2026-11-26"), (
        "these kernels were replaced"
    )
    row = current(next(r for r in gpu_choice.MEASURED if r.op == LONG.op and not r.grad and r.shape == (577, 577, 64)))
    for changed, why in (
        ({}, None),
        ({"digests": ("c1", row.digests[1])}, "the kernels of cuda have changed since"),
        ({"digests": ("c0", "0" * 16)}, "the kernels of triton have changed since"),
        ({"digests": ("c1", "0" * 16)}, "the kernels of cuda and triton have changed since"),
        ({"digests": ("", "")}, "does not say which version of the kernels it is of"),
        ({"triton_version": "1.0"}, "measured with Triton 1.0"),
    ):
        other = replace(row, cuda=1e-3, **changed)
        assert gpu_choice.stale(other) == why
        monkeypatch.setattr(gpu_choice, "MEASURED", (other,))
        gpu_choice.compare.cache_clear()
        found = gpu_choice.compare(LONG.op, BF16, (), LONG.sizes, "H100")
        if why is None:
            assert (found.faster, found.basis) == ("cuda", "measured (2026-11-26)")
        else:
            assert (found.faster, found.basis) == ("triton", f"predicted (the measurement of 2026-11-26: {why})")


def test_digests_of_cuda_operators(tmp_path: Path) -> None:
    """They change with an operator's own sources and headers, not with comments."""
    folder = Path(__file__).parents[1] / "csrc" / "cuda"
    of = runpy.run_path(str(folder / "digests.py"))["digests"]
    before = of()
    assert set(before) == {op for op, found in CAPABILITIES.items() if "cuda" in found and not found["cuda"].pure} - {
        "flash_attention_varlen"
    }
    copy = Path(shutil.copytree(folder, tmp_path / "cuda"))
    assert of(copy) == before
    for name, line, changed in (
        ("mma.cuh", "\n// why\n/* and\n how */\n", set()),
        ("window_attention_backward.cu", "\nint unused;\n", {"window_attention"}),
        ("attention_forward.cuh", "\nint unused;\n", {"window_attention", "flash_attention"}),
        ("mma.cuh", "\nint unused;\n", set(before)),
    ):
        was = of(copy)
        (copy / name).write_text((copy / name).read_text() + line)
        assert {op for op in was if of(copy)[op] != was[op]} == changed


def test_a_measurement_beats_a_prediction(
    on: Callable[[str | None], None], current: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on("A100")
    row = current(gpu_choice.Measured("A100", "flash_attention", BF16, False, (577, 577, 64), 2.0, 1.0, "2026-01-01"))
    monkeypatch.setattr(gpu_choice, "MEASURED", (row,))
    assert select(LONG) == "triton"
    assert select(LONG._replace(sizes=(1, 1, 1, 577, 577, 64))) == "triton"  # batch and heads do not decide tiles
    assert select(LONG._replace(sizes=(64, 12, 12, 197, 197, 64))) == "cuda"
    assert (
        select(LONG._replace(features=("grad",)))
        == gpu_choice.compare(LONG.op, BF16, ("grad",), LONG.sizes, "A100").faster
    )
    report = str(gpu_choice.compare(LONG.op, BF16, (), LONG.sizes, "A100"))
    assert report == "measured (2026-01-01), for A100: cuda 2 ms, triton 1 ms"


def test_one_that_refuses_is_not_compared(on: Callable[[str | None], None]) -> None:
    on("A100")
    assert select(LONG._replace(features=("dropout",))) == "triton"
    assert select(LONG._replace(head_dims=(160,), sizes=(64, 12, 12, 577, 577, 160))) == "triton"


def test_equal_figures_go_to_triton(on: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch) -> None:
    on("A100")
    monkeypatch.setattr(gpu_choice, "predict", lambda *_: 1.0)
    assert select(LONG) == "triton"
    assert preference("flash_attention") == ["triton", "cpu", "cuda", "reference"]


@pytest.mark.parametrize("gpu", [None, "A100"])
def test_explain_says_by_what(on: Callable[[str | None], None], gpu: str | None) -> None:
    on(gpu)
    with FakeTensorMode():
        q = torch.empty(2, 4, 577, 64, device="cuda", dtype=BF16)
        (note,) = pyvit.explain(ops.flash_attention, q, q, q).notes
        none = torch.empty(0, 4, 577, 64, device="cuda", dtype=BF16)
        assert "declared order, without" in pyvit.explain(ops.flash_attention, none, none, none).notes[0]
    found = gpu_choice.compare("flash_attention", BF16, (), (2, 4, 4, 577, 577, 64), "A100")
    wanted = (
        "declared order, without a GPU to predict for"
        if gpu is None
        else f"predicted, for A100: cuda {found.cuda:.3g} ms, triton"
    )
    assert note.startswith(f"between cuda and triton: {wanted}")


def test_sizes_of_every_operator(on: Callable[[str | None], None]) -> None:
    on("A100")
    with FakeTensorMode():
        q, k, packed = (torch.empty(*s, device="cuda", dtype=BF16) for s in ((2, 4, 9, 64), (2, 2, 7, 64), (57, 4, 32)))
        cu = torch.empty(4, device="cuda", dtype=torch.int32)
        assert pyvit.explain(ops.flash_attention, q, k, k, enable_gqa=True).call.sizes == (2, 4, 2, 9, 7, 64)
        call = pyvit.explain(ops.flash_attention_varlen, packed, packed, packed, cu, cu, 40, 30).call
        assert call.sizes == (3, 4, 4, 40, 30, 32)
        windows = torch.empty(2, 9, 10, 192, device="cuda", dtype=BF16)
        assert pyvit.explain(ops.window_attention, windows, (7, 5), num_heads=2).call.sizes == (2, 9, 10, 7, 5, 2, 32)
        images, weight = (
            torch.empty(2, 3, 32, 48, device="cuda", dtype=BF16),
            torch.empty(24, 3, 16, 16, device="cuda", dtype=BF16),
        )
        assert pyvit.explain(ops.patch_embed, images, weight).call.sizes == (2, 3, 16, 16, 6, 24)
    assert pyvit.explain(ops.flash_attention, *(torch.zeros(1, 1, 2, 8),) * 3).call.sizes == ()


@pytest.mark.parametrize(("dynamic", "chosen"), [(False, "cuda"), (True, "triton")])
def test_compiled(on: Callable[[str | None], None], dynamic: bool, chosen: str) -> None:
    """Static sizes are predicted as in eager mode; dynamic shapes keep the declared order, without guards."""
    on("A100")
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(2, 4, 577, 64, device="cuda", dtype=BF16)
        torch.compile(lambda q: ops.flash_attention(q, q, q) * 2, fullgraph=True, backend=keep, dynamic=dynamic)(q)
    (backend,) = [n.args[-1] for n in graphs[0].graph.nodes if n.target is torch.ops.pyvit.flash_attention.default]
    assert backend == chosen


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200", "B200"])
@pytest.mark.parametrize(
    "features", [(), ("bias_table", "grad"), ("bias", "bias_grad", "grad"), ("causal", "grad"), ("images_grad",)]
)
def test_no_prediction_is_below_the_floor(gpu: str, features: tuple[str, ...]) -> None:
    grad = any(f.endswith("grad") for f in features)
    for dtype in (BF16, torch.float32):
        for n, d in ((1, 8), (49, 32), (144, 32), (197, 64), (257, 72), (1025, 128)):
            floors = [
                cost_model.attention(8, 4, n, n, d, dtype, causal="causal" in features, backward=b).floor(gpu)
                for b in (False, True)
            ]
            for backend in ("cuda", "triton"):
                found = gpu_choice.predict(backend, "flash_attention", dtype, features, (8, 4, 4, n, n, d), gpu, grad)
                assert found > 1e3 * sum(floors[: 1 + grad])
        for window in (4, 7, 12, 16):
            floors = [
                cost_model.window_attention(8, 50, 50, (window, window), 3, 32, dtype, backward=b).floor(gpu)
                for b in (False, True)
            ]
            for backend in ("cuda", "triton"):
                sizes = (8, 50, 50, window, window, 3, 32)
                assert gpu_choice.predict(backend, "window_attention", dtype, features, sizes, gpu, grad) > 1e3 * sum(
                    floors[: 1 + grad]
                )
        for backend in ("cuda", "triton"):
            assert gpu_choice.predict(backend, "patch_embed", dtype, features, (8, 3, 16, 16, 196, 768), gpu, grad) > 0


def test_plans_know_every_head_dimension_that_is_served() -> None:
    for op, plan in (
        ("flash_attention", lambda d: cost_model.cuda_attention(197, 197, d, 2, True, False)),
        ("window_attention", lambda d: cost_model.cuda_window(169, d, 2, True, True)),
    ):
        low, high, step = CAPABILITIES[op]["cuda"].head_dim
        assert all(plan(d).flops >= 1 for d in range(low, high + 1, step))


def test_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, capability, wanted in (
        ("NVIDIA H200", (9, 0), "H200"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100"),
        ("NVIDIA GH900", (9, 0), "H100"),
        ("NVIDIA B300", (10, 3), "B200"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "A100"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert gpu_choice.current_gpu.__wrapped__() == wanted


def test_measuring_two_backends_makes_rows() -> None:
    """With two CPU backends instead of GPU backends: rows are Python code for the table, and a backend that refuses is
    reported."""
    said: list[str] = []
    cases = [case for case in gpu_cases.tiny() if case.op in ("flash_attention", "window_attention", "patch_embed")]
    found = list(
        gpu_backends.rows(
            cases, "A100", "cpu", said.append, ("reference", "cpu" if MISSING["cpu", "cpu"] is None else "reference")
        )
    )
    assert not said
    assert [row.shape for row in found] == [(33, 33, 32), (7, 7, 32), (7, 7, 32), (16, 16, 32)]
    assert all(row.cuda > 0 and row.triton > 0 for row in found)
    assert eval(repr(found[0]), {"Measured": gpu_choice.Measured, "torch": torch}) == found[0]
    assert list(gpu_backends.rows(cases[:1], "A100", "cpu", said.append, ("reference", "cuda"))) == []
    assert "cannot serve" in said[0]
