"""Self-distillation losses of DINO, iBOT and DINOv2: cross-entropy between a student and a teacher over prototypes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.losses.contrastive import positive
from pyvit.ops import distillation_cross_entropy, koleo, sinkhorn_center


class _Centered(nn.Module):
    """Base of the losses whose teacher scores are centred, to avoid collapse: by a running mean (DINO), or by
    Sinkhorn-Knopp on the batch.

    With prototypes, scores are products that are never stored; the mean score is the score of the mean feature. In
    training mode the running mean is updated in each forward pass. If ``deferred`` is set, it is updated by
    :meth:`update_center`, for training loops that accumulate gradients or may skip a step.
    """

    center: Tensor

    def __init__(
        self, prototypes: int, student_temp: float, momentum: float, centering: str, iterations: int, group: Any
    ) -> None:
        super().__init__()
        if centering not in ("centering", "sinkhorn_knopp"):
            raise ValueError(
                f"{type(self).__name__}: centering must be 'centering' or 'sinkhorn_knopp', got {centering!r}"
            )
        name = type(self).__name__
        if prototypes < 2:
            raise ValueError(f"{name}: prototypes must be at least 2, got {prototypes}")
        positive(f"{name}: student_temp", student_temp)
        if not 0 <= momentum < 1:
            raise ValueError(f"{name}: momentum must be in [0, 1), got {momentum}")
        self.student_temp = student_temp
        self.momentum = momentum
        self.centering = centering
        self.iterations = iterations
        self.group = group
        self.deferred = False
        self._batch_means: list[Tensor] = []
        self._used: Tensor | None = None
        self.register_buffer("center", torch.zeros(prototypes, dtype=torch.float32))

    @torch.no_grad()
    def _center(self, teacher: Tensor, prototypes: Tensor | None, temp: float) -> Tensor:
        """The centre of the teacher's features or scores (M, C), and the update of the running mean."""
        positive(f"{type(self).__name__}: teacher_temp", temp)
        if self.centering == "sinkhorn_knopp":
            self._used = sinkhorn_center(teacher, temp, self.iterations, prototypes=prototypes, group=self.group)
            return self._used
        self._used = used = self.center.clone()
        if self.training:
            with torch.autocast(teacher.device.type, enabled=False):
                rows = _wide(teacher)
                total = torch.cat((rows.sum(0), rows.new_full((1,), rows.shape[0])))
                if self.group is not None:
                    dist.all_reduce(total, group=self.group)
                mean = total[:-1] / total[-1].clamp_min(1)
                self._batch_means.append(mean if prototypes is None else _wide(prototypes) @ mean)
            if not self.deferred:
                self.update_center()
        return used

    @torch.no_grad()
    def teacher_outputs(self, teacher: Tensor, temp: float, prototypes: Tensor | None = None) -> Tensor:
        """The teacher's probabilities (M, K) for scores or features (M, C), with the centre of the last forward
        pass."""
        with torch.autocast(teacher.device.type, enabled=False):
            scores = _wide(teacher) if prototypes is None else _wide(teacher) @ _wide(prototypes).T
            return ((scores - (self.center if self._used is None else self._used)) / temp).softmax(-1)

    @torch.no_grad()
    def update_center(self, keep: bool = True) -> None:
        """Update the running mean with the mean of the scores since the last call; with ``keep`` False, discard these
        scores."""
        if self._batch_means and keep:
            self.center.lerp_(torch.stack(self._batch_means).mean(0).to(self.center.dtype), 1 - self.momentum)
        self._batch_means.clear()


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32, or float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


class DINOLoss(_Centered):
    """Cross-entropy of every student crop with every other teacher crop (Caron et al., 2021).

    Args:
        prototypes: K, 65536 in the paper.
        student_temp, momentum: 0.1 and 0.9. The teacher's temperature is an argument of each call, because it has a
            schedule.
        centering: "centering" (DINO) or "sinkhorn_knopp" (DINOv2), with ``iterations``.
        group: ranks that share a batch.
    """

    def __init__(
        self,
        prototypes: int = 65536,
        student_temp: float = 0.1,
        momentum: float = 0.9,
        centering: str = "centering",
        iterations: int = 3,
        group: Any = None,
    ) -> None:
        super().__init__(prototypes, student_temp, momentum, centering, iterations, group)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        teacher_temp: float,
        *,
        student_prototypes: Tensor | None = None,
        teacher_prototypes: Tensor | None = None,
    ) -> Tensor:
        """student (S, N, C), teacher (T, N, C): scores, or features with prototypes (K, C). The first T student crops
        are the teacher's."""
        s = student.shape[0]
        t = teacher.shape[0]
        n = student.shape[1]
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        pairs = 1 - torch.eye(s, t, dtype=wide, device=student.device)
        if not pairs.any():
            raise ValueError(f"DINOLoss: student must have at least 2 crops if the teacher has a single one, got {s}")
        center = self._center(teacher.flatten(0, 1), teacher_prototypes, teacher_temp)
        return distillation_cross_entropy(
            student,
            teacher,
            self.student_temp,
            teacher_temp,
            center=center,
            student_prototypes=student_prototypes,
            teacher_prototypes=teacher_prototypes,
            weights=(pairs / (pairs.sum() * n))[:, :, None],
        )


class IBOTLoss(_Centered):
    """Cross-entropy of masked patches with the teacher's outputs for them (Zhou et al., 2022).

    Each masked token is weighted by 1 / (masked tokens of its image). The mean is over all images, including those
    without a mask, as in DINOv2's code. Arguments as in :class:`DINOLoss`.
    """

    def __init__(
        self,
        prototypes: int = 65536,
        student_temp: float = 0.1,
        momentum: float = 0.9,
        centering: str = "centering",
        iterations: int = 3,
        group: Any = None,
    ) -> None:
        super().__init__(prototypes, student_temp, momentum, centering, iterations, group)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        teacher_temp: float,
        *,
        student_prototypes: Tensor | None = None,
        teacher_prototypes: Tensor | None = None,
    ) -> Tensor:
        """student, teacher (M, C): the masked tokens of the batch; weights (M,): 1 / (masked tokens of its image) /
        images."""
        if student.shape[0] == 0:
            if self.group is not None:
                self._center(
                    teacher, teacher_prototypes, teacher_temp
                )  # a collective operation: other ranks may have masked tokens
            return student.sum() * 0.0
        center = self._center(teacher, teacher_prototypes, teacher_temp)
        return distillation_cross_entropy(
            student,
            teacher,
            self.student_temp,
            teacher_temp,
            center=center,
            student_prototypes=student_prototypes,
            teacher_prototypes=teacher_prototypes,
            weights=weights[None, None],
        )


class KoLeoLoss(nn.Module):
    """KoLeo of normalised features, in float32 or float64 (Sablayrolles et al., 2019; DINOv2, appendix A). group: ranks
    that share a batch."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D): the class tokens of one crop. Crops of the same image must not be neighbours, so call it once per
        crop."""
        return koleo(F.normalize(_wide(x), dim=-1), group=self.group)
