"""Random calls under the numerics rule. A failure prints its case and seed; PYVIT_FUZZ_CASES is the number of cases per
operator.

``python tests/fuzz/test_fuzz.py OP SEED`` repeats a case.
"""

from __future__ import annotations

import functools
import math
import os
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pyvit import ops
from pyvit.testing import LAYOUTS, Served, check_op, served

CASES = int(os.environ.get("PYVIT_FUZZ_CASES", "25"))
Drawn = tuple[Any, dict[str, Tensor], dict[str, Any]]


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
    options: dict[str, Any] = {"is_causal": r.random() < 0.3, "return_lse": r.random() < 0.5}
    if r.random() < 0.5:
        full = (len(lengths[0]), hkv * groups, *longest)
        t["bias"] = _bias(r, full, on)
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
    return ops.window_attention, t, {"window_size": window, "shift_size": shift, "num_heads": heads}


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


DRAW = {
    "flash_attention": attention,
    "flash_attention_varlen": varlen,
    "attention_map": attention_map,
    "window_attention": window,
    "patch_embed": patch,
}


def one(op: str, on: Served, seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    function, tensors, options = DRAW[op](r, on)
    store, store_grad = (r.choice(LAYOUTS) if r.random() < 0.4 else "contiguous" for _ in range(2))
    if store == "expanded" and "broadcast" in options:
        store = "sliced"
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    try:
        check_op(function, tensors, backend=on.backend, store=store, store_grad=store_grad, **options)
    except Exception as failed:
        raise AssertionError(
            f"{op} {seed} on {on}: {shapes}, {options}, stored {store}, gradients {store_grad}\n{failed}"
        ) from failed


@pytest.mark.slow
@pytest.mark.parametrize(("op", "on"), [(op, on) for op in DRAW for on in served(op)], ids=lambda x: str(x))
def test_fuzz(op: str, on: Served, seeded: int) -> None:
    for case in range(CASES if on.backend != "reference" else max(CASES // 5, 1)):
        one(op, on, seeded + case)


if __name__ == "__main__":
    for on in served(sys.argv[1]):
        print(on)
        one(sys.argv[1], on, int(sys.argv[2]))
