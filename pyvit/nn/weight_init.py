"""Initial weights of linear layers."""

from __future__ import annotations

from torch import nn

_SCHEMES = {"normal": lambda weight: nn.init.trunc_normal_(weight, std=0.02), "xavier": nn.init.xavier_uniform_}


def init_linears(model: nn.Module, scheme: str = "normal") -> None:
    """Initialise all linear layers of ``model``, with zero biases.

    "normal" is a truncated normal distribution of standard deviation 0.02, as in ViT, DeiT and Swin. It suits widths of
    384 and more. "xavier" (Glorot and Bengio, 2010) has a standard deviation of ``sqrt(2 / (inputs + outputs))``, which
    is larger for narrow layers: networks of width 96 learn faster with it.

    Raises ValueError for another ``scheme``.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"weight_init must be one of {', '.join(map(repr, _SCHEMES))}, got {scheme!r}")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _SCHEMES[scheme](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
