"""Comparing a pyvit model with a peer that holds the same weights: outputs, and the gradient of every parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvit.models.checkpoints import load_checkpoint, recognise, to_native


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter far from its initial value, so that no term of the model is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = p.dim() == 1 and name.endswith("weight")  # norms
            p.copy_(1.0 + 0.1 * noise if one else (0.2 if "token" in name or "position" in name else 0.15) * noise)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    with torch.no_grad():
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def check_parity(
    ours: nn.Module, theirs: nn.Module, our_out: Tensor, their_out: Tensor, rtol: float = 1e-4, same_names: bool = False
) -> float:
    """Outputs, computed from the same weights, and all gradients agree to ``rtol`` of the largest value; returns the output's error."""
    error = relative_error(our_out, their_out)
    assert error < rtol, f"outputs differ by {error:.2e}"
    weights = torch.randn(their_out.shape, generator=torch.Generator().manual_seed(1))
    (our_out * weights).sum().backward()
    (their_out * weights).sum().backward()
    foreign = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    expected = foreign
    if not same_names:
        expected, unknown, _ = to_native(foreign, recognise(theirs.state_dict()))
        assert not unknown, unknown
    compared = 0
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, p in ours.named_parameters():
        if name not in expected:
            assert p.grad is None or not p.grad.any(), f"{name} has a gradient here alone"
            continue
        assert p.grad is not None, f"{name} has no gradient here"
        difference = float((p.grad - expected[name].view_as(p)).abs().max())
        limit = rtol * max(float(expected[name].abs().max()), 1e-3 * scale)
        assert difference < limit, f"gradient of {name} differs by {difference:.2e}, limit {limit:.2e}"
        compared += 1
    assert compared == len(expected)
    return error


def check_same_names(ours: nn.Module, theirs: nn.Module, *inputs: Tensor, rtol: float = 1e-6) -> float:
    """:func:`check_parity` of models whose parameters have the same names: random weights of ours go to theirs by name, buffers too."""
    randomise(ours)
    with torch.no_grad():
        for name, buffer in ours.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    ours.double(), theirs.double()  # in float32 a value that rounds to the other side of a ReLU's zero is another gradient
    inputs = tuple(x.double() for x in inputs)
    return check_parity(ours, theirs, ours(*inputs), theirs(*inputs), rtol, same_names=True)


def share(ours: nn.Module, theirs: nn.Module) -> None:
    """Give ``ours`` the weights of ``theirs``, through the checkpoint loader."""
    report = load_checkpoint(ours, theirs.state_dict())
    assert not report.missing
    assert not report.unexpected
    ours.eval()
