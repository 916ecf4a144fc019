"""Selecting a backend automatically, by name, by context or by environment, and the reasons if one cannot serve."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyvit
from pyvit import dispatch
from pyvit.dispatch import Call, capabilities, gradients, reasons, select
from pyvit.dispatch.capabilities import BACKENDS, CAPABILITIES, MISSING, PLAIN, Capability
from pyvit.dispatch.schema import schema_of
from pyvit.ops import attention_map, flash_attention, patch_embed, rope_attention, window_attention
from pyvit.ops.flash_attention import ATTENTION_BACKWARD
from pyvit.schemas import PYTHON_SCHEMAS, SCHEMAS

Q = torch.zeros(1, 2, 5, 8)
F32 = torch.float32


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two working backends besides the reference, on any machine."""
    table = {
        "triton": Capability((torch.float16,), frozenset({"bias"}), (16, 128, 8)),
        "cpu": Capability((F32, torch.bfloat16), frozenset({"bias", "grad"}), (1, 256, 1)),
        "reference": CAPABILITIES["flash_attention"]["reference"],
    }
    monkeypatch.setitem(CAPABILITIES, "flash_attention", table)
    for backend in BACKENDS:
        monkeypatch.setitem(MISSING, (backend, "cpu"), "needs a GPU" if backend == "cuda" else None)
    monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})


def call(dtype: torch.dtype = F32, *features: str, d: int = 64, device: str = "cpu") -> Call:
    return Call("flash_attention", device, dtype, features, (d,))


@pytest.mark.usefixtures("fake")
def test_the_first_that_can_is_chosen() -> None:
    assert select(call()) == "cpu"
    assert select(call(torch.float16, "bias")) == "triton"
    assert select(call(torch.float64)) == "reference"
    assert select(call(F32, "bias", "grad")) == "cpu"
    assert select(call(F32, "dropout")) == "reference"
    assert select(call(F32, d=257)) == "reference"


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("asked", "backend", "wanted"),
    [
        (call(), "cuda", ["needs a GPU"]),
        (call(), "triton", ["dtype float32 is not among float16"]),
        (
            call(torch.float16, "causal", d=20),
            "triton",
            ["head dimension 20 is not in 16..128 in steps of 8", "does not support causal"],
        ),
        (call(F32, "lse_grad", d=300), "cpu", ["head dimension 300 is not in 1..256", "does not support lse_grad"]),
        (call(device="xpu"), "cpu", ["runs on cpu tensors, got xpu"]),
        (call(), "cpu", []),
    ],
    ids=str,
)
def test_reasons(asked: Call, backend: str, wanted: list[str]) -> None:
    assert reasons(asked, backend) == wanted
    if wanted:
        with pytest.raises(pyvit.BackendError) as caught:
            select(asked, backend)
        assert str(caught.value) == f"flash_attention: backend {backend!r} cannot serve this call: {'; '.join(wanted)}"


@pytest.mark.usefixtures("fake")
def test_nothing_serves() -> None:
    with pytest.raises(
        pyvit.BackendError,
        match=r"no backend serves this call \(cuda: needs a GPU; triton: .*; cpu: .*; reference: .*int8",
    ):
        select(call(torch.int8))


def test_an_operator_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MISSING, ("triton", "cpu"), None)
    monkeypatch.setitem(CAPABILITIES, "attention_map", {"reference": CAPABILITIES["attention_map"]["reference"]})
    assert reasons(Call("attention_map", "cpu", F32, ()), "triton") == ["has no kernel for attention_map"]


def test_requested_by_argument_context_and_name() -> None:
    """The argument has priority over the context, and the context over automatic selection; contexts nest and end."""
    wrong = next(b for b in BACKENDS if reasons(Call("flash_attention", "cpu", F32, (), (8,)), b))
    with pyvit.use_backend(wrong):
        with pytest.raises(pyvit.BackendError, match=wrong):
            flash_attention(Q, Q, Q)
        flash_attention(Q, Q, Q, backend="reference")
        with pyvit.use_backend("reference"):
            assert pyvit.explain(flash_attention, Q, Q, Q).chosen == "reference"
        with pyvit.use_backend(None):
            flash_attention(Q, Q, Q)
        with pytest.raises(pyvit.BackendError, match=wrong):
            attention_map(Q, Q, 0)
    assert pyvit.explain(flash_attention, Q, Q, Q).chosen == select(Call("flash_attention", "cpu", F32, (), (8,)))


def test_use_backend_as_a_statement() -> None:
    before = pyvit.use_backend("reference")
    try:
        assert pyvit.explain(flash_attention, Q, Q, Q).chosen == "reference"
    finally:
        before.__exit__()
    with pytest.raises(
        ValueError, match="use_backend: name must be one of cuda, triton, cpu, torch, reference, got 'cpi'"
    ):
        pyvit.use_backend("cpi")
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, torch, reference, got 'cpi'"):
        flash_attention(Q, Q, Q, backend="cpi")


def test_a_context_that_fails_to_begin_changes_nothing() -> None:
    chosen = pyvit.explain(flash_attention, Q, Q, Q).chosen
    with pytest.raises(ValueError, match="cpi"):
        pyvit.use_backend("cpi")
    assert pyvit.explain(flash_attention, Q, Q, Q).chosen == chosen


def test_the_backward_runs_where_the_forward_did() -> None:
    """The backend is part of the graph: leaving the context between forward and backward changes nothing."""
    leaf = torch.randn(1, 2, 5, 8, requires_grad=True)
    with pyvit.use_backend("reference"):
        out = flash_attention(leaf, leaf, leaf)
    (inside,) = torch.autograd.grad(out.sum(), leaf)
    (alone,) = torch.autograd.grad(flash_attention(leaf, leaf, leaf, backend="reference").sum(), leaf)
    assert torch.equal(inside, alone)


def test_explain_reports() -> None:
    bias = torch.zeros(5, 5, requires_grad=True)
    report = pyvit.explain(
        flash_attention, Q.transpose(2, 3), Q.transpose(2, 3), Q.transpose(2, 3)[..., :3], bias=None, is_causal=True
    )
    assert report.call == Call("flash_attention", "cpu", F32, ("causal",), (5, 3))
    assert [note.split()[0] for note in report.notes] == ["q", "k", "v"]
    assert "stride 8 in its last dimension and will be copied" in report.notes[0]
    text = str(report)
    assert text.startswith(f"flash_attention on cpu, float32 (causal) -> {report.chosen}")
    for backend in BACKENDS:
        assert f"  {backend:<10} " in text
        assert backend == report.chosen or backend in PLAIN or report.refusals[backend]
    described = pyvit.explain("flash_attention", Q, Q, Q, bias=bias, return_lse=True, dropout_p=0.5).call.features
    assert described == ("bias", "bias_grad", "dropout", "lse", "lse_grad")
    with torch.no_grad():
        assert pyvit.explain(flash_attention, Q, Q, Q, bias=bias).call.features == ("bias",)


def test_explain_every_operator() -> None:
    window = pyvit.explain(
        window_attention,
        torch.zeros(1, 5, 6, 48),
        3,
        1,
        num_heads=2,
        pad_qkv=torch.zeros(48),
        logit_scale=torch.zeros(2),
    )
    assert set(window.call.features) == {"logit_scale", "pad_qkv", "shift", "padding"}
    assert window.call.head_dims == (8,)
    images, weight = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 3, 4, 4, requires_grad=True)
    patch = pyvit.explain(
        patch_embed,
        images,
        weight,
        stride=2,
        keep=torch.zeros(1, 2, dtype=torch.int64),
        mean=torch.zeros(3),
        std=torch.ones(3),
    )
    assert set(patch.call.features) == {"uint8", "normalize", "keep", "overlap", "grad"}
    assert pyvit.explain(attention_map, Q, Q, 0, bias=torch.ones(5, 5, dtype=torch.bool)).call.features == (
        "bool_mask",
    )


def test_explain_rope_attention() -> None:
    """Where no kernel of its own serves it, the report says of what it is made."""
    rope = torch.zeros(5, 2, 8, requires_grad=True)
    report = pyvit.explain(rope_attention, Q, Q, Q, rope, is_causal=True)
    assert set(report.call.features) == {"causal", "grad"}
    with FakeTensorMode():
        on_gpu = [torch.empty(1, 2, 5, 8, device="cuda") for _ in range(3)]
        report = pyvit.explain(rope_attention, *on_gpu, torch.empty(5, 2, 8, device="cuda"))
    assert report.chosen == "torch"
    assert any("then flash_attention, which chooses its own backend" in note for note in report.notes)


def test_explain_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(dispatch.Operator, "__call__", refuse)
    assert pyvit.explain(flash_attention, Q, Q, Q).chosen in BACKENDS
    with pytest.raises(AssertionError, match="computed"):
        flash_attention(Q, Q, Q)


def test_capabilities_name_only_what_dispatch_knows() -> None:
    """A misspelt feature in the table would refuse calls: every feature must be one that some operator uses."""
    described = {"bias", "bool_mask", "bias_grad", "causal", "dropout", "gqa", "grad", "lse", "lse_grad"}
    described |= {
        "bias_table",
        "logit_scale",
        "pad_qkv",
        "shift",
        "padding",
        "uint8",
        "normalize",
        "overlap",
        "pos_embed",
        "prefix",
        "keep",
        "images_grad",
    }
    described |= {"group", "prototypes", "center", "logits", "wider_dtype"}
    for op, table in CAPABILITIES.items():
        assert table["reference"] is capabilities._REFERENCE, op
        for backend, capability in table.items():
            assert backend in BACKENDS
            assert capability.features <= described, (op, backend)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_environment_variable() -> None:
    code = "import torch, pyvit; q = torch.zeros(1, 1, 4, 8); print(pyvit.explain('flash_attention', q, q, q).chosen)"
    assert _python(code, PYVIT_BACKEND="reference").stdout.strip() == "reference"
    refused = _python(code, PYVIT_BACKEND="cuda")
    assert refused.returncode
    assert (
        "BackendError: flash_attention: backend 'cuda' cannot serve this call: runs on cuda tensors, got cpu"
        in refused.stderr
    )
    assert (
        "PYVIT_BACKEND must be one of cuda, triton, cpu, torch, reference, got 'gpu'"
        in _python(code, PYVIT_BACKEND="gpu").stderr
    )


def test_schemas_are_read_as_torch_reads_them() -> None:
    for name in (*SCHEMAS, *PYTHON_SCHEMAS):
        schema, theirs = schema_of(name), getattr(torch.ops.pyvit, name).default._schema
        assert schema.arguments == tuple(a.name for a in theirs.arguments)
        assert schema.tensors == {a.name for a in theirs.arguments if "Tensor" in str(a.type)}
        assert schema.optional == {a.name for a in theirs.arguments if "Optional" in str(a.type)}
        assert schema.outputs == tuple(r.name or "out" for r in theirs.returns)


def test_names_that_no_schema_has() -> None:
    with pytest.raises(ValueError, match="arguments are q, k, rows, bias, scale, backend; there is no 'v'"):
        gradients.by_formula(schema_of("attention_map"), attention_map, ("q", "v"))
    with pytest.raises(ValueError, match="backward: grad_out, grad_lse, out, lse, bias_grad must be named after"):
        gradients.by_operator(schema_of("info_nce"), ATTENTION_BACKWARD)


def test_a_kernel_comes_before_a_tile_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the losses use Triton kernels, or torch's products tile by tile if Triton cannot serve."""
    monkeypatch.setitem(MISSING, ("triton", "cuda"), None)
    monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})
    pair = ("info_nce", "cuda", F32)
    assert select(Call(*pair, ("grad",))) == "triton"
    assert select(Call(*pair, ("grad", "group"))) == "cuda"
    assert select(Call("info_nce", "cuda", torch.float64, ())) == "cuda"
    assert capabilities.preference("flash_attention")[0] == "triton"
    assert capabilities.preference("info_nce")[-1] == "reference"
