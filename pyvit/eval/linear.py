"""A linear probe on frozen features: several learning rates are trained at once, and the best is chosen (Oquab et al.,
2024, appendix B.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.eval.features import check_finite, check_labelled, right

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)


#: Smaller training sets choose the rate by cross-validation with this many folds.
_SMALL, _FOLDS = 200, 5


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    rates: Sequence[float] = RATES,
    epochs: int = 50,
    batch: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """Test accuracy in per cent with the learning rate that is best on a validation set: {"linear": ..., "rate": ...}.

    train, test: (features (N, D), labels (N,)). Every learning rate has its own classifier. All use the same batches of
    standardised features. SGD with momentum and a cosine schedule to zero.

    A tenth of the training set is the validation set; below 200 features, five-fold cross-validation, after which the
    best rate is trained on all. Ties in accuracy are broken by the loss. Raises ValueError for features that are not
    finite, and if training has fewer than two classes.
    """
    if epochs < 1:
        raise ValueError(f"linear: epochs must be at least 1, got {epochs}")
    check_labelled("linear", train, test)
    check_finite("linear", train[0], test[0])
    classes = int(max(train[1].max(), test[1].max())) + 1
    mean, std = train[0].mean(0), train[0].std(0, correction=0).clamp(min=1e-6)
    x, test_x = (train[0] - mean) / std, (test[0] - mean) / std
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator, device="cpu")

    def learn(at: Tensor, speeds: Sequence[float]) -> tuple[Tensor, Tensor]:
        return _learn(x[at], train[1][at], classes, speeds, epochs, batch, generator)

    if len(x) < _SMALL:
        # Stratified: the items of each class are distributed over the folds in turn.
        dealt = order[train[1][order].argsort(stable=True)]
        parts = [dealt[i::_FOLDS] for i in range(min(_FOLDS, len(x)))]
        scores = torch.zeros(2, len(rates), dtype=torch.float32, device="cpu")
        for i, held in enumerate(parts):
            weights = learn(torch.cat(parts[:i] + parts[i + 1 :]), rates)
            scores += _scores(*weights, x[held], train[1][held])
        rate = _best(scores)
        weight, bias = (w[0] for w in learn(order, [rates[rate]]))
    else:
        held, kept = order[: len(x) // 10], order[len(x) // 10 :]
        every = learn(kept, rates)
        rate = _best(_scores(*every, x[held], train[1][held]))
        weight, bias = (w[rate] for w in every)
    return {"linear": 100 * right(test_x @ weight.t() + bias, test[1]), "rate": rates[rate]}


def _learn(
    x: Tensor, labels: Tensor, classes: int, rates: Sequence[float], epochs: int, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weights (rates, classes, D) and biases (rates, 1, classes)."""
    weight = (
        torch.randn(len(rates), classes, x.shape[1], generator=generator, dtype=torch.float32, device="cpu") * 0.01
    ).requires_grad_()
    bias = torch.zeros(len(rates), 1, classes, dtype=torch.float32, device="cpu", requires_grad=True)
    momentum = [torch.zeros_like(p) for p in (weight, bias)]
    speed = torch.tensor(rates, dtype=torch.float32, device="cpu")[:, None, None]
    per_epoch = max(len(x) // batch, 1)
    steps = epochs * per_epoch
    for step in range(steps):
        if step % per_epoch == 0:
            batches = iter(torch.randperm(len(x), generator=generator, device="cpu").split(batch))
        at = next(batches)
        logits = F.linear(x[at], weight.flatten(0, 1), bias.flatten()).view(-1, classes)  # (B * rates, classes)
        loss = F.cross_entropy(logits, labels[at].repeat_interleave(len(rates)), reduction="sum") / len(at)
        factor = 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi, dtype=torch.float32, device="cpu")))
        with torch.no_grad():
            for p, m, g in zip((weight, bias), momentum, torch.autograd.grad(loss, (weight, bias)), strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(speed * factor * m)
    return weight.detach(), bias.detach()


def _scores(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """(2, rates): number of correct predictions, and the negative loss."""
    logits = x @ weight.mT + bias
    loss = (
        F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none").view(len(logits), -1).sum(1)
    )
    return torch.stack([(logits.argmax(2) == labels).float().sum(1), -loss])


def _best(scores: Tensor) -> int:
    """The rate with most correct predictions; ties are broken by the loss. Rates with a loss that is not finite are
    excluded."""
    count, negative = scores[0].where(scores[1].isfinite(), -1), scores[1].nan_to_num(-torch.inf, neginf=-torch.inf)
    if count.max() < 0:
        raise ValueError("linear: the loss is not finite at any rate")
    return int(negative.where(count == count.max(), -torch.inf).argmax())
