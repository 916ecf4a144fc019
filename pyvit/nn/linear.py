"""A linear layer that runs :func:`pyvit.ops.linear`, its activation included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as globally

from pyvit.ops import layer_norm, linear, packed
from pyvit.ops.packed import Branch, Norm


class Linear(nn.Linear):
    """``torch.nn.Linear`` by parameters and keys; ``activation`` (see :func:`pyvit.ops.linear`) is applied in the same call."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


_GLOBAL_HOOKS = (
    globally._global_forward_hooks,
    globally._global_forward_pre_hooks,
    globally._global_backward_hooks,
    globally._global_backward_pre_hooks,
)


def hooked(*modules: nn.Module | None) -> bool:
    """Whether anything watches calls of these modules, and so would notice that they are bypassed."""
    if any(_GLOBAL_HOOKS):
        return any(m is not None for m in modules)
    return any(
        m is not None and bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks) for m in modules
    )


def ordinary(t: Any) -> bool:
    """Whether a tensor is one of torch's own, whose memory a kernel may read: no quantised or sharded weight, no proxy of a tracer."""
    return type(t) in _TENSORS or type(t).__module__.startswith("torch._subclasses.")  # of torch.compile and torch.export


_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def plain(layer: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """A ``kind`` with nothing in or around it (adapters, quantised weights, hooks): its weights may be used directly."""
    return (
        type(layer) is kind
        and not hooked(layer)
        and "forward" not in vars(layer)
        and all(p is None or ordinary(p) for p in layer._parameters.values())
    )


def idle(drop: nn.Dropout | None) -> bool:
    """Whether ``drop`` drops nothing, and nothing watches it."""
    return drop is None or not ((drop.p and drop.training) or hooked(drop))


def apply(
    layer: nn.Module,
    x: Tensor,
    drop: nn.Dropout | None = None,
    *,
    norm: Norm | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scale * drop(layer(norm(x))), see :func:`pyvit.ops.linear`: by one call of it where nothing stands between."""
    if plain(layer) and idle(drop):
        weight, bias, activation = layer.weight, layer.bias, layer.activation
        return linear(x, weight, bias, activation=activation, norm=norm, scale=scale, residual=residual)  # type: ignore[arg-type]
    y = layer(x if norm is None else layer_norm(x, *norm))
    y = y if drop is None else drop(y)
    y = y if scale is None else y * scale
    return y if residual is None else residual + y


def prepared(
    layer: nn.Module, x: Tensor, drop: nn.Dropout | None = None, **around: Any
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """:func:`apply` as a function of x and residual, for inputs like these: see :mod:`pyvit.nn.replay`."""
    if not (plain(layer) and idle(drop)):
        return None
    return packed.prepared(x, Branch(layer.weight, layer.bias, layer.activation, **around))  # type: ignore[arg-type]
