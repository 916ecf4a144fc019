"""Modules whose forward writes attention out, as ``softmax(q @ k.mT * scale + bias, -1) @ v``: their own code runs, and
these operations are computed as one.

While it runs, a product of two matrices is not computed but recorded, and so are a scale, biases, the softmax and the
dropout that follow. The product of the result with values is then one call of ``flash_attention``. Whatever else is
asked of a recorded tensor, its values are computed first, by the operations as they were written: code that computes
something else gives what it always gave.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function

from pyvit.integrations import originals
from pyvit.integrations.common import usable
from pyvit.integrations.forwards import Replacement, servable
from pyvit.integrations.unknown import computes_attention
from pyvit.nn.linear import hooked
from pyvit.ops import flash_attention

_WIDEST = 256  # largest head dimension of the kernels
#: Smallest head dimension that is recorded: models with smaller ones (LeViT, SHViT, TNT) were slower in coarse
#: measurements than with torch's products.
_NARROWEST = 32
NOTE = f"flash_attention for the products that its own code writes out, heads of {_NARROWEST} channels and more"


def writes_out(module: nn.Module) -> bool:
    """Whether a class's own code applies a softmax between matrix products, and keeps none of them."""
    kind = type(module)
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__") or not computes_attention(module):
        return False
    code = originals.record(kind)
    whole = "scaled_dot_product_attention" in code.reads or "multi_head_attention_forward" in code.reads
    asks = {"isinstance", "type", "is_tensor"} & code.reads  # a recorded tensor is none
    return code.foreign is None and not whole and not asks and not _stores(kind)


@functools.lru_cache(maxsize=256)
def _stores(kind: type) -> bool:
    """Whether the class's forward, or a method it calls, sets attributes, which would keep recorded tensors."""
    functions = (getattr(kind, name, None) for name in {"forward", *originals.record(kind).methods} - {"__call__"})
    codes = [f.__code__ for f in functions if isinstance(f, types.FunctionType)]
    return any(step.opname in ("STORE_ATTR", "STORE_GLOBAL") for code in codes for step in dis.get_instructions(code))


def rule(module: nn.Module) -> Iterator[Replacement]:
    yield Replacement(module, _forward, NOTE)


#: Modules in which nothing could be computed as one, or that return their attention weights.
_without: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    if torch.compiler.is_compiling() or module in _without or any(map(hooked, module.modules())):
        return forward(module, *args, **kwargs)
    with _Recording() as recording:
        out = forward(module, *args, **kwargs)
    found, returned = _values(out)
    if not recording.fused or returned:
        _without.add(module)
    return found


def _values(out: Any) -> tuple[Any, bool]:
    """An output with its recorded tensors computed, and whether there were any."""
    if isinstance(out, Recorded):
        return out.value(), True
    if isinstance(out, tuple | list):
        items = [_values(item) for item in out]
        if any(was for _, was in items):
            return type(out)(item for item, _ in items), True
    if isinstance(out, dict):
        items = [_values(item) for item in out.values()]
        if any(was for _, was in items):
            return type(out)(zip(out, (item for item, _ in items), strict=True)), True
    return out, False


_PRODUCTS = {"matmul", "__matmul__", "bmm"}
_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor", "mod")}
_IN_PLACE |= {"__setitem__"}


class _Recording(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.fused, self.open, self.paused = 0, False, False
        self.pending: list[weakref.ref[Recorded]] = []

    def __enter__(self) -> _Recording:
        self.open = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.open = False
        super().__exit__(*error)

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:  # the values of a recorded tensor are computed
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _PRODUCTS and len(args) == 2 and not kwargs:
            if (out := self._product(function, *args)) is not None:
                return out
        elif any(isinstance(a, Recorded) for a in args) and (out := _step(function, name, args, kwargs)) is not None:
            return self._remember(out)
        if self.pending and _writes(name, args, kwargs):
            self.settle()
        return function(*map(_value, args), **{key: _value(value) for key, value in kwargs.items()})

    def _product(self, function: Any, a: Any, b: Any) -> Any:
        if isinstance(a, Recorded) or isinstance(b, Recorded):
            out = None
            if isinstance(a, Recorded) and a.weights and not a.transposed and isinstance(b, Tensor):
                out = a.attend(b)
            elif isinstance(b, Recorded) and b.weights and b.transposed and isinstance(a, Tensor):
                out = b.attend(a.mT)
                out = None if out is None else out.mT
            self.fused += out is not None
            return out
        if servable(a) and servable(b) and 3 <= a.dim() == b.dim() <= 5 and _suits(a.shape[-1]):
            same = a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2] and a.dtype == b.dtype
            if same and a.device == b.device and a.shape[-2] and b.shape[-1]:
                return self._remember(Recorded(self, (function, (a, b), {}), a, b))
        return None

    def _remember(self, out: Any) -> Any:
        if isinstance(out, Recorded):
            self.pending.append(weakref.ref(out))
        return out

    def settle(self) -> None:
        """Compute what is recorded: one of the tensors that it was made of may be written to."""
        for reference in self.pending:
            if (recorded := reference()) is not None:
                recorded.value()
        self.pending.clear()


def _suits(width: int) -> bool:
    return _NARROWEST <= width <= _WIDEST


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function may write to one of its arguments."""
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
        return True
    return bool(kwargs.get("inplace")) or any(a is True for a in args[1:])


def _value(x: Any) -> Any:
    if isinstance(x, Recorded):
        return x.value()
    if isinstance(x, tuple | list) and any(isinstance(item, Recorded) for item in x):
        return type(x)(map(_value, x))
    return x


class Recorded:
    """scale a @ b + biases, a (..., Nq, d) and b (..., d, Nk), or with ``weights`` its softmax over the keys and its
    dropout, (..., Nq, Nk), or with ``transposed`` (..., Nk, Nq).

    ``origin``: the function and the arguments that compute it as it was written.
    """

    def __init__(
        self,
        recording: _Recording,
        origin: tuple[Any, tuple[Any, ...], dict[str, Any]],
        a: Tensor,
        b: Tensor,
        scale: float = 1.0,
        biases: tuple[Tensor, ...] = (),
        weights: bool = False,
        dropout: float = 0.0,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.recording = recording
        self.origin, self.a, self.b, self.scale, self.biases = origin, a, b, scale, biases
        self.weights, self.dropout, self.transposed = weights, dropout, transposed
        self.dtype = dtype or (torch.get_autocast_dtype(a.device.type) if _autocast(a) else a.dtype)
        self._computed: Tensor | None = None

    def but(self, origin: Any, **changes: Any) -> Recorded:
        names = ("a", "b", "scale", "biases", "weights", "dropout", "transposed", "dtype")
        return Recorded(self.recording, origin, **{name: changes.get(name, getattr(self, name)) for name in names})

    @property
    def shape(self) -> torch.Size:
        n, m = self.a.shape[-2], self.b.shape[-1]
        return torch.Size((*self.a.shape[:-2], *((m, n) if self.transposed else (n, m))))

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def ndim(self) -> int:
        return self.a.dim()

    def dim(self) -> int:
        return self.a.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def value(self) -> Tensor:
        """The values, computed as they were written."""
        if self._computed is None:
            function, args, kwargs = self.origin
            args, paused = tuple(map(_value, args)), self.recording.paused
            self.recording.paused = True
            try:
                # Within another module's recording, the result is recorded by that one.
                self._computed = _value(function(*args, **kwargs))
            finally:
                self.recording.paused = paused
        return self._computed

    def attend(self, v: Tensor) -> Tensor | None:
        """The product of the attention weights with values (..., Nk, dv), or None where pyvit does not compute it."""
        a, k = self.a, self.b.mT
        if self._computed is not None or not servable(v) or not _suits(v.shape[-1]):
            return None
        if v.dim() != a.dim() or v.shape[:-1] != k.shape[:-1] or a.dtype != v.dtype:
            return None
        if self.dtype != v.dtype and not _autocast(a):
            return None
        lead = a.shape[:-2]
        bias = functools.reduce(torch.add, self.biases) if self.biases else None
        if len(lead) == 1:
            a, k, v = (t.unsqueeze(1) for t in (a, k, v))
            bias = bias.unsqueeze(1) if bias is not None and bias.dim() == 3 else bias
        elif len(lead) == 3:
            a, k, v = (t.flatten(0, 1) for t in (a, k, v))
            bias = bias if bias is None or bias.dim() < 4 else _collapsed(bias, lead)
        out: Any = flash_attention(a, k, v, bias=bias, scale=self.scale, dropout_p=self.dropout)
        return out.reshape(*lead, *out.shape[-2:]) if len(lead) != 2 else out

    # Methods and operators of the code that has it in place of a tensor.

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(_value, args), **{key: _value(value) for key, value in (kwargs or {}).items()})

    __hash__ = object.__hash__

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if self.recording.open:
            return handle_torch_function(function, (self,), self, *args, **kwargs)
        return function(self.value(), *map(_value, args), **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(Tensor, name, None)
        return functools.partial(self._call, function) if callable(function) else getattr(self.value(), name)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)
    return lambda self, *args: self._call(function, *args)


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg", "abs"),
    *("iadd", "isub", "imul", "itruediv", "getitem", "setitem", "len", "iter", "contains", "bool", "float", "int"),
    *("eq", "ne", "lt", "gt", "le", "ge", "and", "or", "xor", "invert", "floordiv", "mod", "rpow"),
):
    setattr(Recorded, f"__{_name}__", _operator(f"__{_name}__"))


def _autocast(t: Tensor) -> bool:
    return torch.is_autocast_enabled(t.device.type)


def _step(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What follows a recorded tensor, recorded; None where it is to be computed."""
    origin, first = (function, args, kwargs), args[0]
    if name in ("add", "__add__", "__radd__", "mul", "__mul__", "__rmul__") and len(args) == 2 and not kwargs:
        here, other = (first, args[1]) if isinstance(first, Recorded) else (args[1], first)
        if here.weights or isinstance(other, Recorded):
            return None
        return _biased(here, other, origin) if "add" in name else _scaled(here, other, origin)
    if not isinstance(first, Recorded):
        return None
    if name in ("div", "__truediv__", "true_divide") and len(args) == 2 and not kwargs:
        number = isinstance(args[1], float | int) and args[1] != 0
        return _scaled(first, 1.0 / args[1], origin) if number and not first.weights else None
    if name in ("softmax", "_softmax"):
        return _softmax(first, origin)
    if name == "dropout":
        return _dropped(first, origin)
    if name in ("transpose", "swapaxes") and len(args) == 3 and first.weights:
        axes = {axis % first.dim() for axis in args[1:]}
        return (
            first.but(origin, transposed=not first.transposed) if axes == {first.dim() - 2, first.dim() - 1} else None
        )
    if name in ("to", "type", "type_as") and len(args) == 2 and not kwargs and first.weights:
        dtype = args[1].dtype if name == "type_as" else args[1]
        return first.but(origin, dtype=dtype) if dtype in (torch.float32, first.a.dtype) else None
    if name == "contiguous":
        return first
    if name in ("view", "reshape") and not first.weights and not kwargs:
        return _reshaped(first, origin)
    return None


def _scaled(scores: Recorded, factor: Any, origin: Any) -> Recorded | None:
    if scores.biases:
        return None
    if isinstance(factor, float | int) and not isinstance(factor, bool):
        return scores.but(origin, scale=scores.scale * factor)
    rows = servable(factor) and factor.dtype == scores.a.dtype and factor.dim() <= scores.dim()
    if not rows or (factor.dim() and factor.shape[-1] != 1) or not _broadcasts(factor, scores.shape):
        return None
    return scores.but(origin, a=scores.a * factor)


def _biased(scores: Recorded, bias: Any, origin: Any) -> Recorded | None:
    known = servable(bias) and usable(bias) and bias.dtype in (scores.dtype, scores.a.dtype) and bias.dim() >= 2
    if not known or not _broadcasts(bias, scores.shape):
        return None
    return scores.but(origin, biases=(*scores.biases, bias))


def _broadcasts(t: Tensor, shape: torch.Size) -> bool:
    """Whether ``t`` broadcasts to exactly this shape."""
    return t.dim() <= len(shape) and all(n in (1, m) for n, m in zip(t.shape[::-1], shape[::-1], strict=False))


def _softmax(scores: Recorded, origin: Any) -> Recorded | None:
    _, args, kwargs = origin
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    dtypes = [x for x in (*args[2:], kwargs.get("dtype")) if isinstance(x, torch.dtype)]
    if scores.weights or dim not in (-1, scores.dim() - 1) or dtypes not in ([], [torch.float32], [scores.a.dtype]):
        return None
    return scores.but(origin, weights=True, dtype=dtypes[0] if dtypes else scores.dtype)


def _dropped(weights: Recorded, origin: Any) -> Recorded | None:
    _, args, kwargs = origin
    given = dict(zip(("p", "training", "inplace"), args[1:], strict=False), **kwargs)
    p, training = given.get("p", 0.5), given.get("training", True)
    if not training or p == 0.0:
        return weights
    if not weights.weights or weights.dropout or given.get("inplace") or not 0.0 < p < 1.0:
        return None
    return weights.but(origin, dropout=p)


def _reshaped(scores: Recorded, origin: Any) -> Recorded | None:
    """Windows (B n, H, N, N) taken apart to (B, n, H, N, N), and back."""
    shape = origin[1][1:]
    shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else list(shape)
    lead, n, m = scores.shape[:-2], *scores.shape[-2:]
    if not all(isinstance(s, int) for s in shape) or shape[-2:] != [n, m] or {len(lead), len(shape) - 2} != {2, 3}:
        return None
    total = lead.numel()
    others = torch.Size(s for s in shape[:-2] if s != -1).numel()
    new = [total // max(others, 1) if s == -1 else s for s in shape[:-2]]
    if torch.Size(new).numel() != total or new[-1] != lead[-1]:
        return None
    a, b = (t.reshape(*new, *t.shape[-2:]) for t in (scores.a, scores.b))
    biases = []
    for bias in scores.biases:
        if bias.dim() < 4 or (len(lead) == 2 and bias.shape[0] == 1):
            biases.append(bias)
        elif len(lead) == 2:
            biases.append(bias.reshape(*new[:2], *bias.shape[1:]))
        else:
            biases.append(_collapsed(bias, lead))
    return scores.but(origin, a=a, b=b, biases=tuple(biases))


def _collapsed(bias: Tensor, lead: torch.Size) -> Tensor:
    """A bias that broadcasts to (B, n, H, Nq, Nk) as one of (B n, H or 1, Nq, Nk)."""
    bias = bias if bias.dim() == 5 else bias.unsqueeze(0)
    return bias.expand(*lead[:2], *bias.shape[2:]).flatten(0, 1)
