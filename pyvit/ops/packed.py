"""Inference with weights kept packed on a CPU: linear layers, and a block's branch in one pass.

A weight is packed as oneDNN multiplies it, as ``csrc/cpu/linear.cpp`` does, or both; which way a call goes is decided as any product's
(:mod:`pyvit.ops.products`). Nothing here is recorded by autograd.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvit import dispatch, library
from pyvit.memory import recycled
from pyvit.ops import products
from pyvit.ops.layer_norm import layer_norm
from pyvit.ops.tracing import traced

#: weight (C,), bias (C,), eps
Norm = tuple[Tensor | None, Tensor | None, float]


class Branch(NamedTuple):
    """residual + scale * layers(norm(x)): one linear layer with its activation after it, or two with the activation between them."""

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


class Pack:
    """The packed forms of a layer's weight, and the ways that calls with it went."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        # Of the layer, not of the weight: torch swaps no tensor that a weak reference points to.
        self.layer = weakref.ref(layer, functools.partial(_forget, PACKS, id(weight)))
        self.of: tuple[Any, ...] = ()
        self.print: Tensor | None = None  # of the weight that the forms were made of
        self.turn = 0
        self.forms: dict[str, Tensor] = {}
        self.ways: dict[tuple[Any, ...], Way] = {}
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
    return -1 if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


@functools.cache
def _changed() -> Callable[[int, int, int], int]:
    """``pyvit_weights_changed`` of csrc/torch/watch.cpp."""
    function = ctypes.PyDLL(str(library.PATH)).pyvit_weights_changed
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), ctypes.c_int
    return function  # type: ignore[no-any-return]


def unchanged(packs: Sequence[Pack], prints: Tensor, turn: int) -> bool:
    """Whether the weights of ``packs``, whose :func:`state` is as it was, hold what their prints (packs, words) tell: some words of each,
    and of 128 stripes the one whose turn it is. Packs whose weights do not are forgotten."""
    found = _changed()(prints.data_ptr(), len(packs), turn)
    if found:
        for pack in packs:
            pack.forget()
    if found == 2:
        warnings.warn(
            "pyvit: a packed weight was written to past PyTorch's count of changes (through .data, NumPy or DLPack), so little of it that "
            "only now it was seen: earlier results may be of the old weight. Call pyvit.pack_weights(model) after such a change.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not found


def pack_of(weight: Tensor | None) -> Pack | None:
    pack = PACKS.get(id(weight))
    return pack if pack is not None and pack.is_of(weight) else None


@functools.cache
def _forms(dtype: torch.dtype) -> tuple[str, ...]:
    """The forms that weights of ``dtype`` can be packed in on this processor: oneDNN refuses bfloat16 without AVX-512."""
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
    """Keep the weight of ``layer`` packed from the next product without a gradient on; False where no library here can."""
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
    return library.problem() is None and weight.numel() * weight.element_size() >= 8 and bool(_forms(weight.dtype))


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


def again(x: Tensor, branch: Branch) -> Tensor | None:
    """The short way for a call like an earlier one: every check was made then. None where there was none, or where a gradient is wanted."""
    if id(branch.weight) not in PACKS or not direct(x):
        return None
    way = _known_way(x, branch)
    return None if way is None else way(x, branch)


def direct(x: Tensor) -> bool:
    """Whether a call with x is inference that nothing changes or watches, so that it may go where an earlier one went."""
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
    """The branch by its fastest way, or None where its weights are not packed. Its tensors fit each other and have one dtype."""
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
    able = _forms(x.dtype)
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
        op(x, normed, *norm, pack.form("pyvit", weight), rows, bias, activation or "", words2, rows2, bias2, scale, residual, out)
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
    return [f"weights kept packed: {known or products.expected(_kind(branch), _ways(x, branch), rows, branch.weight.shape, x.dtype)}"]


library.FRAGMENT.define(
    "branch(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? weight2, Tensor? bias2, bool norm, Tensor? norm_weight, "
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
    b = Branch(weight, bias, activation, weight2, bias2, (norm_weight, norm_bias, eps) if norm else None, scale, residual)
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
