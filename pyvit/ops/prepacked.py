"""Inference on a CPU with prepacked weights: linear layers and residual branches, each in one call of the library.

A prepacked weight is an attribute of the weight, so that it lasts as long and belongs to nothing else. It is in the
order in which ``csrc/cpu/linear.cpp`` multiplies it, or oneDNN where :mod:`pyvit.ops.matmul_rules` prefer that
(processors with AMX). The library compares it with the weight in every call and packs it anew where the weight has
changed. Nothing here is recorded by autograd.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvit import dispatch, library
from pyvit.dispatch.devices import cpu_isa
from pyvit.ops import matmul, matmul_rules
from pyvit.ops.layer_norm import layer_norm
from pyvit.ops.rms_norm import rms_norm
from pyvit.ops.tracing import compiled_inference, traced

#: A layer norm: weight (C,), bias (C,), eps. An RMS norm: weight (C,), eps, which may be None as in
#: :func:`pyvit.ops.rms_norm`.
Norm = tuple[Tensor | None, Tensor | None, float] | tuple[Tensor | None, float | None]

#: What the library is told: no norm, a layer norm, an RMS norm.
NO_NORM, LAYER_NORM, RMS_NORM = range(3)

ATTRIBUTE = "_pyvit_prepacked"


class Branch(NamedTuple):
    """residual + scale * layers(norm(x)): one linear layer, its activation after it, or two, the activation between."""

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


class Prepacked:
    """The packed form of a weight, made for its dtype and shape; with ``parts`` 2, of the two halves of its rows, as
    the gate and the values of a gated MLP are multiplied.

    Attributes:
        form: "pyvit" or "onednn".
        words: of "pyvit" what the library multiplies, a header before it; of "onednn" the header.
        reordered: of "onednn" what oneDNN multiplies.
    """

    __slots__ = ("dtype", "form", "parts", "reordered", "shape", "words")

    def __init__(self, weight: Tensor, form: str, parts: int = 1) -> None:
        self.form, self.parts, self.dtype, self.shape = form, parts, weight.dtype, weight.shape
        self.reordered: Tensor | None = None
        with torch.inference_mode(False), torch.no_grad():
            if form == "pyvit":
                self.words: Tensor = torch.ops.pyvit.prepack_weight.default(weight, parts)
            else:
                self.words = torch.ops.pyvit.prepack_header.default(weight)
                self.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # a copy or a pickle of the weight holds none, and loads without pyvit


def pack(layer: nn.Module, parts: int = 1) -> bool:
    """Prepack the weight of ``layer``, in ``parts`` if it is for a gated MLP; False where no library here can."""
    weight = layer._parameters.get("weight")  # not one that a parametrization computes anew for every call
    if weight is None or weight.is_inference() or not _packable(weight):
        return False
    form = _form(weight)
    if form is None:
        return False
    _warn_of_late_changes()
    setattr(weight, ATTRIBUTE, Prepacked(weight, form, parts))
    return True


@ctypes.CFUNCTYPE(None)
def _changed_late() -> None:
    warnings.warn(
        "pyvit: a packed weight was written to past PyTorch's count of changes (through .data, NumPy or DLPack), so "
        "little of it that only now it was seen: earlier results may be of the old weight. Call "
        "pyvit.pack_weights(model) after such a change.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_of_late_changes() -> None:
    ctypes.CDLL(str(library.PATH)).pyvit_when_changed_late(_changed_late)


def unpack(layer: nn.Module) -> None:
    weight = layer._parameters.get("weight")
    if hasattr(weight, ATTRIBUTE):
        delattr(weight, ATTRIBUTE)


def is_packed(weight: Tensor | None) -> bool:
    return find(weight) is not None


def find(weight: Tensor | None) -> Prepacked | None:
    """The packed form of ``weight``, made anew where the weight has got another dtype or shape; None where there is
    none, or where the weight can no longer be packed."""
    kept = getattr(weight, ATTRIBUTE, None)
    if type(kept) is not Prepacked or weight is None:
        return None
    if kept.dtype is weight.dtype and kept.shape == weight.shape:
        usable = weight.is_contiguous() and weight.is_cpu
        usable = usable and (torch.compiler.is_compiling() or not weight.is_inference())  # which have no version
        return kept if usable else None
    if torch.compiler.is_compiling() or weight.is_inference() or not _packable(weight):
        return None
    form = _form(weight)
    if form is None:
        return None
    kept = Prepacked(weight, form, kept.parts if weight.shape[0] % kept.parts == 0 else 1)
    setattr(weight, ATTRIBUTE, kept)
    return kept


def _packable(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and weight.device.type == "cpu"
    if not plain or weight.dim() != 2 or not weight.is_contiguous() or not weight.data_ptr():
        return False
    # The library tells whether a weight has changed; one below a word is not worth the trouble.
    return library.problem() is None and weight.numel() * weight.element_size() >= 8


def _form(weight: Tensor) -> str | None:
    able, policy = forms(weight.dtype), matmul.policy()
    if policy == "torch":
        return None
    if policy in able:
        return policy
    shape = matmul_rules.Shape(0, *weight.shape)
    return next((name for name in matmul_rules.preference("prepacked", weight.dtype, shape) if name in able), None)


@functools.cache
def forms(dtype: torch.dtype) -> tuple[str, ...]:
    """The forms that weights of ``dtype`` can be packed in here: oneDNN refuses bfloat16 without AVX-512."""
    if library.problem() is not None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return ()
    found = ["pyvit"]
    if matmul.onednn() is not None and dtype != torch.float16:
        try:
            torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype, device="cpu"))
            found.append("onednn")
        except RuntimeError:
            pass
    return tuple(found)


def _words(weight: Tensor | None, parts: int = 1) -> Tensor | None:
    """The packed form of ``weight`` for the library's own kernels, None if it has none. One that is asked for in two
    parts is packed anew where it is whole, and stays so."""
    kept = find(weight)
    if kept is None or weight is None or kept.form != "pyvit":
        return None
    if kept.parts != parts:
        if parts == 1 or torch.compiler.is_compiling() or weight.shape[0] % parts:
            return None
        kept = Prepacked(weight, "pyvit", parts)
        setattr(weight, ATTRIBUTE, kept)
    return kept.words


def inference(x: Tensor, *given: Tensor | None) -> bool:
    """Whether a call with these tensors is inference on a CPU that nothing changes or watches."""
    if (
        torch.is_grad_enabled()
        or not x.is_cpu
        or dispatch.requested_backend() not in (None, "cpu")
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    return not traced(x, *given) or compiled_inference(x, *given)


def linear_branch(x: Tensor, b: Branch) -> Tensor | None:
    """The branch in one call; None where its weights are not prepacked, or where it is more than inference.

    Raises RuntimeError where the tensors do not fit each other.
    """
    weight, bias, activation, weight2, bias2, norm, scale, residual = b
    if weight.dtype is not x.dtype or activation == "" or (words := _words(weight)) is None:
        return None
    words2 = None
    if weight2 is not None and (words2 := _words(weight2)) is None:
        return None
    normed = norm_arguments(norm, x.dtype)
    if not inference(x, weight, bias, weight2, bias2, normed[1], normed[2], scale, residual):
        return None
    layers = (weight, words, bias, activation or "", weight2, words2, bias2)
    return torch.ops.pyvit.prepacked_mlp.default(x, *normed, *layers, scale, residual)  # type: ignore[no-any-return]


def norm_arguments(norm: Norm | None, dtype: torch.dtype) -> tuple[int, Tensor | None, Tensor | None, float]:
    """A norm of rows of ``dtype`` as the library takes it: kind, weight, bias and eps."""
    if norm is None:
        return NO_NORM, None, None, 0.0
    if len(norm) == 3:
        return LAYER_NORM, *norm
    weight, eps = norm
    return RMS_NORM, weight, None, torch.finfo(dtype).eps if eps is None else eps


def gated_branch(
    x: Tensor,
    b: Branch,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gate_last: bool,
    hidden_norm: Norm | None,
) -> Tensor | None:
    """As :func:`linear_branch` for :func:`pyvit.ops.gated_mlp`, in whose words the arguments are."""
    weight, bias, activation, weight2, bias2, norm, scale, residual = b
    if weight.dtype is not x.dtype or not activation or weight2 is None:
        return None
    if (words := _words(weight, 2 if gate_weight is None else 1)) is None or (words2 := _words(weight2)) is None:
        return None
    gate_words = None
    if gate_weight is not None and (gate_words := _words(gate_weight)) is None:
        return None
    if (gate_weight is None and gate_bias is not None) or (gate_weight is not None and gate_last):
        return None  # which the caller refuses
    normed, within = norm_arguments(norm, x.dtype), norm_arguments(hidden_norm, x.dtype)
    around = (normed[1], normed[2], within[1], within[2], scale, residual)
    if not inference(x, weight, bias, gate_weight, gate_bias, weight2, bias2, *around):
        return None
    gate = (gate_weight, gate_words, gate_bias, gate_last, activation)
    return torch.ops.pyvit.prepacked_gated_mlp.default(  # type: ignore[no-any-return]
        x, *normed, weight, words, bias, *gate, *within, weight2, words2, bias2, scale, residual
    )


def attention_branch(
    x: Tensor,
    qkv: nn.Linear,
    proj: nn.Linear,
    num_heads: int,
    is_causal: bool,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor | None:
    """residual + scale * proj(attention(qkv(norm(x)))) for x (B, N, C), as :func:`linear_branch`."""
    if x.dim() != 3 or (layers := _layers(x, qkv, proj, norm, scale, residual)) is None:
        return None
    first, last = layers
    if first[0].shape[0] > 3 * 256 * num_heads:  # channels per head, of which the kernels take 256
        return None
    return torch.ops.pyvit.prepacked_attention.default(  # type: ignore[no-any-return]
        x, *norm_arguments(norm, x.dtype), *first, num_heads, is_causal, *last, scale, residual
    )


def window_attention_branch(
    x: Tensor,
    qkv: nn.Linear,
    proj: nn.Linear,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    num_heads: int,
    bias_table: Tensor,
    mask_padding: bool,
    norm: Norm | None,
    scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor | None:
    """residual + scale * proj(window_attention(qkv(norm(x)))) for x (B, H, W, C), as :func:`linear_branch`."""
    if x.dim() != 4 or not x.shape[1] > 0 or not x.shape[2] > 0:
        return None
    if (layers := _layers(x, qkv, proj, norm, scale, residual)) is None:
        return None
    first, last = layers
    windows = (window_size, shift_size, num_heads, bias_table, mask_padding)
    return torch.ops.pyvit.prepacked_window_attention.default(  # type: ignore[no-any-return]
        x, *norm_arguments(norm, x.dtype), *first, *windows, *last, scale, residual
    )


def _layers(
    x: Tensor, qkv: nn.Linear, proj: nn.Linear, norm: Norm | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Weight, packed weight and bias of both layers; None where :func:`linear_branch` would give None."""
    first, last = qkv._parameters, proj._parameters  # __getattr__ of a module takes half a microsecond
    weight, weight2, bias, bias2 = first["weight"], last["weight"], first["bias"], last["bias"]
    if (words := _words(weight)) is None or (words2 := _words(weight2)) is None:
        return None
    if weight.dtype is not x.dtype or weight2.dtype is not x.dtype:  # type: ignore[union-attr]
        return None
    if x.shape[-1] != weight.shape[1]:  # type: ignore[union-attr]  # the layers say so in the words of linear
        return None
    _, norm_weight, norm_bias, _ = norm_arguments(norm, x.dtype)
    if not inference(x, weight, weight2, bias, bias2, norm_weight, norm_bias, scale, residual):
        return None
    return (weight, words, bias), (weight2, words2, bias2)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x weight^T + bias) by oneDNN's packed form if there is one, else by the product of the rules."""
    kept = find(weight) if weight.dtype == x.dtype else None
    if kept is None or kept.form != "onednn":
        return matmul.forward(x, weight, bias, activation)
    with _reordering:  # no thread may take a form that another one is about to replace
        if not torch.ops.pyvit.is_prepacked.default(weight, kept.words):
            kept.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        reordered = kept.reordered
    assert reordered is not None
    return matmul.by_onednn(x, reordered, bias, activation)


_reordering = threading.Lock()


def around(x: Tensor, layers: Callable[[Tensor], Tensor], branch: Branch, backend: str | None = None) -> Tensor:
    """residual + scale * layers(norm(x)), a step at a time; of autocast's dtype between norm and layers."""
    if branch.norm is not None:
        kind = x.device.type
        cast = x.dtype == torch.float32 and kind == "cpu" and torch.is_autocast_enabled(kind)
        x = normalize(x, branch.norm, torch.get_autocast_dtype(kind) if cast else None, backend)
    y = layers(x)
    if branch.scale is not None:
        y = y * branch.scale
    return y if branch.residual is None else branch.residual + y


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """norm(x) by :func:`pyvit.ops.layer_norm` or :func:`pyvit.ops.rms_norm`."""
    if len(norm) == 3:
        return layer_norm(x, *norm, dtype=dtype, backend=backend)
    return rms_norm(x, *norm, dtype=dtype, backend=backend)


def explain(x: Tensor, branch: Branch) -> list[str]:
    """How a call whose weights are prepacked is computed, for :func:`pyvit.explain`."""
    kept = [find(w) for w in (branch.weight, branch.weight2) if w is not None and w.dtype == x.dtype]
    names = [each.form for each in kept if each is not None]
    if not names or len(names) < (1 if branch.weight2 is None else 2):
        return []
    why = "PYVIT_LINEAR" if matmul.policy() == names[0] else f"by rule for {cpu_isa(x.dtype)}"
    return [f"weights kept packed: {names[0]} ({why})"]


if library.problem() is None:

    @torch.library.register_fake("pyvit::prepacked_mlp")
    def _fake_mlp(x: Tensor, _n: Any, _w: Any, _b: Any, _e: Any, weight: Tensor, *rest: Any) -> Tensor:
        weight2 = rest[3]
        return x.new_empty(*x.shape[:-1], (weight if weight2 is None else weight2).shape[0])

    @torch.library.register_fake("pyvit::prepacked_gated_mlp")
    def _fake_gated_mlp(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[16].shape[0])

    @torch.library.register_fake("pyvit::prepacked_attention")
    def _fake_attention(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[9].shape[0])

    @torch.library.register_fake("pyvit::prepacked_window_attention")
    def _fake_window(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[12].shape[0])
