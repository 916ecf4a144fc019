"""Random calls of every operator: its arguments, drawn from all that it takes."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvit import ops
from pyvit.testing import LAYOUTS, Served, check_op

#: A function of tensors, the tensors (which get gradients where they are floating), and options of check_op. "summed"
#: is the largest of what is added up for the results, where that is more than 1 and the results; "summed_grads" the
#: same for gradients, of all tensors or by their names.
Drawn = tuple[Any, dict[str, Tensor], dict[str, Any]]


def _of_attention(width: int) -> dict[str, Any]:
    """The backward pass subtracts sum(out * gradient of out), of an out that was rounded."""
    return {"summed_grads": 4 * width**0.5}


def _length(r: random.Random) -> int:
    return r.choice([1, 2, 3, 15, 16, 17, 31, 33, 48, 49, 64, 65, r.randint(1, 140), r.randint(1, 140)])


def _head_dim(r: random.Random) -> int:
    return r.choice([8, 16, 24, 32, 40, 64, 72, 80, 96, 128, r.randint(1, 130)])


def _bias(r: random.Random, full: tuple[int, ...], on: Served) -> Tensor:
    shape = [n if r.random() < 0.6 else 1 for n in full]
    bias = torch.randn(shape, device=on.device) * r.choice([0.1, 1.0, 5.0])
    kind = r.choice(["float", "low", "bool", "-inf"])
    if kind == "bool":
        return bias > r.choice([-1.0, 0.0, 1.0])
    if kind == "-inf":
        return bias.masked_fill(torch.rand(shape, device=on.device) < 0.3, -math.inf)
    return bias.to(on.dtype) if kind == "low" else bias


def attention(r: random.Random, on: Served) -> Drawn:
    b, hkv, groups, nq, nk, d = (
        r.randint(1, 2),
        r.randint(1, 3),
        r.choice([1, 1, 2, 3]),
        _length(r),
        _length(r),
        _head_dim(r),
    )
    dv = d if r.random() < 0.6 else _head_dim(r)
    t = {"q": on.randn(b, hkv * groups, nq, d), "k": on.randn(b, hkv, nk, d), "v": on.randn(b, hkv, nk, dv)}
    options: dict[str, Any] = {"is_causal": r.random() < 0.3, "enable_gqa": groups > 1, "return_lse": r.random() < 0.5}
    options |= _of_attention(dv)
    if r.random() < 0.3:
        options["scale"] = r.uniform(0.0, 0.5)
    if r.random() < 0.6:
        full = (b, hkv * groups, nq, nk)
        t["bias"] = _bias(r, full, on)
        options["broadcast"] = {"bias": full}
    return ops.flash_attention, t, options


def varlen(r: random.Random, on: Served) -> Drawn:
    lengths = [[r.choice([0, 1, _length(r)]) for _ in range(r.randint(1, 5))]]
    lengths.append([n if r.random() < 0.5 else _length(r) for n in lengths[0]])
    hkv, groups, d = r.randint(1, 3), r.choice([1, 2]), _head_dim(r)
    totals = [sum(n) for n in lengths]
    t = {"q": on.randn(totals[0], hkv * groups, d), "k": on.randn(totals[1], hkv, d), "v": on.randn(totals[1], hkv, d)}
    cu = [torch.tensor([0, *n], device=on.device).cumsum(0).to(r.choice([torch.int32, torch.int64])) for n in lengths]
    longest = [max(n) + r.randint(0, 3) for n in lengths]
    options: dict[str, Any] = {"is_causal": r.random() < 0.3, "return_lse": r.random() < 0.5} | _of_attention(d)
    if r.random() < 0.5:
        full = (len(lengths[0]), hkv * groups, *longest)
        t["bias"] = _bias(r, full, on)
        options["broadcast"] = {"bias": full}
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return functools.partial(ops.flash_attention_varlen, **dict(zip(names, (*cu, *longest), strict=True))), t, options


def attention_map(r: random.Random, on: Served) -> Drawn:
    b, h, nq, nk, d = r.randint(1, 3), r.randint(1, 3), _length(r), _length(r), _head_dim(r)
    t = {"q": on.randn(b, h, nq, d), "k": on.randn(b, h, nk, d)}
    options = {}
    if r.random() < 0.5:
        t["bias"] = _bias(r, (b, h, nq, nk), on)
        options["broadcast"] = {"bias": (b, h, nq, nk)}
    rows = torch.randint(nq, (b, r.randint(1, 4)), device=on.device)
    return functools.partial(ops.attention_map, rows=rows), t, options


def window(r: random.Random, on: Served) -> Drawn:
    size, window = (r.randint(1, 20), r.randint(1, 20)), (r.randint(1, 9), r.randint(1, 9))
    shift = tuple(r.randint(0, n - 1) for n in window)
    b, heads, d = r.randint(1, 2), r.randint(1, 3), r.choice([8, 16, 32, 40, 64, r.randint(1, 100)])
    t = {"qkv": on.randn(b, *size, 3 * heads * d)}
    if r.random() < 0.7:
        t["bias_table"] = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads, device=on.device)
    if r.random() < 0.3:
        t["logit_scale"] = torch.rand(heads, device=on.device) * 4
    if r.random() < 0.5:
        t["pad_qkv"] = on.randn(3 * heads * d)
    fixed = {"window_size": window, "shift_size": shift, "num_heads": heads}
    options: dict[str, Any] = _of_attention(d)
    if "logit_scale" in t:  # its gradient is a sum over all tokens, of what cancels
        each = options["summed_grads"]
        options["summed_grads"] = dict.fromkeys(t, each) | {"logit_scale": each * math.prod(size) ** 0.5}
    return functools.partial(ops.window_attention, **fixed), t, options


def patch(r: random.Random, on: Served) -> Drawn:
    b, c, d, (ph, pw) = (
        r.randint(1, 3),
        r.randint(1, 4),
        r.choice([1, 16, 40, 64, r.randint(1, 100)]),
        (r.randint(1, 9), r.randint(1, 9)),
    )
    stride = (ph, pw) if r.random() < 0.5 else (r.randint(1, ph), r.randint(1, pw))
    rows, columns = r.randint(1, 5), r.randint(1, 5)
    size = (
        (rows - 1) * stride[0] + ph + (r.randint(0, stride[0] - 1) if stride[0] < ph else 0),
        (columns - 1) * stride[1] + pw,
    )
    images = (
        torch.randint(256, (b, c, *size), dtype=torch.uint8, device=on.device)
        if r.random() < 0.3
        else on.randn(b, c, *size)
    )
    t = {"images": images, "weight": on.randn(d, c, ph, pw, scale=(c * ph * pw) ** -0.5)}
    shapes = {"bias": (d,), "pos_embed": (rows * columns, d), "prefix": (r.randint(1, 4), d)}
    t |= {name: on.randn(*shape) for name, shape in shapes.items() if r.random() < 0.5}
    fixed: dict[str, Any] = {"stride": stride}
    if r.random() < 0.4:
        fixed["keep"] = torch.randint(rows * columns, (b, r.randint(1, rows * columns)), device=on.device)
    if r.random() < 0.4:
        fixed |= {"mean": torch.rand(c, device=on.device), "std": torch.rand(c, device=on.device) + 0.5}
    return functools.partial(ops.patch_embed, **fixed), t, {}


def qkvpacked(r: random.Random, on: Served) -> Drawn:
    b, n, h, d = r.randint(1, 2), _length(r), r.randint(1, 3), _head_dim(r)
    options: dict[str, Any] = {"is_causal": r.random() < 0.3, "return_lse": r.random() < 0.5} | _of_attention(d)
    t = {"qkv": on.randn(b, n, 3, h, d)}
    if r.random() < 0.3:
        t["bias"] = _bias(r, (b, h, n, n), on)
        options["broadcast"] = {"bias": (b, h, n, n)}
    return ops.flash_attention_qkvpacked, t, options


def rope(r: random.Random, on: Served) -> Drawn:
    b, hkv, n, d = r.randint(1, 2), r.randint(1, 3), _length(r), _head_dim(r)
    packed = r.random() < 0.3
    prefix = 0 if packed else r.choice([0, 0, 1, 5])
    groups = r.choice([1, 1, 2])
    per_head = groups == 1 and r.random() < 0.3
    fixed: dict[str, Any] = {"interleaved": r.random() < 0.5, "return_lse": r.random() < 0.3}
    if packed:
        lengths = [r.choice([0, 1, _length(r)]) for _ in range(r.randint(1, 4))]
        n = sum(lengths)
        kind = r.choice([torch.int32, torch.int64])
        fixed["cu_seqlens"] = torch.tensor([0, *lengths], device=on.device).cumsum(0).to(kind)
        fixed["enable_gqa"] = groups > 1
        fixed |= {"max_seqlen": max(lengths) + r.randint(0, 3)}
        t = {"q": on.randn(n, hkv * groups, d), "k": on.randn(n, hkv, d), "v": on.randn(n, hkv, _head_dim(r))}
    else:
        fixed |= {"num_prefix_tokens": min(prefix, n), "is_causal": r.random() < 0.2, "enable_gqa": groups > 1}
        shape = (b, hkv, n, d)
        t = {"q": on.randn(b, hkv * groups, n, d), "k": on.randn(*shape), "v": on.randn(*shape[:3], _head_dim(r))}
    rotated = 2 * r.randint(0, d // 2)
    if rotated and r.random() < 0.8:
        rows = n if packed else n - fixed["num_prefix_tokens"]
        angles = torch.rand(*([hkv] if per_head else []), rows, 1, rotated // 2, device=on.device) * 6
        angles = angles.repeat_interleave(2, -1) if fixed["interleaved"] else torch.cat([angles, angles], -1)
        t["rope"] = torch.cat([angles.sin(), angles.cos()], -2)
    else:
        fixed |= {"interleaved": False} | ({} if packed else {"num_prefix_tokens": 0})
    if kind := r.choice([None, "layer", "rms"]):
        fixed |= {"qk_norm": kind, "eps": r.choice([1e-6, 1e-5])}
        names = ("q_weight", "k_weight", *(("q_bias", "k_bias") if kind == "layer" else ()))
        t |= {name: torch.randn(d, device=on.device) for name in names if r.random() < 0.6}
    return functools.partial(ops.rope_attention, **fixed), t, _of_attention(t["v"].shape[-1])


def decomposed(r: random.Random, on: Served) -> Drawn:
    b, h, d, grid = r.randint(1, 2), r.randint(1, 3), _head_dim(r), (r.randint(1, 20), r.randint(1, 20))
    n = grid[0] * grid[1] if r.random() < 0.5 else _length(r)
    dv = d if r.random() < 0.6 else _head_dim(r)
    t = {"q": on.randn(b, h, n, d), "k": on.randn(b, h, grid[0] * grid[1], d)}
    t["v"] = on.randn(b, h, grid[0] * grid[1], dv)
    kind = r.choice([torch.float32, on.dtype])
    for name, axis in zip(("rel_h", "rel_w"), grid, strict=True):
        t[name] = (torch.randn(b, h, n, axis, device=on.device) * r.choice([0.1, 1.0, 5.0])).to(kind)
    options: dict[str, Any] = {"return_lse": r.random() < 0.5} | _of_attention(dv)
    return ops.decomposed_attention, t, options


def _rows(r: random.Random, width: int) -> tuple[int, ...]:
    """The shape of a linear layer's input."""
    return (*[r.choice([1, 2, 3, r.randint(1, 20)]) for _ in range(r.randint(0, 3))], width)


def _width(r: random.Random) -> int:
    return r.choice([1, 7, 8, 16, 31, 32, 33, 48, 64, 65, r.randint(1, 100), r.randint(1, 200)])


def _norm(r: random.Random, on: Served, width: int, prefix: str = "norm") -> tuple[dict[str, Tensor], bool | None]:
    """Parameters of a norm, and whether it is an RMS norm; None for no norm."""
    # The gradient of a norm of one or two channels is rounding, divided by sqrt(eps).
    kind = r.choice([None, "layer", "rms"]) if width > 3 else None
    names = {None: (), "layer": ("weight", "bias"), "rms": ("weight",)}[kind]
    return {f"{prefix}_{n}": on.randn(width) for n in names}, None if kind is None else kind == "rms"


def _with_norms(op: Callable[..., Tensor], **kinds: bool | None) -> Callable[..., Tensor]:
    """``op`` whose norms are given as separate tensors: norm_weight, norm_bias."""

    def call(backend: str | None = None, **given: Any) -> Tensor:
        for argument, rms in kinds.items():
            parameters = [given.pop(f"{argument}_{n}") for n in ("weight", "bias") if f"{argument}_{n}" in given]
            given[argument] = None if rms is None else (*parameters, 1e-5)
        return op(**given, backend=backend)

    return call


def _branch(r: random.Random, on: Served, rows: tuple[int, ...], width: int) -> dict[str, Tensor]:
    t = {"scale": on.randn(width)} if r.random() < 0.4 else {}
    return t | ({"residual": on.randn(*rows, width)} if r.random() < 0.4 else {})


# ReLU's derivative jumps where rounding decides; tests/ops/test_linear.py has it.
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")


def linear(r: random.Random, on: Served) -> Drawn:
    k, m = _width(r), _width(r)
    x = _rows(r, k)
    t = {"x": on.randn(*x), "weight": on.randn(m, k, scale=k**-0.5)}
    if r.random() < 0.6:
        t["bias"] = on.randn(m)
    norm, rms = _norm(r, on, k)
    t |= norm | _branch(r, on, x[:-1], m)
    op = functools.partial(_with_norms(ops.linear, norm=rms), activation=r.choice([None, None, *_ACTIVATIONS]))
    return op, t, {}


def mlp(r: random.Random, on: Served) -> Drawn:
    k, h, m = _width(r), _width(r), _width(r)
    x = _rows(r, k)
    t = {"x": on.randn(*x), "fc1_weight": on.randn(h, k, scale=k**-0.5), "fc2_weight": on.randn(m, h, scale=h**-0.5)}
    biases = {"fc1_bias": h, "fc2_bias": m}
    t |= {name: on.randn(n) for name, n in biases.items() if r.random() < 0.6}
    fixed = {name: None for name in biases if name not in t}
    norm, rms = _norm(r, on, k)
    t |= norm | _branch(r, on, x[:-1], m)
    return functools.partial(_with_norms(ops.mlp, norm=rms), activation=r.choice(_ACTIVATIONS), **fixed), t, {}


def gated_mlp(r: random.Random, on: Served) -> Drawn:
    k, h, m, split = _width(r), _width(r), _width(r), r.random() < 0.5
    x, first = _rows(r, k), h if split else 2 * h
    t = {"x": on.randn(*x), "fc1_weight": on.randn(first, k, scale=k**-0.5)}
    t["fc2_weight"] = on.randn(m, h, scale=h**-0.5)
    biases = {"fc1_bias": first, "fc2_bias": m}
    t |= {name: on.randn(n) for name, n in biases.items() if r.random() < 0.6}
    fixed: dict[str, Any] = {name: None for name in biases if name not in t}
    if split:
        t["gate_weight"] = on.randn(h, k, scale=k**-0.5)
        t |= {"gate_bias": on.randn(h)} if r.random() < 0.5 else {}
    else:
        fixed["gate_last"] = r.random() < 0.5
    norm, rms = _norm(r, on, k)
    inner, inner_rms = _norm(r, on, h, "hidden_norm")
    t |= norm | inner | _branch(r, on, x[:-1], m)
    op = _with_norms(ops.gated_mlp, norm=rms, hidden_norm=inner_rms)
    return functools.partial(op, activation=r.choice(_ACTIVATIONS), **fixed), t, {}


def layer_norm(r: random.Random, on: Served) -> Drawn:
    width = max(4, r.choice([_width(r), _width(r), r.randint(200, 1500)]))
    t = {"x": on.randn(*_rows(r, width), scale=r.choice([1.0, 1e-3, 100.0]))}
    t |= {name: on.randn(width) for name in ("weight", "bias") if r.random() < 0.7}
    return functools.partial(ops.layer_norm, eps=r.choice([1e-6, 1e-5, 1e-3])), t, {}


def rms_norm(r: random.Random, on: Served) -> Drawn:
    width = r.choice([_width(r), _width(r), r.randint(200, 1500)])
    t = {"x": on.randn(*_rows(r, width))}
    t |= {"weight": on.randn(width)} if r.random() < 0.7 else {}
    return functools.partial(ops.rms_norm, eps=r.choice([None, 1e-6, 1e-3])), t, {}


def _embeddings(r: random.Random, on: Served) -> tuple[Tensor, Tensor]:
    n, d = max(2, _length(r)), max(2, _width(r))  # of one row the loss is 0, of one channel every row the same
    a, b = (torch.nn.functional.normalize(torch.randn(n, d, device=on.device), dim=1) for _ in range(2))
    return a.to(on.dtype), b.to(on.dtype)


def info_nce(r: random.Random, on: Served) -> Drawn:
    a, b = _embeddings(r, on)
    scale = r.uniform(0.1, 20.0)
    return functools.partial(ops.info_nce, scale=scale), {"a": a, "b": b}, {"summed": scale}


def nt_xent(r: random.Random, on: Served) -> Drawn:
    a, b = _embeddings(r, on)
    temperature = r.uniform(0.05, 2.0)
    return functools.partial(ops.nt_xent, temperature=temperature), {"z1": a, "z2": b}, {"summed": 1 / temperature}


def sigmoid_contrastive(r: random.Random, on: Served) -> Drawn:
    a, b = _embeddings(r, on)
    fixed = {"scale": r.uniform(0.1, 20.0), "bias": r.uniform(-10.0, 2.0)}
    return functools.partial(ops.sigmoid_contrastive, **fixed), {"a": a, "b": b}, {"summed": fixed["scale"] + 10}


def distillation(r: random.Random, on: Served) -> Drawn:
    s, t_, n, k = r.randint(1, 4), r.randint(1, 2), r.randint(1, 20), max(2, _width(r))  # of one prototype it is 0
    fixed: dict[str, Any] = {"student_temp": r.uniform(0.1, 1.0), "teacher_temp": r.uniform(0.1, 1.0)}
    if r.random() < 0.5:
        fixed["center"] = torch.randn(k, device=on.device)
    if r.random() < 0.5:
        fixed["weights"] = torch.rand(s, t_, n, device=on.device)
    tensors = {}
    if r.random() < 0.5:
        c = _width(r)
        tensors = {"student": on.randn(s, n, c), "student_prototypes": on.randn(k, c, scale=c**-0.5)}
        fixed["teacher_prototypes"] = on.randn(k, c, scale=c**-0.5)
        fixed["teacher"] = on.randn(t_, n, c)
    else:
        tensors = {"student": on.randn(s, n, k)}
        fixed["teacher"] = on.randn(t_, n, k)

    def op(backend: str | None = None, **given: Tensor) -> Tensor:
        wide = next(iter(given.values())).dtype == torch.float64  # the reference of everything in float64
        other = {name: v.double() if wide and isinstance(v, Tensor) else v for name, v in fixed.items()}
        return ops.distillation_cross_entropy(**given, **other, backend=backend)

    return op, tensors, {}


#: Rows that are all alike have no variance, and the gradient of their norm is rounding over sqrt(eps). Attention over
#: tokens that are all alike has no gradient of queries and keys, and those of their norm are sums of rounding.
NORMED = ("linear", "mlp", "gated_mlp", "layer_norm", "rms_norm")

DRAWS: dict[str, Callable[[random.Random, Served], Drawn]] = {
    "flash_attention": attention,
    "flash_attention, packed": qkvpacked,
    "flash_attention_varlen": varlen,
    "rope_attention": rope,
    "decomposed_attention": decomposed,
    "attention_map": attention_map,
    "window_attention": window,
    "patch_embed": patch,
    "linear": linear,
    "mlp": mlp,
    "gated_mlp": gated_mlp,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "info_nce": info_nce,
    "nt_xent": nt_xent,
    "sigmoid_contrastive": sigmoid_contrastive,
    "distillation_cross_entropy": distillation,
}


def call(
    op: str,
    on: Served,
    r: random.Random,
    placed: Callable[[Tensor], Tensor] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """A random call, checked. ``placed``: puts a tensor without gradient where it is wanted in memory."""
    torch.manual_seed(r.randrange(2**31))
    function, tensors, options = DRAWS[op](r, on)
    summed = options.pop("summed", 1.0)
    of_grads = options.pop("summed_grads", summed)
    if placed and isinstance(function, functools.partial):
        fixed = {name: placed(v) if isinstance(v, Tensor) else v for name, v in function.keywords.items()}
        function = functools.partial(function.func, **fixed)
    store, store_grad = (r.choice(LAYOUTS) if r.random() < 0.4 else "contiguous" for _ in range(2))
    normed = op in NORMED or "qk_norm" in getattr(function, "keywords", ())
    if store == "expanded" and ("broadcast" in options or normed):
        store = "sliced"
    say(f"{ {name: tuple(t.shape) for name, t in tensors.items()} }, {function}, {options}, stored {store}")
    fixed = {"backend": on.backend, "store": store, "store_grad": store_grad, "raises": False}
    found = check_op(function, tensors, **fixed, **options)
    rounding = torch.finfo(on.dtype).eps * (4 if on.dtype == torch.float32 else 1 / 8)
    largest = max(c.magnitude for c in found)
    wrong = []
    for each in found:
        _, is_grad, tensor = each.name.rpartition(" grad_")
        added = summed if not is_grad else of_grads[tensor] if isinstance(of_grads, dict) else of_grads
        if not each.error <= each.limit + rounding * max(added, largest):
            wrong.append(each)
    assert not wrong, "\n".join(map(str, wrong))
