"""Exponential moving average of the weights of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyvit.torch_private import lerp_all


def decay_at(decay: float, updates: int, warmup: bool = False) -> float:
    """The decay of update number ``updates``, counted from 1. With ``warmup`` it rises from 0 as min(decay, 1 -
    updates^(-2/3)), which is timm's."""
    return min(decay, 1 - updates ** (-2 / 3)) if warmup else decay


class WeightAverage:
    """The average of a model's trainable parameters and floating-point buffers, such as those of batch norms.

    It starts from the model's values. With FSDP each rank averages its shards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._live += [b for b in model.buffers() if b.is_floating_point()]
        self._average = [t.clone() for t in self._local()]

    def _local(self) -> list[Tensor]:
        return [getattr(t, "_local_tensor", t).detach() for t in self._live]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * model."""
        lerp_all(self._average, self._local(), 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged values inside, and its own again afterwards, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for live, average in zip(self._local(), self._average, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
