"""The correctness check: no time is reported for an output that fails the numerics rule of :mod:`pyvit.testing`.

The rule also applies to peers, with one difference: a peer that fails is timed and marked. Beyond ``WRONG`` times the
limit it computes something else and is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyvit import testing

WRONG = 16.0


@dataclass(frozen=True)
class Verdict:
    """The comparison that is closest to its limit (or furthest beyond it), of all outputs, gradients and inputs."""

    error: float
    allowed: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    @property
    def wrong(self) -> bool:
        return not self.error <= WRONG * self.allowed


def worst(comparisons: Sequence[testing.Comparison]) -> Verdict:
    c = max(comparisons, key=lambda c: c.error / c.limit if c.limit else (float("inf") if c.error else 0.0))
    return Verdict(c.error, c.limit, str(c))


class Gate:
    """Compares functions of the same tensors with the float64 reference, which is computed once.

    Args:
        tensors: inputs by name; floating ones are converted to float64 for the reference.
        naive: the naive form, called with the tensors by name, returning one tensor.
        grads: tensors whose gradients are compared.
        items: batch entries that the reference computes; None: all. The function under test always computes all. Only
            for functions in which batch entries do not interact, and gradients of batched tensors.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        naive: Callable[..., Tensor],
        grads: Sequence[str] = (),
        items: Sequence[int] | None = None,
    ) -> None:
        self.tensors = tensors
        self.grads = list(grads)
        self.items = items
        self.batch = next(iter(tensors.values())).shape[0]
        few = {name: self._pick(t) for name, t in tensors.items()}
        wide = {name: t.double() if t.is_floating_point() else t for name, t in few.items()}
        shape, dtype = self._output_like(naive, few)
        rng = torch.Generator(device=shape.device).manual_seed(7)
        whole = (self.batch, *shape.shape[1:]) if shape.dim() and items is not None else shape.shape
        self.cotangent = torch.randn(whole, generator=rng, device=shape.device).to(dtype) if grads else None
        few_cotangent = None if self.cotangent is None else [self._pick(self.cotangent)]
        self.ref, self.ref_grads = testing.run(naive, wide, self.grads, few_cotangent)
        self.naive, self.naive_grads = testing.run(naive, few, self.grads, few_cotangent)

    @staticmethod
    def _output_like(naive: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> tuple[Tensor, torch.dtype]:
        with torch.no_grad():
            out = naive(**tensors)
        return out, out.dtype

    def _pick(self, t: Tensor) -> Tensor:
        if self.items is None or not t.dim() or t.shape[0] != self.batch:
            return t
        return t[list(self.items)]

    def __call__(self, name: str, function: Callable[..., Tensor]) -> list[testing.Comparison]:
        """Run ``function(**tensors)`` in NaN-filled memory and compare its output and gradients."""
        with testing.poisoned():
            got, grads = testing.run(
                function, self.tensors, self.grads, None if self.cotangent is None else [self.cotangent]
            )
        got, grads = [self._pick(t) for t in got], [self._pick(t) for t in grads]
        found = testing.compare(name, got, self.naive, self.ref, labels=["out"], raises=False)
        if self.grads:
            labels = [f"grad_{g}" for g in self.grads]
            found += testing.compare(
                name,
                grads,
                self.naive_grads,
                self.ref_grads,
                testing.GRADIENT_FACTOR,
                labels=labels,
                dtype=got[0].dtype,
                raises=False,
            )
        return found
