"""Training for half an hour with random sizes: memory stays flat, and the models keep agreeing with the reference.

ViT, Swin and a ViT for images of different sizes (packed sequences) take turns. Each step draws batch, image size and
dtype; every :data:`EVERY` steps the outputs and all gradients of the model at hand, with the weights it has by then,
are compared with the naive form in float64.
"""

from __future__ import annotations

import copy
import gc
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyvit
from pyvit import heap
from pyvit.models.naflex import NaFlexVisionTransformer
from pyvit.models.swin import SwinTransformer
from pyvit.models.vit import VisionTransformer
from pyvit.testing import GRADIENT_FACTOR, Comparison, compare

#: Steps between two comparisons with float64.
EVERY = 25
#: Part of the time after which memory counts as that of a warm process, and how much it may grow from then on, in MiB.
WARM, MOST_GROWTH = 0.2, 32.0
_CLASSES = 10

Images = Tensor | list[Tensor]


def resident() -> float:
    """Memory of this process, in MiB, after garbage and what malloc keeps of freed memory were given back: the latter
    grows under tensors of many sizes, whoever allocates them."""
    gc.collect()
    heap.Trimmer(0)()
    return heap.resident() / 2**20


def models() -> dict[str, nn.Module]:
    """Small models with every part of the large ones."""
    vit: dict[str, Any] = {"patch_size": 8, "num_classes": _CLASSES, "embed_dim": 96, "depth": 3, "num_heads": 3}
    return {
        "ViT": VisionTransformer(img_size=64, drop_path_rate=0.1, init_values=0.1, **vit),
        "Swin": SwinTransformer(
            img_size=64, num_classes=_CLASSES, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=4
        ),
        "NaFlex": NaFlexVisionTransformer(img_size=64, class_token=False, global_pool="avg", **vit),
    }


def draw(name: str, r: random.Random) -> tuple[Images, Tensor]:
    """A batch of random size for the model ``name``, and its labels."""
    batch = r.randint(1, 12)
    labels = torch.randint(_CLASSES, (batch,))

    def size() -> tuple[int, int]:
        if name == "ViT":
            return 64, 64
        return 8 * r.randint(1, 12), 8 * r.randint(1, 12)

    if name == "NaFlex" and r.random() < 0.7:
        return [torch.randn(3, *size()) for _ in range(batch)], labels
    images = torch.randn(batch, 3, *size())
    return (images.contiguous(memory_format=torch.channels_last) if r.random() < 0.3 else images), labels


def _as(images: Images, dtype: torch.dtype) -> Images:
    return images.to(dtype) if isinstance(images, Tensor) else [image.to(dtype) for image in images]


def _gradients(model: nn.Module, images: Images, labels: Tensor) -> list[Tensor]:
    logits = model(images)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(F.cross_entropy(logits, labels), parameters, allow_unused=True)
    return [logits.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))]


def check(name: str, model: nn.Module, images: Images, labels: Tensor) -> list[Comparison]:
    """Logits and gradients of all parameters, in evaluation mode, beside the naive form. Raises NumericsError."""
    evaluated = copy.deepcopy(model).eval()
    got = _gradients(evaluated, images, labels)
    with pyvit.use_backend("reference"):
        same = _gradients(evaluated, images, labels)
        want = _gradients(evaluated.double(), _as(images, torch.float64), labels)
    labels_of = ["logits", *(f"grad_{key}" for key, p in model.named_parameters() if p.requires_grad)]
    peak = max(float(g.abs().max()) for g in want[1:])
    found = compare(name, got[:1], same[:1], want[:1], labels=labels_of[:1])
    # The gradients of a batch are sums over all tokens, whose terms are of one size in all parameters.
    least = [max(float(g.abs().max()), 0.05 * peak) for g in want[1:]]
    return found + compare(name, got[1:], same[1:], want[1:], GRADIENT_FACTOR, labels=labels_of[1:], magnitudes=least)


def soak(minutes: float, seed: int = 0) -> dict[str, Any]:
    """Train for ``minutes``; figures of the run. Raises AssertionError if memory grows by more than
    :data:`MOST_GROWTH`, a loss is not finite, or a result is off the reference."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    trained = models()
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-4) for name, m in trained.items()}
    started, steps, checks, largest = time.monotonic(), dict.fromkeys(trained, 0), 0, 0.0
    memory: list[tuple[float, float]] = []  # part of the time, MiB
    while (elapsed := time.monotonic() - started) < 60 * minutes or not checks:
        name = r.choice(list(trained))
        model, optimizer = trained[name], optimizers[name]
        images, labels = draw(name, r)
        with torch.autocast("cpu", torch.bfloat16, enabled=r.random() < 0.5):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not loss.isfinite():
            raise AssertionError(f"{name}: the loss of step {steps[name]} is {float(loss)}")
        steps[name] += 1
        if sum(steps.values()) % EVERY == 0:
            found = check(name, model, images, labels)
            checks, largest = checks + 1, max(largest, *(c.error / c.limit for c in found))
            memory.append((elapsed / (60 * minutes), resident()))
    warm, growth = grown(memory)
    if growth > MOST_GROWTH:
        raise AssertionError(f"memory grew by {growth:.0f} MiB from {warm:.0f} MiB, more than {MOST_GROWTH:.0f} MiB")
    return {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "steps": steps,
        "checks": checks,
        "of_limit": round(largest, 3),
        "warm_mib": round(warm),
        "growth_mib": round(growth, 1),
        "bound_mib": MOST_GROWTH,
    }


def grown(memory: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The median MiB of a fifth of the run after :data:`WARM` of it, and by how much that of the last fifth is above
    it; ``memory``: pairs (part of the time, MiB). Medians, since the largest batch decides single values."""

    def median(low: float, high: float) -> float:
        found = sorted(m for at, m in memory if low <= at <= high) or [memory[-1][1]]
        return found[len(found) // 2]

    warm = median(WARM, 2 * WARM)
    return warm, median(1 - WARM, 2.0) - warm
