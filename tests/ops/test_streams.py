"""CUDA streams: kernels run on the current stream, and calls can be captured into a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyvit.testing import Served

pytestmark = pytest.mark.gpu


def _pass(example: Any, on: Served, leaves: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and, if any, gradients of their weighted sum, without reading values on the host."""
    outputs = example(on, leaves)
    differentiable = [o for o in outputs if o.requires_grad]
    wanted = [t for t in leaves.values() if t.requires_grad]
    if not differentiable:
        return outputs
    return [*outputs, *torch.autograd.grad(differentiable, wanted, [torch.ones_like(o) for o in differentiable])]


@pytest.mark.every_dtype
def test_captured_in_a_graph(example: Any, on: Served) -> None:
    """A replay uses the inputs' current values and gives the same bits as a call outside the graph."""
    leaves = example.leaves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # Triton compiles here, before the capture
        _pass(example, on, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _pass(example, on, leaves)
    with torch.no_grad():
        for t in leaves.values():
            if t.is_floating_point():
                t.mul_(0.5)
    graph.replay()
    want = _pass(example, on, leaves)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_runs_on_the_current_stream(example: Any, on: Served) -> None:
    """The call waits for work queued on its stream."""
    leaves = example.leaves()
    want = _pass(example, on, leaves)
    name = next(name for name, t in leaves.items() if t.is_floating_point())
    held = leaves[name].detach().clone()
    with torch.no_grad():
        leaves[name].fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            leaves[name].copy_(held)
        got = _pass(example, on, leaves)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
