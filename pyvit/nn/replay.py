"""A block in inference, run again as it ran before.

Around the kernels of a block lie some hundred Python calls: what shapes fit, which way a product goes, whether hooks
watch a module. In a small model, one image at a time, they take a tenth of the time. Where a block's first run in
inference went by kernels alone, the next runs call these at once, if nothing that decided it has changed: a
:class:`Snapshot` of the module tells.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyvit.ops import packed
from pyvit.ops.packs import PACKS, changes, pack_of, state, unchanged
from pyvit.torch_private import GLOBAL_HOOKS, HOOKS

Run = Callable[[Tensor], Tensor]

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_MOST = 64  # shapes of inputs


class Snapshot:
    """What a module and its parts are: classes, parts, parameters, attributes, what packed weights hold, and that no
    hook watches them."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        held: list[tuple[dict[Any, Any], Any, Any]] = []  # this dictionary holds at this key this object
        self.tensors: list[Tensor] = []
        for m in modules:
            held += [(vars(m), name, value) for name, value in vars(m).items() if name not in _INTERNAL]
            for parts in (m._modules, m._parameters, m._buffers):
                held += [(parts, name, part) for name, part in parts.items()]
                self.tensors += [t for t in parts.values() if isinstance(t, Tensor)]
        packs = {id(t): pack for t in self.tensors if (pack := pack_of(t)) is not None and pack.print is not None}
        self.packs, self.weights = list(packs.values()), [t for t in self.tensors if id(t) in packs]
        self.prints = torch.stack([pack.print for pack in self.packs]) if packs else None  # type: ignore[misc]
        self.turn, self.stale = 0, False
        self.kinds = list({*map(type, modules)})
        self.dictionaries, self.keys, self.objects = zip(*held, strict=True)
        self.kind, self.parts = type(module), modules[1:]  # the module itself must not be kept alive by its snapshot
        self.attributes = [vars(m) for m in modules]
        self.hooks = [attributes for attributes in self.attributes for _ in HOOKS], HOOKS * len(modules)
        self.state = self._state()

    def _state(self) -> list[Any]:
        return [
            *map(type, self.parts),
            *map(len, self.attributes),  # a patched forward is one more
            *map(Tensor.data_ptr, self.tensors),
            *map(_dtype, self.tensors),
            *map(state, self.weights),
            *map(_forward, self.kinds),
            *map(_call_of, self.kinds),
            changes(),
        ]

    def watched(self) -> bool:
        """Whether hooks watch the module or a part of it; a dictionary of hooks may have been replaced since."""
        return any(GLOBAL_HOOKS) or any(map(operator.getitem, *self.hooks))

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still the same. Its values may have changed, but those that are kept packed."""
        try:
            if self.stale or type(module) is not self.kind or self.watched():
                return False
            found = map(operator.getitem, self.dictionaries, self.keys)
            if not all(map(operator.is_, found, self.objects)) or self._state() != self.state:
                return False
            self.turn += 1
            self.stale = self.prints is not None and not unchanged(self.packs, self.prints, self.turn)
            return not self.stale
        except (KeyError, AttributeError):
            return False


_dtype, _forward, _call_of = map(operator.attrgetter, ("dtype", "forward", "__call__"))


class _Known:
    """Of one module: its snapshot, and by what it is called with how it runs, None where not by kernels alone."""

    def __init__(self, module: nn.Module) -> None:
        key = id(module)
        self.module = weakref.ref(module, lambda _, known=_known: known.pop(key, None))
        self.snapshot, self.runs = Snapshot(module), dict[Any, Run | None]()


_known: dict[int, _Known] = {}


def _call(x: Tensor, options: tuple[Any, ...]) -> tuple[Any, ...]:
    return x.shape, x.dtype, options, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def again(module: nn.Module, x: Tensor, *options: Any) -> Tensor | None:
    """The module's result as by its run before with such an input and ``options``; None where there was none or
    something has changed."""
    if torch.compiler.is_compiling() or (known := _known.get(id(module))) is None or not packed.direct(x):
        return None
    run = known.runs.get(_call(x, options))
    if run is None or known.module() is not module or not known.snapshot.holds(module):
        return None
    return run(x)


def record(module: nn.Module, x: Tensor, *options: Any) -> None:
    """After a run: keep how it goes, as ``module.prepared(x, *options)`` says: a function of x, or None where that
    takes more."""
    if torch.compiler.is_compiling() or not PACKS or not packed.direct(x):
        return
    known = _known.get(id(module))
    if known is not None and known.snapshot.watched():
        return
    if known is None or known.module() is not module or not known.snapshot.holds(module) or len(known.runs) >= _MOST:
        try:
            known = _known[id(module)] = _Known(module)
        except RuntimeError:  # wrapped tensors, of quantisation for example, have no address
            return
    call = _call(x, options)
    if call not in known.runs:
        known.runs[call] = module.prepared(x, *options)
