"""Self-distillation without labels (Caron et al., 2021)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.eval.features import embed
from pyvit.losses import DINOLoss
from pyvit.train import augment, schedules
from pyvit.train.config import Config
from pyvit.train.heads import PrototypeHead
from pyvit.train.rank_norm import RankNorm
from pyvit.train.recipe import Recipe, Views, build, initialise


class DINO(Recipe):
    """The student sees every crop, the teacher the two global ones; the teacher is the student's moving average."""

    defaults: ClassVar[dict[str, Any]] = {"epochs": 100, "batch_size": 1024, "weight_decay": 0.04, "warmup": 0.1, "clip": 3.0}
    options: ClassVar[dict[str, Any]] = {
        "prototypes": 65536,
        "hidden": 2048,
        "bottleneck": 256,
        "batch_norm": False,
        "student_temp": 0.1,
        "teacher_temp": 0.04,
        "warm_teacher_temp": 0.04,
        "warm_teacher": 0.3,
        "momentum": 0.996,
        "center_momentum": 0.9,
        "weight_decay_end": 0.4,
        "freeze_last": 0.01,
        "local_crops": 8,
        "local_size": 0,
        "global_crop": 0.4,
        "local_crop": 0.05,
        "drop_path": 0.1,
        "centering": "centering",
        "distort": True,
        "solarize": 0.2,
        "slant": 0.0,
    }
    base_lr, base_batch = 5e-4, 256

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        o = self.opt
        if data.sound and o["distort"]:
            raise ValueError(
                f"{config.recipe}: data must be images, whose colours the paper distorts, {data.name} is sound; give --option distort=False"
            )
        self.student = self.network(config, data)
        if config.init is not None:
            initialise(self.student, config.init)
        with torch.no_grad():
            self.width = embed(self.student, torch.zeros(2, data.channels, *data.size)).shape[1]
        norm = o.get("batch_norm", False)  # no option of DINOv2, whose masked rows differ in number from rank to rank
        self.head = PrototypeHead(self.width, o["prototypes"], o["hidden"], o["bottleneck"], norm)
        if self.group is not None:
            RankNorm.convert(self.head.mlp)
        self.teacher, self.teacher_head = (copy.deepcopy(m).requires_grad_(False) for m in (self.student, self.head))
        for block in self.teacher.modules():  # the teacher drops no path
            if hasattr(block, "drop_prob"):
                block.drop_prob = 0.0
        self.loss = DINOLoss(o["prototypes"], o["student_temp"], o["center_momentum"], o["centering"], group=self.group)
        low, high = (o["local_crop"], o["global_crop"]), (o["global_crop"], 1.0)
        side = o["local_size"] or self.local_size(data.size)
        if o["distort"]:
            self.local = augment.dino((side, side), data.flip, low, blur=0.5, solarize=0.0, slant=o["slant"])
            self.first = augment.dino(data.size, data.flip, high, blur=1.0, solarize=0.0, slant=o["slant"])
            self.second = augment.dino(data.size, data.flip, high, blur=0.1, solarize=o["solarize"], slant=o["slant"])
        else:
            self.local = augment.mae((side, side), data.flip, low, o["slant"])
            self.first = self.second = augment.mae(data.size, data.flip, high, o["slant"])

    def network(self, config: Config, data: Data) -> nn.Module:
        return build(config.model or "", data, config, num_classes=0, drop_path_rate=self.opt["drop_path"])

    def local_size(self, size: tuple[int, int]) -> int:
        """3/7 of the image, in whole patches: 96 of 224."""
        stem = getattr(self.student, "patch_embed", None)
        patch = 1 if stem is None else stem.multiple  # type: ignore[union-attr]
        return max(round(size[0] * 3 / 7 / patch), 1) * patch

    @property
    def backbone(self) -> nn.Module:
        return self.student

    def exported(self) -> nn.Module:
        return self.teacher

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {"weight_decay": schedules.cosine(step, steps, self.config.weight_decay or 0.0, self.opt["weight_decay_end"])}

    def views(self, batch: Views, step: int, steps: int) -> Views:
        images, o = batch["image"], self.opt
        large = [self.normalize(crop(images)) for crop in (self.first, self.second)]
        small = [self.normalize(self.local(images)) for _ in range(o["local_crops"])]
        temp = schedules.linear(step, int(o["warm_teacher"] * steps), o["warm_teacher_temp"], o["teacher_temp"])
        return {"global": torch.stack(large), "local": torch.stack(small) if small else None, "teacher_temp": temp}

    def student_features(self, views: Views) -> Tensor:
        """Features of every crop (2 + L, B, D), the global ones first; ViTs take all sizes in one packed pass."""
        crops, b = [views["global"], views["local"]], views["global"].shape[1]
        crops = [c.flatten(0, 1) for c in crops if c is not None]
        if hasattr(self.student, "forward_packed") and len(crops) > 1:
            found = [self.student.forward_head(tokens, pre_logits=True) for tokens in self.student.forward_packed(crops)]  # type: ignore[operator]
        else:
            found = [embed(self.student, c) for c in crops]
        return torch.cat(found).unflatten(0, (-1, b))

    @torch.no_grad()
    def teacher_features(self, views: Views) -> Tensor:
        return embed(self.teacher, views["global"].flatten(0, 1)).unflatten(0, (2, -1))

    def forward(self, views: Views) -> dict[str, Tensor]:
        student, teacher = self.head(self.student_features(views)), self.teacher_head(self.teacher_features(views))
        loss = self.loss(
            student,
            teacher,
            views["teacher_temp"],
            student_prototypes=self.head.prototypes,
            teacher_prototypes=self.teacher_head.prototypes,
        )
        return {"loss": loss}

    def heads(self) -> list[tuple[nn.Module, nn.Module]]:
        """(student, teacher) pairs beside the backbones."""
        return [(self.head, self.teacher_head)]

    def gradients(self, step: int, steps: int) -> None:
        """The prototypes rest at first, until the features have spread (appendix D of the paper)."""
        if step < self.opt["freeze_last"] * steps:
            for head, _ in self.heads():
                head.directions.grad = None  # type: ignore[union-attr]

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        m = schedules.cosine(step, steps, self.opt["momentum"], 1.0)
        for student, teacher in [(self.student, self.teacher), *self.heads()]:
            for theirs, ours in zip(teacher.parameters(), student.parameters(), strict=True):
                theirs.lerp_(ours, 1 - m)

    def evaluate(self, data: Data) -> dict[str, float]:
        from pyvit.eval.knn import knn_accuracy_of

        return knn_accuracy_of(self, data)

    def expectation(self, results: dict[str, float]) -> str:
        return f"k-NN accuracy {results['knn']:.2f} % with the teacher" if results else "done"


RECIPE = DINO
