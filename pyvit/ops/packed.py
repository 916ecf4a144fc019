"""Inference with weights kept packed on a CPU: linear layers, and a block's branch in one pass.

A weight is packed as oneDNN multiplies it, as ``csrc/cpu/linear.cpp`` does, or both; which way a call goes is decided
as any product's (:mod:`pyvit.ops.products`). Nothing here is recorded by autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit import dispatch, library
from pyvit.memory import recycled
from pyvit.ops import products
from pyvit.ops.layer_norm import layer_norm
from pyvit.ops.packs import PACKS, forms, pack_of
from pyvit.ops.tracing import traced

#: weight (C,), bias (C,), eps
Norm = tuple[Tensor | None, Tensor | None, float]


class Branch(NamedTuple):
    """residual + scale * layers(norm(x)): one linear layer with its activation after it, or two with the activation
    between them."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    norm: Norm | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None

    def is_one_layer(self) -> bool:
        return self.weight2 is self.norm is self.scale is self.residual is None


Way = Callable[[Tensor, Branch], Tensor]


def again(x: Tensor, branch: Branch) -> Tensor | None:
    """The short way for a call like an earlier one: every check was made then. None where there was none, or where a
    gradient is wanted."""
    if id(branch.weight) not in PACKS or not direct(x):
        return None
    way = _known_way(x, branch)
    return None if way is None else way(x, branch)


def direct(x: Tensor) -> bool:
    """Whether a call with x is inference that nothing changes or watches, so that it may go where an earlier one
    went."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and dispatch._override is None
        and not torch.is_autocast_enabled("cpu")
        and not traced(x)
    )


def _known_way(x: Tensor, branch: Branch) -> Way | None:
    for weight in (branch.weight, branch.weight2):
        if weight is not None and ((pack := pack_of(weight)) is None or not pack.same(weight)):
            return None
    return PACKS[id(branch.weight)].ways.get(_call(x, branch))


def prepared(x: Tensor, branch: Branch) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """The known way of a call like this one as a function of x and the residual; None where none is known."""
    way, branch = _known_way(x, branch), branch._replace(residual=None)
    if way is _in_one_pass:
        return _one_pass(x, branch)
    return None if way is None else lambda x, residual: way(x, branch._replace(residual=residual))


def _call(x: Tensor, b: Branch) -> tuple[Any, ...]:
    """What, the weights being the same, a way was chosen for."""
    return (
        x.shape,
        x.dtype,
        b.activation,
        _small(b.bias),
        id(b.weight2),
        _small(b.bias2),
        tuple(map(_small, b.norm)) if isinstance(b.norm, tuple) else id(b.norm),
        _small(b.scale),
        (b.residual.shape, b.residual.dtype) if isinstance(b.residual, Tensor) else id(b.residual),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _small(t: Any) -> Any:
    """A parameter's identity; of what should be none, whatever tells it from one: the checks have it before them."""
    return (id(t), t.dtype, t.shape) if isinstance(t, Tensor) else t if isinstance(t, float) else id(t)


def run(x: Tensor, branch: Branch) -> Tensor | None:
    """The branch by its fastest way, or None where its weights are not packed. Its tensors fit each other and have one
    dtype."""
    weights = [w for w in (branch.weight, branch.weight2) if w is not None]
    packs = [pack for w in weights if (pack := pack_of(w)) is not None]
    if len(packs) < len(weights):
        return None
    if not all(pack.follow(weight) for pack, weight in zip(packs, weights, strict=True)):
        return None
    rows = x.numel() // max(x.shape[-1], 1)
    key = _key(rows, x, branch)
    width = (branch.weight if branch.weight2 is None else branch.weight2).shape[0]

    def arguments(few: int) -> tuple[Tensor, Branch]:
        residual = None if branch.residual is None else branch.residual.reshape(-1, width)[:few]
        return (x if x.dim() < 2 else x.reshape(-1, x.shape[-1])[:few]), branch._replace(residual=residual)

    found = products._chosen.get(key)
    measuring = found is None and products.policy() == "measure"
    before = [(dict(pack.ways), set(pack.used)) for pack in packs] if measuring else []
    if found is None:
        found = products.choose(key, _kind(branch), _ways(x, branch), arguments, rows, branch.weight.shape, x.dtype)
    way = found[0]
    for pack, (ways, used) in zip(packs, before, strict=False):  # calls that were only measured leave nothing
        pack.ways, pack.used = ways, used
    for pack in packs:
        pack.used |= _USES.get(way, set())
        if measuring:
            pack.forms = {name: form for name, form in pack.forms.items() if name in pack.used}
    if len(packs[0].ways) >= 64:  # lengths, or biases, that change with every call
        packs[0].ways.clear()
    packs[0].ways[_call(x, branch)] = way
    return way(x, branch)


def _key(rows: int, x: Tensor, b: Branch) -> tuple[Any, ...]:
    rest = (b.bias2 is None, b.norm and (b.norm[0] is None, b.norm[1] is None), b.scale is None, b.residual is None)
    second = () if b.weight2 is None else (b.weight2.shape,)
    return ("packed", *products.forward_key(rows, x, b.weight, b.bias, b.activation), *second, *rest)


def _kind(b: Branch) -> str:
    return "packed layer" if b.is_one_layer() else "packed branch"


def _ways(x: Tensor, b: Branch) -> dict[str, Way]:
    """Those that serve here."""
    able = forms(x.dtype)
    ways: dict[str, Way] = {"torch": _torch}
    if not b.is_one_layer():
        ways["layer by layer"] = _layer_by_layer
    elif "onednn" in able and "onednn" in products.forward_ways(x.dtype, x.dtype, b.activation):
        ways["onednn"] = _onednn
    if "pyvit" in able and (b.is_one_layer() or products.policy() != "onednn"):
        ways["pyvit"] = _in_one_pass
    return ways


def _onednn(x: Tensor, b: Branch) -> Tensor:
    return products.by_onednn(x, PACKS[id(b.weight)].form("onednn", b.weight), b.bias, b.activation)


def _in_one_pass(x: Tensor, b: Branch) -> Tensor:
    return _one_pass(x, b)(x, b.residual)


def _one_pass(x: Tensor, b: Branch) -> Callable[[Tensor, Tensor | None], Tensor]:
    op, dtype = torch.ops.pyvit.packed_layers.default, x.dtype
    weight, bias, activation, weight2, bias2, norm, scale, _ = b
    normed, norm = norm is not None, norm or (None, None, 0.0)
    pack, rows = PACKS[id(weight)], weight.shape[0]
    pack2, rows2 = (None, 0) if weight2 is None else (PACKS[id(weight2)], weight2.shape[0])
    shape = (*x.shape[:-1], rows2 or rows)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        out = recycled(shape, dtype)
        words2 = None if pack2 is None or weight2 is None else pack2.form("pyvit", weight2)
        op(
            x,
            normed,
            *norm,
            pack.form("pyvit", weight),
            rows,
            bias,
            activation or "",
            words2,
            rows2,
            bias2,
            scale,
            residual,
            out,
        )
        return out

    return run


def _layer_by_layer(x: Tensor, b: Branch) -> Tensor:
    return around(x, functools.partial(layers, b=b), b)


def layers(x: Tensor, b: Branch) -> Tensor:
    """The linear layers of a branch, one by one."""
    y = layer(x, b.weight, b.bias, b.activation)
    return y if b.weight2 is None else layer(y, b.weight2, b.bias2, None)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x weight^T + bias), with ``weight`` as it is kept."""
    out = run(x, Branch(weight, bias, activation)) if PACKS else None
    return products.forward(x, weight, bias, activation) if out is None else out


def _torch(x: Tensor, b: Branch) -> Tensor:
    def product(y: Tensor) -> Tensor:
        y = products.by_torch(y, b.weight, b.bias, b.activation)
        return y if b.weight2 is None else products.by_torch(y, b.weight2, b.bias2, None)

    return around(x, product, b)


#: The forms a way multiplies itself.
_USES = {_onednn: {"onednn"}, _in_one_pass: {"pyvit"}}


def around(x: Tensor, layers: Callable[[Tensor], Tensor], branch: Branch, backend: str | None = None) -> Tensor:
    """residual + scale * layers(norm(x)), a step at a time; of autocast's dtype between norm and layers."""
    if branch.norm is not None:
        kind = x.device.type
        cast = x.dtype == torch.float32 and kind == "cpu" and torch.is_autocast_enabled(kind)
        x = layer_norm(x, *branch.norm, dtype=torch.get_autocast_dtype(kind) if cast else None, backend=backend)
    y = layers(x)
    if branch.scale is not None:
        y = y * branch.scale
    return y if branch.residual is None else branch.residual + y


def explain(x: Tensor, branch: Branch) -> list[str]:
    """The way of a call whose weights are packed, for :func:`pyvit.explain`; nothing is computed."""
    weights = [w for w in (branch.weight, branch.weight2) if w is not None]
    if any(pack_of(w) is None or w.dtype != x.dtype for w in weights):
        return []
    rows = x.numel() // max(x.shape[-1], 1)
    known = products.known(_key(rows, x, branch))
    return [
        (
            "weights kept packed: "
            f"{known or products.expected(_kind(branch), _ways(x, branch), rows, branch.weight.shape, x.dtype)}"
        )
    ]


library.FRAGMENT.define(
    "branch(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? weight2, Tensor? bias2, bool norm, "
    "Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor? scale, Tensor? residual) -> Tensor"
)


def _branch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    norm: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    b = Branch(
        weight, bias, activation, weight2, bias2, (norm_weight, norm_bias, eps) if norm else None, scale, residual
    )
    out = again(x, b)
    out = run(x, b) if out is None else out
    return _layer_by_layer(x, b) if out is None else out


library.FRAGMENT.impl("branch", _branch, "CPU")


@torch.library.register_fake("pyvit::branch")
def _fake_branch(x: Tensor, weight: Tensor, _bias: Any, _activation: Any, weight2: Tensor | None, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], (weight if weight2 is None else weight2).shape[0])


def in_graph(x: Tensor, b: Branch) -> Tensor:
    """The branch as one operator, for graphs that ``torch.compile`` makes without gradients."""
    norm = b.norm or (None, None, 0.0)
    weights = (b.weight, b.bias, b.activation, b.weight2, b.bias2)
    return torch.ops.pyvit.branch(x, *weights, b.norm is not None, *norm, b.scale, b.residual)
