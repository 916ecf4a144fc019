"""Fine-tuning: layer-wise learning rates, and freezing."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def layer_of(name: str, depths: list[int]) -> int:
    """Depth of a parameter by its name: 0 for the embedding, 1 to n for the blocks, n + 1 for what follows.

    ``depths`` are the numbers of blocks per stage; a ViT has one stage.
    """
    residual = re.match(r"layer(\d)\.(\d+)\.", name)
    if residual:
        return sum(depths[: int(residual[1]) - 1]) + int(residual[2]) + 1
    if len(depths) > 1 and re.match(r"(conv|bn)\d\.", name):  # the stem of a ResNet
        return 0
    staged = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", name)
    if staged:
        stage, block = int(staged[1]), staged[2]
        return sum(depths[:stage]) + int(block or 0) + 1
    plain = re.match(r"blocks\.(\d+)\.", name)
    if plain:
        return int(plain[1]) + 1
    embedding = ("cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "norm_pre")
    return 0 if name.startswith(embedding) else sum(depths) + 1


def depths_of(model: nn.Module) -> list[int]:
    """Blocks per stage of a ViT, Swin or ResNet. Raises TypeError for another model."""
    if hasattr(model, "layer4"):
        return [len(getattr(model, f"layer{i}")) for i in range(1, 5)]  # type: ignore[arg-type]
    if hasattr(model, "layers"):
        return [len(stage.blocks) for stage in model.layers]  # type: ignore[union-attr, arg-type]
    if hasattr(model, "blocks"):
        return [len(model.blocks)]  # type: ignore[arg-type]
    raise TypeError(
        "depths_of: model must have blocks (ViT), layers of blocks (Swin) or layer1 to layer4 (ResNet), got "
        f"{type(model).__name__}"
    )


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Optimizer groups with layer-wise learning rates: lr * layer_decay^(n - l) for layer l of n (Clark et al.,
    "ELECTRA", 2020; Bao et al., "BEiT", 2022).

    Biases, norms and the parameters of the model's ``no_weight_decay()`` have no weight decay. Frozen parameters are
    left out. Each group also has ``lr_scale`` and ``layer``, for schedules.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"param_groups: layer_decay must be in (0, 1], got {layer_decay}")
    depths = depths_of(model)
    last = sum(depths) + 1
    exempt = set(getattr(model, "no_weight_decay", set)())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        layer, decays = layer_of(name, depths), p.dim() > 1 and name not in exempt
        scale = layer_decay ** (last - layer)
        start = {
            "params": [],
            "lr": lr * scale,
            "lr_scale": scale,
            "weight_decay": weight_decay if decays else 0.0,
            "layer": layer,
        }
        groups.setdefault((layer, decays), start)["params"].append(p)
    return list(groups.values())


def freeze(model: nn.Module, layers: int | None = None) -> list[str]:
    """Freeze the embedding and the first ``layers`` blocks; None freezes all but the head. Returns the names of the
    frozen parameters.

    0 freezes only the embedding.
    """
    depths = depths_of(model)
    if layers is not None and not 0 <= layers <= sum(depths):
        raise ValueError(f"freeze: layers must be in 0..{sum(depths)}, got {layers}")
    frozen = []
    for name, p in model.named_parameters():
        if not name.startswith("head") if layers is None else layer_of(name, depths) <= layers:
            p.requires_grad_(False)
            frozen.append(name)
    return frozen
