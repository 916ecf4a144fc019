"""Contrastive losses over more images than fit into memory (GradCache; Gao et al., "Scaling Deep Contrastive Learning
Batch Size", 2021).

1. All micro-batches are encoded without autograd.
2. The loss of the whole batch gives the gradient of every embedding.
3. A second forward pass of each micro-batch propagates these gradients to the parameters.

The gradients are those of one large batch, up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.ops.loss_tiles import widen
from pyvit.train.recipe import Contrastive, Views


def rng_state(device: torch.device) -> list[Tensor]:
    """States of the random number generators that a forward pass uses."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_rng_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@dataclass
class Cached:
    """What the second forward pass of a micro-batch needs.

    embeddings: those of all micro-batches, detached. gradients: of the loss with respect to this micro-batch's
    embeddings. last: whether this is the last micro-batch; it computes the loss itself, which gives the gradients of
    the loss's own parameters.
    """

    embeddings: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]
    last: bool

    def loss(self, recipe: Contrastive, live: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": ...} whose gradients are this micro-batch's part of the gradients of the whole loss."""
        if self.last:
            return recipe.compare(_concatenated([*self.embeddings[:-1], live]))
        return {"loss": torch.stack([(widen(live[key]) * g).sum() for key, g in self.gradients.items()]).sum()}


def _concatenated(embeddings: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([each[key] for each in embeddings]) for key in embeddings[0]}


@dataclass
class MicroBatch:
    """Views of a micro-batch, and the generator states at the start of its forward passes."""

    views: Views
    state: list[Tensor]


def cache(recipe: Contrastive, micros: list[MicroBatch], device: torch.device, scale: float = 1.0) -> list[Cached]:
    """The first forward pass of all micro-batches, and the gradients of their embeddings.

    ``scale`` multiplies the loss during differentiation, as a gradient scaler does, so that half precision does not
    underflow.
    """
    embeddings = []
    with _unchanged_statistics(recipe):
        with torch.no_grad():
            for micro in micros:
                set_rng_state(micro.state, device)
                embeddings.append(recipe.encode(micro.views))
        leaves = [{key: e.detach().requires_grad_() for key, e in each.items()} for each in embeddings]
        with torch.enable_grad():
            loss = recipe.compare(_concatenated(leaves))["loss"] * scale
        found = iter(torch.autograd.grad(loss, [leaf for each in leaves for leaf in each.values()]))
    gradients = [{key: widen(next(found)) / scale for key in each} for each in leaves]
    return [Cached(embeddings, g, i + 1 == len(micros)) for i, g in enumerate(gradients)]


@contextlib.contextmanager
def _unchanged_statistics(model: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norms afterwards: the second forward pass updates them."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers: list[Any] = [b for norm in norms for b in norm.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
