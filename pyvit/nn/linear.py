"""A linear layer that runs :func:`pyvit.ops.linear`, its activation included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from pyvit.ops import layer_norm, linear, packed
from pyvit.ops.packed import Branch, Norm
from pyvit.torch_private import GLOBAL_HOOKS

_CALL = nn.Module.__call__
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Identity, nn.Dropout, nn.Linear, nn.LayerNorm)
}
Kind = TypeVar("Kind", bound=type[nn.Module])


def bypassed(kind: Kind) -> Kind:
    """Of a class whose work others may do without calling it, as long as its forward is the one it has now."""
    _FORWARDS[kind] = kind.forward
    return kind


def unpatched(module: nn.Module) -> bool:
    """Whether a call of ``module`` would run its class's own code: that of a :func:`bypassed` class, or of another as
    it was first seen."""
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

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


def hooked(*modules: nn.Module | None) -> bool:
    """Whether anything watches calls of these modules, and so would notice that they are bypassed."""
    given = [m for m in modules if m is not None]
    own = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in given)
    return own or (bool(given) and any(GLOBAL_HOOKS))


def ordinary(t: Any) -> bool:
    """Whether a tensor is one of torch's own, whose memory a kernel may read: no quantised or sharded weight, no proxy
    of a tracer."""
    return type(t) in _TENSORS or type(t).__module__.startswith(
        "torch._subclasses."
    )  # of torch.compile and torch.export


_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def plain(layer: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """A ``kind`` with nothing in or around it (adapters, quantised weights, hooks): its weights may be used
    directly."""
    if type(layer) is not kind or not unpatched(layer) or hooked(layer):
        return False
    return all(p is None or ordinary(p) for p in layer._parameters.values())


def idle(drop: nn.Module | None) -> bool:
    """Whether ``drop`` returns what it is given, and nothing watches it. A class that is not known may do anything."""
    return drop is None or plain(drop, nn.Identity) or (plain(drop, nn.Dropout) and not (drop.p and drop.training))


def apply(
    layer: nn.Module,
    x: Tensor,
    drop: nn.Module | None = None,
    *,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * drop(layer(norm(x))), see :func:`pyvit.ops.linear`: by one call of it where nothing stands
    between."""
    if plain(layer) and idle(drop):
        weight, bias, activation = layer.weight, layer.bias, layer.activation
        return linear(x, weight, bias, activation=activation, norm=norm, scale=scale, residual=residual)  # type: ignore[arg-type]
    y = layer(x if norm is None else layer_norm(x, *norm))
    y = y if drop is None else drop(y)
    y = y if scale is None else y * scale
    return y if residual is None else residual + y


def prepared(
    layer: nn.Module, x: Tensor, drop: nn.Module | None = None, **around: Any
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """:func:`apply` as a function of x and residual, for inputs like these: see :mod:`pyvit.nn.replay`."""
    if not (plain(layer) and idle(drop)):
        return None
    return packed.prepared(x, Branch(layer.weight, layer.bias, layer.activation, **around))  # type: ignore[arg-type]
