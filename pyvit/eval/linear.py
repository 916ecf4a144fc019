"""Linear probe on frozen features: a grid of rates trained at once, the best kept (Oquab et al., 2024, appendix B.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    rates: Sequence[float] = RATES,
    epochs: int = 50,
    batch: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """Test accuracy in per cent of the rate that did best on a tenth of the training features held back, {"linear": ..., "rate": ...}.

    train, test: (features (N, D), labels (N,)). Every rate has its own classifier; all see the same batches of one pass over the features,
    scaled by the training set's mean and deviation. SGD with momentum, cosine to zero.
    """
    classes = int(max(train[1].max(), test[1].max())) + 1
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, test_x = (train[0] - mean) / std, (test[0] - mean) / std
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator, device="cpu")
    held, kept = order[: len(x) // 10], order[len(x) // 10 :]
    weight = (torch.randn(len(rates), classes, x.shape[1], generator=generator, dtype=torch.float32, device="cpu") * 0.01).requires_grad_()
    bias = torch.zeros(len(rates), 1, classes, dtype=torch.float32, device="cpu", requires_grad=True)
    momentum = [torch.zeros_like(p) for p in (weight, bias)]
    speed = torch.tensor(rates, dtype=torch.float32, device="cpu")[:, None, None]
    steps = epochs * max(len(kept) // batch, 1)
    for step in range(steps):
        if step % max(len(kept) // batch, 1) == 0:
            shuffled = kept[torch.randperm(len(kept), generator=generator, device="cpu")]
            batches = iter(shuffled.split(batch))
        at = next(batches)
        logits = x[at] @ weight.mT + bias  # (rates, B, classes)
        loss = F.cross_entropy(logits.flatten(0, 1), train[1][at].repeat(len(rates)), reduction="sum") / len(at)
        factor = 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi, dtype=torch.float32, device="cpu")))
        with torch.no_grad():
            for p, m, g in zip((weight, bias), momentum, torch.autograd.grad(loss, (weight, bias)), strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(speed * factor * m)
    with torch.no_grad():
        right = ((x[held] @ weight.mT + bias).argmax(2) == train[1][held]).float().mean(1)
        best = int(right.argmax())
        accuracy = ((test_x @ weight[best].t() + bias[best]).argmax(1) == test[1]).float().mean()
    return {"linear": 100 * accuracy.item(), "rate": rates[best]}
