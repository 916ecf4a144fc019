"""Small differentiable calls of every operator, for tests of PyTorch features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit import ops
from pyvit.ops import reference


class Case(NamedTuple):
    """``op`` of tensors, and its reference."""

    op: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def leaves(self) -> list[Tensor]:
        return [t.detach().clone().requires_grad_() for t in self.tensors]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def through(op: Callable[..., Any], *order: int, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``op`` with options, by the default backend and by the reference; the first of several results."""

    def by(backend: str | None, *tensors: Tensor) -> Tensor:
        found = op(*tensors, **options, backend=backend)
        return found if isinstance(found, Tensor) else found[0]

    return functools.partial(by, None), functools.partial(by, "reference")


def linear(activation: str | None) -> Case:
    return Case(*through(ops.linear, activation=activation), (randn(2, 5, 16), randn(12, 16), randn(12)))


def whole_branch() -> Case:
    def op(x: Tensor, w: Tensor, w2: Tensor, n: Tensor, s: Tensor, backend: str | None = None) -> Tensor:
        return ops.mlp(x, w, None, w2, None, norm=(n, None, 1e-5), scale=s, residual=x, backend=backend)

    return Case(
        op,
        functools.partial(op, backend="reference"),
        (randn(2, 5, 16), randn(24, 16), randn(16, 24), randn(16), randn(17)[:16]),
    )


def gated_branch() -> Case:
    def op(x: Tensor, w: Tensor, g: Tensor, w2: Tensor, n: Tensor, backend: str | None = None) -> Tensor:
        options = {"gate_weight": g, "hidden_norm": (n, 1e-5), "norm": (n[:16], 1e-5), "residual": x}
        return ops.gated_mlp(x, w, None, w2, None, activation="gelu", **options, backend=backend)

    return Case(
        op,
        functools.partial(op, backend="reference"),
        (randn(2, 5, 16), randn(24, 16), randn(24, 17)[:, :16], randn(16, 24), randn(24)),
    )


LENGTHS = torch.tensor([0, 3, 9])


def varlen(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    return ops.flash_attention_varlen(
        q, k, v, cu_seqlens_q=LENGTHS, cu_seqlens_k=LENGTHS, max_seqlen_q=6, max_seqlen_k=6, backend=backend
    )


def rope(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    options = {"qk_norm": "rms", "q_weight": weight, "k_weight": weight, "num_prefix_tokens": 1}
    return ops.rope_attention(q, k, v, torch.stack((angles.sin(), angles.cos()), 1), backend=backend, **options)


TEACHER, WIDE, WEIGHTS = randn(2, 6, 8), randn(20, 8), randn(3, 2, 6).softmax(0)


def distillation(student: Tensor, prototypes: Tensor, backend: str | None = None) -> Tensor:
    given = {
        "student_prototypes": prototypes,
        "teacher_prototypes": WIDE[:20],
        "center": WIDE[:20, 0],
        "weights": WEIGHTS,
    }
    return ops.distillation_cross_entropy(student, TEACHER, 0.5, 0.4, **given, backend=backend)


CASES: dict[str, Callable[[], Case]] = {
    "layer_norm": lambda: Case(*through(ops.layer_norm), (randn(2, 5, 16), randn(16), randn(17)[:16])),
    "layer_norm, rounded": lambda: Case(*through(ops.layer_norm, dtype=torch.bfloat16), (randn(2, 5, 16),)),
    "rms_norm": lambda: Case(*through(ops.rms_norm), (randn(2, 5, 16), randn(17)[:16])),
    **{f"linear {name}": functools.partial(linear, name) for name in (None, *reference.ACTIVATIONS)},
    "mlp": lambda: Case(*through(ops.mlp), (randn(2, 5, 16), randn(24, 16), randn(24), randn(12, 24), randn(12))),
    "branch": whole_branch,
    "gated_mlp": lambda: Case(
        *through(ops.gated_mlp), (randn(2, 5, 16), randn(48, 16), randn(48), randn(12, 24), randn(12))
    ),
    "gated_mlp, split": gated_branch,
    "flash_attention": lambda: Case(
        *through(ops.flash_attention), (randn(1, 2, 7, 16), randn(1, 2, 6, 16), randn(1, 2, 6, 8))),
    "flash_attention, biased": lambda: Case(
        lambda q, b: ops.flash_attention(q, q, q, bias=b),
        lambda q, b: ops.flash_attention(q, q, q, bias=b, backend="reference"),
        (randn(1, 2, 7, 16), randn(1, 2, 7, 7))),
    "flash_attention_qkvpacked": lambda: Case(*through(ops.flash_attention_qkvpacked), (randn(2, 5, 3, 2, 8),)),
    "flash_attention_varlen": lambda: Case(
        varlen, functools.partial(varlen, backend="reference"), (randn(9, 2, 16), randn(9, 2, 16), randn(9, 2, 8))),
    "rope_attention": lambda: Case(
        rope, functools.partial(rope, backend="reference"),
        (randn(1, 2, 7, 16), randn(1, 2, 7, 16), randn(1, 2, 7, 8), randn(6, 12), randn(16))),
    "decomposed_attention": lambda: Case(
        *through(ops.decomposed_attention),
        (randn(1, 2, 7, 16), randn(1, 2, 6, 16), randn(1, 2, 6, 8), randn(1, 2, 7, 2), randn(1, 2, 7, 3))),
    "attention_map": lambda: Case(*through(ops.attention_map, rows=[0, 4]), (randn(1, 2, 7, 16), randn(1, 2, 6, 16))),
    "window_attention": lambda: Case(
        *through(ops.window_attention, window_size=4, shift_size=2, num_heads=2), (randn(1, 8, 8, 48),)),
    "patch_embed": lambda: Case(*through(ops.patch_embed), (randn(2, 3, 8, 8), randn(16, 3, 4, 4), randn(16))),
    "info_nce": lambda: Case(*through(ops.info_nce, scale=3.0), (randn(6, 8), randn(6, 9)[:, :8])),
    "nt_xent": lambda: Case(*through(ops.nt_xent, temperature=0.5), (randn(6, 8), randn(6, 9)[:, :8])),
    "sigmoid_contrastive": lambda: Case(
        *through(ops.sigmoid_contrastive, scale=3.0, bias=-2.0), (randn(6, 8), randn(6, 9)[:, :8])),
    "distillation": lambda: Case(
        distillation, functools.partial(distillation, backend="reference"), (randn(3, 6, 8), randn(20, 9)[:, :8])),
    "koleo": lambda: Case(*through(ops.koleo), (randn(6, 8),)),
}  # fmt: skip
