"""Packed weights for inference on a CPU."""

from __future__ import annotations

from torch import nn

from pyvit.ops import prepacked


def pack_weights(model: nn.Module) -> int:
    """Keep the weights of ``model``'s linear layers a second time, in the order in which they are multiplied, and
    return how many.

    Each product otherwise brings its weight into that order again. With packed weights a block's branch (layer norm,
    linear layers, activation, LayerScale, residual) runs in one pass where that is faster (:func:`pyvit.ops.mlp`): its
    hidden layer stays in cache. The copies are made by the first forward without a gradient and cost the weights'
    memory once more. Training and other devices use the weights themselves. Nothing is kept without the compiled
    library, or where ``PYVIT_LINEAR=torch`` rules the packed products out. The results are the same to rounding.

    When a weight has changed its copy is made anew. What PyTorch counts (optimizers, ``load_state_dict``, ``copy_``,
    any write in place or new memory) is seen whatever it changes. Writes past that count, through ``weight.data``,
    NumPy or DLPack, are seen by reading some of the weight: in every call 64 places spread over its rows and columns,
    and one of 128 stripes in turn. A merged adapter, a pruned head or other numbers in most places are seen by the next
    call. A few single elements may be seen only after up to 128 calls, which a RuntimeWarning then says: call this
    function again after such a write. A layer that is given another weight (a new parameter,
    ``load_state_dict(assign=True)``, a parametrization) multiplies that one unpacked until this function is called
    again.

    :func:`unpack_weights` frees the copies; they do not travel with ``state_dict``, ``copy.deepcopy`` or pickling.
    """
    return sum(prepacked.pack(layer) for layer in model.modules() if isinstance(layer, nn.Linear))


def unpack_weights(model: nn.Module) -> None:
    """Free what :func:`pack_weights` keeps."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            prepacked.unpack(layer)
