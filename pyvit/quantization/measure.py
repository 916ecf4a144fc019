"""Calibration: the batches to measure on, and the errors of layers and of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvit.integrations import example_inputs
from pyvit.nn.quantized import QuantizedLinear
from pyvit.quantization.layers import Place, put_back, replace


def batches(model: nn.Module, calibration: Any) -> tuple[list[Any], str]:
    """Batches as (arguments, keyword arguments), and where they are from."""
    if calibration is None:
        example: Any = getattr(model, "example_inputs", None)
        generator = torch.Generator().manual_seed(0)
        if example is not None:
            return [(_random(example(2), generator), {})], "random inputs"
        given = example_inputs(model, 2)
        guess: list[Any] = [] if given is None else [((_random(given, generator),), {})]
        try:
            list(_run(model, guess))
        except (TypeError, ValueError):
            guess = []
        return guess, "random inputs" if guess else "random rows"
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
            # One seed for every call: a model that draws (which patches to mask, say) draws the same each time.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    out = call(*args, **kwargs)
                except Exception as error:
                    raise ValueError(
                        f"quantize: calibration does not fit the model: {_where(model, error)}{error}"
                    ) from error
            yield _tensor(out).float()
    finally:
        for module, mode in modes:
            module.training = mode


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module of the model whose code was running."""
    names, found, at = {id(module): name for name, module in model.named_modules()}, "", error.__traceback__
    while at is not None:
        found = names.get(id(at.tb_frame.f_locals.get("self")), found)
        at = at.tb_next
    return f"in {found}: " if found else ""


def _tensor(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    values: Iterable[Any] = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else ()
    for value in values:
        if isinstance(value, (Tensor, tuple, list, Mapping)):
            return _tensor(value)
    raise TypeError(f"quantize: calibration: the model's output must hold a tensor, got {type(out).__name__}")


def samples(model: nn.Module, places: Sequence[Place], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Up to 256 rows of what each layer gets from the first batch."""
    samples: dict[str, Tensor] = {}

    def watch(place: Place) -> Callable[..., None]:
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
    return {name: rows for name, rows in samples.items() if rows.isfinite().all()}


def measure(
    model: nn.Module, places: Sequence[Place], made: Mapping[int, QuantizedLinear], batches: Sequence[Any]
) -> dict[str, float]:
    """The relative error of each layer on what it gets in the original model; of a layer whose weight that reads
    without calling it, in the quantized one."""
    sums: dict[str, list[Tensor]] = {}

    def watch(place: Place) -> Callable[..., None]:
        layer, stand_in = place.layer, made[id(place.layer)]

        def hook(called: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            training, stand_in.training = stand_in.training, False
            found, wanted = (stand_in(args[0]), out) if called is layer else (out, layer(args[0]))
            stand_in.training = training
            squares = [(found.double() - wanted.double()).square().sum(), wanted.double().square().sum()]
            totals = sums.get(place.name, [torch.zeros_like(each) for each in squares])
            sums[place.name] = [a + b for a, b in zip(totals, squares, strict=True)]

        return hook

    def watched(hooked: Sequence[tuple[nn.Module, Place]]) -> None:
        hooks = [module.register_forward_hook(watch(place)) for module, place in hooked]
        try:
            for _ in _run(model, batches):
                pass
        finally:
            for each in hooks:
                each.remove()

    watched([(place.layer, place) for place in places])
    # Some models read the weights of a layer without calling it. They call what has int8 weights.
    if batches and (unseen := [place for place in places if place.name not in sums]):
        replace(places, made)
        try:
            watched([(made[id(place.layer)], place) for place in unseen])
        finally:
            put_back(places)
    return {name: _ratio(wrong, whole) for name, (wrong, whole) in sums.items()}


def _ratio(wrong: Tensor, whole: Tensor) -> float:
    return float((wrong / whole).sqrt()) if whole > 0 else float("inf") if wrong > 0 else 0.0


def row_error(layer: nn.Linear, stand_in: QuantizedLinear, rows: Tensor | None = None) -> float:
    if rows is None:
        rows = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    training, stand_in.training = stand_in.training, False
    with torch.no_grad():
        wanted, found = layer(rows).double(), stand_in(rows).double()
    stand_in.training = training
    return _ratio((found - wanted).square().sum(), wanted.square().sum())


class Outputs(NamedTuple):
    """For each batch the model's output, and where it has ``forward_features`` those: (..., tokens, C)."""

    whole: list[Tensor]
    tokens: list[Tensor]


class Difference(NamedTuple):
    """Of two :class:`Outputs`, NaN where there is nothing to compare: the relative error of the whole, the least cosine
    of its rows, and the median and the least of the tokens'."""

    error: float
    cosine: float
    dense: tuple[float, float]

    @property
    def least(self) -> float:
        """The least cosine of rows and tokens."""
        return min((c for c in (self.cosine, self.dense[1]) if c == c), default=float("nan"))


def outputs(model: nn.Module, batches: Sequence[Any]) -> Outputs:
    forward: Any = getattr(model, "forward_features", None)
    if forward is None:
        return Outputs(list(_run(model, batches)), [])
    tokens: list[Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        tokens.append(_tensor(out).float())
        return out

    own = "forward_features" in vars(model)
    vars(model)["forward_features"] = watched  # of most models a part of their forward
    try:
        whole = list(_run(model, batches))
    finally:
        if own:
            vars(model)["forward_features"] = forward
        else:
            del vars(model)["forward_features"]
    if len(tokens) != len(whole):
        tokens = list(_run(model, batches, forward))
    return Outputs(whole, tokens)


def difference(found: Outputs, wanted: Outputs) -> Difference:
    if not wanted.whole:
        return Difference(float("nan"), float("nan"), (float("nan"), float("nan")))
    pairs = list(zip(found.whole, wanted.whole, strict=True))
    wrong = sum((a - b).double().square().sum() for a, b in pairs)
    whole = sum(b.double().square().sum() for _, b in pairs)
    least, dense = _cosines(found.whole, wanted.whole)[1], _cosines(found.tokens, wanted.tokens)
    return Difference(_ratio(torch.as_tensor(wrong), torch.as_tensor(whole)), least, dense)


def _cosines(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """Median and least cosine of the rows. Zeros that stay zeros, as of a head that was never trained, and rows that
    were not finite do not count; those that no longer are count as -1."""
    rows = []
    for a, b in zip(found, wanted, strict=True):
        if b.dim():
            counts = ((a != 0).any(-1) | (b != 0).any(-1)) & b.isfinite().all(-1)
            rows.append(torch.cosine_similarity(a, b, -1)[counts].nan_to_num(-1.0))
    cosines = torch.cat(rows) if rows else torch.empty(0)
    if not cosines.numel():
        return float("nan"), float("nan")
    return float(cosines.median()), float(cosines.min())
