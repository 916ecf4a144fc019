"""Weights that are kept packed: their forms, for whom they are kept, and whether they are still what they were made
of."""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyvit import library
from pyvit.ops import products


class Pack:
    """The packed forms of a layer's weight, and the ways that calls with it went."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        # Of the layer, not of the weight: torch swaps no tensor that a weak reference points to.
        self.layer = weakref.ref(layer, functools.partial(_forget, PACKS, id(weight)))
        self.of: tuple[Any, ...] = ()
        self.print: Tensor | None = None  # of the weight that the forms were made of
        self.turn = 0
        self.forms: dict[str, Tensor] = {}
        self.ways: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.used: set[str] = set()  # the forms that these ways multiply

    def is_of(self, weight: Tensor | None) -> bool:
        """Whether ``weight`` is still the layer's."""
        layer = self.layer()
        return layer is not None and layer._parameters.get("weight") is weight

    def same(self, weight: Tensor) -> bool:
        """Whether ``weight`` is what the forms were made of."""
        self.turn += 1
        return self.print is not None and self.of == state(weight) and unchanged([self], self.print, self.turn)

    def follow(self, weight: Tensor) -> bool:
        """Forget what is known of a weight that has changed; False where it can no longer be packed."""
        if not self.same(weight):
            self.forget()
            if weight.is_inference() or not _packable(weight):
                return False
            self.of, self.print = state(weight), torch.ops.pyvit.weight_print.default(weight.detach())
        return True

    def forget(self) -> None:
        self.print = None
        self.forms.clear()
        self.ways.clear()
        self.used.clear()

    def form(self, name: str, weight: Tensor) -> Tensor:
        found = self.forms.get(name)
        if found is None:
            found = self.forms[name] = _PACKERS[name](weight.detach())
        return found


def _forget(packs: dict[int, Pack], key: int, gone: object) -> None:
    """A layer is gone. ``PACKS`` is an argument because when Python ends a module's names may be gone first."""
    if (pack := packs.get(key)) is not None and pack.layer is gone:
        del packs[key]


_changes = 0
PACKS: dict[int, Pack] = {}  # by the weight's id: a dictionary of weak references takes microseconds to ask

_PACKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "onednn": lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight),
    "pyvit": lambda weight: torch.ops.pyvit.pack_layer.default(weight),
}


def state(weight: Tensor) -> tuple[Any, ...]:
    """What a change of ``weight`` that PyTorch counts changes, and where and how its elements lie."""
    return (
        -1 if weight.is_inference() else weight._version,
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        weight.stride(),
    )


@functools.cache
def _changed() -> Callable[[int, int, int], int]:
    """``pyvit_weights_changed`` of csrc/torch/watch.cpp."""
    function = ctypes.PyDLL(str(library.PATH)).pyvit_weights_changed
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), ctypes.c_int
    return function  # type: ignore[no-any-return]


def unchanged(packs: Sequence[Pack], prints: Tensor, turn: int) -> bool:
    """Whether the weights of ``packs``, whose :func:`state` is as it was, hold what their prints (packs, words) tell:
    some words of each, and of 128 stripes the one whose turn it is. Packs whose weights do not are forgotten."""
    found = _changed()(prints.data_ptr(), len(packs), turn)
    if found:
        for pack in packs:
            pack.forget()
    if found == 2:
        warnings.warn(
            "pyvit: a packed weight was written to past PyTorch's count of changes (through .data, NumPy or "
            "DLPack), so little of it that "
            "only now it was seen: earlier results may be of the old weight. Call pyvit.pack_weights(model) after "
            "such a change.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not found


def pack_of(weight: Tensor | None) -> Pack | None:
    pack = PACKS.get(id(weight))
    return pack if pack is not None and pack.is_of(weight) else None


@functools.cache
def forms(dtype: torch.dtype) -> tuple[str, ...]:
    """The forms that weights of ``dtype`` can be packed in on this processor: oneDNN refuses bfloat16 without
    AVX-512."""
    found = []
    for name in _PACKERS:
        try:
            if name == "onednn" and (products.onednn() is None or dtype not in (torch.float32, torch.bfloat16)):
                continue
            if name == "pyvit" and library.problem() is not None:
                continue
            _PACKERS[name](torch.zeros(16, 16, dtype=dtype, device="cpu"))
        except RuntimeError:
            continue
        found.append(name)
    return tuple(found)


def keep(layer: nn.Module) -> bool:
    """Keep the weight of ``layer`` packed from the next product without a gradient on; False where no library here
    can."""
    global _changes
    weight = layer._parameters.get("weight")  # not one that a parametrization computes anew for every call
    if weight is None or products.policy() == "torch" or weight.is_inference() or not _packable(weight):
        return False
    PACKS[id(weight)] = Pack(layer, weight)
    _changes += 1
    return True


def _packable(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and weight.device.type == "cpu"
    if not plain or weight.dim() != 2 or not weight.is_contiguous() or not weight.data_ptr():
        return False
    # The library tells whether a weight has changed; one below a word is not worth the trouble.
    return library.problem() is None and weight.numel() * weight.element_size() >= 8 and bool(forms(weight.dtype))


def drop(layer: nn.Module) -> None:
    global _changes
    weight = layer._parameters.get("weight")
    if (pack := pack_of(weight)) is not None:
        del PACKS[id(weight)]
        pack.forget()  # whoever remembers the pack
        _changes += 1


def changes() -> int:
    """How often weights began or ceased to be kept packed."""
    return _changes
