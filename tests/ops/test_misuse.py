"""Everything that is no dense tensor of real numbers, in place of each tensor of each operator: a TypeError or
ValueError that names the operator and the argument. None may crash, hang or return something."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyvit import ops


def z(*shape: int) -> Tensor:
    return torch.zeros(shape) + 0.5


CU = torch.tensor([0, 4, 9])
#: Operator -> sound arguments, in float32.
CALLS: dict[str, dict[str, Any]] = {
    "flash_attention": {"q": z(2, 4, 5, 8), "k": z(2, 4, 7, 8), "v": z(2, 4, 7, 8), "bias": z(5, 7)},
    "flash_attention_qkvpacked": {"qkv": z(2, 5, 3, 4, 8), "bias": z(5, 5)},
    "flash_attention_varlen": {
        "q": z(9, 4, 8), "k": z(9, 4, 8), "v": z(9, 4, 8), "cu_seqlens_q": CU, "cu_seqlens_k": CU,
        "max_seqlen_q": 5, "max_seqlen_k": 5,
    },
    "rope_attention": {
        "q": z(2, 4, 5, 8), "k": z(2, 4, 5, 8), "v": z(2, 4, 5, 8), "rope": z(5, 2, 8), "qk_norm": "layer",
        "q_weight": z(8), "k_weight": z(8), "q_bias": z(8), "k_bias": z(8),
    },
    "decomposed_attention": {
        "q": z(2, 4, 5, 8), "k": z(2, 4, 6, 8), "v": z(2, 4, 6, 8), "rel_h": z(2, 4, 5, 2), "rel_w": z(2, 4, 5, 3),
    },
    "attention_map": {"q": z(2, 4, 5, 8), "k": z(2, 4, 7, 8), "rows": torch.tensor([[0], [1]])},
    "window_attention": {
        "qkv": z(2, 6, 7, 24), "window_size": 3, "shift_size": 1, "num_heads": 2, "bias_table": z(25, 2),
        "logit_scale": z(2), "pad_qkv": z(24),
    },
    "patch_embed": {
        "images": z(2, 3, 8, 12), "weight": z(5, 3, 4, 4), "bias": z(5), "pos_embed": z(6, 5), "prefix": z(1, 5),
        "keep": torch.tensor([[0], [1]]), "mean": z(3), "std": z(3),
    },
    "linear": {"x": z(2, 8), "weight": z(3, 8), "bias": z(3), "scale": z(3), "residual": z(2, 3)},
    "mlp": {
        "x": z(2, 8), "fc1_weight": z(6, 8), "fc1_bias": z(6), "fc2_weight": z(3, 6), "fc2_bias": z(3),
        "scale": z(3), "residual": z(2, 3),
    },
    "gated_mlp": {
        "x": z(2, 8), "fc1_weight": z(6, 8), "fc1_bias": z(6), "fc2_weight": z(3, 6), "fc2_bias": z(3),
        "gate_weight": z(6, 8), "gate_bias": z(6), "scale": z(3), "residual": z(2, 3),
    },
    "layer_norm": {"x": z(2, 8), "weight": z(8), "bias": z(8)},
    "rms_norm": {"x": z(2, 8), "weight": z(8)},
    "info_nce": {"a": z(4, 8), "b": z(4, 8), "scale": z()},
    "nt_xent": {"z1": z(4, 8), "z2": z(4, 8), "temperature": z()},
    "sigmoid_contrastive": {"a": z(4, 8), "b": z(4, 8), "scale": z(), "bias": z()},
    "distillation_cross_entropy": {
        "student": z(2, 4, 8), "teacher": z(2, 4, 8), "student_temp": 0.1, "teacher_temp": 0.1, "center": z(6),
        "student_prototypes": z(6, 8), "teacher_prototypes": z(6, 8), "weights": z(2, 2, 4),
    },
    "koleo": {"x": z(4, 8)},
    "sinkhorn_knopp": {"scores": z(4, 8), "temperature": 0.1},
    "sinkhorn_center": {"features": z(4, 8), "temperature": 0.1, "prototypes": z(6, 8)},
}  # fmt: skip


class Subclass(torch.Tensor):
    """A tensor whose functions are torch's: no misuse, but not to be taken for something else."""


#: What is given -> a function of the sound tensor.
STRANGE: dict[str, Callable[[Tensor], Any]] = {
    "a numpy array": lambda t: t.numpy(),
    "a list": lambda t: t.tolist(),
    "a string": lambda t: "tensor",
    "a module": lambda t: torch.nn.Identity(),
    "a type": lambda t: torch.Tensor,
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "bool": lambda t: t.bool(),
    "8 bits": lambda t: t.to(torch.float8_e4m3fn),
    "on another device": lambda t: t.to("meta"),
    "one dimension more": lambda t: t[None, None, None, None, None],
    "larger than memory": lambda t: t.reshape(-1)[:1].expand(2**40),
}
#: Arguments that take more than tensors of numbers: (operator, argument, what).
ALLOWED = {
    ("attention_map", "rows", "a list"),
    *((op, "bias", "bool") for op in ("flash_attention", "flash_attention_qkvpacked")),
    *((op, "x", "one dimension more") for op in ("linear", "mlp", "gated_mlp", "layer_norm", "rms_norm")),
    *((op, name, "on another device") for op, name in (("koleo", "x"), ("sinkhorn_knopp", "scores"))),
    *(
        (op, name, what)  # one element, in any number of dimensions; a list of no dimensions is a number
        for op, name in (
            ("info_nce", "scale"),
            ("nt_xent", "temperature"),
            ("sigmoid_contrastive", "scale"),
            ("sigmoid_contrastive", "bias"),
        )
        for what in ("a list", "one dimension more", "on another device")
    ),
}


def strange() -> list[tuple[str, str, str]]:
    found = []
    for op, given in CALLS.items():
        tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
        found += [(op, name, what) for name in tensors for what in STRANGE if (op, name, what) not in ALLOWED]
    return found


def test_the_calls_are_sound() -> None:
    for op, given in CALLS.items():
        assert getattr(ops, op)(**given) is not None, op


@pytest.mark.parametrize(("op", "argument", "what"), strange(), ids=lambda x: x)
def test_strange_tensors(op: str, argument: str, what: str) -> None:
    given = CALLS[op]
    if what in ("quantized", "nested", "sparse") and not given[argument].dim():
        pytest.skip("of no dimensions there is none")
    try:
        wrong = STRANGE[what](given[argument])
    except (RuntimeError, TypeError, NotImplementedError) as error:
        pytest.skip(f"torch makes none: {error}")
    with pytest.raises((TypeError, ValueError, MemoryError, RuntimeError)) as caught:
        getattr(ops, op)(**{**given, argument: wrong})
    if isinstance(caught.value, (MemoryError, RuntimeError)):
        assert what == "larger than memory"
        assert isinstance(caught.value, MemoryError) or "memory" in str(caught.value)
        return
    message = str(caught.value)
    assert message.startswith(op.removesuffix("_qkvpacked")), message
    named = re.match(r"\w+: (\w+)", message)
    assert named, message
    assert named[1] in given or named[1] == "norm", message  # the argument, or one that no longer fits it


@pytest.mark.parametrize(("op", "argument"), [(op, name) for op, given in CALLS.items() for name in given], ids=str)
def test_none_for_what_is_needed(op: str, argument: str) -> None:
    given = {**CALLS[op], argument: None}
    found: Any = None
    with contextlib.suppress(TypeError, ValueError):
        found = getattr(ops, op)(**given)
    if found is not None:  # an optional argument
        assert (found[0] if isinstance(found, tuple) else found).isfinite().all()
        return
    with pytest.raises((TypeError, ValueError), match=f"^{op.removesuffix('_qkvpacked')}.*: "):
        getattr(ops, op)(**given)


NUMBERS = [
    ("flash_attention", "scale"), ("flash_attention_varlen", "scale"), ("rope_attention", "scale"),
    ("decomposed_attention", "scale"),
    ("window_attention", "scale"), ("attention_map", "scale"), ("rope_attention", "eps"), ("layer_norm", "eps"),
    ("rms_norm", "eps"), ("koleo", "eps"), ("info_nce", "scale"), ("nt_xent", "temperature"),
    ("sigmoid_contrastive", "scale"), ("sigmoid_contrastive", "bias"), ("distillation_cross_entropy", "student_temp"),
    ("distillation_cross_entropy", "teacher_temp"), ("sinkhorn_knopp", "temperature"),
    ("sinkhorn_center", "temperature"),
]  # fmt: skip


@pytest.mark.parametrize("value", ["1", [1.0], True, 1j, {}], ids=str)
@pytest.mark.parametrize(("op", "argument"), NUMBERS, ids=str)
def test_strange_numbers(op: str, argument: str, value: object) -> None:
    given = {**CALLS[op], argument: value}
    if op == "window_attention":
        del given["logit_scale"]
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(ops, op)(**given)
    assert str(caught.value).startswith(op), caught.value
    assert argument in str(caught.value), caught.value


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("op", "argument"),
    [(op, name) for op, name in NUMBERS if "temp" in name],
    ids=str,
)
def test_temperatures_are_positive_and_finite(op: str, argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{op}: {argument} must be .*positive"):
        getattr(ops, op)(**{**CALLS[op], argument: value})


def test_subclasses_are_tensors() -> None:
    for op, given in CALLS.items():
        wrapped = {n: v.as_subclass(Subclass) if isinstance(v, Tensor) else v for n, v in given.items()}
        want, got = getattr(ops, op)(**given), getattr(ops, op)(**wrapped)
        torch.testing.assert_close(torch.Tensor(got), want, rtol=1e-5, atol=1e-5)


def test_numpy_scalars_are_numbers() -> None:
    q, k, v = (CALLS["flash_attention"][n] for n in "qkv")
    want = ops.flash_attention(q, k, v, scale=0.25)
    assert torch.equal(ops.flash_attention(q, k, v, scale=np.float64(0.25)), want)
