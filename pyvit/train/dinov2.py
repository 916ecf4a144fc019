"""DINOv2 (Oquab et al., 2024): DINO on crops, iBOT on masked patches, and the switches that its table 1 adds one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.losses import IBOTLoss, KoLeoLoss
from pyvit.models.encoders import image_encoder
from pyvit.models.vit import VisionTransformer
from pyvit.train.config import Config
from pyvit.train.dino import DINO
from pyvit.train.heads import PrototypeHead
from pyvit.train.recipe import Views, build


class DINOv2(DINO):
    """The global crops of half of the images reach the student with 10 to 50 % of their patches masked.

    Each row of the ablation table is an option: layer_scale, drop_path, prototypes, koleo, ffn (mlp or swiglu), momentum,
    warm_teacher_temp, centering, ibot, separate_head.
    """

    defaults: ClassVar[dict[str, Any]] = {**DINO.defaults, "batch_size": 2048, "layer_decay": 0.9}
    options: ClassVar[dict[str, Any]] = {
        **{k: v for k, v in DINO.options.items() if k != "batch_norm"},
        "prototypes": 131072,
        "momentum": 0.994,
        "teacher_temp": 0.07,
        "centering": "sinkhorn_knopp",
        "local_crops": 8,
        "global_crop": 0.32,
        "drop_path": 0.3,
        "layer_scale": 1e-5,
        "ffn": "mlp",
        "ibot": 1.0,
        "mask_share": 0.5,
        "mask_low": 0.1,
        "mask_high": 0.5,
        "separate_head": True,
        "koleo": 0.1,
    }
    base_lr, base_batch = 4e-3, 1024
    takes = "a vision transformer, whose patches a mask token can hide"
    decides = ("init_values", "mask_token")

    @classmethod
    def fits(cls, name: str) -> bool:
        found = image_encoder(name)
        return found is not None and issubclass(found.constructor, VisionTransformer)

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        o = self.opt
        if not hasattr(self.student, "mask_token"):
            raise ValueError(f"dinov2: model must be a vision transformer with a mask token, got {config.model}")
        self.patch_head = self.teacher_patch_head = None
        if o["separate_head"]:
            self.patch_head = PrototypeHead(self.width, o["prototypes"], o["hidden"], o["bottleneck"])
            self.teacher_patch_head = PrototypeHead(self.width, o["prototypes"], o["hidden"], o["bottleneck"]).requires_grad_(False)
            self.teacher_patch_head.load_state_dict(self.patch_head.state_dict())
        self.ibot = IBOTLoss(o["prototypes"], o["student_temp"], o["center_momentum"], o["centering"], group=self.group)
        self.koleo = KoLeoLoss(self.group)

    def network(self, config: Config, data: Data) -> nn.Module:
        o = self.opt
        switches = {"init_values": o["layer_scale"] or None, **({"activation": "swiglu"} if o["ffn"] == "swiglu" else {})}
        uniform = {"drop_path_rate": o["drop_path"], "drop_path_uniform": True}
        return build(config.model or "", data, config, num_classes=0, mask_token=True, **switches, **uniform)

    def heads(self) -> list[tuple[nn.Module, nn.Module]]:
        separate = [(self.patch_head, self.teacher_patch_head)] if self.patch_head is not None else []
        return [*super().heads(), *separate]  # type: ignore[list-item]

    def views(self, batch: Views, step: int, steps: int) -> Views:
        found = super().views(batch, step, steps)
        crops, b = found["global"].shape[:2]
        rows, columns = self.student.patch_embed.grid(found["global"].shape[-2:])  # type: ignore[union-attr,operator]
        o, patches = self.opt, rows * columns
        masked = torch.rand(crops, b).argsort(1) < round(o["mask_share"] * b)
        share = o["mask_low"] + (o["mask_high"] - o["mask_low"]) * torch.rand(crops, b)
        counts = (share * patches).round().clamp(1, patches - 1) * masked
        mask = torch.rand(crops, b, patches).argsort(2) < counts[..., None]
        weights = mask / (counts.clamp(min=1)[..., None] * max(crops * round(o["mask_share"] * b), 1))
        device = found["global"].device
        return {**found, "mask": mask.to(device), "mask_weights": weights.to(device)}

    def student_tokens(self, views: Views) -> tuple[Tensor, Tensor]:
        """Class features of every crop (2 + L, B, D) and patch tokens of the global ones (2, B, N, D), masked patches hidden."""
        images, b = views["global"].flatten(0, 1), views["global"].shape[1]
        tokens = self.student.forward_features(images, masks=views["mask"].flatten(0, 1))  # type: ignore[operator]
        found = [self.student.forward_head(tokens, pre_logits=True)]  # type: ignore[operator]
        if views["local"] is not None:
            small = self.student.forward_features(views["local"].flatten(0, 1))  # type: ignore[operator]
            found.append(self.student.forward_head(small, pre_logits=True))  # type: ignore[operator]
        patches = tokens[:, self.student.num_prefix_tokens :]  # type: ignore[index,misc]
        return torch.cat(found).unflatten(0, (-1, b)), patches.unflatten(0, (2, -1))

    def forward(self, views: Views) -> dict[str, Tensor]:
        o = self.opt
        student, student_patches = self.student_tokens(views)
        with torch.no_grad():
            tokens = self.teacher.forward_features(views["global"].flatten(0, 1))  # type: ignore[operator]
            teacher = self.teacher.forward_head(tokens, pre_logits=True).unflatten(0, (2, -1))  # type: ignore[operator]
            patches = tokens[:, self.teacher.num_prefix_tokens :].unflatten(0, (2, -1))  # type: ignore[index,misc]
        found = {
            "dino": self.loss(
                self.head(student),
                self.teacher_head(teacher),
                views["teacher_temp"],
                student_prototypes=self.head.prototypes,
                teacher_prototypes=self.teacher_head.prototypes,
            )
        }
        loss = found["dino"]
        if o["ibot"]:
            ours, theirs = (self.patch_head, self.teacher_patch_head) if self.patch_head is not None else (self.head, self.teacher_head)
            mask = views["mask"]
            found["ibot"] = self.ibot(
                ours(student_patches[mask]),
                theirs(patches[mask]),  # type: ignore[misc]
                views["mask_weights"][mask],
                views["teacher_temp"],
                student_prototypes=ours.prototypes,
                teacher_prototypes=theirs.prototypes,  # type: ignore[union-attr]
            )
            loss = loss + o["ibot"] * found["ibot"]
        if o["koleo"]:
            found["koleo"] = sum(self.koleo(crop) for crop in student[:2])  # type: ignore[assignment]
            loss = loss + o["koleo"] * found["koleo"]
        return {"loss": loss, **{k: v.detach() for k, v in found.items()}}


RECIPE = DINOv2
