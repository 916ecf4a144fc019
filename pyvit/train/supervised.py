"""Supervised classification, with the settings of DeiT (Touvron et al., 2021) and Swin (Liu et al., 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.eval.features import predict
from pyvit.train import augment
from pyvit.train.config import Config
from pyvit.train.recipe import Recipe, Views, build, initialise


class Supervised(Recipe):
    """Cross-entropy with smoothed labels on mixed, cropped, erased images, or on masked spectrograms (Gong et al., 2021)."""

    defaults: ClassVar[dict[str, Any]] = {"epochs": 300, "batch_size": 1024, "weight_decay": 0.05, "warmup": 20 / 300, "clip": 5.0}
    options: ClassVar[dict[str, Any]] = {"augment": "standard", "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "drop_path": 0.1}

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if data.classes is None:
            raise ValueError(f"{config.recipe}: data must have classes (one subfolder each), {data.name} has none")
        assert config.model is not None
        self.model = build(config.model, data, config, num_classes=len(data.classes), drop_path_rate=self.opt["drop_path"])
        if config.init is not None:
            initialise(self.model, config.init)
        kinds = {
            "standard": lambda: augment.Spectrogram(data.mean[0]) if data.sound else augment.supervised(data.size, data.flip),
            "mild": lambda: augment.mild(data.flip),
            "none": augment.Augment,
        }
        if self.opt["augment"] not in kinds:
            raise ValueError(f"{config.recipe}: option augment must be one of {', '.join(kinds)}, got {self.opt['augment']!r}")
        self.augment = kinds[self.opt["augment"]]()

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def views(self, batch: Views, step: int, steps: int) -> Views:
        images = self.augment(batch["image"])
        targets = F.one_hot(batch["label"], len(self.data.classes or ())).to(images.dtype)
        images, targets = augment.mixup(images, targets, self.opt["mixup"], self.opt["cutmix"])
        return {"images": self.normalize(images), "targets": targets}

    def forward(self, views: Views) -> dict[str, Tensor]:
        logits = self.model(views["images"])
        if isinstance(logits, tuple):  # a distilled DeiT without a teacher: both heads together learn the labels
            logits = sum(logits) / len(logits)
        return {"loss": F.cross_entropy(logits.float(), views["targets"], label_smoothing=self.opt["smoothing"])}

    def evaluate(self, data: Data) -> dict[str, float]:
        logits, labels = predict(self.model, data.test, self.normalize)
        top = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        return {"accuracy": 100 * top[:, 0].float().mean().item(), "top5": 100 * top.any(1).float().mean().item()}

    def expectation(self, results: dict[str, float]) -> str:
        line = f"test accuracy {results['accuracy']:.2f} % on {len(self.data.test)} held-out images"
        usual = {("digits", "vit"): 97, ("digits", "swi"): 96}.get((self.data.name, (self.config.model or "")[:3]))
        return line + (f"; with the default settings, expect at least {usual} %" if usual else "")


RECIPE = Supervised
