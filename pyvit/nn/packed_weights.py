"""Prepacked weights for inference on a CPU."""

from __future__ import annotations

from torch import nn

from pyvit.ops import prepacked


def pack_weights(model: nn.Module) -> int:
    """Prepacks the weights of ``model``'s linear layers for inference on a CPU and returns how many there are.

    A prepacked weight is a copy in the order in which it is multiplied. Without it, every product reorders the weight.
    With it, each residual branch of a block (layer norm, linear layers or attention, activation, LayerScale, residual)
    is one call of the library. The copies need as much memory as the weights. Training and other devices use the
    weights themselves. The results agree to rounding.

    Nothing is packed without the compiled library, or with ``PYVIT_LINEAR=torch``.

    **Changes of a weight.** A changed weight is packed again in the next call. This covers every change that PyTorch
    counts: optimizers, ``load_state_dict``, ``copy_``, any write in place, new memory. Writes past that count, through
    ``weight.data``, NumPy or DLPack, are found by reading part of the weight: in every call 64 places spread over its
    rows and columns, and one of 128 stripes in turn. A change of most elements (a merged adapter, a pruned head) is
    found in the next call. A change of a few elements may be found only after up to 128 calls, which a RuntimeWarning
    reports. Call this function again after such a write.

    **Another weight.** A layer that gets a new parameter (assignment, ``load_state_dict(assign=True)``, a
    parametrization) multiplies it unpacked until this function is called again. Packed weights are not part of
    ``state_dict``, ``copy.deepcopy`` or pickles. :func:`unpack_weights` frees them.
    """
    gated = _gated_layers(model)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return sum(prepacked.pack(layer, 2 if layer in gated else 1) for layer in layers)


def _gated_layers(model: nn.Module) -> set[nn.Module]:
    """The layers of gates and values together, which are multiplied in halves: those whose result is twice as wide as
    what the layer after it takes."""
    found: set[nn.Module] = set()
    for module in model.modules():
        for first, second in _GATED_NAMES:
            fc1, fc2 = module._modules.get(first), module._modules.get(second)
            if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear) and fc1.out_features == 2 * fc2.in_features:
                found.add(fc1)
    return found


#: By pyvit and timm, and by DINOv2 in transformers and in its own repository.
_GATED_NAMES = (("fc1", "fc2"), ("weights_in", "weights_out"), ("w12", "w3"))


def unpack_weights(model: nn.Module) -> None:
    """Frees the copies of :func:`pack_weights`."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            prepacked.unpack(layer)
