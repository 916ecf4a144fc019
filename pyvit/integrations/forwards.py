"""Replacements of a module's forward: pyvit's function if it can serve a call, else the class's own forward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from pyvit.integrations import originals
from pyvit.nn.linear import hooked, ordinary
from pyvit.nn.quantized import QuantizedLinear


class Replacement(NamedTuple):
    """``module.method`` is replaced by ``function(module, ...)``; ``by`` names the operator of pyvit.

    ``needs``, ``may``: names of all attributes that the class has, or may have, in the library versions that
    ``function`` supports. ``parts``: submodules that ``function`` does not call; it only runs while each is of a known
    class and unchanged. ``optional``: not reported if it cannot be replaced. ``layers``: paths of the linear layers
    that ``function`` also multiplies with int8 weights (:func:`pyvit.quantize`), in the order in which it calls them;
    of several, separated by spaces, each takes the same input. ``reads_weights``: the class's own method multiplies
    their weights itself, and so cannot run with int8 weights.
    """

    module: nn.Module
    function: Callable[..., Any]
    by: str
    method: str = "forward"
    needs: str = ""
    may: str = ""
    parts: tuple[str, ...] = ()
    optional: bool = False
    layers: tuple[str, ...] = ()
    reads_weights: bool = False


class Reason(NamedTuple):
    """Why a module is not replaced; ``users``: because the user's own code must run."""

    text: str
    users: bool = False


class Left(NamedTuple):
    """A module that is not replaced, and why; ``users`` as in :class:`Reason`."""

    module: nn.Module
    reason: str
    users: bool = False


def kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def exporting() -> bool:
    """Whether torch.export is at work, which patches ``Module.__call__``."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()  # type: ignore[no-any-return]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def servable(x: Any) -> bool:
    """Whether kernels support the input's dtype, device and layout, and no exporter is active that does not know
    pyvit's operators."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        return False
    return (
        ordinary(x) and x.dtype in _DTYPES and (x.is_cpu or x.is_cuda) and x.layout is torch.strided and not x.is_nested
    )


def ordinary_weights(module: nn.Module) -> bool:
    """Whether the module's own parameters and buffers are :func:`ordinary` tensors."""
    for tensors in (module._parameters, module._buffers):
        for t in tensors.values():
            if t is not None and not ordinary(t):
                return False
    return True


def same(found: type, known: type) -> bool:
    """Whether a class is ``known``, possibly under the name that FSDP gives it."""
    return found is known or (found.__module__.startswith("torch.distributed.") and found.__bases__[-1:] == (known,))


WATCHED = "a hook watches"


def watched(module: nn.Module | None) -> bool:
    """Whether ``module`` has a hook that a call would trigger."""
    if module is None or not hooked(module):
        return False
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(others) or not module._forward_hooks or not all(map(is_idle, module._forward_hooks.values()))


def is_idle(hook: Any) -> bool:
    """Whether a hook is transformers' collector of outputs and currently collects no attention probabilities."""
    if "output_capturing_hook" not in getattr(hook, "__qualname__", ""):
        return False
    active = sys.modules["transformers.utils.output_capturing"]._active_collector.get()  # type: ignore[attr-defined]
    return active is None or "attentions" not in active


class _Part(NamedTuple):
    """A submodule that is bypassed: its path, its class, and the number of the class's recorded code."""

    path: tuple[str, ...]
    kind: type
    code: int
    methods: frozenset[str]

    def of(self, module: nn.Module) -> nn.Module | None:
        found: nn.Module | None = module
        for name in self.path:
            found = None if found is None else found._modules.get(name)
        return found


#: Classes that may be bypassed, besides those with rules.
_PARTS = {
    "pyvit.nn.attention.Attention",
    "pyvit.nn.block.Block",
    "torch.nn.modules.activation.Softmax",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
}


class Forward:
    """Stored in ``vars(module)[method]`` of an accelerated module. Every call checks that nothing has changed, because
    patches and hooks may be added later."""

    #: As torch.jit.ignore sets it: scripting then compiles the class's own forward.
    _torchscript_modifier = torch.jit.ignore(lambda: None)._torchscript_modifier  # type: ignore[attr-defined]

    def __init__(self, item: Replacement) -> None:
        self.item = item
        self.module = item.module
        self.function = item.function
        self.method = item.method
        self.active, self.kind = True, None
        self._learn()

    def _learn(self) -> None:
        module, method = self.module, self.method
        self.kind = type(module)
        self.code = originals.number(self.kind)
        self.others = originals.record(self.kind).methods - {method}
        self.parts = []
        for path in self.item.parts:
            part = _Part(tuple(path.split(".")), type(None), -1, frozenset()).of(module)
            if part is not None:
                known = nn.Linear if type(part) is QuantizedLinear else type(part)
                code = originals.record(known)
                self.parts.append(_Part(tuple(path.split(".")), known, originals.number(known), code.methods))
        ours = list(inspect.signature(self.function).parameters.values())[1:]
        own = getattr(self.kind, method, None)
        self.theirs = list(inspect.signature(own).parameters.values())[1:] if callable(own) else []
        self.ours = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.first = self.theirs[0].name if self.theirs else ""
        self.names = frozenset(p.name for p in self.ours[1:])
        self.any_names = any(p.kind is p.VAR_KEYWORD for p in ours)
        self.most = 1000 if any(p.kind is p.VAR_POSITIONAL for p in ours) else len(self.ours)

    def __reduce__(self) -> tuple[Any, ...]:
        # Recorded code is only valid in this process. The module is incomplete while it is copied.
        return _empty, (), {"item": self.item._replace(module=None), "module": self.module, "active": self.active}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.item = self.item._replace(module=self.module)
        self.function = self.item.function
        self.method = self.item.method
        self.kind = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kind is None:
            self._learn()
        if not args and self.first in kwargs:
            args = (kwargs.pop(self.first),)
        if (
            args
            and self.active
            and servable(args[0])
            and len(args) <= self.most
            and self._takes(kwargs)
            and (self.holds() or self._exported())
        ):
            return self.function(self.module, *args, **kwargs)
        if self.item.reads_weights:
            self.refuse_int8()
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def _exported(self) -> bool:
        """Whether an exporter is active, for whose patch of ``Module.__call__`` the original would run, but cannot with
        the weights that it has."""
        return exporting() and self.item.reads_weights and any(type(each) is QuantizedLinear for each in self._layers())

    def _layers(self) -> list[nn.Module | None]:
        paths = [path for group in self.item.layers for path in group.split()]
        return [_Part(tuple(path.split(".")), type(None), -1, frozenset()).of(self.module) for path in paths]

    def refuse_int8(self) -> None:
        """Raises RuntimeError where the class's own method would read int8 weights."""
        refuse_int8(self.module, *self._layers())

    def _takes(self, kwargs: dict[str, Any]) -> bool:
        return self.any_names or all(name in self.names for name in kwargs)

    def holds(self) -> bool:
        """Whether the module and the bypassed submodules are unchanged, and no hook would see these submodules."""
        module = self.module
        if self.kind is None:
            self._learn()
        if not (
            self.active
            and same(type(module), self.kind)
            and originals.unchanged(self.code)
            and ordinary_weights(module)
        ):
            return False
        if not _methods_are_ours(module, self.others, holding=False):
            return False
        for part in self.parts:
            found = part.of(module)
            if part.kind is nn.Linear and type(found) is QuantizedLinear:
                continue  # the function calls it where it is watched
            if (
                found is None
                or not same(type(found), part.kind)
                or watched(found)
                or not originals.unchanged(part.code)
            ):
                return False
            if not ordinary_weights(found) or not _methods_are_ours(found, part.methods):
                return False
        return True

    def reason(self, known: Callable[[str], bool]) -> Reason | None:
        """Why the module cannot be replaced, or None; ``known`` says whether there is a rule for a class's name."""
        module, method = self.module, self.method
        code = originals.record(type(module))
        if code.foreign:
            return Reason(code.foreign, True)
        for name in code.methods & vars(module).keys():
            if vars(module)[name] is not self and not (isinstance(vars(module)[name], Forward) and name != method):
                return Reason(f"its {name} is already replaced on this instance, by something else", True)
        if (reason := self._drift()) is not None:
            return Reason(reason)
        if not ordinary_weights(module):
            return Reason("its weights are of a tensor class that kernels cannot read")
        for path in self.item.parts:
            part = _Part(tuple(path.split(".")), type(None), -1, frozenset()).of(module)
            if part is None or type(part) is QuantizedLinear:
                continue
            code = originals.record(type(part))
            if not (kind(part) in _PARTS or known(kind(part))):
                users = code.library not in (originals.record(type(module)).library, "torch")
                return Reason(f"its {path} is a {kind(part)}, which pyvit does not know", users)
            if code.foreign:
                return Reason(f"its {path}: {code.foreign}", True)
            if not _methods_are_ours(part, code.methods, holding=False):
                return Reason(f"its {path} has methods that are replaced on this instance", True)
            if not ordinary_weights(part):
                return Reason(f"the weights of its {path} are of a tensor class that kernels cannot read")
        return None

    def seen(self) -> str | None:
        """A message about a hook on a bypassed submodule, or None."""
        for path in self.item.parts:
            part = _Part(tuple(path.split(".")), type(None), -1, frozenset()).of(self.module)
            if watched(part) and type(part) is not QuantizedLinear:
                return f"{WATCHED} its {path}: the original runs for as long as it does"
        return None

    def changed(self) -> str | None:
        """A message if the module has changed since it was replaced, or None."""
        return None if self.seen() or self.holds() else "changed since it was replaced: the original runs"

    def _drift(self) -> str | None:
        """How the class's signature or attributes differ from the supported versions, or None."""
        module = self.module
        for ours, theirs in zip(self.ours[1:], self.theirs[1:], strict=False):
            known = theirs.kind in (theirs.VAR_KEYWORD, theirs.VAR_POSITIONAL) or (ours.name, ours.default) == (
                theirs.name,
                theirs.default,
            )
            if not known:
                return (
                    f"its {self.method} takes ({', '.join(p.name for p in self.theirs)}), which is not what "
                    "pyvit knows of the class"
                )
        extra = [
            p.name
            for p in self.theirs[len(self.ours) :]
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if extra and not self.any_names:
            return f"its {self.method} takes {extra[0]}, which pyvit does not know"
        return layout(module, self.item.needs, self.item.may) if self.item.needs else None


_INTERNAL = {*vars(nn.Module()), "_forwards_of_pyvit"}


def layout(module: nn.Module, needs: str, may: str) -> str | None:
    """How a module's attributes differ from those it ``needs`` and ``may`` have, or None."""
    code, required = originals.record(type(module)), set(needs.split())
    missing = sorted(name for name in required if not hasattr(module, name))
    if missing:
        return f"has no {', '.join(missing)}: not a version of {code.library} that pyvit knows"
    own = {*module._modules, *module._parameters, *module._buffers}
    read = {name for name in vars(module) if name in code.reads and name not in _INTERNAL and name not in code.methods}
    unknown = sorted((own | read) - required - set(may.split()))
    return f"has {', '.join(unknown)}: not a version of {code.library} that pyvit knows" if unknown else None


def refuse_int8(module: nn.Module, *layers: nn.Module | None) -> None:
    """Raises RuntimeError if one of the layers, whose weights the original forward of ``module`` reads, has int8
    weights."""
    for layer in layers:
        if type(layer) is QuantizedLinear:
            raise RuntimeError(
                f"{kind(module)}: this call needs its original forward, which reads the weights of "
                f"{layer.name or 'its layers'} and those are int8: pyvit.dequantize(model) first"
            )


def _empty() -> Forward:
    return Forward.__new__(Forward)


def _methods_are_ours(module: nn.Module, methods: frozenset[str], holding: bool = True) -> bool:
    """Whether the instance overrides none of its class's methods, except by replacements of accelerate (that hold, if
    ``holding``)."""
    own = vars(module)
    if methods.isdisjoint(own):
        return True
    return not any(
        name in own and not (type(own[name]) is Forward and (not holding or own[name].holds())) for name in methods
    )


def put(forward: Forward) -> None:
    own = vars(forward.module)
    own[forward.method] = forward
    own["_forwards_of_pyvit"] = (*own.get("_forwards_of_pyvit", ()), forward)


def take_away(module: nn.Module) -> None:
    """Undo :func:`put`. Wrappers that other libraries put around a replaced forward stay and call the class's own."""
    for forward in vars(module).pop("_forwards_of_pyvit", ()):
        forward.active = False
        if vars(module).get(forward.method) is forward:
            delattr(module, forward.method)


def forwards(model: nn.Module) -> list[Forward]:
    return [forward for module in model.modules() for forward in vars(module).get("_forwards_of_pyvit", ())]


def served_by(module: nn.Module, function: Callable[..., Any], method: str = "forward") -> bool:
    """Whether a call of ``module`` would run ``function`` now, without any hook seeing it."""
    forward = vars(module).get(method)
    return type(forward) is Forward and forward.function is function and forward.holds() and not watched(module)
