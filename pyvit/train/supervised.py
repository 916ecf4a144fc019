"""Supervised classification, with the settings of DeiT (Touvron et al., 2021) and Swin (Liu et al., 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.eval.features import predict, right
from pyvit.train import augment
from pyvit.train.config import Config
from pyvit.train.options import Option
from pyvit.train.recipe import Recipe, Views, build, initialise


class Supervised(Recipe):
    """Cross-entropy with label smoothing on cropped, mixed and erased images, or on masked spectrograms (Gong et al.,
    2021)."""

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 300,
        "batch_size": 1024,
        "weight_decay": 0.05,
        "warmup": 20 / 300,
        "clip": 5.0,
    }
    options: ClassVar[dict[str, Option]] = {
        "augment": Option("standard", "strong, mild or no augmentation", choices=("standard", "mild", "none")),
        "mixup": Option(0.8, "alpha of mixup's Beta distribution; 0 for none", "[0, inf)"),
        "cutmix": Option(1.0, "alpha of CutMix's Beta distribution; 0 for none", "[0, inf)"),
        "smoothing": Option(0.1, "label smoothing", "[0, 1)"),
        "drop_path": Option(0.1, "stochastic depth of the last block", "[0, 1)"),
    }
    classifies = True

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if data.classes is None:
            raise ValueError(f"{config.recipe}: data must have classes (one subfolder each), {data.name} has none")
        if len(data.classes) < 2:
            raise ValueError(
                f"{config.recipe}: data must have at least 2 classes, {data.name} has {', '.join(data.classes)}"
            )
        assert config.model is not None
        self.model = build(
            config.model, data, config, num_classes=len(data.classes), drop_path_rate=self.opt["drop_path"]
        )
        if config.init is not None:
            initialise(self.model, config.init)
        kinds = {
            "standard": lambda: (
                augment.Spectrogram(data.mean[0]) if data.sound else augment.supervised(data.size, data.flip)
            ),
            "mild": lambda: augment.mild(data.flip),
            "none": augment.Augment,
        }
        self.augment = kinds[self.opt["augment"]]()

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def views(self, batch: Views, step: int, steps: int) -> Views:
        images = self.augment(self.cropped(batch)["crop"] if self.crops else batch["image"])
        targets = F.one_hot(batch["label"], len(self.data.classes or ())).to(images.dtype)
        images, targets = augment.mixup(images, targets, self.opt["mixup"], self.opt["cutmix"])
        return {"images": self.normalize(images), "targets": targets}

    def forward(self, views: Views) -> dict[str, Tensor]:
        logits = self.model(views["images"])
        if isinstance(logits, tuple):  # a distilled DeiT without a teacher: the mean of both heads
            logits = sum(logits) / len(logits)
        return {"loss": F.cross_entropy(logits.float(), views["targets"], label_smoothing=self.opt["smoothing"])}

    def evaluate(self, data: Data) -> dict[str, float]:
        logits, labels = predict(self.model, data.test, self.normalize, group=self.group)
        top = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        return {"accuracy": 100 * right(logits, labels), "top5": 100 * top.any(1).float().mean().item()}

    def expectation(self, results: dict[str, float]) -> str:
        line = f"test accuracy {results['accuracy']:.2f} % on {len(self.data.test.readable())} held-out images"
        usual = {("digits", "vit"): 97, ("digits", "swi"): 96}.get((self.data.name, (self.config.model or "")[:3]))
        return line + (f"; with the default settings, expect at least {usual} %" if usual else "")


RECIPE = Supervised
