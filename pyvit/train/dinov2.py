"""DINOv2 (Oquab et al., 2024): DINO on crops, iBOT on masked patches, and the changes of the paper's table 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.losses import IBOTLoss, KoLeoLoss
from pyvit.models.dino import SelfDistillation, block_masks
from pyvit.models.dino import Views as Outputs
from pyvit.models.encoders import image_encoder
from pyvit.models.vit import VisionTransformer
from pyvit.train.config import Config
from pyvit.train.dino import DINO, POSITIONS
from pyvit.train.options import Option, SettingError
from pyvit.train.recipe import Views, build


class DINOv2(DINO):
    """Half of the student's global crops have 10 to 50 % of their patches masked, in blocks.

    Each row of the ablation table is an option: layer_scale, drop_path, prototypes, koleo, ffn (mlp or swiglu),
    momentum, warm_teacher_temp, centering, ibot, separate_head.
    """

    defaults: ClassVar[dict[str, Any]] = {**DINO.defaults, "batch_size": 2048, "layer_decay": 0.9}
    options: ClassVar[dict[str, Option]] = {
        # no batch norm: ranks have different numbers of masked patches
        **{k: v for k, v in DINO.options.items() if k != "batch_norm"},
        "prototypes": Option(131072, "outputs of the head", "[2, inf)"),
        "norm_last_layer": Option(False, "keep the prototypes at length 1"),
        "momentum": Option(0.994, "momentum of the teacher's moving average at the start; it rises to 1", "[0, 1)"),
        "teacher_temp": Option(0.07, "temperature of the teacher after its warm-up", "(0, inf)"),
        "centering": Option(
            "sinkhorn_knopp",
            "how the teacher avoids collapse",
            choices=("centering", "sinkhorn_knopp"),
        ),
        "global_crop": Option(0.32, "smallest share of an image that a global crop keeps", "(0, 1]"),
        "drop_path": Option(0.3, "stochastic depth of every block of the student", "[0, 1)"),
        "layer_scale": Option(1e-5, "initial value of LayerScale; 0 for none", "[0, inf)"),
        "ffn": Option("mlp", "feed-forward layer of the blocks", choices=("mlp", "swiglu")),
        "ibot": Option(1.0, "weight of the loss of masked patches; 0 for none", "[0, inf)"),
        "mask_share": Option(0.5, "share of the global crops that are masked", "(0, 1]"),
        "mask_low": Option(0.1, "smallest share of the patches that a mask hides", "[0, 1)"),
        "mask_high": Option(0.5, "largest share of the patches that a mask hides", "(0, 1)"),
        "separate_head": Option(True, "a separate head for patches"),
        "koleo": Option(0.1, "weight of the KoLeo loss, which spreads class tokens; 0 for none", "[0, inf)"),
        "patch_embed_rate": Option(0.2, "factor on the learning rate of the patch embedding", "(0, inf)"),
    }
    base_lr, base_batch, scaling = 4e-3, 1024, "sqrt"
    models = "a vision transformer, whose patches can be masked"
    fixed_settings = ("init_values", "mask_token")

    @classmethod
    def fits(cls, name: str) -> bool:
        found = image_encoder(name)
        return found is not None and issubclass(found.constructor, VisionTransformer)

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        o = self.opt
        if o["mask_low"] > o["mask_high"]:
            raise SettingError(
                f"dinov2: option mask_low must be at most mask_high, {o['mask_high']}, got {o['mask_low']}"
            )
        if o["ibot"] and int(2 * self.rows * o["mask_share"]) < 1:
            raise SettingError(
                f"dinov2: option mask_share must mask one of the 2 x {self.rows} global crops of a micro-batch, got "
                f"{o['mask_share']}"
            )
        if o["koleo"] and config.batch_size is not None and config.batch_size // config.accumulate < 2:
            raise SettingError(
                "dinov2: option koleo must be 0 for micro-batches of one image, which has no neighbour; or give "
                "more images per micro-batch"
            )
        self.ibot = IBOTLoss(o["prototypes"], o["student_temp"], o["center_momentum"], o["centering"], group=self.group)
        self.ibot.deferred = True
        self.koleo = KoLeoLoss(self.group)

    def network(self, config: Config, data: Data) -> nn.Module:
        o = self.opt
        switches = {
            "init_values": o["layer_scale"] or None,
            **({"activation": "swiglu"} if o["ffn"] == "swiglu" else {}),
        }
        uniform = {"drop_path_rate": o["drop_path"], "drop_path_uniform": True, "drop_path_form": "batch"}
        switches |= {"num_classes": 0, "mask_token": bool(o["ibot"]), **uniform, **POSITIONS}
        network = build(config.model or "", data, config, **switches)
        if not isinstance(network, VisionTransformer):
            raise ValueError(f"dinov2: model must be a vision transformer (vit_*), got {config.model}")
        return network

    def distillation(self, student: nn.Module) -> SelfDistillation:
        o = self.opt
        return SelfDistillation(
            student,  # type: ignore[arg-type]
            o["prototypes"],
            o["hidden"],
            o["bottleneck"],
            masks=bool(o["ibot"]),
            separate_heads=bool(o["ibot"]) and o["separate_head"],
            norm_last_layer=self.norm_last_layer(student),
        )

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """The backbone and each head."""
        return [list(part.parameters()) for part in self.model.student.values()]

    def own_rates(self) -> Mapping[str, str]:
        prefix = "model.student."
        return {
            prefix + name: "last_layer_lr"
            for name, _ in self.model.student.named_parameters()
            if ".last_layer." in name
        }

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        """The prototypes have no learning rate at first, but their gradients are collected, unlike in DINO."""
        found = super().schedule(step, steps)
        return {**found, "last_layer_lr": 0.0 if self.frozen(step) else found["lr"]}

    def gradients(self, step: int, steps: int) -> None:
        pass

    def rate_scales(self) -> Mapping[str, float]:
        return {"patch_embed": self.opt["patch_embed_rate"]}

    def depends_on_micro_batch(self) -> list[str]:
        return [*super().depends_on_micro_batch(), *(["KoLeo"] if self.opt["koleo"] else [])]

    def losses(self) -> list[Any]:
        return [self.loss, self.ibot]

    def views(self, batch: Views, step: int, steps: int) -> Views:
        found, o = super().views(batch, step, steps), self.opt
        if not o["ibot"]:
            return found
        crops, b = found["global"].shape[:2]
        grid = self.backbone.patch_embed.grid(found["global"].shape[-2:])  # type: ignore[union-attr,operator]
        masks = block_masks(crops * b, grid, (o["mask_low"], o["mask_high"]), o["mask_share"], spread=True)
        return {**found, "mask": masks.unflatten(0, (crops, b)).to(found["global"].device)}

    @torch.compiler.disable
    def compare(self, seen: Outputs, views: Views) -> dict[str, Tensor]:
        o = self.opt
        temp = views["teacher_temp"]
        prototypes = self.prototypes()
        found = {"dino": self.loss(seen.student, seen.teacher, temp, **prototypes)}
        loss = found["dino"]
        if o["ibot"]:
            found["ibot"] = self.ibot(
                seen.student_patches, seen.teacher_patches, seen.weights, temp, **self.prototypes(patches=True)
            )
            loss = loss + o["ibot"] * found["ibot"]
        if o["koleo"]:
            found["koleo"] = torch.stack([self.koleo(crop) for crop in seen.class_tokens]).sum()
            loss = loss + o["koleo"] * found["koleo"]
        monitored = self.monitors(seen, views, prototypes["teacher_prototypes"])
        return {"loss": loss, **{k: v.detach() for k, v in found.items()}, **monitored}


RECIPE = DINOv2
