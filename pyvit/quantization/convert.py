"""int8 inference on CPUs: :func:`quantize` replaces linear layers in place, :func:`dequantize` undoes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyvit.nn.quantized import QuantizedLinear
from pyvit.quantization import layers
from pyvit.quantization.layers import Place
from pyvit.quantization.measure import batches as batches_of
from pyvit.quantization.measure import dense as dense_cosines
from pyvit.quantization.measure import difference, features, measure, row_error, samples
from pyvit.quantization.report import LayerReport, QuantizationReport

SCHEME = "int8 weights with a scale per channel, 8-bit rows with a scale and a zero point found in each call"


def quantize(
    model: nn.Module,
    calibration: Any = None,
    *,
    keep: Iterable[str] = (),
    tolerance: float | None = None,
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
        tolerance: of the report's ``error``. Above it each layer is quantized alone, and those that change the output
            most are put back: as few of them as meet it. None: whatever it is.
        reversible: keep the original layers for :func:`dequantize`. False frees their memory; what is then put back
            has the values of the int8 weights.

    Raises ValueError where a weight is not finite or too wide, the model is not on a CPU, the calibration does not fit
    the model, a pattern of ``keep`` matches nothing, or ``tolerance`` cannot be measured; TypeError for weights of
    another dtype. Messages name the layer. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model must be a Module, got {type(model).__name__}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"quantize: tolerance must be positive, got {tolerance}")
    patterns = [keep] if isinstance(keep, str) else list(keep)
    batches, source = batches_of(model, calibration)
    reasons = layers.prepare(model)
    try:
        report = _quantize(model, batches, source, patterns, reasons, tolerance, reversible)
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
    tolerance: float | None,
    reversible: bool,
) -> QuantizationReport:
    places, left = layers.find(model, keep, reasons)
    rows, wanted = samples(model, places, batches)
    made = {id(place.layer): layers.make(place, rows.get(place.name), row_error) for place in places}
    errors = measure(model, places, made, batches)
    before = features(model, batches)
    layers.replace(places, made)
    try:
        error, cosine = difference(model, batches, wanted)
        put_back: list[Place] = []
        if tolerance is not None:
            if error != error:
                raise ValueError("quantize: tolerance needs calibration: the model names no inputs of its own")
            if error > tolerance:
                put_back = _to_put_back(model, places, made, batches, wanted, tolerance)
                layers.put_back(put_back)
                error, cosine = difference(model, batches, wanted)
        dense = dense_cosines(features(model, batches), before)
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
            note = f"to meet the tolerance; its own error is {value:.4f}"
            reports[place.name] = LayerReport(place.name, None, value, note)
    if not reversible:
        _release(model)
    order = [name for name, module in model.named_modules(remove_duplicate=False) if name in reports]
    return QuantizationReport([reports[name] for name in order], error, cosine, dense, source)


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
    wanted: Sequence[Tensor],
    tolerance: float,
) -> list[Place]:
    """As few layers as bring the error of the output to the tolerance, in the order of what each does to it alone."""
    effects = {}
    for place in places:
        layers.put_back(places)
        layers.replace([place], made)
        effects[place.name] = difference(model, batches, wanted)[0]
    ranked = sorted(places, key=lambda place: -effects[place.name])
    below, enough = 0, len(ranked)
    while enough - below > 1:
        count = (below + enough) // 2
        layers.replace(places, made)
        layers.put_back(ranked[:count])
        if difference(model, batches, wanted)[0] > tolerance:
            below = count
        else:
            enough = count
    layers.replace(places, made)
    return ranked[:enough]
