"""Checks of accelerated models against the original: outputs, gradients, weights, copies and restoring."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyvit
from pyvit.testing import GRADIENT_FACTOR, compare
from tests.integrations.models import MODELS
from tests.models.parity import relative_error

#: An output, and gradients by the names of their parameters.
Results = tuple[Tensor, dict[str, Tensor]]


def counts(report: pyvit.integrations.Report) -> dict[str, int]:
    """How many modules of each class were replaced, without LayerNorm, all of which must be replaced."""
    found = Counter(row.kind.rpartition(".")[2] for row in report.replaced)
    assert found.pop("LayerNorm", 0) == sum(type(m).__name__ == "LayerNorm" for m in report.model.modules())
    return dict(found)


def results(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Results:
    """The output, and the gradients of all parameters."""
    model.zero_grad()
    out = call(model)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_rule(name: str, ours: Results, theirs: Results, exact: Results) -> None:
    """The numerics rule for :func:`results` of a model: ours, and theirs in the same dtype and in float64."""
    compare(name, ours[0], theirs[0], exact[0])
    assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
    largest = max(float(g.abs().max()) for g in exact[1].values())
    # Rounding passes through all layers: that of a small gradient is that of the larger ones that it comes from.
    least = [max(float(g.abs().max()), 0.1 * largest) for g in exact[1].values()]
    gradients = ([each[1][key] for key in exact[1]] for each in (ours, theirs, exact))
    compare(name, *gradients, GRADIENT_FACTOR, labels=list(exact[1]), magnitudes=least)


def check_accelerated(
    model: nn.Module, call: Callable[[nn.Module], Tensor], replaced: dict[str, int], rtol: float = 1e-4
) -> None:
    """``call`` gives the same result before and after, in float32 and bfloat16, and ``replaced`` modules of each class
    are replaced."""
    expected, gradients = results(model, call)
    exact, slopes = results(copy.deepcopy(model).double(), call)
    rounded = call(copy.deepcopy(model).bfloat16()).detach()
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}

    report = pyvit.accelerate(model)
    assert not report.left, report
    assert counts(report) == replaced
    found, ours = results(model, call)
    assert relative_error(found, expected) < rtol
    assert ours.keys() == gradients.keys()
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, theirs in gradients.items():
        difference = float((ours[name] - theirs).abs().max())
        # A bias of keys has no gradient but rounding, which is that of the sums it is left over from.
        least = 1e-3 * scale if float(slopes[name].abs().max()) > 1e-9 * scale else 1e-2 * scale
        assert difference < rtol * max(float(theirs.abs().max()), least), (
            f"gradient of {name} differs by {difference:.2e}"
        )

    # bfloat16 as every operator is held to: at most twice the original's error, and a rounding.
    short = call(copy.deepcopy(model).bfloat16()).detach()
    floor = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert float((short - exact).abs().max()) <= 2 * float((rounded - exact).abs().max()) + floor
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(call(model).detach().float(), expected) < 0.1

    after = model.state_dict(keep_vars=True)
    assert {name: id(value) for name, value in after.items()} == {name: pair[0] for name, pair in state.items()}
    assert all(torch.equal(after[name], pair[1]) for name, pair in state.items())
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(call(other), call(model))
        pyvit.restore(other)
        assert not torch.equal(call(other), call(model)), (
            "nothing distinguishes the accelerated model from the original"
        )
    pyvit.restore(model)
    assert torch.equal(results(model, call)[0], expected)
    assert not any({"forward", "_attn"} & set(vars(m)) for m in (*model.modules(), *other.modules()))


class Quantised(torch.Tensor):
    """A weight as quantisation libraries have: linear layers support it, most other code does not."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.values_ = values

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return torch.nn.functional.linear(args[0], args[1].values_ * 2, *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, kinds, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values_)
        raise NotImplementedError(f"Quantised: {function}")


def other(out):
    """Other numbers of the same size."""
    return (out[0].flip(-1), *out[1:]) if isinstance(out, tuple) else out.flip(-1)


def mine(function):
    """A user's replacement of ``function``."""
    return lambda *args, **kwargs: other(function(*args, **kwargs))


@functools.cache
def made(name):
    return MODELS[name]()


def check_changed(name, change, when):
    """A model that is accelerated and changed gives the same as one that is only changed. Returns the size of the
    change, and the report."""
    model, run = made(name)
    plain, model, other = None, copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        plain = run(model)
        report = pyvit.accelerate(model) if when == "after" else None
        with contextlib.ExitStack() as stack:
            change(other, stack)
            expected = run(other)
        with contextlib.ExitStack() as stack:
            change(model, stack)
            report = pyvit.accelerate(model) if report is None else report.refresh()
            assert relative_error(run(model), expected) < 1e-4
            pyvit.restore(model)
            assert relative_error(run(model), expected) < 1e-5
    return relative_error(plain, expected), report
