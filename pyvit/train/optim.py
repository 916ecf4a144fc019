"""Parameter groups: which parameters decay, and how fast each layer learns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.(?:blocks\.(\d+)\.)?")


def no_decay(model: nn.Module) -> set[str]:
    """Full names of the parameters that models under ``model`` exempt from weight decay by ``no_weight_decay()``."""
    found = set()
    for prefix, module in model.named_modules():
        names: Iterable[str] = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()
        found |= {f"{prefix}.{name}" if prefix else name for name in names}
    return found


def layer_of(name: str, stages: list[int] | None, depth: int) -> int:
    """0 for the embedding, i + 1 for block i, depth + 1 for what follows; Swin's blocks count through its stages."""
    found = _BLOCK.search(name)
    if found is None:
        early = any(part in name for part in ("patch_embed", "pos_embed", "cls_token", "reg_token", "mask_token", "norm_pre"))
        return 0 if early else depth + 1
    first, second = int(found[1]), found[2]
    if stages is None:
        return first + 1
    return sum(stages[:first]) + (int(second) if second is not None else 0) + 1


def parameter_groups(model: nn.Module, backbone: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: vectors and exempted parameters without decay; rates ``layer_decay ** (layers above)`` inside ``backbone``.

    Each group carries ``lr_scale`` and ``decays``, which the engine multiplies with the schedules.
    """
    stages = [len(s.blocks) for s in backbone.layers] if hasattr(backbone, "layers") and hasattr(backbone.layers[0], "blocks") else None
    depth = sum(stages) if stages is not None else len(getattr(backbone, "blocks", ()))
    exempt, inside = no_decay(model), {id(p): name for name, p in backbone.named_parameters()}
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.dim() > 1 and name not in exempt
        scale = layer_decay ** (depth + 1 - layer_of(inside[id(p)], stages, depth)) if id(p) in inside and layer_decay != 1 else 1.0
        whole = p.dim() == 0  # apart: FSDP2 shards all others, and an optimizer cannot mix the two kinds in one fused step
        group = groups.setdefault((scale, decays, whole), {"params": [], "lr_scale": scale, "decays": decays})
        group["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step in each matrix is a fixed share of its norm (You et al., 2017), for very large batches.

    Groups with ``decays`` false, biases and norms, take plain steps.
    """

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-6, trust: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "decays": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if group["decays"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    size, slope = p.norm(), update.norm()
                    update = update * torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, torch.ones_like(size))
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum"], alpha=-group["lr"])
