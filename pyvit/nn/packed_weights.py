"""Packed weights for inference on a CPU."""

from __future__ import annotations

from torch import nn

from pyvit.ops import packed


def pack_weights(model: nn.Module) -> int:
    """Keep the weights of ``model``'s linear layers a second time, in the order in which oneDNN multiplies them, and return how many.

    Each product otherwise brings its weight into that order again: 6 to 7 % of a ViT-B's inference on a CPU, 1 to 4 % of a Swin-T's. The
    copies are made by the first forward without a gradient, cost the weights' memory once more, and are made anew when a weight has
    changed: by an optimizer, ``load_state_dict`` or ``copy_``. A change that autograd cannot see, one through ``weight.data``, goes unseen
    here too: call this function again after it. Training, compiled graphs and other devices use the weights themselves, and nothing is kept
    where ``PYVIT_LINEAR=torch`` rules oneDNN out. The results are the same to rounding.

    :func:`unpack_weights` frees the copies; they do not travel with ``state_dict``, ``copy.deepcopy`` or pickling.
    """
    return sum(packed.keep(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear))


def unpack_weights(model: nn.Module) -> None:
    """Free what :func:`pack_weights` keeps."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            packed.drop(layer.weight)
