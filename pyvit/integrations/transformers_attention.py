"""pyvit's attention under transformers' ``attn_implementation``: "pyvit" and "pyvit_flash".

``import pyvit.integrations.transformers`` registers both, each with the masks that it takes. "pyvit" has the semantics
of transformers' "sdpa". "pyvit_flash" has those of "flash_attention_2": transformers gives only names that contain
"flash" the sequence lengths of packed images, and padding masks (B, N) in place of dense ones.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as flash_utils

from pyvit.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, refuse
from pyvit.ops import scaled_dot_product_attention

Result = tuple[Tensor, None]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """transformers' ``sdpa_attention_forward`` on pyvit's kernels.

    Args:
        module: the attention layer; its ``is_causal`` holds if the call does not say.
        query: (B, H, Nq, D).
        key, value: (B, Hkv, Nk, D) and (B, Hkv, Nk, Dv); Hkv divides H.
        attention_mask: bool or float, any broadcast of (B, H, Nq, Nk); a float mask gets its gradient.
        dropout, scaling, is_causal: as in ``F.scaled_dot_product_attention``. Causality needs more than one query and
            no mask: transformers' masks contain it.
        position_bias: added to the scores beside the mask, with a gradient.
        kwargs: sequence lengths of packed inputs without a mask go to :func:`packed_attention`. A soft cap and
            attention sinks are refused.

    Returns out (B, Nq, H, Dv) and None: there are no attention weights, also where ``output_attentions`` asks for them.

    Raises ValueError for an option that is not supported, and what :func:`pyvit.ops.scaled_dot_product_attention`
    raises.
    """
    refuse("pyvit", **{name: kwargs.get(name) for name in ("softcap", "s_aux")})
    if attention_mask is None and position_bias is None and kwargs.get("cu_seq_lens_q") is not None:
        return packed_attention(module, query, key, value, None, dropout, scaling, is_causal=is_causal, **kwargs)
    _warn_of_weights(kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)
    if causal and key.shape[2] > query.shape[2]:  # the rest of a static cache, which is empty yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    mask = attention_mask
    if position_bias is not None and mask is not None:
        lowest = torch.finfo(key.dtype).min
        mask = torch.where(mask, position_bias, lowest) if mask.dtype == torch.bool else position_bias + mask
    elif position_bias is not None:
        mask = position_bias
    out = scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """transformers' ``flash_attention_forward`` on pyvit's kernels, in float32 too.

    Args:
        attention_mask: padding (B, Nk), 0 or False at tokens that nobody attends to. Dense masks and ``position_bias``,
            which other flash attention has not, go to :func:`attention`.
        is_causal: aligned to the last query and key, as in flash attention.
        kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (S + 1,), ``max_length_q`` and ``max_length_k``: the sequences
            that are packed in the tokens of a batch of 1; or ``position_ids``, from which transformers finds them.

    The other arguments and the result are those of :func:`attention`. Packed and padded sequences have no dropout.
    """
    refuse("pyvit_flash", softcap=softcap, s_aux=s_aux)
    dense = attention_mask is not None and attention_mask.dim() != 2
    if dense or kwargs.get("position_bias") is not None:
        refuse("pyvit_flash with a dense mask or a position bias", cu_seq_lens_q=kwargs.get("cu_seq_lens_q"))
        return attention(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    _warn_of_weights(kwargs)
    out = flash_utils._flash_attention_forward(
        query.transpose(1, 2),  # (B, N, H, D)
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=bool(module.is_causal if is_causal is None else is_causal),
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        attn_implementation="pyvit_flash",
        **kwargs,
    )
    return out, None


def _warn_of_weights(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        transformers.utils.logging.get_logger("transformers").warning_once(
            "pyvit's attention returns no attention weights; set attn_implementation='eager' to get them"
        )


def register() -> None:
    """Register "pyvit" and "pyvit_flash" with transformers. Calling it again changes nothing.

    Nothing is registered with a transformers that is too old to have these interfaces.
    """
    if not hasattr(transformers, "AttentionMaskInterface"):
        return
    from transformers.masking_utils import flash_attention_mask, sdpa_mask

    for name, function, mask in (
        ("pyvit", attention, sdpa_mask),
        ("pyvit_flash", packed_attention, flash_attention_mask),
    ):
        transformers.AttentionInterface.register(name, function)
        transformers.AttentionMaskInterface.register(name, mask)
    chooser = getattr(flash_utils, "_lazy_imports", None)  # a private name of transformers
    if chooser is not None and chooser.__module__ != __name__:
        flash_utils._lazy_imports = _with_pyvit(chooser)


def _with_pyvit(lazy_imports: Any) -> Any:
    """transformers' choice of the functions behind a name with "flash", which otherwise knows only flash_attn's
    packages and the Hub's kernels."""

    def choose(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != "pyvit_flash":
            return lazy_imports(implementation, *args, **kwargs)
        cache = (None,) if hasattr(flash_utils, "_flash_with_kvcache_fn") else ()  # for paged keys and values
        return flash_attn_func, flash_attn_varlen_func, *cache, flash_utils._pad_input, flash_utils._unpad_input

    return choose
