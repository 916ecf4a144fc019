"""Signs of collapse: the rank of the features, and in self-distillation the entropy of the teacher's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

#: Images of a micro-batch whose outputs are examined.
ROWS = 64

#: Outputs are nearly the same for all images below this share of the largest possible mutual information. A run of
#: DINO that learns the digits is at 0.3.
SHARE = 0.05


@torch.no_grad()
def entropies(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy of probabilities (B, K), and the entropy of their mean, in nats.

    Their difference is the mutual information of images and prototypes: 0 if all images get the same output.
    """
    return torch.special.entr(outputs).sum(-1).mean(), torch.special.entr(outputs.mean(0)).sum()


@torch.no_grad()
def feature_rank(features: Tensor) -> Tensor:
    """Effective rank of features (B, D): exp of the entropy of their normalised singular values, 1 to min(B, D).

    Garrido et al., "RankMe" (2023), equation 1.
    """
    x = features.cpu().double()
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(values / values.sum().clamp_min(1e-300)).sum().exp()


class CollapseDetector:
    """Finds teachers that give all images the same output.

    Both kinds of collapse are found (Caron et al., 2021, section 5.3): uniform outputs, to which centring alone leads,
    and a single prototype, to which sharpening alone leads.

    Args:
        prototypes: outputs of the head.
        rows: images whose outputs are compared.
    """

    def __init__(self, prototypes: int, rows: int) -> None:
        self.most = math.log(prototypes)
        self.least = SHARE * math.log(max(min(rows, prototypes), 1))
        self.steps = 0
        self.told = False

    def warning(self, values: Mapping[str, float], patience: int) -> str:
        """A warning once all outputs were the same for ``patience`` steps in a row, or "". ``values`` has
        teacher_entropy and batch_entropy of a step."""
        entropy, of_mean = values["teacher_entropy"], values["batch_entropy"]
        self.steps = self.steps + 1 if of_mean - entropy < self.least else 0
        if self.told or self.steps < patience:
            return ""
        self.told = True
        if entropy > self.most / 2:
            kind, advice = "near the uniform distribution", "a lower teacher_temp or a longer freeze_last may help"
        else:
            kind, advice = "on few prototypes", "a higher teacher_temp or centering=sinkhorn_knopp may help"
        return (
            f"collapse: for {self.steps} steps the teacher's outputs were nearly the same for all images, {kind} "
            f"(entropy {entropy:.3f}, at most {self.most:.3f}); {advice}"
        )
