"""Runs recipes beside their originals: formulas of the papers, written anew, in float64 on the same views."""

import math

import torch

from pyvit.train.config import Config
from pyvit.train.engine import Run


def close(found, want, name, off=1e-9):
    """Equal to rounding: ``off`` times the largest value, or times 0.01 for gradients that are 0 but for rounding."""
    found, want = (torch.as_tensor(x, dtype=torch.float64) for x in (found, want))
    assert found.shape == want.shape, name
    assert (found - want).abs().max() <= off * max(float(want.abs().max()), 1e-2), name


def cosine(step, steps, peak, end, warmup, first=0.0):
    """Linear warm-up by step / warmup, then a half cosine over the other steps."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class AdamW:
    """Loshchilov and Hutter (2019), algorithm 2."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-8):
        self.betas, self.eps, self.state = betas, eps, {}

    def update(self, name, p, gradient, lr, decay, _):
        b1, b2 = self.betas
        n, m, v = self.state.get(name, (0, torch.zeros_like(p), torch.zeros_like(p)))
        n, m, v = n + 1, b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        self.state[name] = n, m, v
        return p - lr * decay * p - lr * (m / (1 - b1**n)) / ((v / (1 - b2**n)).sqrt() + self.eps)


class LARS:
    """You et al. (2017), algorithm 1, as SimCLR uses it: biases and norms are neither decayed nor adapted."""

    def __init__(self, momentum=0.9, trust=0.001):
        self.momentum, self.trust, self.state = momentum, trust, {}

    def update(self, name, p, gradient, lr, decay, adapts):
        if adapts:
            gradient = gradient + decay * p
            w, g = float(p.norm()), float(gradient.norm())
            lr *= self.trust * w / g if w > 0 and g > 0 else 1.0
        v = self.momentum * self.state.get(name, torch.zeros_like(p)) + lr * gradient
        self.state[name] = v
        return p - v


class Original:
    """A training loop with its own parameters.

    Args:
        parameters: {name: tensor} to train.
        loss: of (parameters, views).
        group: of (name, parameter), to (factor on the rate, weight decay, whether LARS adapts it).
        rate: of the step.
        optimizer: AdamW or LARS. clip: largest norm of the gradients; 0 for none.
    """

    def __init__(self, parameters, loss, group, rate, optimizer, clip=0.0):
        self.parameters = {name: p.detach().double().clone() for name, p in parameters.items()}
        self.loss, self.group, self.rate, self.optimizer, self.clip = loss, group, rate, optimizer, clip

    def step(self, step, views):
        leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        loss = self.loss(leaves, views)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        used = gradients
        if self.clip:
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
            used = {name: g * min(1.0, self.clip / (norm + 1e-6)) for name, g in gradients.items()}
        for name, g in used.items():
            scale, decay, adapts = self.group(name, self.parameters[name])
            lr = self.rate(step) * scale
            self.parameters[name] = self.optimizer.update(name, self.parameters[name], g, lr, decay, adapts)
        return float(loss.detach()), gradients


def run_of(folder, steps=20, **settings):
    """A run of pico size on noise, in float64. ``run.seen`` gets the views and gradients of each step."""
    base = {"data": "synthetic", "model": "vit_pico_patch8_32", "image_size": 32, "batch_size": 16}
    run = Run(Config(**{**base, **settings}, steps=steps, out=str(folder)))
    recipe = run.recipe.double()
    views, gradients = recipe.views, recipe.gradients

    def seen_views(batch, step, total):
        run.seen["batch"], run.seen["views"] = batch, views(batch, step, total)
        return run.seen["views"]

    def seen_gradients(step, total):
        run.seen["gradients"] = {n: p.grad.clone() for n, p in recipe.named_parameters() if p.grad is not None}
        return gradients(step, total)

    run.seen, recipe.views, recipe.gradients = {}, seen_views, seen_gradients
    return run


def compare(run, original, off=1e-9):
    """All steps of a run beside those of its original: losses, gradients, weights."""
    trained = {name for name, p in run.recipe.named_parameters() if p.requires_grad}
    assert trained == set(original.parameters)
    run.recipe.train()
    batches = run.batches()
    for step in range(run.steps):
        values = run.step(step, batches)
        loss, gradients = original.step(step, run.seen["views"])
        close(values["loss"], loss, f"loss of step {step}", off)
        assert values["lr"] == original.rate(step)
        for name, gradient in gradients.items():
            close(run.seen["gradients"][name], gradient, f"gradient of {name}, step {step}", off)
    moved = 0.0
    for name, p in run.recipe.named_parameters():
        if name in trained:
            close(p.detach(), original.parameters[name], name, off)
            moved += float(p.detach().norm())
    assert moved > 0
    run.close()
