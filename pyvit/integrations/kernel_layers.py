"""Layers for ``kernels.kernelize``: the forwards of transformers' attention and MLP, and of ``torch.nn.LayerNorm``.

``kernelize`` puts the forward of one of these classes in place of a module's own; the module keeps its parameters. The
class must have nothing but this forward, with the parameters of the forward that it replaces.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvit.ops import layer_norm, linear, mlp, scaled_dot_product_attention

#: By class name, which transformers gives its activations' modules.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
}


def _plain(*layers: Any) -> bool:
    """Whether the weights of these layers may be used without calling them: no adapters, hooks or replaced forwards."""
    return all(
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in vars(layer)
        for layer in layers
    )


def _project(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias) if _plain(layer) else layer(x)


class LayerNorm(nn.Module):
    """``torch.nn.LayerNorm`` over the last dimension."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1:
            return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return layer_norm(input, self.weight, self.bias, self.eps)


class MLP(nn.Module):
    """``ViTMLP``, ``CLIPMLP``, ``SiglipMLP`` and others of layers ``fc1``, ``activation_fn`` and ``fc2``."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        name = _ACTIVATIONS.get(type(self.activation_fn).__name__)
        if name is None or not _plain(self.fc1, self.fc2):
            return _project(self.fc2, self.activation_fn(_project(self.fc1, hidden_states)))
        fc1, fc2 = self.fc1, self.fc2
        return mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=name)


class Attention(nn.Module):
    """``ViTAttention``, ``Dinov2Attention``, ``CLIPAttention``, ``SiglipAttention`` and others of layers ``q_proj``,
    ``k_proj``, ``v_proj`` and ``o_proj`` or ``out_proj``, as with ``attn_implementation="sdpa"``.

    hidden_states (B, N, C), attention_mask any broadcast of (B, H, N, N) -> (B, N, C) and None: there are no attention
    weights. Raises ValueError for sequence lengths of packed inputs.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        for name in ("cu_seqlens", "cu_seq_lens_q", "position_embeddings", "softcap", "s_aux"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"pyvit's Attention layer does not support {name}; leave this model's attention as it is"
                )
        q, k, v = (
            _project(layer, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, N, D)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        causal = self.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
        dropout = self.attention_dropout if hasattr(self, "attention_dropout") else self.dropout
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attention_mask,
            dropout if self.training else 0.0,
            bool(causal and attention_mask is None),
            scale=self.scaling if hasattr(self, "scaling") else self.scale,
            enable_gqa=True,
        )
        out = out.transpose(1, 2).flatten(2)
        return _project(self.o_proj if hasattr(self, "o_proj") else self.out_proj, out), None


__all__ = ["MLP", "Attention", "LayerNorm"]
