"""A linear probe on frozen features, with the settings of MAE (He et al., 2022, appendix A.1)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.eval.features import embed, labels_of, over, right
from pyvit.train import augment
from pyvit.train.config import Config
from pyvit.train.options import Option
from pyvit.train.recipe import Recipe, Views, build, initialise
from pyvit.train.sync_batch_norm import SyncBatchNorm1d


class Linear(Recipe):
    """A batch norm without affine parameters and a linear layer on the features of a frozen model."""

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 90,
        "batch_size": 16384,
        "weight_decay": 0.0,
        "warmup": 10 / 90,
        "clip": 0.0,
    }
    options: ClassVar[dict[str, Option]] = {
        "crop": Option(0.08, "smallest share of an image that a random crop keeps", "(0, 1]"),
    }
    base_lr, base_batch, optimizer = 0.1, 256, "lars"
    classifies = True
    needs_init = "a run's folder or a checkpoint whose features to use"

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if data.classes is None:
            raise ValueError(f"linear: data must have classes (one subfolder each), {data.name} has none")
        if len(data.classes) < 2:
            raise ValueError(f"linear: data must have at least 2 classes, {data.name} has {', '.join(data.classes)}")
        if data.multilabel:
            raise ValueError(f"linear: each image must have one label, those of {data.name} have any number")
        self.model = build(config.model or "", data, config, num_classes=0)
        if config.init is not None:
            initialise(self.model, config.init)
        self.model.requires_grad_(False)
        with torch.no_grad():
            width = embed(self.model.eval(), torch.zeros(2, data.channels, *data.size)).shape[1]
        self.norm = SyncBatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, len(data.classes))
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        self.augment = augment.mae(data.size, data.flip, (self.opt["crop"], 1.0))

    def train(self, mode: bool = True) -> Linear:
        super().train(mode)
        self.model.eval()
        return self

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def exported(self) -> nn.Module:
        return nn.ModuleDict({"model": self.model, "norm": self.norm, "head": self.head})

    def classifier(self) -> nn.Module:
        return Probe(self.model, self.norm, self.head)

    def encoder(self) -> nn.Module:
        return self.model

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {"lr": self.paper_lr(step, steps)}

    def views(self, batch: Views, step: int, steps: int) -> Views:
        return {"images": self.normalize(self.augment(self.cropped(batch)["crop"])), "labels": batch["label"]}

    def forward(self, views: Views) -> dict[str, Tensor]:
        with torch.no_grad():
            features = embed(self.model, views["images"])
        logits = self.head(self.norm(features.to(self.head.weight.dtype)))
        return {"loss": F.cross_entropy(logits, views["labels"])}

    def evaluate(self, data: Data) -> dict[str, float]:
        device = self.head.weight.device

        def compute(batch: Views) -> Tensor:
            features = embed(self.model, self.normalize(batch["image"]))
            return self.head(self.norm(features.to(self.head.weight.dtype)))

        logits = over(data.test, compute, device=device, group=self.group)
        return {"accuracy": 100 * right(logits, labels_of(data.test))}

    def expectation(self, results: dict[str, float]) -> str:
        return f"linear accuracy {results['accuracy']:.2f} % on {len(self.data.test.readable())} held-out images"


class Probe(nn.Module):
    """Class scores of a probe: images (B, C, H, W) to (B, classes)."""

    def __init__(self, model: nn.Module, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self.norm, self.head = model, norm, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(embed(self.model, images).to(self.head.weight.dtype)))


RECIPE = Linear
