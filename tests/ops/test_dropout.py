"""Dropout of attention weights: its statistics, and agreement with the Philox mask."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from pyvit.ops import checks, flash_attention, reference, window_attention
from pyvit.testing import Served, compare, served

on_attention = pytest.mark.parametrize("on", served("flash_attention", "dropout", "grad"), ids=str)
on_window = pytest.mark.parametrize("on", served("window_attention", "dropout", "grad"), ids=str)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fraction_kept(p: float) -> None:
    """Bernoulli statistics in every row and column; different masks for every head and seed."""
    keep = reference.dropout_keep(torch.randint(2**62, (1,)), p, 8, 200, 300).double()
    expected, deviation = 1 - p, (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - expected) < 5 * deviation / keep.numel() ** 0.5
    for dim in (0, 1, 2):
        rows = keep.mean([d for d in range(3) if d != dim])
        assert (rows - expected).abs().max() < 6 * deviation / (keep.numel() / keep.shape[dim]) ** 0.5
    centred = (keep - expected).flatten(1) / deviation
    correlation = centred @ centred.T / centred.shape[1] - torch.eye(8)
    assert correlation.abs().max() < 6 / centred.shape[1] ** 0.5 + 0.02 * deviation / expected
    lagged = (keep[..., 1:] - expected) * (keep[..., :-1] - expected)
    assert abs(lagged.mean()) < 6 * deviation**2 / keep.numel() ** 0.5


def test_seeds_differ_and_repeat() -> None:
    draw = functools.partial(reference.dropout_keep, p=0.5, heads=4, rows=30, cols=30)
    a, b = torch.tensor([1]), torch.tensor([1 << 40])
    assert torch.equal(draw(a), draw(a.clone()))
    assert 0.4 < (draw(a) == draw(b)).double().mean() < 0.6
    assert torch.equal(draw(a)[:2, :10, :7], reference.dropout_keep(a, 0.5, 2, 10, 7)), "a function of position alone"


def _masked(p: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    return torch.where(keep, p / (1 - dropout_p), 0.0)


@on_attention
@pytest.mark.parametrize("dropout_p", [0.1, 0.7])
def test_attention_drops_what_the_mask_says(on: Served, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients with a given seed, against the formula with an explicit mask, in float64."""
    tensors = [on.randn(2, 3, 20, 32), on.randn(2, 3, 27, 32), on.randn(2, 3, 27, 16)]
    seed = torch.randint(2**62, (1,), device=on.device)
    monkeypatch.setattr(checks, "dropout_seed", lambda *_: seed)
    keep = reference.dropout_keep(seed, dropout_p, 6, 20, 27).view(2, 3, 20, 27)
    weight = torch.randn(2, 3, 20, 16, device=on.device)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _masked((q * 0.3 @ k.mT).softmax(-1), keep, dropout_p).to(v.dtype) @ v

    def op(*leaves: Tensor) -> Tensor:
        return flash_attention(*leaves, scale=0.3, dropout_p=dropout_p, backend=on.backend)

    results = []
    for function, dtype in ((op, on.dtype), (naive, on.dtype), (naive, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, weight.to(dtype))])
    compare("dropout", *results, factor=3, labels=["out", "grad_q", "grad_k", "grad_v"])


@on_attention
def test_attention_is_unbiased_and_seeded(on: Served) -> None:
    q, k, v = (on.randn(1, 2, 6, 32, scale=0.5) for _ in range(3))
    drop = functools.partial(flash_attention, q, k, v, dropout_p=0.3, backend=on.backend)
    torch.manual_seed(3)
    first, second = drop(), drop()
    torch.manual_seed(3)
    assert torch.equal(first, drop())
    assert not torch.equal(first, second)
    mean = torch.stack([drop().double() for _ in range(600)]).mean(0)
    assert (mean - flash_attention(q, k, v, backend="reference").double()).abs().mean() < 0.02


@on_attention
def test_the_backward_draws_the_same_mask(on: Served) -> None:
    """If v is the identity and the output gradient is 1, grad_v is the column sums of the weights that the forward
    used."""
    q, k = on.randn(1, 2, 9, 16), on.randn(1, 2, 12, 16)
    v = torch.eye(12, dtype=on.dtype, device=on.device).expand(1, 2, 12, 12).clone().requires_grad_()
    weights = flash_attention(q, k, v, dropout_p=0.4, backend=on.backend)
    weights.sum().backward()
    wanted = weights.detach().float().sum(2)[..., None].expand_as(v)
    torch.testing.assert_close(
        v.grad.float(),
        wanted,
        rtol=1e-3 if on.dtype == torch.float32 else 2e-2,
        atol=1e-5 if on.dtype == torch.float32 else 1e-2,
    )


@on_window
def test_window_attention(on: Served) -> None:
    qkv = on.randn(2, 6, 7, 48)
    drop = functools.partial(window_attention, qkv, 3, 1, num_heads=2, backend=on.backend)
    torch.manual_seed(3)
    first = drop(dropout_p=0.3)
    torch.manual_seed(3)
    assert torch.equal(first, drop(dropout_p=0.3))
    mean = torch.stack([drop(dropout_p=0.3).double() for _ in range(400)]).mean(0)
    assert (mean - drop().double()).abs().mean() < 0.06
    leaf = qkv.clone().requires_grad_()
    torch.manual_seed(4)
    (grad,) = torch.autograd.grad(
        window_attention(leaf, 3, 1, num_heads=2, dropout_p=0.3, backend=on.backend).sum(), leaf
    )
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_dropout_zero_draws_no_number() -> None:
    state = torch.get_rng_state()
    q = torch.zeros(1, 1, 3, 8)
    flash_attention(q, q, q)
    window_attention(torch.zeros(1, 3, 3, 24), 3, num_heads=1)
    assert torch.equal(state, torch.get_rng_state())
