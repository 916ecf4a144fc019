"""Which linear layers of a model :func:`pyvit.quantize` replaces, and by what."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvit import integrations
from pyvit.integrations.multihead import MultiheadAttention, replaceable
from pyvit.nn.attention import Attention
from pyvit.nn.linear import Linear, plain
from pyvit.nn.mlp import GatedMlp, Mlp
from pyvit.nn.quantized import QuantizedLinear
from pyvit.nn.window_attention import WindowAttention
from pyvit.ops.linear_int8 import DTYPES, MAX_COLUMNS
from pyvit.quantization.report import LayerReport

#: Modules of pyvit whose linear layers are quantized: the residual branches of transformer blocks. Of other libraries
#: the rules of :func:`pyvit.accelerate` name the layers (``Replacement.layers``).
BRANCHES = (Attention, WindowAttention, Mlp, GatedMlp, MultiheadAttention)
#: Their layers that take the branch's input; and how much smaller the error must become to scale its channels.
FIRST, HELPS = ("qkv", "fc1", "fc1_g", "fc1_x", "in_proj"), 0.9
#: An attribute of models that were accelerated only to be quantized.
_ACCELERATED = "_accelerated_by_quantize"


class Place(NamedTuple):
    """A linear layer, where it is, and whether it takes the input of its residual branch."""

    name: str
    parent: nn.Module
    child: str
    layer: nn.Linear
    first: bool


class Layers(NamedTuple):
    """What :func:`find` found: the layers to quantize, and reports of the others."""

    places: list[Place]
    left: dict[str, LayerReport]


def prepare(model: nn.Module) -> dict[str, str]:
    """Accelerates a model of another library that is not yet, where that serves the layers to quantize, and puts a
    :class:`MultiheadAttention` in place of each of torch's. Returns why modules were left, by their paths."""
    report = integrations.examine(model)
    served = [forward for forward in report.found if forward.item.layers]
    if served and not integrations.is_accelerated(model):
        report = integrations.accelerate(model)
        vars(model)[_ACCELERATED] = True
    reasons = {row.path: f"pyvit.accelerate leaves {row.path or 'the model'}: {row.note}" for row in report.left}
    attention = {id(f.module) for f in report.found if type(f.module) is nn.MultiheadAttention}
    stand_ins: dict[int, MultiheadAttention] = {}
    for path, parent in list(model.named_modules(remove_duplicate=False)):
        for child, module in list(parent._modules.items()):
            if id(module) not in attention or not isinstance(module, nn.MultiheadAttention):
                continue
            if (reason := replaceable(module, parent)) is not None:
                reasons[f"{path}.{child}" if path else child] = reason
            else:
                parent._modules[child] = stand_ins.setdefault(id(module), MultiheadAttention(module))
    return reasons


def unprepare(model: nn.Module) -> None:
    """Undoes :func:`prepare` where no layer is quantized: torch's attention modules, and at last the forwards."""
    found: dict[int, nn.MultiheadAttention] = {}
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if isinstance(module, MultiheadAttention) and not any(map(_is_quantized, module.children())):
                if id(module) not in found:
                    found[id(module)] = module.restored()
                parent._modules[child] = found[id(module)]
    if not any(map(_is_quantized, model.modules())) and vars(model).pop(_ACCELERATED, False):
        integrations.restore(model)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear)


def find(model: nn.Module, keep: Sequence[str], reasons: Mapping[str, str]) -> Layers:
    """The layers to quantize of a model that :func:`prepare` has seen, which gave ``reasons``."""
    places, left, matched, members = [], {}, set(), _members(model)
    for path, parent in model.named_modules(remove_duplicate=False):
        for child, layer in parent._modules.items():
            name = f"{path}.{child}" if path else child
            if isinstance(layer, QuantizedLinear):
                left[name] = LayerReport(name, None, float("nan"), "is quantized already")
            if not isinstance(layer, nn.Linear):
                continue
            patterns = [pattern for pattern in keep if fnmatch.fnmatchcase(name, pattern)]
            matched.update(patterns)
            if patterns:
                why: str | None = f"keep={patterns[0]!r}"
            elif id(layer) in members:
                why = _refusal(layer)
            else:
                inside = [reason for at, reason in reasons.items() if not at or name.startswith(f"{at}.")]
                why = inside[-1] if inside else "not in a residual branch that pyvit computes"
            if why is None:
                check(name, layer)
                places.append(Place(name, parent, child, layer, members[id(layer)]))
            else:
                left[name] = LayerReport(name, None, float("nan"), why)
    if unknown := [pattern for pattern in keep if pattern not in matched]:
        raise ValueError(f"quantize: keep: no linear layer is called {', '.join(map(repr, unknown))}")
    return Layers(places, left)


def _members(model: nn.Module) -> dict[int, bool]:
    """The identities of the linear layers of residual branches, and whether each takes the branch's input."""
    found: dict[int, bool] = {}
    for module in model.modules():
        if isinstance(module, BRANCHES):
            for child, layer in module._modules.items():
                if isinstance(layer, nn.Linear):
                    found[id(layer)] = child in FIRST
    for forward in integrations.replacements(model):
        if type(forward.module) is nn.MultiheadAttention or not forward.holds():
            continue
        for i, group in enumerate(forward.item.layers):
            for path in group.split():
                layer = _submodule(forward.module, path)
                if isinstance(layer, nn.Linear):
                    found.setdefault(id(layer), i == 0)
    return found


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _refusal(layer: nn.Linear) -> str | None:
    """Why a layer of a residual branch is left, None where it is quantized."""
    if not (plain(layer, Linear) or plain(layer, nn.Linear)):
        return "has hooks, another forward or another kind of weight"
    if layer.weight.numel() == 0:
        return "has no weights"
    return None


def check(name: str, layer: nn.Linear) -> None:
    weight = layer.weight
    if weight.device.type != "cpu":
        raise ValueError(f"quantize: {name}: weight must be on a CPU, got {weight.device}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"quantize: {name}: weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.shape[1] > MAX_COLUMNS:
        raise ValueError(f"quantize: {name}: weight must have at most {MAX_COLUMNS} columns, got {weight.shape[1]}")
    if not bool(weight.isfinite().all()) or (layer.bias is not None and not bool(layer.bias.isfinite().all())):
        raise ValueError(f"quantize: {name}: weight and bias must be finite")


def make(
    place: Place, rows: Tensor | None, error: Callable[[nn.Linear, QuantizedLinear, Tensor], float]
) -> QuantizedLinear:
    """The layer in int8, with factors for its channels if it takes a branch's input and they help: if they lower the
    ``error`` on ``rows`` of its input."""
    made = QuantizedLinear(place.layer, place.name)
    if rows is not None and place.first and (factors := _factors(place.layer, rows)) is not None:
        smoothed = QuantizedLinear(place.layer, place.name, factors)
        if error(place.layer, smoothed, rows) < HELPS * error(place.layer, made, rows):
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


def replace(places: Iterable[Place], made: Mapping[int, QuantizedLinear]) -> None:
    for place in places:
        place.parent._modules[place.child] = made[id(place.layer)]


def put_back(places: Iterable[Place]) -> None:
    for place in places:
        place.parent._modules[place.child] = place.layer
