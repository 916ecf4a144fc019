"""int8 inference on CPUs: :func:`quantize` replaces linear layers in place, :func:`dequantize` undoes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from pyvit.nn.quantized import QuantizedLinear
from pyvit.quantization import layers
from pyvit.quantization.layers import Place
from pyvit.quantization.measure import Difference, Outputs, difference, measure, outputs, row_error, samples
from pyvit.quantization.measure import batches as batches_of
from pyvit.quantization.report import LayerReport, QuantizationReport

SCHEME = "int8 weights with a scale per channel, 8-bit rows with a scale and a zero point found in each call"


class Limits(NamedTuple):
    """What the outputs of the quantized model must keep to."""

    tolerance: float | None
    least_cosine: float | None

    def used(self, found: Difference) -> float:
        """The share of a limit that is used up, of the one that is used most; at most 1 where both are kept to."""
        shares = [0.0]
        if self.tolerance is not None:
            shares.append(found.error / self.tolerance)
        if self.least_cosine is not None:
            allowed = 1 - self.least_cosine
            shares += [(1 - found.least) / allowed, 2 * (1 - found.dense[0]) / allowed]
        return max(share for share in shares if share == share)

    def met(self, found: Difference) -> bool:
        return self.used(found) <= 1

    def __str__(self) -> str:
        tolerance = [] if self.tolerance is None else [f"the tolerance of {self.tolerance:g}"]
        return " and ".join(tolerance + ([] if self.least_cosine is None else [f"cosines of {self.least_cosine:g}"]))


def quantize(
    model: nn.Module,
    calibration: Any = None,
    *,
    keep: Iterable[str] = (),
    tolerance: float | None = None,
    least_cosine: float | None = 0.998,
    reversible: bool = True,
) -> QuantizationReport:
    """Replaces the linear layers of transformer blocks by :class:`pyvit.nn.QuantizedLinear`, in place, for inference on
    a CPU.

    Models of timm, transformers, torchvision and open_clip are accelerated first, if they are not yet
    (:func:`pyvit.accelerate`), and the layers of the modules it replaces are quantized. Of torch's
    ``MultiheadAttention`` the input projection becomes a layer, ``in_proj``.

    Nothing has to be exported, compiled or calibrated: the ranges of the inputs are found row by row in each call (see
    :mod:`pyvit.ops.linear_int8`). ``calibration`` serves to measure what it costs, and to see which channels are much
    larger than the others: after a layer norm they are scaled where that lowers a layer's error.

    Args:
        model: on a CPU. The linear layers of attention and MLPs are replaced: of :class:`pyvit.nn.Attention`,
            :class:`pyvit.nn.WindowAttention`, :class:`pyvit.nn.Mlp`, :class:`pyvit.nn.GatedMlp` and what
            :func:`pyvit.accelerate` replaces. Patch embedding, heads and everything else stay as they are.
        calibration: a batch (a tensor, or a dictionary of keyword arguments), or several: an iterable of tensors,
            dictionaries, or tuples whose first element is the tensor (a DataLoader). None: random inputs of the size
            the model names, or if it names none, random rows for each layer.
        keep: names of layers to leave, as shell patterns ("blocks.0.*").
        tolerance: the largest ``error`` of the report. None: whatever it is.
        least_cosine: the least of the report's ``cosine`` and of its tokens' cosines, so that no single token is lost
            to a mean; the median of the tokens may lose half as much, 1 - cosine. Inputs that were not measured have
            worse tokens: on 6000 held-out images of trained models the worst lost up to 7 times as much as on 64.
            None: whatever it is.

            Where one of the two is missed, each layer is quantized alone, and those that come nearest to missing it
            are put back: as few of them as meet both.
        reversible: keep the original layers for :func:`dequantize`. False frees their memory; what is then put back
            has the values of the int8 weights.

    Raises ValueError where a weight is not finite or too wide, the model is not on a CPU, the calibration does not fit
    the model, a pattern of ``keep`` matches nothing, or ``tolerance`` cannot be measured (where a model names no inputs
    and none are given, nothing of its output is measured); TypeError for weights of
    another dtype. Messages name the layer. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model must be a Module, got {type(model).__name__}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"quantize: tolerance must be positive, got {tolerance}")
    if least_cosine is not None and not -1 <= least_cosine < 1:
        raise ValueError(f"quantize: least_cosine must be in [-1, 1), got {least_cosine}")
    limits = Limits(tolerance, least_cosine)
    patterns = [keep] if isinstance(keep, str) else list(keep)
    batches, source = batches_of(model, calibration)
    reasons = layers.prepare(model)
    try:
        report = _quantize(model, batches, source, patterns, reasons, limits, reversible)
    except BaseException:
        layers.unprepare(model)
        raise
    layers.unprepare(model)  # what has kept its layers
    return report


def _quantize(
    model: nn.Module,
    batches: Sequence[Any],
    source: str,
    keep: Sequence[str],
    reasons: Mapping[str, str],
    limits: Limits,
    reversible: bool,
) -> QuantizationReport:
    places, left = layers.find(model, keep, reasons)
    rows, wanted = samples(model, places, batches), outputs(model, batches)
    made = {id(place.layer): layers.make(place, rows.get(place.name), row_error) for place in places}
    errors = measure(model, places, made, batches)
    layers.replace(places, made)
    try:
        found = difference(outputs(model, batches), wanted)
        put_back: list[Place] = []
        if limits.tolerance is not None and found.error != found.error:
            raise ValueError("quantize: tolerance needs calibration: the model names no inputs of its own")
        if not limits.met(found):
            put_back = _to_put_back(model, places, made, batches, wanted, limits)
            layers.put_back(put_back)
            found = difference(outputs(model, batches), wanted)
    except BaseException:
        layers.put_back(places)
        raise
    reports = dict(left)
    for place in places:
        notes = [] if place.name in errors else ["measured on random rows"]
        notes += [] if made[id(place.layer)].smoothing is None else ["channels scaled against outliers"]
        value = errors[place.name] if place.name in errors else row_error(place.layer, made[id(place.layer)])
        reports[place.name] = LayerReport(place.name, SCHEME, value, ", ".join(notes))
        if place in put_back:
            note = f"to meet {limits}; its own error is {value:.4f}"
            reports[place.name] = LayerReport(place.name, None, value, note)
    if not reversible:
        _release(model)
    order = [name for name, module in model.named_modules(remove_duplicate=False) if name in reports]
    return QuantizationReport([reports[name] for name in order], *found, source)


def _release(model: nn.Module) -> None:
    """Frees the memory of the original layers."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.original.clear()
        elif isinstance(module, layers.MultiheadAttention):
            module.release()


def dequantize(model: nn.Module) -> int:
    """Puts the original linear layers back in place of those of :func:`quantize`, and returns how many there were. A
    model that was accelerated only to be quantized is restored too.

    A layer whose original was not kept (``reversible=False``), or whose int8 weight has changed since, for example by
    ``load_state_dict``, becomes a linear layer with the values of the int8 weight.
    """
    found: dict[int, nn.Linear] = {}
    for parent in list(model.modules()):
        for child, layer in list(parent._modules.items()):
            if isinstance(layer, QuantizedLinear):
                if id(layer) not in found:
                    found[id(layer)] = layer.dequantized()
                parent._modules[child] = found[id(layer)]
    layers.unprepare(model)
    return len(found)


def _to_put_back(
    model: nn.Module,
    places: Sequence[Place],
    made: Mapping[int, QuantizedLinear],
    batches: Sequence[Any],
    wanted: Outputs,
    limits: Limits,
) -> list[Place]:
    """As few layers as bring the model within the limits, in the order of how near to them each comes alone."""
    effects = {}
    for place in places:
        layers.put_back(places)
        layers.replace([place], made)
        effects[place.name] = limits.used(difference(outputs(model, batches), wanted))
    ranked = sorted(places, key=lambda place: -effects[place.name])
    below, enough = 0, len(ranked)
    while enough - below > 1:
        count = (below + enough) // 2
        layers.replace(places, made)
        layers.put_back(ranked[:count])
        if limits.met(difference(outputs(model, batches), wanted)):
            enough = count
        else:
            below = count
    layers.replace(places, made)
    return ranked[:enough]
