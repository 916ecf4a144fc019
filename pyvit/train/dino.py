"""Self-distillation without labels (Caron et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.data.crops import Crop
from pyvit.losses import DINOLoss
from pyvit.models.dino import DINOHead, SelfDistillation
from pyvit.models.dino import Views as Outputs
from pyvit.models.vit import SIZES, VisionTransformer
from pyvit.train import augment, schedules
from pyvit.train.collapse import ROWS, CollapseDetector, entropies, feature_rank
from pyvit.train.config import Config
from pyvit.train.options import Option, SettingError
from pyvit.train.recipe import Recipe, Views, build, initialise
from pyvit.train.sync_batch_norm import SyncBatchNorm1d

#: How the papers' code resamples positions for local crops.
POSITIONS = {"interpolate_antialias": False, "interpolate_offset": 0.1}


class DINO(Recipe):
    """The student sees all crops, the teacher only the two global ones. The teacher is the student's moving average."""

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 100, "batch_size": 1024, "weight_decay": 0.04, "warmup": 0.1, "clip": 3.0, "min_lr": 1e-6
    }  # fmt: skip
    options: ClassVar[dict[str, Option]] = {
        "prototypes": Option(65536, "outputs of the head", "[2, inf)"),
        "hidden": Option(2048, "width of the head's hidden layers", "[1, inf)"),
        "bottleneck": Option(256, "width of the head's bottleneck layer, before the prototypes", "[1, inf)"),
        "batch_norm": Option(False, "batch norm in the head; it helps small networks against collapse"),
        "norm_last_layer": Option(
            "auto",
            "keep the prototypes at length 1; auto: except with vision transformers up to ViT-S",
            choices=("auto", True, False),
        ),
        "student_temp": Option(0.1, "temperature of the student", "(0, inf)"),
        "teacher_temp": Option(0.04, "temperature of the teacher after its warm-up", "(0, inf)"),
        "warm_teacher_temp": Option(0.04, "temperature of the teacher at the start", "(0, inf)"),
        "warm_teacher": Option(0.3, "share of the steps of the teacher's warm-up", "[0, 1]"),
        "momentum": Option(0.996, "momentum of the teacher's moving average at the start; it rises to 1", "[0, 1)"),
        "center_momentum": Option(0.9, "momentum of the centre, the moving average of the teacher's outputs", "[0, 1)"),
        "weight_decay_end": Option(0.4, "weight decay of the last step", "[0, inf)"),
        "freeze_last": Option(1.0, "epochs at the start with frozen prototypes", "[0, inf)"),
        "local_crops": Option(8, "local crops of each image", "[0, inf)"),
        "local_size": Option(0, "side of the local crops; 0 for 3/7 of the image", "[0, inf)"),
        "global_crop": Option(0.4, "smallest share of an image that a global crop keeps", "(0, 1]"),
        "local_crop": Option(
            0.05, "smallest share of an image that a local crop keeps; the largest is global_crop", "(0, 1]"
        ),
        "drop_path": Option(0.1, "stochastic depth of the student's last block", "[0, 1)"),
        "centering": Option("centering", "how the teacher avoids collapse", choices=("centering", "sinkhorn_knopp")),
        "distort": Option(True, "colour distortion, blur and solarisation"),
        "solarize": Option(0.2, "probability of solarising the second global crop", "[0, 1]"),
        "slant": Option(0.0, "largest rotation and shear in degrees", "[0, 180)"),
    }
    base_lr, base_batch = 5e-4, 256
    shown: ClassVar[tuple[str, ...]] = ("loss", "teacher_entropy", "feature_rank")
    averages = True

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        o = self.opt
        if data.sound and o["distort"]:
            raise ValueError(
                f"{config.recipe}: data must be images, whose colours the paper distorts, {data.name} is sound; "
                "give --option distort=False"
            )
        if o["local_crop"] > o["global_crop"]:
            raise SettingError(
                f"{config.recipe}: option local_crop must be at most global_crop, {o['global_crop']}, got "
                f"{o['local_crop']}"
            )
        student = self.network(config, data)
        if config.init is not None:
            initialise(student, config.init)
        self.model = self.distillation(student)
        if self.group is not None:
            for head in self.heads("student") + self.heads("teacher"):
                SyncBatchNorm1d.convert(head.mlp)
        self.loss = DINOLoss(o["prototypes"], o["student_temp"], o["center_momentum"], o["centering"], group=self.group)
        self.loss.deferred = True
        self.collapse = CollapseDetector(o["prototypes"], min(self.rows, ROWS))
        low, high = (o["local_crop"], o["global_crop"]), (o["global_crop"], 1.0)
        side = self.local_size(data.size)
        if o["distort"]:
            self.local = augment.dino(
                (side, side), data.flip, low, blur=0.5, solarize=0.0, slant=o["slant"], views=o["local_crops"]
            )
            self.first = augment.dino(data.size, data.flip, high, blur=1.0, solarize=0.0, slant=o["slant"])
            self.second = augment.dino(data.size, data.flip, high, blur=0.1, solarize=o["solarize"], slant=o["slant"])
        else:
            self.local = augment.mae((side, side), data.flip, low, o["slant"], o["local_crops"])
            self.first = self.second = augment.mae(data.size, data.flip, high, o["slant"])

    def network(self, config: Config, data: Data) -> nn.Module:
        """The student's backbone."""
        return build(config.model or "", data, config, num_classes=0, drop_path_rate=self.opt["drop_path"], **POSITIONS)

    def distillation(self, student: nn.Module) -> SelfDistillation:
        """Student and teacher, with their heads."""
        o = self.opt
        return SelfDistillation(
            student,
            o["prototypes"],
            o["hidden"],
            o["bottleneck"],
            head_batch_norm=o["batch_norm"],
            norm_last_layer=self.norm_last_layer(student),
        )

    def norm_last_layer(self, student: nn.Module) -> bool:
        """Whether the prototypes keep the length 1. The paper's do, except those of ViT-S, which train stably without
        (help text of its code)."""
        chosen = self.opt["norm_last_layer"]
        small = isinstance(student, VisionTransformer) and student.embed_dim <= SIZES["small"]["embed_dim"]
        return not small if chosen == "auto" else chosen

    def local_size(self, size: tuple[int, int]) -> int:
        """Side of the local crops. The default is 3/7 of the image (96 of 224), rounded to whole patches."""
        stem = getattr(self.backbone, "patch_embed", None)
        patch = 1 if stem is None else stem.multiple
        side = self.opt["local_size"]
        if side % patch:
            raise SettingError(
                f"{self.config.recipe}: option local_size must be a multiple of the patch, {patch}, got {side}"
            )
        return side or max(round(size[0] * 3 / 7 / patch), 1) * patch

    @property
    def backbone(self) -> nn.Module:
        return self.model.student["backbone"]

    def exported(self) -> nn.Module:
        return self.model.encoder_of()

    def heads(self, side: str) -> list[DINOHead]:
        """The heads of the "student" or of the "teacher"."""
        return [part for name, part in getattr(self.model, side).items() if name != "backbone"]

    def no_decay(self) -> set[str]:
        """In the paper's code all matrices of a ViT decay, also tokens and positions."""
        return set() if isinstance(self.backbone, VisionTransformer) else super().no_decay()

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Each parameter alone, as in the paper's code."""
        return [[p] for p in self.parameters() if p.requires_grad]

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        c = self.config
        return {
            "lr": schedules.dino(step, steps, c.lr or 0.0, c.min_lr or 0.0, int(steps * (c.warmup or 0.0))),
            "weight_decay": schedules.dino(step, steps, c.weight_decay or 0.0, self.opt["weight_decay_end"]),
        }

    def teacher_momentum(self, step: int, steps: int) -> float:
        """Momentum of the teacher."""
        return schedules.dino(step, steps, self.opt["momentum"], 1.0)

    def teacher_temp(self, step: int, steps: int) -> float:
        """Temperature of the teacher."""
        warmup, end = int(self.opt["warm_teacher"] * steps), self.opt["teacher_temp"]
        return schedules.linear(step, warmup - 1, self.opt["warm_teacher_temp"], end) if step < warmup else end

    @property
    def crops(self) -> dict[str, Crop]:
        """Two global crops and ``local_crops`` local ones, each cut from the whole image."""
        found = {
            "first": self.first.crop,
            "second": self.second.crop,
            **({"local": self.local.crop} if self.opt["local_crops"] else {}),
        }
        return {name: crop for name, crop in found.items() if crop is not None}

    def views(self, batch: Views, step: int, steps: int) -> Views:
        batch, o = self.cropped(batch), self.opt
        first = self.normalize(self.first(batch["first"]))
        second = self.normalize(self.second(batch["second"]))
        local = [self.normalize(self.local(crop)) for crop in batch["local"]] if o["local_crops"] else []
        return {
            "global": torch.stack([first, second]),
            "local": torch.stack(local) if local else None,
            "teacher_temp": self.teacher_temp(step, steps),
            "momentum": self.teacher_momentum(step, steps),
        }

    def outputs(self, views: Views) -> Outputs:
        """The outputs of student and teacher."""
        return self.model(views["global"], views["local"] if views["local"] is not None else (), views.get("mask"))

    def prototypes(self, patches: bool = False) -> dict[str, Tensor]:
        """Prototypes of student and teacher, as arguments of the losses. Scores are head outputs times prototypes."""
        return {f"{side}_prototypes": self.model.head_of(side, patches).prototypes for side in ("student", "teacher")}

    def forward(self, views: Views) -> dict[str, Tensor]:
        return self.compare(self.outputs(views), views)

    @torch.compiler.disable  # temperature and momentum change at every step, and would recompile it
    def compare(self, seen: Outputs, views: Views) -> dict[str, Tensor]:
        """{"loss": ..., and other values to log} from the outputs of student and teacher."""
        prototypes = self.prototypes()
        loss = self.loss(seen.student, seen.teacher, views["teacher_temp"], **prototypes)
        return {"loss": loss, **self.monitors(seen, views, prototypes["teacher_prototypes"])}

    @torch.no_grad()
    def monitors(self, seen: Outputs, views: Views, prototypes: Tensor) -> dict[str, Tensor]:
        """Values that show a collapse, of the first global crop of up to ROWS images, and the teacher's settings."""
        outputs = self.loss.teacher_outputs(seen.teacher[0, :ROWS], views["teacher_temp"], prototypes)
        entropy, of_mean = entropies(outputs)
        return {
            "teacher_entropy": entropy,
            "batch_entropy": of_mean,
            "feature_rank": feature_rank(seen.teacher_tokens[0, :ROWS]),
            "teacher_temp": torch.tensor(views["teacher_temp"]),
            "momentum": torch.tensor(views["momentum"]),
        }

    def warning(self, step: int, steps: int, values: Mapping[str, float]) -> str:
        if step < int(steps * (self.config.warmup or 0.0)):
            return ""
        return self.collapse.warning(values, max(50, steps // 10))

    def frozen(self, step: int) -> bool:
        """Whether the prototypes are frozen."""
        return step < self.opt["freeze_last"] * self.per_epoch

    def gradients(self, step: int, steps: int) -> None:
        """Freeze the prototypes in the first epochs, until the features have spread (appendix D of the paper)."""
        if self.frozen(step):
            for head in self.heads("student"):
                for p in head.last_layer.parameters():
                    p.grad = None

    def depends_on_micro_batch(self) -> list[str]:
        return [
            *super().depends_on_micro_batch(),
            *(["Sinkhorn-Knopp"] if self.opt["centering"] == "sinkhorn_knopp" else []),
        ]

    def losses(self) -> list[Any]:
        """The losses that have a centre."""
        return [self.loss]

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        self.model.update_teacher(self.teacher_momentum(step, steps))
        for loss in self.losses():
            loss.update_center()

    def step_skipped(self) -> None:
        for loss in self.losses():
            loss.update_center(keep=False)

    def evaluate(self, data: Data) -> dict[str, float]:
        from pyvit.eval.knn import knn_accuracy_of

        return knn_accuracy_of(self, data)

    def expectation(self, results: dict[str, float]) -> str:
        return f"k-NN accuracy {results['knn']:.2f} % with the teacher" if results else "done"


RECIPE = DINO
