"""Which of several able backends comes first: by measurement, by rule, by prediction, by declared order. On GPUs that
are not there; nothing runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyvit
from benchmarks import gpu_cases, gpu_model
from pyvit import library, ops
from pyvit.dispatch import Call, choice, cost_model, devices, select
from pyvit.dispatch.capabilities import CAPABILITIES, MISSING, preference
from pyvit.dispatch.devices import PARTS

BF16, F32 = torch.bfloat16, torch.float32
LONG = Call("flash_attention", "cuda", BF16, (), (64,), (64, 12, 12, 577, 577, 64))
#: A call that PyTorch's attention does not serve.
BIASED = LONG._replace(features=("bias",))
WINDOWS = Call("window_attention", "cuda", BF16, ("bias_table",), (32,), (128, 56, 56, 7, 7, 3, 32))
H200 = replace(PARTS["sm_90"], name="NVIDIA H200")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Both GPU backends and the given GPUs."""

    def use(*gpus: devices.Device) -> None:
        monkeypatch.setitem(MISSING, ("cuda", "cuda"), None)
        monkeypatch.setitem(MISSING, ("triton", "cuda"), None)
        monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})
        monkeypatch.setattr(pyvit.library, "cuda_archs", lambda: ["8.0", "9.0", "10.0", "12.0+PTX"])
        monkeypatch.setattr(devices, "present", lambda: gpus)

    return use


def _fresh(monkeypatch: pytest.MonkeyPatch, *rows: choice.Measured) -> None:
    """The rows as measurements of the kernels at hand."""
    digests, triton = pytest.importorskip("pyvit.triton_kernels.digests"), pytest.importorskip("triton")
    monkeypatch.setattr(library, "cuda_digests", lambda: dict.fromkeys(CAPABILITIES, "c0"))
    choice.stale.cache_clear()
    found = (
        replace(row, digests=("c0", digests.operator(row.op)), triton_version=triton.__version__)
        for row in rows or choice.MEASURED
    )
    monkeypatch.setattr(choice, "MEASURED", tuple(found))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    choice.stale.cache_clear()


def test_unmeasured_attention_is_pytorchs(on: Callable[..., None]) -> None:
    """Without a measurement of the present kernels: PyTorch's attention where it serves, ours for windows and bias."""
    for part in PARTS.values():
        on(part)
        assert select(LONG) == select(LONG._replace(features=("causal", "grad"))) == "torch"
        assert select(LONG._replace(features=("lse_grad", "lse"))) != "torch"
    on(PARTS["sm_89"])
    assert select(BIASED) in ("triton", "cuda")
    assert select(WINDOWS) in ("triton", "cuda")
    plain = Call("patch_embed", "cuda", BF16, ("grad",), (), (8, 3, 16, 16, 196, 768))
    assert select(plain) == "torch"
    assert select(plain._replace(features=("uint8", "normalize"))) in ("triton", "cuda")


def test_predictions_decide_between_ours(on: Callable[..., None]) -> None:
    """577 tokens: CUDA's warps need less padding than Triton's tiles; on Hopper, Triton's tiles use faster
    instructions."""
    for part, wanted in (("sm_80", "A100"), ("sm_90", "H100")):
        on(PARTS[part])
        found = choice.first(*BIASED[:4], BIASED.sizes, ("cuda", "triton"))
        assert found is not None
        assert found.backend == select(BIASED)
        times = [choice.predict(b, LONG.op, BF16, ("bias",), LONG.sizes, wanted, False) for b in ("cuda", "triton")]
        assert found.backend == ("cuda" if times[0] < times[1] else "triton")
        assert found.why.startswith(f"predicted for {wanted}: triton {times[1]:.3g} ms, cuda {times[0]:.3g} ms")


def test_the_nearest_measurement_decides(on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper: CUDA for windows of 12, Triton for windows of 7, the nearer one for those between. No row for fp32 and
    distant lengths."""
    _fresh(monkeypatch)
    sides = {side: WINDOWS._replace(sizes=(128, 56, 56, side, side, 3, 32)) for side in (6, 7, 9, 11, 12, 24)}
    for gpu in (PARTS["sm_90"], H200):
        on(gpu)
        assert [select(call) for call in sides.values()] == ["triton", "triton", "triton", "cuda", "cuda", "cuda"]
    assert select(LONG) == "torch"
    near = lambda dtype, sizes: choice.nearest("window_attention", dtype, ("bias_table",), sizes, "H100")  # noqa: E731
    assert near(BF16, sides[7].sizes).shape == (7, 7, 32)
    assert near(torch.float16, sides[9].sizes).shape == (8, 8, 32)
    assert near(F32, sides[7].sizes) is near(BF16, (128, 56, 56, 3, 3, 3, 32)) is None


def test_a_measurement_beats_a_rule(on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    on(PARTS["sm_80"])
    row = choice.Measured("A100", "flash_attention", BF16, False, (577, 577, 64), 2.0, 1.0, 1.1, "2026-01-01")
    _fresh(monkeypatch, row)
    assert select(LONG) == "triton"
    assert select(LONG._replace(sizes=(1, 1, 1, 577, 577, 64))) == "triton"  # batch and heads do not decide tiles
    assert select(LONG._replace(sizes=(64, 12, 12, 197, 197, 64))) == "torch"  # too far from the row
    assert select(LONG._replace(features=("grad",))) == "torch"
    found = choice.first(*LONG[:4], LONG.sizes, ("cuda", "triton", "torch"))
    assert found is not None
    assert found.why == "measured: triton 1 ms, cuda 2 ms, torch 1.1 ms at 577x577x64 on A100, 2026-01-01"
    _fresh(monkeypatch, replace(row, torch=0.9))
    on(PARTS["sm_80"])
    assert select(LONG) == "torch"
    _fresh(monkeypatch, replace(row, torch=math.nan, cuda=0.5))
    on(PARTS["sm_80"])
    assert select(LONG) == "cuda"


def test_a_measurement_of_other_kernels_does_not(on: Callable[..., None]) -> None:
    """The rows of 2026-11-26 are of kernels that have changed: the rule decides, and says what was measured."""
    on(PARTS["sm_90"])
    assert all(choice.stale(row) for row in choice.MEASURED)
    found = choice.first(*LONG[:4], LONG.sizes, ("cuda", "triton", "torch"))
    assert found is not None
    assert found.backend == "torch"
    assert "(not used, does not say which version of the kernels it is of: triton 0.259 ms" in found.why
    assert "torch 0.231 ms at 577x577x64 on H100, 2026-11-26)" in found.why


def test_why_a_measurement_is_not_used(on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row decides while both kernels and Triton are as measured."""
    on(PARTS["sm_90"])
    _fresh(monkeypatch)
    row = next(r for r in choice.MEASURED if r.op == LONG.op and not r.grad and r.shape == (577, 577, 64))
    for changed, why in (
        ({}, None),
        ({"digests": ("c1", row.digests[1])}, "the kernels of cuda have changed since"),
        ({"digests": ("c0", "0" * 16)}, "the kernels of triton have changed since"),
        ({"digests": ("c1", "0" * 16)}, "the kernels of cuda and triton have changed since"),
        ({"digests": ("", "")}, "does not say which version of the kernels it is of"),
        ({"triton_version": "1.0"}, "measured with Triton 1.0"),
    ):
        other = replace(row, cuda=1e-3, **changed)
        assert choice.stale(other) == why
        monkeypatch.setattr(choice, "MEASURED", (other,))
        found = choice.first(*LONG[:4], LONG.sizes, ("cuda", "triton", "torch"))
        assert found is not None
        assert found.backend == ("cuda" if why is None else "torch")
        assert f"(not used, {why}: " in found.why or why is None
    with monkeypatch.context() as hidden:  # as where Triton is not installed
        hidden.setitem(sys.modules, "triton", None)
        choice.stale.cache_clear()
        assert choice.stale(row) == f"measured with Triton {row.triton_version}"
    choice.stale.cache_clear()
    monkeypatch.setattr(choice, "MEASURED", (other, row))
    assert choice.nearest(*(LONG.op, BF16, (), LONG.sizes, "H100")) is row


def test_one_that_refuses_is_not_compared(on: Callable[..., None]) -> None:
    on(PARTS["sm_80"])
    assert select(LONG._replace(features=("dropout",))) == "triton"
    assert select(BIASED._replace(head_dims=(160,), sizes=(64, 12, 12, 577, 577, 160))) == "triton"


def test_equal_figures_go_to_triton(on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    on(PARTS["sm_80"])
    monkeypatch.setattr(choice, "predict", lambda *_: 1.0)
    assert select(BIASED) == "triton"
    assert preference("flash_attention") == ["triton", "cpu", "cuda", "torch", "reference"]


def test_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vector instructions PyTorch's gradients are faster, our forward is."""
    monkeypatch.setitem(MISSING, ("cpu", "cpu"), None)
    monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})
    monkeypatch.setattr(devices, "cpu_isa", lambda dtype: "portable")
    assert select(LONG._replace(device="cpu", sizes=())) == "cpu"
    assert select(LONG._replace(device="cpu", sizes=(), features=("grad",))) == "torch"


def test_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention multiplies with AMX, ours does not."""
    monkeypatch.setitem(MISSING, ("cpu", "cpu"), None)
    for isa, wanted in (("amx", "torch"), ("avx512bf16", "cpu"), ("avx2", "cpu")):
        monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})
        monkeypatch.setattr(devices, "cpu_isa", lambda dtype, isa=isa: isa if dtype == BF16 else "avx512")
        call = LONG._replace(device="cpu", sizes=())
        assert select(call) == wanted
        assert select(call._replace(dtype=F32)) == "cpu"
        assert select(call._replace(features=("bias",))) == "cpu"


@pytest.mark.parametrize("part", [None, "sm_80"])
def test_explain_says_by_what(on: Callable[..., None], part: str | None) -> None:
    on(*([] if part is None else [PARTS[part]]))
    with FakeTensorMode():
        q = torch.empty(2, 4, 577, 64, device="cuda", dtype=BF16)
        report = pyvit.explain(ops.flash_attention, q, q, q)
        assert report.chosen == "torch"
        assert report.notes[0].startswith("torch first, PyTorch's kernels come first where")
        bias = torch.empty(1, 1, 577, 577, device="cuda", dtype=BF16)
        notes = pyvit.explain(ops.flash_attention, q, q, q, bias=bias).notes
        assert len(notes) == (part is not None)
        assert all("first, predicted for A100: triton" in note for note in notes)
        none = torch.empty(0, 4, 577, 64, device="cuda", dtype=BF16)
        assert not pyvit.explain(ops.flash_attention, none, none, none, bias=bias).notes


def test_sizes_of_every_operator(on: Callable[..., None]) -> None:
    on(PARTS["sm_80"])
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


@pytest.mark.parametrize(("part", "dynamic"), [("sm_80", False), ("sm_80", True), ("sm_90", False)])
def test_compiled(on: Callable[..., None], monkeypatch: pytest.MonkeyPatch, part: str, dynamic: bool) -> None:
    """Static sizes are predicted as in eager mode; dynamic shapes keep the declared order, without guards. On Hopper
    cuDNN's attention is asked for in the graph too."""
    on(PARTS[part])
    monkeypatch.setattr(choice, "predict", lambda backend, *_: 1.0 if backend == "cuda" else 2.0)
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(2, 4, 577, 64, device="cuda", dtype=BF16)
        mask = torch.empty(1, 4, 1, 577, device="cuda", dtype=torch.bool)
        attend = lambda q: ops.flash_attention(q, q, q, bias=mask) * 2  # noqa: E731
        torch.compile(attend, fullgraph=True, backend=keep, dynamic=dynamic)(q)
        if not dynamic:  # PyTorch's attention on fake tensors of symbolic sizes needs a build with CUDA
            torch.compile(lambda q: ops.flash_attention(q, q, q) * 2, fullgraph=True, backend=keep)(q)
    (backend,) = [n.args[-1] for n in graphs[0].graph.nodes if n.target is torch.ops.pyvit.flash_attention.default]
    assert backend == ("triton" if dynamic else "cuda")
    if not dynamic:
        called = [str(n.target) for n in graphs[1].graph.nodes]
        assert any("scaled_dot_product_attention" in name for name in called)
        assert any("sdpa" in name for name in called) == (part == "sm_90"), called


@pytest.mark.parametrize("gpu", list(cost_model.GPUS))
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
                found = choice.predict(backend, "flash_attention", dtype, features, (8, 4, 4, n, n, d), gpu, grad)
                assert found > 1e3 * sum(floors[: 1 + grad])
        for window in (4, 7, 12, 16):
            floors = [
                cost_model.window_attention(8, 50, 50, (window, window), 3, 32, dtype, backward=b).floor(gpu)
                for b in (False, True)
            ]
            for backend in ("cuda", "triton"):
                sizes = (8, 50, 50, window, window, 3, 32)
                assert choice.predict(backend, "window_attention", dtype, features, sizes, gpu, grad) > 1e3 * sum(
                    floors[: 1 + grad]
                )
        for backend in ("cuda", "triton"):
            assert choice.predict(backend, "patch_embed", dtype, features, (8, 3, 16, 16, 196, 768), gpu, grad) > 0


def test_plans_know_every_head_dimension_that_is_served() -> None:
    for op, plan in (
        ("flash_attention", lambda d: cost_model.cuda_attention(197, 197, d, 2, True, False)),
        ("window_attention", lambda d: cost_model.cuda_window(169, d, 2, True, True)),
    ):
        low, high, step = CAPABILITIES[op]["cuda"].head_dim
        assert all(plan(d).flops >= 1 for d in range(low, high + 1, step))


def test_the_current_gpu(on: Callable[..., None]) -> None:
    for name, arch, wanted in (
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100"),
        ("NVIDIA GH900", "sm_90", "H100"),
        ("NVIDIA GB300", "sm_103", "B300"),
        ("NVIDIA GeForce RTX 4090", "sm_89", "RTX4090"),
        ("NVIDIA RTX A6000", "sm_86", "RTX3090"),
        ("Tesla T4", "sm_75", None),
    ):
        on(replace(PARTS[arch], name=name))
        assert choice.current_gpu() == wanted
    on()
    assert choice.current_gpu() is None


def test_a_measured_case_makes_a_row() -> None:
    """Rows are Python code for the table."""
    (case,) = [c for c in gpu_cases.tiny() if c.op == "flash_attention" and c.mode == "forward+backward"][:1]
    row = gpu_model.measured(case, "A100", (1.23456, 2.0, math.nan), "2026-01-01", ("a", "b"), "3.9")
    assert (row.cuda, row.triton, row.grad, row.shape) == (1.235, 2.0, True, (33, 33, 32))
    names = {"Measured": choice.Measured, "torch": torch, "NAN": choice.NAN}
    assert repr(eval(repr(row).replace("nan", "NAN"), names)) == repr(row)
