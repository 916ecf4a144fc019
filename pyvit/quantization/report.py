"""What :func:`pyvit.quantize` reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class LayerReport(NamedTuple):
    """A linear layer: its name; its scheme, or None where it was left as it was; the relative error of its output, NaN
    where it was not measured; what it was measured on, or why it was left."""

    name: str
    scheme: str | None
    error: float
    note: str


class QuantizationReport:
    """Result of :func:`quantize`.

    Attributes:
        layers: a :class:`LayerReport` for every linear layer of the model.
        error: |quantized - original| / |original| of the model's output on the calibration batches, NaN without any.
        cosine: the least cosine between the rows of the two outputs, likewise.
        dense: median and least cosine between the tokens of ``model.forward_features``, NaN where there is none.
        source: what the errors were measured on.
    """

    def __init__(
        self, layers: Sequence[LayerReport], error: float, cosine: float, dense: tuple[float, float], source: str
    ) -> None:
        self.layers, self.error, self.cosine, self.dense, self.source = list(layers), error, cosine, dense, source

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.scheme is not None]

    @property
    def left(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.scheme is None]

    def __str__(self) -> str:
        quantized, left = self.quantized, self.left
        lines = [f"quantized {len(quantized)} linear layers, left {len(left)}; errors on {self.source}"]
        if self.error == self.error:
            cosine = "" if self.cosine != self.cosine else f", least cosine {self.cosine:.5f}"
            lines.append(f"  output: relative error {self.error:.4f}{cosine}")
        if self.dense[0] == self.dense[0]:
            lines.append("  tokens' features: median cosine {:.5f}, least {:.5f}".format(*self.dense))
        for layer in sorted(quantized, key=lambda layer: -layer.error):
            lines.append(f"  {layer.name}: error {layer.error:.4f}{f' ({layer.note})' if layer.note else ''}")
        lines += [f"  left {layer.name}: {layer.note}" for layer in left]
        return "\n".join(lines)
