"""Parameter groups (weight decay, layer-wise learning rates) and LARS."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pyvit.models.finetune import depths_of, layer_of


def no_decay(model: nn.Module) -> set[str]:
    """Full names of the parameters that ``no_weight_decay()`` of a submodule exempts from weight decay."""
    found = set()
    for prefix, module in model.named_modules():
        names: Iterable[str] = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        found |= {f"{prefix}.{name}" if prefix else name for name in names}
    return found


def parameter_groups(
    model: nn.Module,
    backbone: nn.Module,
    layer_decay: float,
    rate_scales: Mapping[str, float] | None = None,
    exempt: Collection[str] | None = None,
    own_rates: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups: no weight decay for vectors and exempt parameters; inside ``backbone``, learning rates times
    ``layer_decay ** (layers above)``.

    Args:
        rate_scales: factors on the learning rate of backbone parameters whose name contains the key.
        exempt: full names of the exempt parameters, by default those of :func:`no_decay`.
        own_rates: {full name: schedule} of the parameters that do not follow the schedule "lr".

    Each group has ``lr_scale``, ``decays`` and ``schedule``, which the engine combines with the schedules. Raises
    TypeError for a ``layer_decay`` below 1 if the backbone has no layers.
    """
    depths = depths_of(backbone) if layer_decay != 1 else []
    exempt = no_decay(model) if exempt is None else exempt
    inside = {id(p): name for name, p in backbone.named_parameters()}
    groups: dict[tuple[float, bool, bool, str], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.dim() > 1 and name not in exempt
        scale = 1.0
        backbone_name = inside.get(id(p))
        if backbone_name is not None:
            scale = layer_decay ** (sum(depths) + 1 - layer_of(backbone_name, depths)) if depths else 1.0
            for key, factor in (rate_scales or {}).items():
                scale *= factor if key in backbone_name else 1.0
        # FSDP2 does not shard scalars, and a fused optimizer step cannot mix sharded and unsharded parameters.
        scalar = p.dim() == 0
        schedule = (own_rates or {}).get(name, "lr")
        new = {"params": [], "lr_scale": scale, "decays": decays, "schedule": schedule}
        group = groups.setdefault((scale, decays, scalar, schedule), new)
        group["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for each matrix is proportional to the matrix's norm (You et al., 2017), for very
    large batches.

    Vectors (biases and norms) take plain SGD steps. Groups with ``decays`` false have no weight decay. The momentum
    accumulates steps, each with the learning rate of its time.
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
                    weight_norm, update_norm = p.norm(), update.norm()
                    ratio = group["trust"] * weight_norm / update_norm
                    nonzero = (weight_norm > 0) & (update_norm > 0)
                    update = update * torch.where(nonzero, ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(state["momentum"])
