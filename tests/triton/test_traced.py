"""Triton operators under torch.compile, export, autocast and CUDA graphs, without a GPU.

Tracing uses fake CUDA tensors. A CPU build of torch computes no gradients for them, so backward formulas are traced in
the interpreter: ``PYVIT_NO_LIBRARY=1 TRITON_INTERPRET=1 pytest tests/ops/test_contract.py -k triton``. For CUDA graphs,
the launchers' torch operations are checked, forward and backward; the capture itself needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyvit import ops

common = pytest.importorskip("pyvit.triton_kernels.common")
workloads = pytest.importorskip("pyvit.triton_kernels.tools.workloads")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

Call = tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]


def _cuda(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _attention(dtype: torch.dtype) -> Call:
    q, kv = _cuda(2, 197, 4, 64, dtype=dtype).transpose(1, 2), _cuda(2, 2, 50, 64, dtype=dtype)
    tensors = {"q": q, "k": kv, "v": kv, "bias": _cuda(1, 4, 197, 50, dtype=F32)}
    return ops.flash_attention, tensors, {"enable_gqa": True, "dropout_p": 0.1, "return_lse": True}


def _varlen(dtype: torch.dtype) -> Call:
    tensors = {name: _cuda(57, 2, 32, dtype=dtype) for name in "qkv"}
    cu = _cuda(4, dtype=torch.int32)
    return (
        ops.flash_attention_varlen,
        tensors | {"cu_seqlens_q": cu, "cu_seqlens_k": cu},
        {"max_seqlen_q": 40, "max_seqlen_k": 40},
    )


def _map(dtype: torch.dtype) -> Call:
    tensors = {"q": _cuda(2, 4, 9, 24, dtype=dtype), "k": _cuda(2, 4, 70, 24, dtype=dtype)}
    return ops.attention_map, tensors | {"rows": _cuda(2, 3, dtype=torch.int64)}, {}


def _window(dtype: torch.dtype) -> Call:
    tensors = {
        "qkv": _cuda(2, 9, 10, 96, dtype=dtype),
        "bias_table": _cuda(169, 2, dtype=F32),
        "pad_qkv": _cuda(96, dtype=dtype),
    }
    return ops.window_attention, tensors, {"window_size": 7, "shift_size": 3, "num_heads": 2}


def _patches(dtype: torch.dtype) -> Call:
    tensors = {
        "images": _cuda(2, 3, 32, 32, dtype=dtype),
        "weight": _cuda(24, 3, 16, 16, dtype=dtype),
        "bias": _cuda(24, dtype=dtype),
    }
    return ops.patch_embed, tensors, {}


def _pair(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"a": _cuda(37, 24, dtype=dtype), "b": _cuda(37, 24, dtype=dtype), "scale": _cuda(dtype=F32)}


def _nt_xent(dtype: torch.dtype) -> Call:
    return ops.nt_xent, {"z1": _cuda(37, 24, dtype=dtype), "z2": _cuda(37, 24, dtype=dtype)}, {"temperature": 0.1}


def _distillation(dtype: torch.dtype) -> Call:
    tensors = {
        "student": _cuda(3, 5, 24, dtype=dtype),
        "teacher": _cuda(2, 5, 24, dtype=dtype),
        "weights": _cuda(3, 2, 5, dtype=F32),
    }
    tensors |= {name: _cuda(50, 24, dtype=dtype) for name in ("student_prototypes", "teacher_prototypes")}
    return ops.distillation_cross_entropy, tensors, {"student_temp": 0.1, "teacher_temp": 0.04}


ATTENTIONS: dict[str, Callable[[torch.dtype], Call]] = {
    "flash_attention": _attention,
    "flash_attention_varlen": _varlen,
    "attention_map": _map,
    "window_attention": _window,
    "patch_embed": _patches,
}
LOSSES: dict[str, Callable[[torch.dtype], Call]] = {
    "info_nce": lambda dtype: (ops.info_nce, _pair(dtype), {}),
    "nt_xent": _nt_xent,
    "sigmoid_contrastive": lambda dtype: (ops.sigmoid_contrastive, _pair(dtype) | {"bias": _cuda(dtype=F32)}, {}),
    "distillation_cross_entropy": _distillation,
}
CALLS = ATTENTIONS | LOSSES


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """A CPU build of torch aborts if a fake CUDA tensor requires a gradient."""
    with torch.no_grad():
        yield


class _Around(torch.nn.Module):
    """A Triton call between other operations."""

    def __init__(self, op: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        found = self.op(**tensors, **self.options, backend="triton")
        return [t * 2 for t in ([found] if isinstance(found, Tensor) else found)]


def _nodes(module: torch.fx.GraphModule, name: str) -> list[torch.fx.Node]:
    """Calls of an operator; losses are separate graphs in which autocast is off."""
    graphs = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    return [n for graph in graphs for n in graph.nodes if n.target is getattr(torch.ops.pyvit, name).default]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name: str, dynamic: bool) -> None:
    """torch.compile(fullgraph=True) keeps the operator with Triton, and knows its outputs."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    with FakeTensorMode():
        op, tensors, options = CALLS[name](BF16)
        got = torch.compile(_Around(op, options), fullgraph=True, backend=keep, dynamic=dynamic)(tensors)
        want = _Around(op, options)(tensors)
    (module,) = graphs
    (node,) = _nodes(module, name)
    assert node.args[-1] == "triton"
    assert [(t.shape, t.dtype, t.device, t.stride()) for t in got] == [
        (t.shape, t.dtype, t.device, t.stride()) for t in want
    ]


@pytest.mark.parametrize("name", CALLS)
def test_exports(name: str) -> None:
    with FakeTensorMode():
        op, tensors, options = CALLS[name](BF16)
        program = torch.export.export(_Around(op, options), (tensors,))
    (node,) = _nodes(program.graph_module, name)
    assert node.args[-1] == "triton"


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_never_reach_a_kernel(name: str) -> None:
    with FakeTensorMode(), common.recording("sm_90") as launches:
        op, tensors, options = CALLS[name](F16)
        out = op(**tensors, **options, backend="triton")
    assert not launches
    assert (out[0] if isinstance(out, tuple) else out).device.type == "cuda"


@pytest.fixture
def autocast() -> Iterator[None]:
    """torch.autocast("cuda", bfloat16), which torch disables without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", BF16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.usefixtures("autocast")
@pytest.mark.parametrize("name", CALLS)
def test_autocast(name: str) -> None:
    """Attention, windows and patch embedding use autocast's dtype; losses keep the dtype of their inputs."""
    with FakeTensorMode():
        op, tensors, options = CALLS[name](F32)
        out = op(**tensors, **options, backend="triton")
        low = torch.ops.pyvit.attention_map(
            _cuda(1, 1, 2, 8, dtype=F32), _cuda(1, 1, 3, 8, dtype=F32), _cuda(1, 1), None, 1.0, "triton"
        )
    assert (out[0] if isinstance(out, tuple) else out).dtype == (BF16 if name in ATTENTIONS else F32)
    assert low.dtype == BF16  # the dispatcher's own autocast layer


class _OnDevice(TorchDispatchMode):
    """Refuses operations on host tensors, which a CUDA graph cannot contain."""

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.device.type != "meta" for t in tree_leaves((args, kwargs, out))):
            raise AssertionError(f"{function} on a tensor of the host")
        return out


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Run on meta tensors under a CUDA graph's restrictions: reading a value or copying from the host is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor made of the host's values")

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched, common.recording("sm_90") as launches, _OnDevice():
            for name in ("tensor", "as_tensor", "from_numpy"):
                patched.setattr(torch, name, refuse)
            function()
        return [(launch.kernel.__name__, launch.grid, launch.options) for launch in launches]

    return run


@pytest.mark.parametrize("case", workloads.CASES)
def test_nothing_a_cuda_graph_cannot_hold(captured, case: str) -> None:
    """Forward and backward launchers read no tensor values, so no size, grid or choice of kernel depends on them."""
    run = workloads.prepare(case, BF16, "meta")
    first = captured(run)
    assert first
    assert captured(run) == first


@pytest.mark.parametrize(
    "reads",
    [
        lambda t: t.sum().item(),
        lambda t: t.cpu(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: bool(t[0] > 0),
        lambda t: torch.ones(3).to(t.device),
        lambda t: torch.tensor(2.0, device=t.device),
    ],
    ids=["item", "cpu", "mask", "nonzero", "bool", "copy", "tensor"],
)
def test_what_a_cuda_graph_cannot_hold_is_noticed(captured, reads: Callable[[Tensor], Any]) -> None:
    values = torch.empty(4, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        captured(lambda: reads(values))
