"""Packed weights for inference on a CPU."""

from __future__ import annotations

from torch import nn

from pyvit.ops import packed


def pack_weights(model: nn.Module) -> int:
    """Keep the weights of ``model``'s linear layers a second time, in the order in which they are multiplied, and return how many.

    Each product otherwise brings its weight into that order again. With packed weights a block's branch (layer norm, linear layers,
    activation, LayerScale, residual) runs in one pass where that is measured to be faster (:func:`pyvit.ops.mlp`): its hidden layer
    stays in cache. The copies are made by the first forward without a gradient, cost the weights' memory once more, and are made anew
    when a weight has changed: by an optimizer, ``load_state_dict`` or ``copy_``. A change that autograd cannot see, one through
    ``weight.data``, goes unseen here too: call this function again after it. Training and other devices use the weights themselves, and
    nothing is kept where ``PYVIT_LINEAR=torch`` rules the packed products out. The results are the same to rounding.

    :func:`unpack_weights` frees the copies; they do not travel with ``state_dict``, ``copy.deepcopy`` or pickling.
    """
    return sum(packed.keep(layer) for layer in model.modules() if isinstance(layer, nn.Linear))


def unpack_weights(model: nn.Module) -> None:
    """Free what :func:`pack_weights` keeps."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            packed.drop(layer)
