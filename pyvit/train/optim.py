"""Parameter groups: which parameters decay, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pyvit.models.finetune import depths_of, layer_of


def no_decay(model: nn.Module) -> set[str]:
    """Full names of the parameters that models under ``model`` exempt from weight decay by ``no_weight_decay()``."""
    found = set()
    for prefix, module in model.named_modules():
        names: Iterable[str] = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        found |= {f"{prefix}.{name}" if prefix else name for name in names}
    return found


def parameter_groups(
    model: nn.Module, backbone: nn.Module, layer_decay: float, rate_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups for AdamW: vectors and exempted parameters without decay; rates ``layer_decay ** (layers above)`` inside
    ``backbone``.

    ``rate_scales``: factors on the rate of the backbone's parameters whose name contains the key. Each group carries
    ``lr_scale`` and ``decays``, which the engine multiplies with the schedules. Raises TypeError for a ``layer_decay``
    below 1 on a backbone without layers.
    """
    depths = depths_of(backbone) if layer_decay != 1 else []
    exempt, inside = no_decay(model), {id(p): name for name, p in backbone.named_parameters()}
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays, scale, place = p.dim() > 1 and name not in exempt, 1.0, inside.get(id(p))
        if place is not None:
            scale = layer_decay ** (sum(depths) + 1 - layer_of(place, depths)) if depths else 1.0
            for part, factor in (rate_scales or {}).items():
                scale *= factor if part in place else 1.0
        whole = (
            p.dim() == 0
        )  # apart: FSDP2 shards all others, and an optimizer cannot mix the two kinds in one fused step
        group = groups.setdefault((scale, decays, whole), {"params": [], "lr_scale": scale, "decays": decays})
        group["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step in each matrix is a fixed share of its norm (You et al., 2017), for very large
    batches.

    Vectors, biases and norms, take plain steps; groups with ``decays`` false do not decay.
    """

    def __init__(
        self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-6, trust: float = 1e-3
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "decays": True}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if group["decays"]:
                    update = update.add(p, alpha=group["weight_decay"])
                if p.dim() > 1:
                    size, slope = p.norm(), update.norm()
                    update = update * torch.where(
                        (size > 0) & (slope > 0), group["trust"] * size / slope, torch.ones_like(size)
                    )
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum"], alpha=-group["lr"])
