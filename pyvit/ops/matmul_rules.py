"""Which matrix product runs on a CPU, as data. ``python -m benchmarks.matmul`` measures what these rules cost.

Matrix products of different libraries differ in rounding, so a choice is part of a result's bits. It follows from the
processor, the dtype and the shape alone: every process chooses alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pyvit.dispatch.devices import cpu_isa

#: Instruction sets of the rules, as :func:`pyvit.dispatch.devices.cpu_isa` tells them.
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")

#: Products: of a linear layer, of its two gradients, and of a linear layer in inference with a prepacked weight.
KINDS = ("forward", "grad_input", "grad_weight", "prepacked")


class Shape(NamedTuple):
    """rows (N, K) times a weight (M, K): ``rows`` is the least power of two that is larger than N."""

    rows: int
    out: int
    inner: int


class Rule(NamedTuple):
    """``preferred`` names candidates, the best first, for products that fit the other fields; an empty one fits all."""

    preferred: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    isas: tuple[str, ...] = ()
    most_macs: int = 1 << 62  # multiply-adds

    def fits(self, kind: str, dtype: str, isa: str, shape: Shape) -> bool:
        return (
            (not self.kinds or kind in self.kinds)
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.isas or isa in self.isas)
            and shape.rows * shape.out * shape.inner <= self.most_macs
        )


#: The first that fits decides; of its candidates, the first that this processor and these libraries offer.
RULES = (
    # A call of F.linear costs less than one of the others, and so little is multiplied that only this counts.
    Rule(("torch",), kinds=("forward", "grad_input", "grad_weight"), dtypes=("float32",), most_macs=1 << 18),
    Rule(("onednn", "pyvit", "torch"), isas=("amx",)),
    Rule(("pyvit", "onednn", "torch"), isas=("avx512bf16", "avx512", "avx2")),
    Rule(("onednn", "float32 copies", "torch")),
)


def preference(kind: str, dtype: torch.dtype, shape: Shape) -> tuple[str, ...]:
    """The names of candidates, the best first."""
    name, found = str(dtype).removeprefix("torch."), cpu_isa(dtype)
    return next(rule.preferred for rule in RULES if rule.fits(kind, name, found, shape))
