"""Files of quantized models: safetensors with int8 weights and their scales."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyvit.models.metadata import header_of
from pyvit.nn.constants import Constants
from pyvit.nn.quantized import QuantizedLinear
from pyvit.quantization import layers

_SCALE = ".weight_scale"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the ``state_dict`` of a quantized model to a safetensors file, of about a quarter of its size in float32.

    Tensors that the model has under several names are written once. Raises ValueError if no layer of ``model`` is
    quantized.
    """
    from safetensors.torch import save_file

    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("save: the model has no quantized layer; call pyvit.quantize first")
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().contiguous()
    save_file(state, Path(path), {"format": "pt", **header_of(model)})


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads a file of :func:`save` into a model of the same architecture, and returns it, in evaluation mode.

    The layers that were quantized become :class:`pyvit.nn.QuantizedLinear` in place; no float weights of them are
    needed. A model of another library is accelerated first, as by :func:`pyvit.quantize`.

    Args:
        model: with any weights. Built under ``torch.device("meta")`` it takes no memory for them.

    Raises ValueError where the file is damaged, where names or shapes differ, naming them, or where a buffer on the
    meta device is neither in the file nor computed from settings; the model is then unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(Path(path))
    except SafetensorError as error:
        raise ValueError(f"load: {path} is not a safetensors file, or is cut short: {error}") from error
    names = [key.removesuffix(_SCALE) for key in state if key.endswith(_SCALE)]
    if not names:
        raise ValueError(f"load: {path}: holds no quantized layer")
    layers.prepare(model)
    replaced: list[layers.Place] = []
    try:
        for name in names:
            if (place := _place(model, name)) is not None:
                replaced.append(place)
                place.parent._modules[place.child] = QuantizedLinear.without_values(place.layer, name)
        same = _check(model, state)
    except BaseException:
        layers.put_back(reversed(replaced))
        layers.unprepare(model)
        raise
    on_meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    if on_meta:
        model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    model.load_state_dict({**state, **{name: state[other] for name, other in same.items()}}, strict=False)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.pack()
        elif isinstance(module, layers.MultiheadAttention):
            module.release()
    layers.unprepare(model)
    return model.eval()


def _place(model: nn.Module, name: str) -> layers.Place | None:
    """The linear layer called ``name``, None where it is quantized already."""
    path, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
    except AttributeError:
        parent = nn.Module()
    layer = parent._modules.get(child)
    if isinstance(layer, QuantizedLinear):
        return None
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"load: {name} is quantized in the file, and the model has no such linear layer")
    return layers.Place(name, parent, child, layer, False)


def _check(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """That the state dict has all of the model's tensors, in their shapes, and no others. Returns the names that are
    not in it, for tensors that are in it by another name."""
    own = model.state_dict(keep_vars=True)
    held = {id(own[name]): name for name in state if name in own}
    floats = [name for name in state if f"{name.removesuffix('weight')}weight_scale" in state]
    smoothing = {name for name in state if name.endswith(".smoothing")}  # of quantized layers, which take them or none
    problems = {
        "are not in the file": [name for name in own if id(own[name]) not in held and not name.endswith(".smoothing")],
        "are not in the model": [name for name in state if name not in own and name not in smoothing],
        "are not int8": [name for name in floats if name.endswith(".weight") and state[name].dtype != torch.int8],
        "have other shapes": [name for name in state if name in own and own[name].shape != state[name].shape],
    }
    for what, found in problems.items():
        if found:
            more = f" and {len(found) - 3} others" if len(found) > 3 else ""
            raise ValueError(f"load: {', '.join(found[:3])}{more} {what}")
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if buffer is not None and buffer.is_meta and full not in state and not isinstance(module, Constants):
                raise ValueError(f"load: {full} is on the meta device and not in the file: build the model on a CPU")
    return {name: held[id(t)] for name, t in own.items() if name not in state and id(t) in held}
