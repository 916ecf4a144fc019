"""PyTorch features on every operator: batched gradients, torch.func, checkpointing, hooks, counters, modes,
profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyvit
from pyvit import ops
from pyvit.models.flops import count_module
from tests.ops.operator_cases import CASES, Case, randn

pytestmark = pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")


every = pytest.mark.parametrize("case", [pytest.param(make, id=name) for name, make in CASES.items()])


@every
def test_batched_gradients(case: Callable[[], Case]) -> None:
    """As ``jacobian(vectorize=True)`` computes them: gradients for a batch of output gradients."""
    case = case()
    leaves = case.leaves()
    out = case.op(*leaves)
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for ours, exact in zip(batched, torch.autograd.grad(out, leaves, grads[i], retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], exact, rtol=1e-4, atol=1e-5)
    for i, leaf in enumerate(leaves):
        jacobian = torch.autograd.functional.jacobian
        f = lambda t, i=i: case.op(*leaves[:i], t, *leaves[i + 1 :])  # noqa: E731
        torch.testing.assert_close(jacobian(f, leaf, vectorize=True), jacobian(f, leaf), rtol=1e-4, atol=1e-5)


@every
def test_batched_gradients_of_gradients(case: Callable[[], Case]) -> None:
    case = case()
    found = []
    for op in (case.op, case.plain):
        leaves = case.leaves()
        out = op(*leaves)
        torch.manual_seed(0)
        first = torch.autograd.grad(out, leaves, torch.randn_like(out), create_graph=True)
        first = [g for g in first if g.requires_grad]  # of what is linear in everything it is not
        grads = [torch.randn(3, *g.shape) for g in first]
        found.append(
            torch.autograd.grad(first, leaves, grads, is_grads_batched=True, allow_unused=True, materialize_grads=True)
        )
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


@every
def test_transforms(case: Callable[[], Case]) -> None:
    case = case()
    tensors, where = case.tensors, tuple(range(len(case.tensors)))
    several = tuple(torch.stack((t, t.flip(0), -t)) for t in tensors)
    for transformed in (
        lambda op: torch.func.grad(lambda *t: op(*t).float().square().sum(), argnums=where)(*tensors),
        lambda op: torch.func.jacrev(op, argnums=where)(*tensors),
        lambda op: (torch.func.vmap(op)(*several),),
        lambda op: torch.func.vmap(torch.func.grad(lambda *t: op(*t).float().square().sum(), argnums=where))(*several),
        lambda op: torch.func.vmap(torch.func.vjp(op, *tensors)[1])(torch.stack((op(*tensors), op(*tensors)))),
    ):
        for ours, exact in zip(transformed(case.op), transformed(case.plain), strict=True):
            torch.testing.assert_close(ours, exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["layer_norm", "linear gelu", "linear None", "mlp", "branch"])
def test_forward_mode_and_hessians_of_layers(name: str) -> None:
    case = CASES[name]()
    for transformed in (
        lambda op: torch.func.jacfwd(op)(*case.tensors),
        lambda op: torch.func.hessian(lambda *t: op(*t).square().sum())(*case.tensors),
        lambda op: torch.func.jvp(
            lambda x: op(x, *case.tensors[1:]), case.tensors[:1], (torch.ones_like(case.tensors[0]),)
        )[1],
    ):
        torch.testing.assert_close(transformed(case.op), transformed(case.plain), rtol=1e-3, atol=1e-3)


@every
def test_checkpoints_and_hooks_on_saved_tensors(case: Callable[[], Case]) -> None:
    case = case()

    def gradients(call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = case.leaves()
        out = call(*leaves)
        return torch.autograd.grad(out.float().square().sum(), leaves)

    def hooked(*leaves: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            return case.op(*leaves)

    def reentrant(*leaves: Tensor) -> tuple[Tensor, ...]:
        inputs = case.leaves()
        checkpoint(case.op, *inputs, use_reentrant=True).float().square().sum().backward()
        return tuple(t.grad for t in inputs)

    wanted = gradients(case.op)
    for found in (gradients(hooked), gradients(lambda *t: checkpoint(case.op, *t, use_reentrant=False)), reentrant()):
        for ours, exact in zip(found, wanted, strict=True):
            assert torch.equal(ours, exact)


@every
def test_results_and_inputs_may_be_written_to(case: Callable[[], Case], request: pytest.FixtureRequest) -> None:
    """A result supports ``+=``. Changing an input that the backward needs is an error, not a wrong gradient."""
    case = case()
    wanted = torch.autograd.grad(case.op(*(leaves := case.leaves())).sum(), leaves)
    out = case.op(*(leaves := case.leaves()))
    out += 1.0
    out.mul_(1.0)
    try:
        found = torch.autograd.grad(out.sum(), leaves)
    except RuntimeError as error:  # where the result is saved, as torch's relu and attention do
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        assert request.node.callspec.id.startswith(("flash", "rope", "decomposed", "window", "linear relu"))
    else:
        for ours, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, exact)
    for at in range(len(leaves)):
        leaves = case.leaves()
        given = [t * 1 for t in leaves]
        out = case.op(*given)
        with torch.no_grad():
            given[at].mul_(3.0)
        try:
            found = torch.autograd.grad(out.sum(), leaves)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            for ours, exact in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, exact)


def flops(call: Callable[[], Tensor], backward: bool = True) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as counter:
        if backward:
            out.float().square().sum().backward()
    return forward.get_total_flops(), counter.get_total_flops()


@every
def test_operations_are_counted(case: Callable[[], Case], request: pytest.FixtureRequest) -> None:
    """The same flops as the plain formula's, forward and backward, also if the forward was not counted."""
    case = case()
    leaves = case.leaves()
    wanted = flops(lambda: case.plain(*leaves))
    if request.node.callspec.id == "attention_map":  # its backward is the plain formula's, forward and all
        wanted = wanted[0], sum(wanted)
    assert flops(lambda: case.op(*leaves)) == wanted
    out = case.op(*leaves)
    with FlopCounterMode(display=False) as counter:
        out.float().square().sum().backward()
    assert counter.get_total_flops() == wanted[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_operations_of_models_are_counted(name: str, packed: bool) -> None:
    model = pyvit.create_model(name, num_classes=10, img_size=56 if "swin" in name else 32)
    images = model.example_inputs(2)[0]
    with pyvit.use_backend("reference"):
        wanted = flops(lambda: model(images))
    assert flops(lambda: model(images)) == wanted
    if packed:
        pyvit.pack_weights(model)
        with torch.no_grad():
            model(images)
            model(images)
            assert flops(lambda: model(images), backward=False)[0] == wanted[0]
    assert count_module(model).macs * 4 == wanted[0]  # multiply-adds of one image


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every
def test_modes_see_what_is_computed(case: Callable[[], Case]) -> None:
    case = case()
    wanted = torch.autograd.grad(case.op(*(leaves := case.leaves())).float().square().sum(), leaves)
    for mode in (Recorder(), Functions()):
        with mode:
            out = case.op(*(leaves := case.leaves()))
            with torch.no_grad():
                seen = len(mode.seen)
                case.op(*case.tensors)
            assert len(mode.seen) > seen
        found = torch.autograd.grad(out.float().square().sum(), leaves)
        for ours, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-2 if out.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_the_profiler_names_operators_with_shapes() -> None:
    x = randn(2, 5, 3, 2, 8).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        ops.flash_attention_qkvpacked(x).sum().backward()
        ops.layer_norm(x).sum().backward()
        ops.linear(x, randn(4, 8)).sum().backward()
    found = {event.key: event.input_shapes for event in profile.key_averages(group_by_input_shape=True)}
    attention = [shapes for name, shapes in found.items() if name.startswith("pyvit::flash_attention")]
    assert attention
    assert any([2, 2, 5, 8] in shapes for shapes in attention)
    assert any(name.startswith("pyvit::_norm") or name == "aten::native_layer_norm" for name in found)
    assert any(
        name in ("pyvit::product", "mkldnn::_linear_pointwise", "aten::linear", "aten::addmm", "aten::mm")
        for name in found
    )
