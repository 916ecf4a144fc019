"""Comparison of a pyvit model with another implementation that has the same weights: outputs, and gradients of all
parameters."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvit.models.checkpoints import load_checkpoint, recognise, to_native


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter far from its initial value, so that no term of the model is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = p.dim() == 1 and name.endswith("weight")  # norms
            if p.dim() == 4 and name.endswith(
                "weight"
            ):  # convolutions: maps that stay of size one, or the attention after them is one-hot
                p.copy_((2 / p[0].numel()) ** 0.5 * noise)
                continue
            p.copy_(1.0 + 0.1 * noise if one else (0.2 if "token" in name or "position" in name else 0.15) * noise)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    with torch.no_grad():
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


class Parity(NamedTuple):
    """Largest differences, relative to the largest value of what is compared."""

    output: float
    gradient: float | None


Gradients = dict[str, Tensor]


def check_parity(
    ours: nn.Module,
    theirs: nn.Module,
    our_out: Tensor,
    their_out: Tensor,
    *also: tuple[Tensor, Tensor],
    rtol: float = 1e-4,
    translate: Callable[[Gradients], Gradients] | None = None,
) -> Parity:
    """Outputs with the same weights, and all gradients, agree to ``rtol`` of the largest value.

    A gradient's error is relative to its largest value, but at least to a thousandth of the largest value of all
    gradients. ``also``: further outputs, ours and theirs. ``translate`` maps their gradients to our names; the default
    is the checkpoint loader. Returns both errors, and adds them to the file that ``PYVIT_PARITY`` names (see
    parity_table.py).
    """
    outputs = [relative_error(a, b) for a, b in ((our_out, their_out), *also)]
    assert all(error < rtol for error in outputs), f"outputs differ by {outputs}"
    weights = torch.randn(their_out.shape, generator=torch.Generator().manual_seed(1))
    (our_out * weights).sum().backward()
    (their_out * weights).sum().backward()
    expected = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    if translate is None:
        expected, unknown, _ = to_native(expected, recognise(theirs.state_dict()))
        assert not unknown, unknown
    else:
        expected = translate(expected)
    errors = {}
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, p in ours.named_parameters():
        if name not in expected:
            assert p.grad is None or not p.grad.any(), f"{name} has a gradient here alone"
            continue
        assert p.grad is not None, f"{name} has no gradient here"
        difference, largest = (float(g.abs().max()) for g in (p.grad - expected[name].view_as(p), expected[name]))
        assert p.dim() < 2 or largest > rtol * 1e-3 * scale, (
            f"gradient of {name} is so small that none would pass for it"
        )
        errors[name] = difference / max(largest, 1e-3 * scale)
        assert errors[name] < rtol, f"gradient of {name} differs by {errors[name]:.2e}"
    assert len(errors) == len(expected)
    parity = Parity(max(outputs), max(errors.values()))
    _record(ours, theirs, parity)
    return parity


def _record(ours: nn.Module, theirs: nn.Module, parity: Parity) -> None:
    if "PYVIT_PARITY" not in os.environ:
        return
    library = sys.modules[type(theirs).__module__.partition(".")[0]]
    row = {
        "model": type(ours).__name__,
        "peer": f"{library.__name__} {library.__version__.partition('+')[0]}",
        "class": type(theirs).__name__,
        "dtype": str(next(ours.parameters()).dtype).removeprefix("torch."),
        **parity._asdict(),
    }
    with open(os.environ["PYVIT_PARITY"], "a") as file:
        file.write(json.dumps(row) + "\n")


def check_both_precisions(
    ours: nn.Module, theirs: nn.Module, *inputs: Tensor, translate: Callable[[Gradients], Gradients]
) -> Parity:
    """Outputs in float32 (kernels), then :func:`check_parity` in float64 (reference formulas).

    For models with ReLU: in float32, rounding may change the sign of a ReLU's input and with it the gradient.
    """
    with torch.no_grad():
        error = relative_error(ours(*inputs), theirs(*inputs))
    assert error < 1e-4, f"outputs differ by {error:.2e} in float32"
    _record(ours, theirs, Parity(error, None))
    ours.double(), theirs.double()
    inputs = tuple(x.double() for x in inputs)
    return check_parity(ours, theirs, ours(*inputs), theirs(*inputs), rtol=1e-6, translate=translate)


def check_same_names(ours: nn.Module, theirs: nn.Module, *inputs: Tensor, relu: bool = True) -> Parity:
    """For models with the same parameter names: copy random weights and buffers by name. ``relu``: the models have
    ReLU."""
    randomise(ours)
    with torch.no_grad():
        for name, buffer in ours.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    if relu:
        return check_both_precisions(ours, theirs, *inputs, translate=dict)
    return check_parity(ours, theirs, ours(*inputs), theirs(*inputs), translate=dict)


def share(ours: nn.Module, theirs: nn.Module) -> None:
    """Load the weights of ``theirs`` into ``ours`` with the checkpoint loader."""
    report = load_checkpoint(ours, theirs.state_dict())
    assert not report.missing
    assert not report.unexpected
    ours.eval()
