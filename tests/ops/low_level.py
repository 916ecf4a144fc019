"""Calls of ``torch.ops.pyvit`` operators with one argument changed. test_low_level.py runs this in a separate process.

``python low_level.py OPERATOR...`` prints every call before making it, so that the last line shows which one ended the
process. Then it prints, after ``wrong:``, the calls that neither raised an error that names the operator nor computed
the same as the reference.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit import library
from pyvit.dispatch import Operator
from pyvit.ops.reference import ACTIVATIONS
from pyvit.testing import Served, layout
from tests.ops.conftest import EXAMPLES

OPERATORS = {
    value.name: value
    for name, module in list(sys.modules.items())
    if name.startswith("pyvit.ops.")
    for _, value in inspect.getmembers(module, lambda value: isinstance(value, Operator))
}
OPERATORS |= {o.gradient.name: o.gradient for o in [*OPERATORS.values()] if getattr(o, "gradient", None) is not None}
BACKEND = "cpu" if library.problem() is None else "reference"
ON = Served(BACKEND, "cpu", torch.float32)


class Base(NamedTuple):
    """A valid call, and a function that computes the same: its results, and what it writes to its arguments, as one
    list."""

    args: list[Any]
    naive: Callable[..., list[Tensor]] | None
    written: tuple[int, ...] = ()


def _listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [] if found is None else list(found)


def _operator(name: str, args: Any, backend: str = BACKEND) -> Base:
    return Base([*args, backend], lambda *args: _listed(OPERATORS[name].kernel("reference")(*args)))


def _example(example: str) -> Base:
    return _operator(example.partition("-")[0], EXAMPLES[example](ON).low[:-1])


def _backward(example: str) -> Base:
    """The backward of an example, for random gradients."""
    low = EXAMPLES[example](ON).low
    name = example.partition("-")[0]
    outputs = _listed(OPERATORS[name].kernel("reference")(*low))
    grads = [torch.randn_like(o) for o in outputs]
    if name == "patch_embed":
        own: list[Any] = [*grads, low[0].is_floating_point(), True]
    elif name == "window_attention":
        own = [grads[0], *outputs]
    elif name == "decomposed_attention":
        own = [*grads, *outputs]
    else:
        own = [*grads, *outputs, True]
        if name == "rope_attention":
            own += [low[10] is not None]
    return _operator(f"{name}_backward", [*own, *low[:-1]])


def _packed_backward() -> Base:
    qkv, bias = torch.randn(2, 9, 3, 2, 16), torch.randn(1, 2, 9, 9)
    out, lse = OPERATORS["flash_attention"].kernel("reference")(
        *qkv.transpose(1, 3).unbind(2), bias, False, 0.3, 0.0, None, BACKEND
    )

    def naive(
        grad: Tensor, grad_lse: Any, out: Tensor, lse: Tensor, bias_grad: bool, qkv: Tensor, *rest: Any
    ) -> list[Tensor]:
        parts = qkv.transpose(1, 3).unbind(2)
        backward = OPERATORS["flash_attention_backward"].kernel("reference")
        *grads, grad_bias = backward(grad, grad_lse, out, lse, bias_grad, *parts, *rest, 0.0, None, BACKEND)
        return [torch.stack(grads, 2).transpose(1, 3), grad_bias]

    return Base([torch.randn_like(out), torch.randn_like(lse), out, lse, True, qkv, bias, False, 0.3], naive)


def _losses() -> dict[str, Callable[[], Base]]:
    a, b, one = torch.randn(5, 8), torch.randn(5, 8), torch.tensor(1.5)
    s, t, w = torch.randn(2, 5, 8), torch.randn(3, 5, 6), torch.rand(2, 3, 5)
    distill = [s, t, torch.randn(7, 8), torch.randn(7, 6), torch.randn(7), w, 0.5, 0.7]
    calls = {
        "info_nce": [a, b, one],
        "nt_xent": [a, b, one],
        "sigmoid_contrastive": [a, b, one, -one],
        "distillation_cross_entropy": distill,
        "nearest_neighbor": [a],
        "linear": [s, torch.randn(7, 8), torch.randn(7), "gelu"],
        "mlp": [s, torch.randn(7, 8), torch.randn(7), torch.randn(6, 7), None, "silu"],
        "gated_mlp": [
            *[s, torch.randn(14, 8), torch.randn(14), None, None, torch.randn(6, 7), None],
            *[2, torch.randn(7), None, 1e-5, True, "silu"],
        ],
    }
    found = {name: lambda name=name: _operator(name, calls[name], "cpu") for name in calls}

    def backward(name: str) -> Base:
        loss, *saved = _listed(OPERATORS[name].kernel("reference")(*calls[name], "cpu"))
        return _operator(f"{name}_backward", [torch.randn_like(loss), *saved, *calls[name]], "cpu")

    return found | {f"{name}_backward": lambda name=name: backward(name) for name in list(calls)[:4]}


def _norms() -> dict[str, Callable[[], Base]]:
    x, w, b = torch.randn(6, 16), torch.randn(16), torch.randn(16)
    calls = {"layer_norm": [x, w, b, 1e-5, torch.float32], "rms_norm": [x, w, 1e-5, torch.float32]}

    def backward(name: str) -> Base:
        out, statistics = OPERATORS[name].kernel("reference")(*calls[name], BACKEND)
        wanted = [True] * (len(calls[name]) - 3)
        return _operator(f"{name}_backward", [torch.randn_like(out), statistics, *wanted, *calls[name]])

    return {name: lambda name=name: _operator(name, calls[name]) for name in calls} | {
        f"{name}_backward": lambda name=name: backward(name) for name in calls
    }


def _passes() -> dict[str, Callable[[], Base]]:
    """Internal operators of the library; they write results to their arguments."""
    x, w, b = torch.randn(6, 16), torch.randn(16), torch.randn(16)
    statistics = torch.stack([x.mean(1), (x.var(1, correction=0) + 1e-5).rsqrt()])

    def norm(x: Any, w: Any, b: Any, eps: float, centered: bool, out: Any, statistics: Any) -> list[Tensor]:
        if centered:
            y = F.layer_norm(x.float(), x.shape[-1:], w, b, eps)
            found = torch.stack([x.mean(-1), (x.var(-1, correction=0) + eps).rsqrt()])
        else:
            y = F.rms_norm(x.float(), x.shape[-1:], w, eps)
            found = (x.square().mean(-1) + eps).rsqrt()
        return [y.to(out.dtype), *([] if statistics is None else [found])]

    def norm_backward(grad: Any, x: Any, w: Any, statistics: Any, centered: bool, out: Any, sums: Any) -> list[Tensor]:
        mean, rstd = statistics[..., None] if centered else (0, statistics[:, None])
        y = (x - mean) * rstd
        g = grad if w is None else grad * w
        grad_x = rstd * (g - centered * g.mean(1, keepdim=True) - y * (g * y).mean(1, keepdim=True))
        of_weight = (grad * y).sum(0)
        found = torch.stack([of_weight, grad.sum(0)]) if centered else of_weight
        return [grad_x, *([] if sums is None else [found])]

    def act(x: Any, name: str, _out: Any) -> list[Tensor]:
        return [ACTIVATIONS[name](x)]

    def act_backward(grad: Any, x: Any, name: str, _grad_x: Any, out: Any) -> list[Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = ACTIVATIONS[name](leaf)
            (found,) = torch.autograd.grad(y, leaf, grad)
        return [found.sum(tuple(range(found.dim() - 1))), found, *([] if out is None else [y.detach()])]

    def product(a: Any, b: Any, bias: Any, out: Any, add: bool) -> list[Tensor]:
        y = a.float() @ b.float() + (0 if bias is None else bias.float())
        return [(out + y if add else y).to(out.dtype)]

    def lse(scores: Any, dim: int, top: Any, total: Any) -> list[Tensor]:
        new = torch.maximum(top, scores.amax(dim))
        return [new, total * (top - new).exp() + (scores - new.unsqueeze(dim)).exp().sum(dim)]

    def gate(a: Any, b: Any, name: str, _out: Any) -> list[Tensor]:
        return [ACTIVATIONS[name](a) * b]

    def gate_backward(grad: Any, a: Any, b: Any, name: str, _grad_a: Any, _grad_b: Any) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (a, b)]
            y = ACTIVATIONS[name](leaves[0]) * leaves[1]
            of_a, of_b = torch.autograd.grad(y, leaves, grad)
        return [torch.stack([of_a.sum(0), of_b.sum(0)]), y.detach(), of_a, of_b]

    tile, top, ones = torch.randn(5, 7), torch.full((5,), -3.0), torch.ones(5)
    found = {
        "activation": lambda: Base([x.clone(), "gelu", torch.empty(6, 16)], act, (2,)),
        "activation_backward": lambda: Base(
            [x + 1, x.clone(), "silu", torch.empty(6, 16), torch.empty(6, 16)], act_backward, (3, 4)
        ),
        "gate": lambda: Base([x.clone(), x + 1, "silu", torch.empty(6, 16)], gate, (3,)),
        "gate_backward": lambda: Base(
            [x + 1, x.clone(), x - 1, "gelu", torch.empty(6, 16), torch.empty(6, 16)], gate_backward, (0, 4, 5)
        ),
        "_norm_out": lambda: Base([x.clone(), w, b, 1e-5, True, torch.empty(6, 16), torch.empty(2, 6)], norm, (5, 6)),
        "_norm_out-rms": lambda: Base(
            [x.clone(), w, None, 1e-5, False, torch.empty(6, 16), torch.empty(6)], norm, (5, 6)
        ),
        "_norm_backward_out": lambda: Base(
            [x + 1, x.clone(), w, statistics, True, torch.empty(6, 16), torch.empty(2, 16)], norm_backward, (5, 6)
        ),
        "_norm_backward_out-rms": lambda: Base(
            [x + 1, x.clone(), w, statistics[1], False, torch.empty(6, 16), torch.empty(16)], norm_backward, (5, 6)
        ),
        "product": lambda: Base(
            [x.clone(), torch.randn(16, 9), torch.randn(9), torch.zeros(6, 9), False], product, (3,)
        ),
        "transposed": lambda: Base([x.clone(), torch.empty(16, 6)], lambda x, out: [x.t()], (1,)),
        "log_sum_exp": lambda: Base([tile, 1, top, ones], lse, (2, 3)),
    }
    return found | {name: (lambda name=name: _pairs_or_tiles(name)) for name in _UNCHECKED}


#: Internal operators whose results the tests of the losses check; here a changed argument must be refused or leave the
#: result unchanged.
_UNCHECKED = ("pair_softmax", "pair_softmax_backward", "pair_sigmoid", "pair_sigmoid_backward", "distillation_tile")
_UNCHECKED += ("distillation_tile_backward", "prepack_weight", "prepack_header")
_UNCHECKED += ("prepacked_mlp", "prepacked_gated_mlp", "prepacked_attention", "prepacked_window_attention")
_UNCHECKED += ("int8_pack", "linear_int8", "mlp_int8", "attention_int8", "window_attention_int8")


def _pairs_or_tiles(name: str) -> Base:
    a, b = torch.randn(5, 8), torch.randn(6, 8)
    n, m, wide = torch.zeros(5), torch.zeros(6), [torch.zeros(5, 16), torch.zeros(6, 16)]
    s, t = torch.randn(2, 5, 7), torch.randn(3, 5, 7)
    of_s, of_t, cross = torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2, 3, 5)
    weight = torch.randn(12, 8)
    args: dict[str, list[Any]] = {
        "pair_softmax": [a, b, False, 1.5, n, n.clone(), m, m.clone()],
        "pair_softmax_backward": [a, b, False, 0, 1.5, n + 3, m + 3, *wide],
        "pair_sigmoid": [a, b, 0, 1.5, -1.0, n],
        "pair_sigmoid_backward": [a, b, 0, 1.5, -1.0, n, *wide],
        "distillation_tile": [s, t, torch.randn(7), 0.5, 0.7, of_s, of_s.clone(), of_t, of_t.clone(), cross],
        "distillation_tile_backward": [s, t, torch.randn(7), 0.5, 0.7, of_s, of_t, cross, torch.empty_like(s)],
        "prepack_weight": [weight, 2],
        "prepack_header": [weight],
    }
    norm, pack = [1, torch.ones(8), torch.zeros(8), 1e-5], torch.ops.pyvit.prepack_weight
    if name == "prepacked_mlp":
        second = torch.randn(8, 12)
        args[name] = [a, *norm, weight, pack(weight), torch.randn(12), "gelu", second, pack(second)]
        args[name] += [torch.randn(8), torch.ones(8), a.clone()]
    if name == "prepacked_gated_mlp":
        second, within = torch.randn(8, 6), [2, torch.ones(6), None, 1e-5]
        args[name] = [a, *norm, weight, pack(weight, 2), torch.randn(12), None, None, None, True, "silu"]
        args[name] += [*within, second, pack(second), torch.randn(8), torch.ones(8), a.clone()]
    if name in ("prepacked_attention", "prepacked_window_attention"):
        qkv, proj, x = torch.randn(24, 8), torch.randn(8, 8), torch.randn(1, 2, 3, 8)
        x = x[0] if name == "prepacked_attention" else x
        options = [2, False] if name == "prepacked_attention" else [[2, 2], [1, 1], 2, torch.randn(9, 2), False]
        last = [proj, pack(proj), torch.randn(8), torch.ones(8), x.clone()]
        args[name] = [x, *norm, qkv, pack(qkv), torch.randn(24), *options, *last]
    if "int8" in name:
        args[name] = _int8(name, [True, *norm[1:]])
    return Base(args[name], None)


def _int8(name: str, norm: list[Any]) -> list[Any]:
    def layer(out: int, k: int) -> list[Any]:
        weight = torch.randint(-127, 128, (out, k), dtype=torch.int8)
        return [weight, torch.ops.pyvit.int8_pack(weight), torch.rand(out), torch.randn(out)]

    x = torch.randn(1, 2, 3, 8)
    if name == "int8_pack":
        return layer(12, 8)[:1]
    if name == "linear_int8":
        return [x, *norm, *layer(12, 8), "gelu", torch.ones(12), torch.randn(1, 2, 3, 12)]
    if name == "mlp_int8":
        return [x, *norm, *layer(12, 8), "gelu", *layer(8, 12), torch.ones(8), x.clone()]
    x = x[0] if name == "attention_int8" else x
    options = [2, False] if name == "attention_int8" else [[2, 2], [1, 1], 2, torch.randn(9, 2), False]
    return [x, *norm, *layer(24, 8), *options, *layer(8, 8), torch.ones(8), x.clone()]


CALLS: dict[str, Callable[[], Base]] = {
    **{f"{name}": lambda name=name: _example(name) for name in EXAMPLES},
    **{
        f"{name}~backward": lambda name=name: _backward(name)
        for name in EXAMPLES
        if not name.startswith("attention_map")
    },
    **_losses(),
    **_norms(),
}
if library.problem() is None:
    CALLS |= {"flash_attention_qkvpacked_backward": _packed_backward} | _passes()

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


#: Changes of a tensor that keep its values.
STORED = ("transposed", "permuted", "sliced", "stepped", "shifted")


def _tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    yield "one dimension more", t[None]
    if t.dim():
        yield "its first element", t[0] if len(t) else t.sum(0)
    for d, n in enumerate(t.shape):
        yield f"size {d} + 1", torch.cat([t, t.narrow(d, 0, 1)], d)
        yield f"size {d} - 1", t.narrow(d, 0, n - 1).contiguous()
        yield f"size {d} of 0", t.narrow(d, 0, 0).contiguous()
        yield f"size {d} of 1", t.narrow(d, 0, 1).contiguous()
    for dtype in _DTYPES:
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    for how in STORED:
        yield how, layout(t, how)
    yield "all one number", t.flatten()[:1].expand(t.numel()).view(t.shape) if t.numel() == 1 else t[:1].expand(t.shape)
    yield "sparse", t.to_sparse() if t.dim() else t
    yield "meta", t.to("meta")
    if t.dtype == torch.int64:
        yield from (("-1", t - t - 1), ("2**40", t - t + 2**40), ("turned", t.flip(-1)))


def changes(value: Any) -> Iterator[tuple[str, Any]]:
    """Other values of an argument."""
    if isinstance(value, Tensor):
        yield from _tensors(value)
        yield "None", None
    elif value is None:
        yield from (
            ("a vector", torch.randn(3)),
            ("a matrix", torch.randn(2, 3)),
            ("ints", torch.zeros(2, 3, dtype=torch.int64)),
        )
    elif isinstance(value, bool):
        yield str(not value), not value
    elif isinstance(value, int):
        yield from ((str(n), n) for n in (-1, 0, 1, value + 1, value - 1, 2**31, 2**62, -(2**62)))
    elif isinstance(value, float):
        yield from ((str(x), x) for x in (0.0, -1.0, math.nan, math.inf, 1e300))
    elif isinstance(value, torch.dtype):
        yield from ((str(d), d) for d in (torch.float64, torch.bfloat16, torch.int64))
    elif isinstance(value, str):
        yield from ((repr(s), s) for s in ("", "nonsense", "cuda", "triton"))
    else:
        lists = (
            [],
            value[:1],
            [*value, 1],
            [0, *value[1:]],
            [-1, *value[1:]],
            [2**31, 2**31],
            [2**62, 1],
            [v + 1 for v in value],
        )
        yield from ((str(v), v) for v in lists)


def _same(got: Tensor, want: Tensor, eps: float | None) -> bool:
    """Whether shapes, dtypes and, with ``eps``, values agree."""
    if got.shape != want.shape or got.dtype != want.dtype or got.device != want.device:
        return False
    if got.is_meta:
        return True
    got, want = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (got, want))
    size = float(want.nan_to_num(0, 0, 0).abs().amax()) if want.numel() else 0.0
    return eps is None or torch.allclose(got, want, rtol=eps, atol=eps * max(1.0, size), equal_nan=True)


def _outcome(op: Any, base: Base, args: list[Any], words: tuple[str, ...], values: bool) -> str | None:
    """What was wrong with a call, or None."""
    before = [a.clone() if i in base.written and isinstance(a, Tensor) else a for i, a in enumerate(args)]
    try:
        found = _listed(op(*args))
    except (RuntimeError, ValueError, TypeError) as error:
        return None if any(word in str(error) for word in words) else f"an error that names nothing: {str(error)[:200]}"
    tensors = [a for a in args if isinstance(a, Tensor)]
    if base.naive is None or not all(t.numel() for t in tensors):
        return None  # torch refuses some empty tensors that the operators take
    found += [args[i] for i in base.written if args[i] is not None]
    try:
        want = base.naive(*before)
    except Exception as error:
        return f"accepted, where the reference says {str(error)[:100]}"
    narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    if narrow and not base.written:  # the naive form's rounding errors are not a criterion
        exact = base.naive(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in before))
        want = [e.to(w.dtype) for e, w in zip(exact, want, strict=True)]
    eps = (4e-2 if narrow else 1e-4) if values else None
    if len(found) != len(want) or not all(_same(*pair, eps) for pair in zip(found, want, strict=True)):
        return f"not the reference's: {[tuple(t.shape) for t in found]}, wanted {[tuple(t.shape) for t in want]}"
    return None


def main(names: list[str]) -> None:
    for name in names:
        torch.manual_seed(0)
        base = CALLS[name]()
        key = name.partition("-")[0] + ("_backward" if name.endswith("~backward") else "")
        op = getattr(torch.ops.pyvit, key.replace("~backward_backward", "_backward")).default
        words = ("pyvit", key.partition("~")[0].removesuffix("_backward"), "attention", "backend", "koleo")
        print(f"{name}: as it is", flush=True)
        if problem := _outcome(op, base, list(base.args), words, True):
            print(f"wrong: {name}, as it is: {problem}")
        for i, argument in enumerate(op._schema.arguments):
            for how, value in changes(base.args[i]):
                if base.written and how == "one dimension more":
                    continue  # the passes see rows, however many dimensions those are of
                torch.manual_seed(0)
                args = [*CALLS[name]().args]
                args[i] = value
                # A backward with values other than the forward's has different results in every implementation.
                values = how in STORED or (
                    "backward" not in name and not (isinstance(value, float) and not abs(value) < 1e3)
                )
                values = values and (name, how) != ("nearest_neighbor", "all one number")  # every row is as near
                print(f"{name}: {argument.name} {how}", flush=True)
                if problem := _outcome(op, base, args, words, values):
                    print(f"wrong: {name}, {argument.name} {how}: {problem}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or list(CALLS))
