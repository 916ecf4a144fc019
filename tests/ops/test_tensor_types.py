"""Arguments that are not dense real tensors: every operator raises an error that names the argument and says what to
use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyvit import BackendError, ops

X = torch.randn(4, 8)
KINDS: dict[str, Callable[[], Any]] = {
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], layout=torch.strided),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "mkldnn": lambda: torch.randn(4, 8).to_mkldnn(),
    "quantised": lambda: torch.quantize_per_tensor(X, 1.0, 0, torch.qint8),
    "complex": lambda: X + 0j,
    "numpy": X.numpy,
    "list": X.tolist,
    "None": lambda: None,
}
#: For each operator, a call with the first argument and one with another.
CALLS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "flash_attention": (
        lambda t: ops.flash_attention(t, t, t),
        lambda t: ops.flash_attention(X[None, None], t, X[None, None]),
    ),
    "flash_attention_qkvpacked": (
        ops.flash_attention_qkvpacked,
        lambda t: ops.flash_attention_qkvpacked(X.view(1, 1, 2, 2, 8), bias=t),
    ),
    "flash_attention_varlen": (
        lambda t: ops.flash_attention_varlen(t, t, t, X, X, 1, 1),
        lambda t: ops.flash_attention_varlen(X[None], X[None], X[None], t, t, 1, 1),
    ),
    "attention_map": (lambda t: ops.attention_map(t, X, 0), lambda t: ops.attention_map(X[None, None], t, 0)),
    "scaled_dot_product_attention": (
        lambda t: ops.scaled_dot_product_attention(t, t, t),
        lambda t: ops.scaled_dot_product_attention(X, X, t),
    ),
    "window_attention": (
        lambda t: ops.window_attention(t, 2, num_heads=2),
        lambda t: ops.window_attention(
            torch.randn(1, 2, 2, 48), 2, num_heads=2, bias_table=t if t is not None else [1]
        ),
    ),
    "patch_embed": (lambda t: ops.patch_embed(t, X), lambda t: ops.patch_embed(torch.randn(1, 3, 4, 4), t)),
    "layer_norm": (ops.layer_norm, lambda t: ops.layer_norm(X, t if t is not None else [1])),
    "rms_norm": (ops.rms_norm, lambda t: ops.rms_norm(X, t if t is not None else [1])),
    "linear": (lambda t: ops.linear(t, X), lambda t: ops.linear(X, X, t if t is not None else [1])),
    "mlp": (lambda t: ops.mlp(t, X, None, X.t(), None), lambda t: ops.mlp(X, X, None, t, None)),
    "gated_mlp": (
        lambda t: ops.gated_mlp(t, X, None, X.t(), None, gate_weight=X),
        lambda t: ops.gated_mlp(X, X, None, X.t(), None, gate_weight=t if t is not None else [1]),
    ),
    "info_nce": (lambda t: ops.info_nce(t, X, 1.0), lambda t: ops.info_nce(X, t, 1.0)),
    "nt_xent": (lambda t: ops.nt_xent(t, X, 1.0), lambda t: ops.nt_xent(X, t, 1.0)),
    "sigmoid_contrastive": (
        lambda t: ops.sigmoid_contrastive(t, X, 1.0, 1.0),
        lambda t: ops.sigmoid_contrastive(X, t, 1.0, 1.0),
    ),
    "koleo": (ops.koleo, ops.koleo),
    "sinkhorn_knopp": (lambda t: ops.sinkhorn_knopp(t, 1.0), lambda t: ops.sinkhorn_knopp(t, 1.0, 0)),
    "distillation_cross_entropy": (
        lambda t: ops.distillation_cross_entropy(t, X, 1.0, 1.0),
        lambda t: ops.distillation_cross_entropy(X, t, 1.0, 1.0),
    ),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.jagged layout:UserWarning", "ignore:Sparse CSR:UserWarning", "ignore:.*nested:UserWarning"
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:.*quantiz.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_refused_by_name(name: str, kind: str) -> None:
    for call in CALLS[name]:
        if kind == "None" and (name, call) == ("flash_attention_qkvpacked", CALLS[name][1]):
            continue  # no bias
        with pytest.raises((TypeError, ValueError), match=r"^[a-z_]+: [a-z0-9_, ]+ must ") as caught:
            call(KINDS[kind]())
        words = {
            "jagged": "nested|jagged|shape",
            "sparse": "sparse|shape",
            "csr": "csr|shape",
            "mkldnn": "mkldnn|shape",
        }
        assert caught.match(words.get(kind, "."))


def _meta(call: Callable[[Any], Any], t: Tensor) -> None:
    assert call(t).is_meta


def test_a_device_without_kernels_is_served_by_pytorch() -> None:
    """As MPS and XPU are. A kernel that is asked for by name says that it does not run there."""
    x, heads = X.to("meta"), torch.randn(1, 2, 4, 8, device="meta")
    _meta(lambda t: ops.flash_attention(t, t, t), heads)
    _meta(lambda t: ops.scaled_dot_product_attention(t, t, t), heads)
    _meta(lambda t: ops.attention_map(t, t, 0), heads)
    _meta(lambda t: ops.window_attention(t, 2, num_heads=2), torch.randn(1, 4, 4, 48, device="meta"))
    _meta(lambda t: ops.patch_embed(t, torch.randn(5, 3, 4, 4, device="meta")), torch.randn(1, 3, 8, 8, device="meta"))
    _meta(ops.layer_norm, x)
    _meta(ops.rms_norm, x)
    _meta(lambda t: ops.linear(t, t), x)
    _meta(lambda t: ops.info_nce(t, t, 1.0), x)
    _meta(ops.koleo, x)
    with pytest.raises(BackendError, match="'cpu' cannot serve this call: runs on cpu tensors, got meta"):
        ops.flash_attention(heads, heads, heads, backend="cpu")
