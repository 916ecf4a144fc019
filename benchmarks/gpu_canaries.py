"""One small call of every GPU kernel in every dtype, forward and backward, against float64.

Those that no GPU has run come first: a fault of theirs is what an hour on a GPU should find out at once.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_rows import read
from pyvit import ops
from pyvit.testing import Comparison, Served, check_op, served

_REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Canary:
    """A small call of ``op`` that asks for these features and head dimensions (see ``pyvit.testing.served``)."""

    op: str
    features: tuple[str, ...]
    head_dims: tuple[int, ...]
    run: Callable[[Served], list[Comparison]]


def _asked(**features: bool) -> tuple[str, ...]:
    return tuple(name for name, wanted in features.items() if wanted)


def _attention(n: int, d: int, kv_heads: int = 2, bias: bool = False, causal: bool = False, batch: int = 2) -> Canary:
    def run(on: Served) -> list[Comparison]:
        t = {"q": on.randn(batch, 2, n, d)} | {name: on.randn(batch, kv_heads, n, d) for name in "kv"}
        if bias:
            t["bias"] = torch.randn(1, 2, n, n, device=on.device)
        options = {"is_causal": causal, "enable_gqa": kv_heads != 2}
        broadcast = {"bias": (batch, 2, n, n)} if bias else None
        return check_op(ops.flash_attention, t, backend=on.backend, broadcast=broadcast, raises=False, **options)

    asked = _asked(bias=bias, bias_grad=bias, causal=causal, gqa=kv_heads != 2, grad=True)
    return Canary("flash_attention", asked, (d,), run)


def _one_processor(canary: Canary) -> Canary:
    """As on a GPU of one multiprocessor, where few heads are many: by ``forward_persistent`` where that serves."""

    def run(on: Served) -> list[Comparison]:
        if on.backend != "triton":
            return canary.run(on)
        flash_attention = importlib.import_module("pyvit.triton_kernels.flash_attention")
        before, flash_attention.processors = flash_attention.processors, lambda _: 1
        try:
            return canary.run(on)
        finally:
            flash_attention.processors = before

    return replace(canary, run=run)


def _varlen(lengths: Sequence[int]) -> Canary:
    def run(on: Served) -> list[Comparison]:
        t = {name: on.randn(sum(lengths), 2, 32) for name in "qkv"}
        cu = torch.tensor([0, *lengths], device=on.device).cumsum(0).int()
        op = functools.partial(ops.flash_attention_varlen, cu_seqlens_q=cu, cu_seqlens_k=cu)
        longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        return check_op(op, t, backend=on.backend, name="varlen", raises=False, **longest)

    return Canary("flash_attention_varlen", ("grad",), (32,), run)


def _map(on: Served) -> list[Comparison]:
    rows = torch.tensor([0, 5], device=on.device).expand(2, 2)
    t = {"q": on.randn(2, 2, 70, 32), "k": on.randn(2, 2, 70, 32)}
    return check_op(ops.attention_map, t, backend=on.backend, grads=(), rows=rows, raises=False)


def _window(window: int, side: int, cosine: bool = False) -> Canary:
    def run(on: Served) -> list[Comparison]:
        heads = 8 if cosine else 2  # with two, the naive form's error of grad_logit_scale may be small by chance
        t = {"qkv": on.randn(1, side, side, 96 * heads)}
        t["bias_table"] = torch.randn((2 * window - 1) ** 2, heads, device=on.device)
        if cosine:
            t["logit_scale"] = torch.linspace(1.0, 2.3, heads, device=on.device)
        options = {"window_size": window, "shift_size": window // 2, "num_heads": heads}
        return check_op(ops.window_attention, t, backend=on.backend, scores=8.0, raises=False, **options)

    return Canary("window_attention", _asked(bias_table=True, logit_scale=cosine, shift=True, grad=True), (32,), run)


def _patches(keep: bool, as_bytes: bool = False) -> Canary:
    def run(on: Served) -> list[Comparison]:
        t = {"images": on.randn(2, 3, 48, 48), "weight": on.randn(40, 3, 16, 16, scale=0.05), "bias": on.randn(40)}
        t |= {"pos_embed": on.randn(9, 40), "prefix": on.randn(1, 40)}
        options: dict[str, object] = {}
        if as_bytes:
            t["images"] = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, device=on.device)
            options |= {name: torch.tensor([0.4, 0.5, 0.3], device=on.device) for name in ("mean", "std")}
        if keep:
            options["keep"] = torch.tensor([[8, 0, 4], [1, 7, 2]], device=on.device)
        return check_op(
            functools.partial(ops.patch_embed, **options), t, backend=on.backend, name="patches", raises=False
        )

    asked = _asked(
        uint8=as_bytes, normalize=as_bytes, pos_embed=True, prefix=True, keep=keep, grad=True, images_grad=not as_bytes
    )
    return Canary("patch_embed", asked, (), run)


def _pairs(op: str, names: Sequence[str], scalars: dict[str, float]) -> Canary:
    def run(on: Served) -> list[Comparison]:
        t = {name: F.normalize(torch.randn(100, 48, device=on.device), dim=1).to(on.dtype) for name in names}
        t |= {name: torch.tensor(value, device=on.device) for name, value in scalars.items()}
        return check_op(getattr(ops, op), t, backend=on.backend, scores=8.0, raises=False)

    return Canary(op, ("grad",), (), run)


def _distillation(on: Served) -> list[Comparison]:
    features = [F.normalize(torch.randn(n, 8, 32, device=on.device), dim=-1).to(on.dtype) for n in (3, 2)]
    prototypes = [F.normalize(torch.randn(90, 32, device=on.device), dim=-1).to(on.dtype) for _ in range(2)]

    def op(student: Tensor, student_prototypes: Tensor, backend: str | None = None) -> Tensor:
        fixed = [t.to(student.dtype) for t in (features[1], prototypes[1])]
        return ops.distillation_cross_entropy(
            student,
            fixed[0],
            0.1,
            0.07,
            student_prototypes=student_prototypes,
            teacher_prototypes=fixed[1],
            backend=backend,
        )

    t = {"student": features[0], "student_prototypes": prototypes[0]}
    return check_op(op, t, backend=on.backend, scores=20.0, name="distillation", raises=False)


#: Together they launch every Triton kernel (tests/benchmarks/test_gpu_kernels.py).
CANARIES: dict[str, Canary] = {
    "50 tokens of 64": _attention(50, 64),
    "100 tokens of 64, many heads": _one_processor(_attention(100, 64)),
    "150 tokens of 72": _attention(150, 72),
    "300 tokens of 64, causal": _attention(300, 64, causal=True, batch=1),
    "70 tokens, bias": _attention(70, 32, bias=True),
    "70 tokens, grouped": _attention(70, 32, kv_heads=1),
    "sequences of 50, 17, 64": _varlen((50, 17, 64)),
    "map of 70 tokens": Canary("attention_map", (), (32,), _map),
    "window 4": _window(4, 6),
    "window 7": _window(7, 10),
    "window 12": _window(12, 20),
    "window 16": _window(16, 20),
    "window 8, cosine": _window(8, 12, cosine=True),
    "patches": _patches(keep=False),
    "kept patches": _patches(keep=True),
    "uint8 patches": _patches(keep=False, as_bytes=True),
    "info_nce": _pairs("info_nce", ("a", "b"), {"scale": 5.0}),
    "nt_xent": _pairs("nt_xent", ("z1", "z2"), {"temperature": 0.3}),
    "sigmoid_contrastive": _pairs("sigmoid_contrastive", ("a", "b"), {"scale": 5.0, "bias": -3.0}),
    "distillation": Canary("distillation_cross_entropy", ("grad", "prototypes"), (), _distillation),
}


def never_run(page: Path = _REPOSITORY / "docs" / "gpu-status.md") -> set[tuple[str, str]]:
    """(backend, operator) of which the status page says that no GPU has run it."""
    found: set[tuple[str, str]] = set()
    headings: list[str] = []
    for line in page.read_text().splitlines() if page.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if {"backend", "operator", "run on a GPU"} <= set(cells):
            headings = cells
        elif not cells:
            headings = []
        elif len(cells) == len(headings) and cells[headings.index("run on a GPU")] == "never":
            named = re.findall(r"\w+", cells[headings.index("operator")])
            found |= {(cells[0], op) for op in named if op in ops.__all__}
    return found


def passed(folder: Path = _REPOSITORY / "benchmarks" / "results") -> set[tuple[str, str]]:
    """(canary's item, digest of its kernels) that have passed on a GPU, by every record in ``folder``."""
    found: set[tuple[str, str]] = set()
    for path in sorted(folder.rglob("rows*.jsonl")):
        found |= {
            (item.item, row.get("digest", ""))
            for item in read(path)
            if item.step == "canaries" and not item.versions.get("gpu", "none").startswith("none")
            for row in item.rows
            if row.get("status") == "ok"
        }
    return found


def chosen(device: str, backends: Sequence[str]) -> Iterator[tuple[str, Canary, Served]]:
    """(item, canary, backend and dtype) of every canary that this machine can run on ``device``."""
    for name, canary in CANARIES.items():
        for on in served(canary.op, *canary.features, head_dims=canary.head_dims):
            if on.backend in backends and on.device == device and on.dtype != torch.float64:
                yield f"{name}, {on}", canary, on
