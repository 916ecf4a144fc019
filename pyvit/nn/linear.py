"""A linear layer that runs :func:`pyvit.ops.linear`, its activation included."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyvit.ops import linear
from pyvit.ops.prepacked import Norm, normalize
from pyvit.torch_private import GLOBAL_HOOKS

_CALL = nn.Module.__call__
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Identity, nn.Dropout, nn.Linear, nn.LayerNorm)
}
Kind = TypeVar("Kind", bound=type[nn.Module])


def bypassed(kind: Kind) -> Kind:
    """Class decorator: fused layers may compute what the class computes without calling it, as long as its forward is
    the one that it has now."""
    _FORWARDS[kind] = kind.forward
    return kind


def unpatched(module: nn.Module) -> bool:
    """Whether neither ``module`` nor its class has been given another ``forward`` or ``__call__``: since it was defined
    for a :func:`bypassed` class, since the first call of this function for others."""
    kind = type(module)
    return (
        kind.forward is _FORWARDS.setdefault(kind, kind.forward)
        and kind.__call__ is _CALL
        and "forward" not in vars(module)
    )


@bypassed
class Linear(nn.Linear):
    """``torch.nn.Linear`` by parameters and keys; ``activation`` (see :func:`pyvit.ops.linear`) is applied in the same
    call."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None, **factory: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, activation=self.activation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype == torch.int8:  # which mean nothing without their scales
            args[-1].append(
                f"{prefix.removesuffix('.')}: weight is int8 in the state dict and {self.weight.dtype} here; call "
                "pyvit.quantize(model) first, or pyvit.quantization.load"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


def hooked(*modules: nn.Module | None) -> bool:
    """Whether hooks observe calls of these modules, and so would notice that they are bypassed."""
    for m in modules:
        if m is not None and (
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or any(GLOBAL_HOOKS)
        ):
            return True
    return False


def ordinary(t: Any) -> bool:
    """Whether a kernel may read the memory of a tensor: it is no tensor subclass (quantized or sharded weights), and no
    proxy of a tracer."""
    return type(t) in _TENSORS or type(t).__module__.startswith("torch._subclasses.")  # torch.compile and torch.export


_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def plain(layer: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """Whether ``layer`` is a ``kind`` without adapters, quantized weights, hooks or patches, so that its weights may be
    used directly.

    Every block asks this of each of its parts in every call. It therefore reads the dictionary of attributes.
    """
    if type(layer) is not kind:
        return False
    attributes = vars(layer)
    if "forward" in attributes or kind.forward is not _FORWARDS[kind] or kind.__call__ is not _CALL:
        return False
    if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
        return False
    # Each dictionary that is read is a guard of compiled graphs, and hooks of the backward see no inference.
    backward = not torch.compiler.is_compiling() or torch.is_grad_enabled()
    if backward and (attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]):
        return False
    if any(GLOBAL_HOOKS):
        return False
    for p in attributes["_parameters"].values():
        if p is not None and type(p) not in _TENSORS and not ordinary(p):
            return False
    return True


def idle(drop: nn.Module | None) -> bool:
    """Whether ``drop`` returns its input and no hook observes it. False for unknown classes."""
    if type(drop) is nn.Dropout:
        return not (drop.p and drop.training) and plain(drop, nn.Dropout)
    return drop is None or plain(drop, nn.Identity)


def fuses_residual(layer: nn.Module) -> bool:
    """Whether the class of ``layer`` computes residual branches, and neither a hook nor a patch wants its calls."""
    return "fuses_residual" in type(layer).__dict__ and unpatched(layer) and not hooked(layer)


def apply(
    layer: nn.Module,
    x: Tensor,
    drop: nn.Module | None = None,
    *,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * drop(layer(norm(x))), in one call if ``drop`` is idle: of :func:`pyvit.ops.linear` if
    ``layer`` is plain, of ``layer`` if it fuses residual branches itself."""
    if plain(layer) and idle(drop):
        weight, bias, activation = layer.weight, layer.bias, layer.activation
        return linear(x, weight, bias, activation=activation, norm=norm, scale=scale, residual=residual)  # type: ignore[arg-type]
    if idle(drop) and fuses_residual(layer):
        return layer(x, norm=norm, scale=scale, residual=residual)  # type: ignore[no-any-return]
    y = layer(x if norm is None else normalize(x, norm))
    y = y if drop is None else drop(y)
    y = y if scale is None else y * scale
    return y if residual is None else residual + y
