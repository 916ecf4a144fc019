"""Parameter groups (weight decay, layer-wise learning rates), and the optimizers LARS, LAMB and Muon."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pyvit.models.finetune import depths_of, layer_of
from pyvit.train.config import Config


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

    Each group has ``lr_scale``, ``decays`` and ``schedule``, which the engine combines with the schedules, and
    ``matrices``, see :class:`Muon`. Raises TypeError for a ``layer_decay`` below 1 if the backbone has no layers.
    """
    depths = depths_of(backbone) if layer_decay != 1 else []
    exempt = no_decay(model) if exempt is None else exempt
    inside = {id(p): name for name, p in backbone.named_parameters()}
    groups: dict[tuple[float, bool, bool, str, int], dict[str, Any]] = {}
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
        matrices = _matrices(name) if decays and p.dim() == 2 else 0
        new = {"params": [], "lr_scale": scale, "decays": decays, "schedule": schedule, "matrices": matrices}
        group = groups.setdefault((scale, decays, scalar, schedule, matrices), new)
        group["params"].append(p)
    return list(groups.values())


def _matrices(name: str) -> int:
    """How many matrices a layer's weight holds: 0 outside of numbered layers (embeddings, outputs), 3 for queries,
    keys and values."""
    return (3 if re.search(r"qkv|in_proj", name) else 1) if re.search(r"\.\d+\.", name) else 0


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
                    update = update * _trust_ratio(p, update, group["trust"])
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(state["momentum"])


class LAMB(torch.optim.Optimizer):
    """Adam whose step for each tensor is scaled to the tensor's norm, for very large batches (You et al., "Large Batch
    Optimization for Deep Learning", 2020, algorithm 2).

    Groups with ``decays`` false have no weight decay and take plain Adam steps. Gradients are not clipped.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decays": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = _adam(self.state[p], p.grad, group["betas"], group["eps"])
                if group["decays"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    update = update * _trust_ratio(p, update)
                p.add_(update, alpha=-group["lr"])


class Muon(torch.optim.Optimizer):
    """Momentum whose step for each matrix is replaced by the nearest orthogonal matrix, for the hidden layers' weights;
    AdamW for all other parameters (Jordan et al., "Muon", 2024).

    Orthogonal steps are scaled to the mean square of AdamW's, so that learning rate and weight decay are those of AdamW
    (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2).

    Groups with ``matrices`` n > 0 hold weights (n * rows, columns) of n matrices each; 0 is for AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**given, "matrices": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if not group["matrices"]:
                    p.add_(_adam(self.state[p], p.grad, group["betas"], group["eps"]), alpha=-group["lr"])
                    continue
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])  # Nesterov's
                shapes.setdefault(p.shape, []).append((p, update))
            for shape, found in shapes.items():
                rows, columns = shape[0] // group["matrices"], shape[1]
                stacked = torch.stack([update for _, update in found]).view(-1, rows, columns)
                steps = orthogonal(stacked).mul_(0.2 * max(rows, columns) ** 0.5).view(len(found), *shape)
                for (p, _), update in zip(found, steps, strict=True):
                    p.add_(update, alpha=-group["lr"])


def orthogonal(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices of (B, rows, columns), approximately: singular values become 0.7 to 1.2.

    A Newton-Schulz iteration with the coefficients of Jordan et al. (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if matrices.shape[1] > matrices.shape[2] else x


def _adam(state: dict[str, Any], gradient: torch.Tensor, betas: tuple[float, float], eps: float) -> torch.Tensor:
    """Adam's step for one parameter, without its learning rate."""
    if "step" not in state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    (beta1, beta2), n, mean, square = betas, int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return (mean / (1 - beta1**n)) / ((square / (1 - beta2**n)).sqrt() + eps)


def _trust_ratio(p: torch.Tensor, update: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """``factor`` times the norm of the parameter over that of its update; 1 if one of them is zero."""
    weight_norm, update_norm = p.norm(), update.norm()
    nonzero = (weight_norm > 0) & (update_norm > 0)
    return torch.where(nonzero, factor * weight_norm / update_norm, torch.ones_like(weight_norm))


def make_optimizer(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """The optimizer of a resolved ``config`` for parameter groups."""
    lr, momentum, betas = config.lr or 0.0, config.momentum or 0.0, (config.beta1 or 0.0, config.beta2 or 0.0)
    if config.optimizer == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if config.optimizer == "lamb":
        return LAMB(groups, lr=lr, betas=betas, eps=config.eps or 0.0)
    if config.optimizer == "muon":
        return Muon(groups, lr=lr, momentum=momentum, betas=betas, eps=config.eps or 0.0)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps or 0.0)
