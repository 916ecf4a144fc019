"""int8 inference on CPUs: :func:`quantize` replaces linear layers in place, :func:`dequantize` undoes it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvit.nn.attention import Attention
from pyvit.nn.linear import Linear, plain
from pyvit.nn.mlp import Mlp, SwiGLU
from pyvit.nn.quantized import QuantizedLinear
from pyvit.nn.window_attention import WindowAttention
from pyvit.ops.linear_int8 import DTYPES, MAX_COLUMNS

__all__ = ["LayerReport", "QuantizationReport", "dequantize", "quantize"]

SCHEME = "int8 weights with a scale per channel, 8-bit rows with a scale and a zero point found in each call"
#: Layers that follow a layer norm, which can divide their channels; and how much smaller the error must become.
AFTER_NORM, HELPS = ("qkv", "fc1"), 0.9
#: The modules whose linear layers are quantized: the residual branches of transformer blocks.
BRANCHES = (Attention, WindowAttention, Mlp, SwiGLU)


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


class _Place(NamedTuple):
    name: str
    parent: nn.Module
    child: str
    layer: nn.Linear


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

    Nothing has to be exported, compiled or calibrated: the ranges of the inputs are found row by row in each call (see
    :mod:`pyvit.ops.linear_int8`). ``calibration`` serves to measure what it costs, and to see which channels are much
    larger than the others: after a layer norm they are scaled where that lowers a layer's error.

    Args:
        model: on a CPU. The layers of :class:`pyvit.nn.Attention`, :class:`pyvit.nn.WindowAttention`,
            :class:`pyvit.nn.Mlp` and :class:`pyvit.nn.SwiGLU` are replaced; patch embedding, heads and everything else
            stay as they are.
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
    places, left = _places(model, patterns)
    batches, source = _batches(model, calibration)
    samples, wanted = _samples(model, places, batches)
    made = {id(place.layer): _quantized(place, samples.get(place.name)) for place in places}
    errors = _measure(model, places, made, batches)
    features = _features(model, batches)
    _replace(places, made)
    try:
        error, cosine = _difference(model, batches, wanted)
        put_back: list[_Place] = []
        if tolerance is not None:
            if error != error:
                raise ValueError("quantize: tolerance needs calibration: the model names no inputs of its own")
            if error > tolerance:
                put_back = _to_put_back(model, places, made, batches, wanted, tolerance)
                _put_back(put_back)
                error, cosine = _difference(model, batches, wanted)
        dense = _dense(_features(model, batches), features)
    except BaseException:
        _put_back(places)
        raise
    rows = dict(left)
    for place in places:
        notes = [] if place.name in errors else ["measured on random rows"]
        notes += [] if made[id(place.layer)].smoothing is None else ["channels scaled against outliers"]
        measured = ", ".join(notes)
        value = errors[place.name] if place.name in errors else _row_error(place.layer, made[id(place.layer)])
        rows[place.name] = LayerReport(place.name, SCHEME, value, measured)
        if place in put_back:
            note = f"to meet the tolerance; its own error is {value:.4f}"
            rows[place.name] = LayerReport(place.name, None, value, note)
    for layer in made.values() if not reversible else ():
        layer.original.clear()
    order = [name for name, module in model.named_modules(remove_duplicate=False) if name in rows]
    return QuantizationReport([rows[name] for name in order], error, cosine, dense, source)


def dequantize(model: nn.Module) -> int:
    """Puts the original linear layers back in place of those of :func:`quantize`, and returns how many there were.

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
    return len(found)


def _places(model: nn.Module, keep: Sequence[str]) -> tuple[list[_Place], dict[str, LayerReport]]:
    """The layers to quantize, and reports of the others."""
    places, left, matched = [], {}, set()
    for path, parent in model.named_modules(remove_duplicate=False):
        for child, layer in parent._modules.items():
            name = f"{path}.{child}" if path else child
            if isinstance(layer, QuantizedLinear):
                left[name] = LayerReport(name, None, float("nan"), "is quantized already")
            if not isinstance(layer, nn.Linear):
                continue
            patterns = [pattern for pattern in keep if fnmatch.fnmatchcase(name, pattern)]
            matched.update(patterns)
            why = f"keep={patterns[0]!r}" if patterns else _refusal(parent, layer)
            if why is None:
                _check(name, layer)
                places.append(_Place(name, parent, child, layer))
            else:
                left[name] = LayerReport(name, None, float("nan"), why)
    if unknown := [pattern for pattern in keep if pattern not in matched]:
        raise ValueError(f"quantize: keep: no linear layer is called {', '.join(map(repr, unknown))}")
    return places, left


def _refusal(parent: nn.Module, layer: nn.Linear) -> str | None:
    """Why ``layer`` is left, None where it is quantized."""
    if not isinstance(parent, BRANCHES):
        return "not part of a residual branch"
    if not (plain(layer, Linear) or plain(layer, nn.Linear)):
        return "has hooks, another forward or another kind of weight"
    if layer.weight.numel() == 0:
        return "has no weights"
    return None


def _check(name: str, layer: nn.Linear) -> None:
    weight = layer.weight
    if weight.device.type != "cpu":
        raise ValueError(f"quantize: {name}: weight must be on a CPU, got {weight.device}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"quantize: {name}: weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.shape[1] > MAX_COLUMNS:
        raise ValueError(f"quantize: {name}: weight must have at most {MAX_COLUMNS} columns, got {weight.shape[1]}")
    if not bool(weight.isfinite().all()) or (layer.bias is not None and not bool(layer.bias.isfinite().all())):
        raise ValueError(f"quantize: {name}: weight and bias must be finite")


def _quantized(place: _Place, rows: Tensor | None) -> QuantizedLinear:
    """The layer in int8, with factors for its channels where they help on ``rows`` of its input and a layer norm before
    it takes them."""
    made = QuantizedLinear(place.layer, place.name)
    if rows is not None and place.child in AFTER_NORM and (factors := _factors(place.layer, rows)) is not None:
        smoothed = QuantizedLinear(place.layer, place.name, factors)
        if _row_error(place.layer, smoothed, rows) < HELPS * _row_error(place.layer, made, rows):
            made = smoothed
    made.original.append(place.layer)
    return made


def _factors(layer: nn.Linear, rows: Tensor) -> Tensor | None:
    """Powers of two, so that nothing is rounded, near sqrt(largest input / largest weight) of each channel over the
    mean of that; None where they are all 1. Xiao et al. (2023), equation 4, with a strength of 1/2."""
    inputs, weights = rows.float().abs().amax(0), layer.weight.detach().float().abs().amax(0)
    ratio = 0.5 * (inputs.clamp(min=1e-20).log2() - weights.clamp(min=1e-20).log2())
    ratio = torch.where((inputs > 0) & (weights > 0), ratio, ratio.median())
    steps = (ratio - ratio.mean()).round().clamp(-8, 8)
    return torch.exp2(steps) if bool(steps.any()) else None


def _replace(places: Iterable[_Place], made: Mapping[int, QuantizedLinear]) -> None:
    for place in places:
        place.parent._modules[place.child] = made[id(place.layer)]


def _put_back(places: Iterable[_Place]) -> None:
    for place in places:
        place.parent._modules[place.child] = place.layer


def _to_put_back(
    model: nn.Module,
    places: Sequence[_Place],
    made: Mapping[int, QuantizedLinear],
    batches: Sequence[Any],
    wanted: Sequence[Tensor],
    tolerance: float,
) -> list[_Place]:
    """As few layers as bring the error of the output to the tolerance, in the order of what each does to it alone."""
    effects = {}
    for place in places:
        _put_back(places)
        _replace([place], made)
        effects[place.name] = _difference(model, batches, wanted)[0]
    ranked = sorted(places, key=lambda place: -effects[place.name])
    below, enough = 0, len(ranked)
    while enough - below > 1:
        count = (below + enough) // 2
        _replace(places, made)
        _put_back(ranked[:count])
        if _difference(model, batches, wanted)[0] > tolerance:
            below = count
        else:
            enough = count
    _replace(places, made)
    return ranked[:enough]


def _batches(model: nn.Module, calibration: Any) -> tuple[list[Any], str]:
    """Batches as (arguments, keyword arguments), and where they are from."""
    if calibration is None:
        example: Any = getattr(model, "example_inputs", None)
        if example is None:
            return [], "random rows"
        generator = torch.Generator().manual_seed(0)
        return [(_random(example(2), generator), {})], "random inputs"
    batches = [calibration] if isinstance(calibration, (Tensor, Mapping)) else list(calibration)
    found: list[Any] = []
    for batch in batches:
        if isinstance(batch, Mapping):
            found.append(((), dict(batch)))
            continue
        first = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, (tuple, list)) and batch else None
        if not isinstance(first, Tensor):
            raise TypeError(
                "quantize: calibration must be a tensor, a dictionary of arguments or an iterable of those or of "
                f"tuples that begin with a tensor, got {type(batch).__name__}"
            )
        found.append(((first,), {}))
    if not found:
        raise ValueError("quantize: calibration must hold at least one batch")
    return found, f"{len(found)} calibration batch{'es' if len(found) > 1 else ''}"


def _random(given: Any, generator: torch.Generator) -> Any:
    """``given`` with normal numbers in place of those of its floating-point tensors."""
    if isinstance(given, (tuple, list)):
        return type(given)(_random(each, generator) for each in given)
    if isinstance(given, Tensor) and given.is_floating_point():
        return torch.randn(given.shape, generator=generator).to(given.dtype)
    return given


def _run(model: nn.Module, batches: Sequence[Any], forward: Callable[..., Any] | None = None) -> Iterator[Tensor]:
    """The output for each batch of the model, or of a method of it, in evaluation mode: the first tensor of it, in
    float32."""
    call: Callable[..., Any] = model if forward is None else forward
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for args, kwargs in batches:
            with torch.no_grad():
                try:
                    out = call(*args, **kwargs)
                except Exception as error:
                    raise ValueError(f"quantize: calibration does not fit the model: {error}") from error
            yield _tensor(out).float()
    finally:
        for module, mode in modes:
            module.training = mode


def _tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    values: Iterable[Any] = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else ()
    for value in values:
        if isinstance(value, (Tensor, tuple, list, Mapping)):
            return _tensor(value)
    raise TypeError(f"quantize: calibration: the model's output must hold a tensor, got {type(out).__name__}")


def _samples(
    model: nn.Module, places: Sequence[_Place], batches: Sequence[Any]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Up to 256 rows of what each layer gets from the first batch, and the model's outputs for all of them."""
    samples: dict[str, Tensor] = {}

    def watch(place: _Place) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            samples[place.name] = rows[:: max(len(rows) // 256, 1)].clone()

        return hook

    hooks = [place.layer.register_forward_pre_hook(watch(place)) for place in places]
    try:
        list(_run(model, batches[:1]))
    finally:
        for each in hooks:
            each.remove()
    # Without hooks, which keep layers from being fused.
    return {name: rows for name, rows in samples.items() if rows.isfinite().all()}, list(_run(model, batches))


def _measure(
    model: nn.Module, places: Sequence[_Place], made: Mapping[int, QuantizedLinear], batches: Sequence[Any]
) -> dict[str, float]:
    """The relative error of each layer on what it gets in the original model."""
    sums: dict[str, list[Tensor]] = {}

    def watch(place: _Place) -> Callable[..., None]:
        stand_in = made[id(place.layer)]

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            training, stand_in.training = stand_in.training, False
            found = stand_in(args[0]).double()
            stand_in.training = training
            squares = [(found - out.double()).square().sum(), out.double().square().sum()]
            sums[place.name] = [a + b for a, b in zip(sums.get(place.name, squares), squares, strict=True)]

        return hook

    hooks = [place.layer.register_forward_hook(watch(place)) for place in places]
    try:
        for _ in _run(model, batches):
            pass
    finally:
        for each in hooks:
            each.remove()
    return {name: _ratio(wrong, whole) for name, (wrong, whole) in sums.items()}


def _ratio(wrong: Tensor, whole: Tensor) -> float:
    return float((wrong / whole).sqrt()) if whole > 0 else float("inf") if wrong > 0 else 0.0


def _row_error(layer: nn.Linear, stand_in: QuantizedLinear, rows: Tensor | None = None) -> float:
    if rows is None:
        rows = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    training, stand_in.training = stand_in.training, False
    with torch.no_grad():
        wanted, found = layer(rows).double(), stand_in(rows).double()
    stand_in.training = training
    return _ratio((found - wanted).square().sum(), wanted.square().sum())


def _difference(model: nn.Module, batches: Sequence[Any], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """Relative error and least cosine of the model's outputs now."""
    if not batches:
        return float("nan"), float("nan")
    pairs = list(zip(_run(model, batches), wanted, strict=True))
    wrong = sum((found - want).double().square().sum() for found, want in pairs)
    whole = sum(want.double().square().sum() for _, want in pairs)
    cosines = [torch.cosine_similarity(found, want, -1).min() for found, want in pairs if want.dim() and want.numel()]
    return _ratio(torch.as_tensor(wrong), torch.as_tensor(whole)), float(min(cosines, default=float("nan")))


def _features(model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """What ``model.forward_features`` gives for the batches, where there is one: (..., tokens, C)."""
    forward: Any = getattr(model, "forward_features", None)
    return [] if forward is None else list(_run(model, batches, forward))


def _dense(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    if not wanted:
        return float("nan"), float("nan")
    cosines = torch.cat([torch.cosine_similarity(a, b, -1).flatten() for a, b in zip(found, wanted, strict=True)])
    return float(cosines.median()), float(cosines.min())
