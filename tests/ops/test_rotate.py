"""pyvit.nn.rotate against products of complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyvit.nn import Attention, rotate


def _turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Pairs of channels of x (..., N, H, R) as complex numbers, turned by angles (N, H or 1, R/2)."""
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    if not interleaved:
        pairs = pairs.mT
    found = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    return (found if interleaved else found.mT).flatten(-2)


def rope_of(angles: Tensor, interleaved: bool) -> Tensor:
    """Sines and cosines (..., N, 2, R) of angles (..., N, R/2)."""
    every = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return torch.stack((every.sin(), every.cos()), -2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "channels"), [(8, 8), (10, 6)])
@pytest.mark.parametrize("per_head", [False, True])
def test_pairs(interleaved: bool, d: int, channels: int, per_head: bool) -> None:
    x = torch.randn(2, 7, 3, d, dtype=torch.float64)
    angles = torch.randn(3 if per_head else 1, 7, channels // 2, dtype=torch.float64) * 9
    rope = rope_of(angles, interleaved)
    found = rotate(x, rope if per_head else rope[0], interleaved)
    torch.testing.assert_close(found[..., :channels], _turned(x[..., :channels], angles.transpose(0, 1), interleaved))
    assert torch.equal(found[..., channels:], x[..., channels:])


def test_attention_interleaved() -> None:
    """Of channels in another order, so that the half-split form rotates the same pairs."""
    attn = Attention(16, 2, rope_interleaved=True).double()
    half = Attention(16, 2).double()
    half.load_state_dict(attn.state_dict())
    order = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2)))
    rows = torch.cat([t.unflatten(0, (2, 8))[:, order].flatten(0, 1) for t in attn.qkv.weight.detach().split(16)[:2]])
    with torch.no_grad():
        half.qkv.weight[:32] = rows
    x, angles = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(attn(x, rope=rope_of(angles, True)), half(x, rope=rope_of(angles, False)))


@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 2, 10), (5, 3, 8), (5, 8), (5, 2, 0)])
def test_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rotate: rope must"):
        rotate(torch.randn(1, 5, 2, 8), torch.randn(shape))
