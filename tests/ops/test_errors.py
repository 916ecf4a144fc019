"""Error messages of the operators: each names the argument, the value seen and the value wanted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pyvit import accelerate, explain, ops

meta = torch.device("meta")


def z(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K = z(2, 4, 5, 8), z(2, 4, 7, 8)
ATTENTION = {"q": Q, "k": K, "v": K}
PACKED = torch.tensor([0, 4, 9])
VARLEN = {
    "q": z(9, 4, 8),
    "k": z(9, 2, 8),
    "v": z(9, 2, 8),
    "cu_seqlens_q": PACKED,
    "cu_seqlens_k": PACKED,
    "max_seqlen_q": 5,
    "max_seqlen_k": 5,
}
MAP = {"q": Q, "k": K, "rows": [0]}
WINDOW = {"qkv": z(2, 6, 7, 24), "window_size": 3, "shift_size": 1, "num_heads": 2}
PATCH = {"images": z(2, 3, 8, 12), "weight": z(5, 3, 4, 4)}
LINEAR = {"x": z(2, 8), "weight": z(3, 8)}
MLP = {"x": z(2, 8), "fc1_weight": z(6, 8), "fc1_bias": z(6), "fc2_weight": z(3, 6), "fc2_bias": None}
GATED = {"x": z(2, 8), "fc1_weight": z(12, 8), "fc1_bias": z(12), "fc2_weight": z(3, 6), "fc2_bias": None}
BASE = {"flash_attention": ATTENTION, "flash_attention_varlen": VARLEN, "attention_map": MAP}
BASE |= {"window_attention": WINDOW, "patch_embed": PATCH, "linear": LINEAR, "mlp": MLP, "gated_mlp": GATED}
ints = torch.tensor

VALUE = [  # operator, changed arguments, the argument that the message names, other parts of the message
    ("flash_attention", {"q": z(4, 5, 8)}, "q", ["(B, H, Nq, D)", "(4, 5, 8)"]),
    ("flash_attention", {"k": z(2, 7, 8)}, "k", ["(B, Hkv, Nk, D)", "(2, 7, 8)"]),
    ("flash_attention", {"v": z(1)}, "v", ["(B, Hkv, Nk, Dv)", "(1)"]),
    ("flash_attention", {"k": z(2, 4, 7, 9)}, "k", ["(2, Hkv, Nk, 8)", "(2, 4, 7, 9)"]),
    ("flash_attention", {"k": z(1, 4, 7, 8)}, "k", ["(2, Hkv, Nk, 8)", "(1, 4, 7, 8)"]),
    ("flash_attention", {"v": z(2, 4, 6, 8)}, "v", ["(2, 4, 7, Dv)", "(2, 4, 6, 8)"]),
    ("flash_attention", {"v": z(2, 2, 7, 8)}, "v", ["(2, 4, 7, Dv)", "(2, 2, 7, 8)"]),
    ("flash_attention", {"k": z(2, 2, 7, 8), "v": z(2, 2, 7, 8)}, "k", ["4 heads", "enable_gqa", "2 heads"]),
    ("flash_attention", {"k": z(2, 3, 7, 8), "v": z(2, 3, 7, 8), "enable_gqa": True}, "k", ["divides", "4", "3"]),
    ("flash_attention", {"k": z(2, 0, 7, 8), "v": z(2, 0, 7, 8), "enable_gqa": True}, "k", ["divides", "4", "0"]),
    ("flash_attention", {"q": z(2, 4, 5, 0), "k": z(2, 4, 7, 0)}, "q, k and v", ["one channel", "D = 0"]),
    ("flash_attention", {"v": z(2, 4, 7, 0)}, "q, k and v", ["Dv = 0"]),
    ("flash_attention", {"bias": z(3, 1, 5, 7)}, "bias", ["(2, 4, 5, 7)", "(3, 1, 5, 7)"]),
    ("flash_attention", {"bias": z(1, 2, 4, 5, 7)}, "bias", ["(2, 4, 5, 7)", "(1, 2, 4, 5, 7)"]),
    ("flash_attention", {"bias": z(5, 6)}, "bias", ["(2, 4, 5, 7)", "(1, 1, 5, 6)"]),
    ("flash_attention", {"dropout_p": 1.0}, "dropout_p", ["[0, 1)", "1.0"]),
    ("flash_attention", {"dropout_p": -0.1}, "dropout_p", ["[0, 1)", "-0.1"]),
    ("flash_attention", {"k": K.to(meta)}, "k", ["device of q", "cpu", "meta"]),
    ("flash_attention", {"bias": z(5, 7, device=meta)}, "bias", ["device of q", "cpu", "meta"]),
    ("flash_attention", {"dropout_p": float("nan")}, "dropout_p", ["[0, 1)", "nan"]),
    ("flash_attention", {"backend": "tritn"}, "backend", ["cuda, triton, cpu, torch, reference", "tritn"]),
    ("flash_attention_varlen", {"q": Q}, "q", ["(Tq, H, D)", "(2, 4, 5, 8)"]),
    ("flash_attention_varlen", {"k": K}, "k", ["(Tk, Hkv, D)"]),
    ("flash_attention_varlen", {"v": K}, "v", ["(Tk, Hkv, Dv)"]),
    ("flash_attention_varlen", {"k": z(9, 2, 9)}, "k", ["(Tk, Hkv, 8)", "(9, 2, 9)"]),
    ("flash_attention_varlen", {"v": z(8, 2, 8)}, "v", ["(9, 2, Dv)", "(8, 2, 8)"]),
    ("flash_attention_varlen", {"k": z(9, 3, 8), "v": z(9, 3, 8)}, "k", ["divides", "4", "3"]),
    ("flash_attention_varlen", {"cu_seqlens_q": ints([[0, 9]])}, "cu_seqlens_q", ["(S + 1,)", "(1, 2)"]),
    (
        "flash_attention_varlen",
        {"cu_seqlens_q": ints([0, 4, 8])},
        "cu_seqlens_q",
        ["ascending from 0 to 9", "[0, 4, 8]"],
    ),
    (
        "flash_attention_varlen",
        {"cu_seqlens_q": ints([1, 4, 9])},
        "cu_seqlens_q",
        ["ascending from 0 to 9", "[1, 4, 9]"],
    ),
    ("flash_attention_varlen", {"cu_seqlens_k": ints([0, 10, 9])}, "cu_seqlens_k", ["ascending", "[0, 10, 9]"]),
    ("flash_attention_varlen", {"cu_seqlens_k": ints([0, 9])}, "cu_seqlens_k", ["length of cu_seqlens_q, 3", "2"]),
    ("flash_attention_varlen", {"cu_seqlens_q": ints([], dtype=torch.int32)}, "cu_seqlens_q", ["at least 1", "0"]),
    ("flash_attention_varlen", {"max_seqlen_q": 4}, "max_seqlen_q", ["longest sequence, 5", "4"]),
    ("flash_attention_varlen", {"max_seqlen_k": 3}, "max_seqlen_k", ["longest sequence, 5", "3"]),
    ("flash_attention_varlen", {"max_seqlen_k": -1}, "max_seqlen_k", ["at least 0", "-1"]),
    ("flash_attention_varlen", {"q": z(9, 4, 0), "k": z(9, 2, 0)}, "q, k and v", ["one channel", "D = 0"]),
    ("flash_attention_varlen", {"bias": z(3, 1, 1, 1)}, "bias", ["(2, 4, 5, 5)", "(3, 1, 1, 1)"]),
    ("attention_map", {"q": z(5, 8)}, "q", ["(B, H, Nq, D)", "(5, 8)"]),
    ("attention_map", {"k": z(5, 8)}, "k", ["(B, Hkv, Nk, D)", "(5, 8)"]),
    ("attention_map", {"k": z(2, 4, 7, 6)}, "k", ["(2, Hkv, Nk, 8)", "(2, 4, 7, 6)"]),
    ("attention_map", {"k": z(2, 3, 7, 8)}, "k", ["divides", "4", "3"]),
    ("attention_map", {"rows": [5]}, "rows", ["[0, 5)", "5..5"]),
    ("attention_map", {"rows": -1}, "rows", ["[0, 5)", "-1..-1"]),
    ("attention_map", {"rows": ints([[0], [0], [0]])}, "rows", ["(2, R)", "(3, 1)"]),
    ("attention_map", {"q": z(2, 4, 5, 0), "k": z(2, 4, 7, 0)}, "q and k", ["one channel", "D = 0"]),
    ("attention_map", {"bias": z(2, 4, 1, 6)}, "bias", ["(2, 4, 5, 7)", "(2, 4, 1, 6)"]),
    ("window_attention", {"qkv": z(6, 7, 24)}, "qkv", ["(B, H, W, 3C)", "(6, 7, 24)"]),
    ("window_attention", {"qkv": z(2, 0, 7, 24)}, "qkv", ["at least one token", "(2, 0, 7, 24)"]),
    ("window_attention", {"window_size": 0}, "window_size", ["at least 1", "(0, 0)"]),
    ("window_attention", {"shift_size": -1}, "shift_size", ["at least 0", "(-1, -1)"]),
    ("window_attention", {"shift_size": (0, 3)}, "shift_size", ["smaller than window_size (3, 3)", "(0, 3)"]),
    ("window_attention", {"num_heads": 3}, "num_heads", ["divisor of C = 8", "24", "3"]),
    ("window_attention", {"num_heads": 0}, "num_heads", ["divisor", "0"]),
    ("window_attention", {"qkv": z(2, 6, 7, 25)}, "num_heads", ["divisor", "25"]),
    ("window_attention", {"logit_scale": z(2), "scale": 0.1}, "scale", ["None", "logit_scale", "0.1"]),
    ("window_attention", {"bias_table": z(24, 2)}, "bias_table", ["(25, 2)", "(24, 2)"]),
    ("window_attention", {"logit_scale": z(3)}, "logit_scale", ["(2,)", "(3)"]),
    ("window_attention", {"pad_qkv": z(8)}, "pad_qkv", ["(24,)", "(8)"]),
    ("window_attention", {"dropout_p": 2}, "dropout_p", ["[0, 1)", "2"]),
    ("window_attention", {"pad_qkv": z(24, device=meta)}, "pad_qkv", ["device of qkv", "meta"]),
    ("patch_embed", {"images": z(3, 8, 12)}, "images", ["(B, C, H, W)", "(3, 8, 12)"]),
    ("patch_embed", {"weight": z(5, 3, 4)}, "weight", ["(D, C, ph, pw)", "(5, 3, 4)"]),
    ("patch_embed", {"weight": z(5, 1, 4, 4)}, "weight", ["(D, 3, ph, pw)", "(5, 1, 4, 4)"]),
    ("patch_embed", {"images": z(2, 3, 9, 12)}, "images", ["divide by the patch (4, 4)", "9 x 12"]),
    (
        "patch_embed",
        {"images": z(2, 3, 3, 12), "stride": 2},
        "images",
        ["at least as large as one patch, (4, 4)", "3 x 12"],
    ),
    ("patch_embed", {"stride": (4, 5)}, "stride", ["at most the patch, (4, 4)", "(4, 5)"]),
    ("patch_embed", {"stride": 0}, "stride", ["at least 1", "(0, 0)"]),
    ("patch_embed", {"weight": z(5, 3, 0, 4)}, "weight", ["at least one element", "(5, 3, 0, 4)"]),
    ("patch_embed", {"weight": z(0, 3, 4, 4)}, "weight", ["at least one element", "(0, 3, 4, 4)"]),
    ("patch_embed", {"bias": z(4)}, "bias", ["(5)", "(4)"]),
    ("patch_embed", {"pos_embed": z(7, 5)}, "pos_embed", ["(6, 5)", "2 x 3 patches", "(7, 5)"]),
    ("patch_embed", {"pos_embed": z(1, 6, 5)}, "pos_embed", ["(6, 5)", "(1, 6, 5)"]),
    ("patch_embed", {"prefix": z(1, 1, 5)}, "prefix", ["(P, 5)", "(1, 1, 5)"]),
    ("patch_embed", {"keep": ints([[0, 6], [0, 1]])}, "keep", ["[0, 6)", "0..6"]),
    ("patch_embed", {"keep": ints([[0, -1], [0, 1]])}, "keep", ["[0, 6)", "-1..1"]),
    ("patch_embed", {"keep": ints([0, 1])}, "keep", ["(2, K)", "(2)"]),
    ("patch_embed", {"mean": z(3)}, "mean and std", ["together", "mean alone"]),
    ("patch_embed", {"std": z(3)}, "mean and std", ["together", "std alone"]),
    ("patch_embed", {"mean": z(1), "std": z(3)}, "mean", ["(3,)", "(1)"]),
    ("patch_embed", {"weight": z(5, 3, 4, 4, device=meta)}, "images", ["device of weight", "meta", "cpu"]),
    ("linear", {"activation": "gelo"}, "activation", ["gelu_tanh", "gelo"]),
    ("linear", {"weight": z(3)}, "weight", ["(M, K)", "(3)"]),
    ("linear", {"x": z(2, 7)}, "x", ["(..., 8)", "(2, 7)"]),
    ("linear", {"bias": z(4)}, "bias", ["(3,)", "(4)"]),
    ("mlp", {"activation": None}, "activation", ["gelu_tanh", "None"]),
    ("mlp", {"x": z(2, 7)}, "x", ["(..., 8)", "(2, 7)"]),
    ("mlp", {"fc1_bias": z(4)}, "fc1_bias", ["(6,)", "(4)"]),
    ("mlp", {"fc2_weight": z(3, 5)}, "fc2_weight", ["(M, 6)", "(3, 5)"]),
    ("mlp", {"fc2_bias": z(4)}, "fc2_bias", ["(3,)", "(4)"]),
    ("mlp", {"norm": (z(8),)}, "norm", ["(weight, bias, eps)", "(weight, eps)"]),
    ("gated_mlp", {"activation": None}, "activation", ["gelu_tanh", "None"]),
    ("gated_mlp", {"activation": "tanh"}, "activation", ["gelu_tanh", "tanh"]),
    ("gated_mlp", {"x": z(2, 7)}, "x", ["(..., 8)", "(2, 7)"]),
    ("gated_mlp", {"fc1_weight": z(11, 8), "fc1_bias": None}, "fc1_weight", ["even", "(11, 8)"]),
    ("gated_mlp", {"fc1_bias": z(6)}, "fc1_bias", ["(12,)", "(6)"]),
    ("gated_mlp", {"fc2_weight": z(3, 12)}, "fc2_weight", ["(M, 6)", "(3, 12)"]),
    ("gated_mlp", {"fc2_bias": z(4)}, "fc2_bias", ["(3,)", "(4)"]),
    ("gated_mlp", {"gate_bias": z(6)}, "gate_bias", ["None without gate_weight"]),
    ("gated_mlp", {"gate_weight": z(6, 8)}, "gate_weight", ["(12, 8)", "(6, 8)"]),
    ("gated_mlp", {"gate_weight": z(12, 8), "gate_last": True}, "gate_last", ["False with gate_weight"]),
    ("gated_mlp", {"hidden_norm": 1}, "hidden_norm", ["(weight, eps)", "1"]),
    ("gated_mlp", {"hidden_norm": (z(8), 1e-5)}, "hidden_norm[0]", ["(6,)", "(8)"]),
    ("gated_mlp", {"scale": z(4)}, "scale", ["(3,)", "(4)"]),
    ("gated_mlp", {"residual": z(2, 8)}, "residual", ["(2, 3)", "(2, 8)"]),
]
half, whole = torch.float16, torch.int32
TYPE = [
    ("flash_attention", {"q": [1.0]}, "q", ["Tensor", "list"]),
    ("flash_attention", {"q": Q.to(whole), "k": K.to(whole), "v": K.to(whole)}, "q", ["float32", "int32"]),
    ("flash_attention", {"k": K.half()}, "k", ["dtype of q", "float32", "float16"]),
    ("flash_attention", {"v": K.double()}, "v", ["dtype of q", "float32", "float64"]),
    ("flash_attention", {"bias": z(5, 7, dtype=half)}, "bias", ["bool, float32", "float16"]),
    ("flash_attention_varlen", {"cu_seqlens_q": ints([0.0, 4, 9])}, "cu_seqlens_q", ["int32 or int64", "float32"]),
    ("flash_attention_varlen", {"cu_seqlens_k": [0, 4, 9]}, "cu_seqlens_k", ["Tensor", "list"]),
    ("attention_map", {"rows": ints([1.0])}, "rows", ["int64", "float32"]),
    ("attention_map", {"k": K.half()}, "k", ["dtype of q", "float16"]),
    ("window_attention", {"qkv": z(2, 6, 7, 24, dtype=whole)}, "qkv", ["float32", "int32"]),
    ("window_attention", {"window_size": (3, 3, 3)}, "window_size", ["pair of ints", "(3, 3, 3)"]),
    ("window_attention", {"shift_size": (0.5, 1)}, "shift_size", ["pair of ints", "(0.5, 1)"]),
    ("window_attention", {"bias_table": z(25, 2, dtype=half)}, "bias_table", ["float32", "float16"]),
    ("patch_embed", {"images": z(2, 3, 8, 12, dtype=whole)}, "images", ["dtype of weight", "int32"]),
    ("patch_embed", {"weight": z(5, 3, 4, 4, dtype=whole)}, "weight", ["float32", "int32"]),
    ("patch_embed", {"bias": z(5, dtype=half)}, "bias", ["float32", "float16"]),
    ("patch_embed", {"keep": z(2, 1)}, "keep", ["int64", "float32"]),
    ("linear", {"weight": [[1.0]]}, "weight", ["Tensor", "list"]),
    ("linear", {"x": [1.0]}, "x", ["Tensor", "list"]),
    ("mlp", {"fc2_weight": z(3, 6).double()}, "fc2_weight", ["float32", "float64"]),
    ("gated_mlp", {"gate_last": 1}, "gate_last", ["bool", "int"]),
    ("gated_mlp", {"hidden_norm": (None, "x")}, "hidden_norm[1]", ["number", "str"]),
    ("gated_mlp", {"gate_weight": [1.0]}, "gate_weight", ["Tensor", "list"]),
    ("gated_mlp", {"hidden_norm": (z(6).half(), 1e-5)}, "hidden_norm[0]", ["float32", "float16"]),
    ("window_attention", {"qkv": None}, "qkv", ["Tensor", "NoneType"]),
    ("patch_embed", {"images": [1]}, "images", ["Tensor", "list"]),
    ("attention_map", {"q": 1}, "q", ["Tensor", "int"]),
    ("flash_attention_varlen", {"q": 1}, "q", ["Tensor", "int"]),
    ("flash_attention", {"is_causal": 1}, "is_causal", ["bool", "int"]),
    ("flash_attention_varlen", {"is_causal": torch.tensor(True)}, "is_causal", ["bool", "Tensor"]),
    ("flash_attention_varlen", {"max_seqlen_q": 5.0}, "max_seqlen_q", ["int", "float"]),
    ("flash_attention_varlen", {"max_seqlen_q": ints([5, 5])}, "max_seqlen_q", ["int", "tensor"]),
    ("attention_map", {"rows": [0.9]}, "rows", ["int", "float"]),
    ("attention_map", {"rows": [True]}, "rows", ["int", "bool"]),
    ("attention_map", {"rows": 1.5}, "rows", ["int", "float"]),
    ("attention_map", {"rows": torch.ones(5, dtype=torch.bool)}, "rows", ["int64", "bool"]),
    ("window_attention", {"num_heads": 2.0}, "num_heads", ["int", "float"]),
    ("window_attention", {"window_size": 3.0}, "window_size", ["pair of ints", "3.0"]),
    ("window_attention", {"window_size": True}, "window_size", ["pair of ints", "True"]),
    ("window_attention", {"bias_table": [[1.0]]}, "bias_table", ["Tensor", "list"]),
    ("patch_embed", {"keep": [[0], [1]]}, "keep", ["Tensor", "list"]),
    ("patch_embed", {"keep": z(2, 1, dtype=torch.int32)}, "keep", ["int64", "int32"]),
    ("patch_embed", {"prefix": [1.0]}, "prefix", ["Tensor", "list"]),
    ("patch_embed", {"mean": [0.5] * 3, "std": z(3)}, "mean", ["Tensor", "list"]),
]
TYPE += [  # integer masks would be added to the scores
    (
        op,
        {"bias": torch.ones(n, 7 if op != "flash_attention_varlen" else 5, dtype=dtype)},
        "bias",
        ["bool, float32", str(dtype)],
    )
    for op, n in (("flash_attention", 5), ("flash_attention_varlen", 5), ("attention_map", 5))
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float64, torch.complex64)
]
TYPE += [
    (op, {"bias": [[0.0]]}, "bias", ["Tensor", "list"])
    for op in ("flash_attention", "flash_attention_varlen", "attention_map")
]


@pytest.mark.parametrize(
    ("error", "op", "changes", "argument", "pieces"),
    [(error, *row) for error, table in ((ValueError, VALUE), (TypeError, TYPE)) for row in table],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(error: type[Exception], op: str, changes: dict[str, Any], argument: str, pieces: list[str]) -> None:
    arguments = {**BASE[op], **changes}
    with pytest.raises(error) as caught:
        getattr(ops, op)(**arguments)
    message = str(caught.value)
    assert message.startswith("backend must" if argument == "backend" else f"{op}: {argument} must"), message
    for piece in pieces:
        assert piece in message, f"{piece!r} not in {message!r}"


@pytest.mark.parametrize("op", [op for op in BASE if op != "linear"])
def test_explain_checks_what_the_call_checks(op: str) -> None:
    """explain has the same arguments, by name, and raises the same errors as the call."""
    assert explain(op, **BASE[op]).call.op == op
    for error, table in ((ValueError, VALUE), (TypeError, TYPE)):
        for name, changes, argument, _ in table:
            if name == op:
                with pytest.raises(error, match=re.escape(argument)):
                    explain(op, **{**BASE[op], **changes})


def test_the_base_calls_are_sound() -> None:
    for op, arguments in BASE.items():
        assert getattr(ops, op)(**arguments).isfinite().all()


def test_explain_refuses_arguments_the_operator_does_not_have() -> None:
    with pytest.raises(TypeError, match="attn_mask"):
        explain("flash_attention", Q, K, K, attn_mask=None)
    with pytest.raises(ValueError, match=r"explain: op must be one of .*flash_attention.*got 'flash'"):
        explain("flash", Q, K, K)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_masks_of_torchs_attention(dtype: torch.dtype) -> None:
    """An accelerated MultiheadAttention refuses integer masks, as torch does."""
    module, x = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 4, 8)
    mask = torch.triu(torch.ones(4, 4), 1)
    for _ in range(2):
        with pytest.raises((AssertionError, RuntimeError, TypeError), match="bool"):
            module(x, x, x, need_weights=False, attn_mask=mask.to(dtype))
        module(x, x, x, need_weights=False, attn_mask=mask.bool())
        accelerate(module)
