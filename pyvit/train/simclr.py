"""Contrastive learning of two views (Chen et al., 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.eval.features import embed
from pyvit.losses import NTXentLoss
from pyvit.models.encoders import image_encoder
from pyvit.models.resnet import ResNet
from pyvit.train import augment
from pyvit.train.collapse import ROWS, feature_rank
from pyvit.train.config import Config
from pyvit.train.options import Option, parse
from pyvit.train.recipe import Contrastive, Views, build, initialise
from pyvit.train.sync_batch_norm import SyncBatchNorm1d


def projection(dim: int, hidden: int, out: int) -> nn.Sequential:
    """The projection head: linear, batch norm, ReLU, linear, batch norm without bias (Chen et al., 2020,
    appendix B)."""
    last = nn.BatchNorm1d(out)
    last.bias.requires_grad_(False)  # stays 0
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False), last
    )  # fmt: skip


class SimCLR(Contrastive):
    """Each view is classified against all other views of the batch: its positive is the other view of its image."""

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 100,
        "batch_size": 4096,
        "weight_decay": 1e-6,
        "warmup": 0.1,
        "clip": 0.0,
    }
    options: ClassVar[dict[str, Option]] = {
        "temperature": Option(0.1, "temperature of the softmax over similarities", "(0, inf)"),
        "hidden": Option(2048, "width of the head's hidden layer", "[1, inf)"),
        "out": Option(128, "width of the head's output", "[1, inf)"),
        "crop": Option(0.08, "smallest share of an image that a random crop keeps", "(0, 1]"),
        "strength": Option(1.0, "strength of the colour distortion", "[0, 2.5]"),
        "slant": Option(0.0, "largest rotation and shear in degrees", "[0, 180)"),
    }
    shown: ClassVar[tuple[str, ...]] = ("loss", "feature_rank")
    base_lr, base_batch, optimizer = 0.3, 256, "lars"
    #: AdamW's rate for 256 images and weight decay, for transformers (Chen et al., "MoCo v3", 2021, section 4).
    adamw_base_lr, adamw_weight_decay = 1.5e-4, 0.1

    @classmethod
    def model_defaults(cls, config: Config) -> dict[str, Any]:
        """AdamW for transformers, LARS for ResNets."""
        found = image_encoder(config.model or "", parse(config.set, "set"))
        resnet = found is not None and found.constructor is ResNet
        if (config.optimizer or ("lars" if resnet else "adamw")) != "adamw":
            return {}
        batch = config.batch_size or cls.defaults["batch_size"]
        lr = cls.adamw_base_lr * batch / cls.base_batch
        return {"optimizer": "adamw", "lr": lr, "weight_decay": cls.adamw_weight_decay}

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if data.sound:
            raise ValueError(
                f"{config.recipe}: data must be images, whose colours the paper distorts, {data.name} is sound"
            )
        self.model = build(config.model or "", data, config, num_classes=0)
        if config.init is not None:
            initialise(self.model, config.init)
        with torch.no_grad():
            width = embed(self.model, torch.zeros(2, data.channels, *data.size)).shape[1]
        self.head = projection(width, self.opt["hidden"], self.opt["out"])
        self.loss = NTXentLoss(self.opt["temperature"], group=self.group)
        if self.group is not None:
            self.head = (
                nn.SyncBatchNorm.convert_sync_batchnorm(self.head)
                if torch.cuda.is_available()
                else SyncBatchNorm1d.convert(self.head)
            )
        self.check_batch()
        self.augment = augment.simclr(
            data.size, data.flip, (self.opt["crop"], 1.0), self.opt["strength"], self.opt["slant"]
        )

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {"lr": self.paper_lr(step, steps)}

    def views(self, batch: Views, step: int, steps: int) -> Views:
        one, two = (self.normalize(self.augment(crop)) for crop in self.cropped(batch)["crop"])
        return {"one": one, "two": two}

    def encode(self, views: Views) -> dict[str, Tensor]:
        """Features before the projection head, whose batch norms need the whole batch."""
        one, two = embed(self.model, torch.cat([views["one"], views["two"]])).chunk(2)
        return {"one": one, "two": two}

    def compare(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        z1, z2 = self.head(torch.cat([embeddings["one"], embeddings["two"]])).chunk(2)
        rank = feature_rank(embeddings["one"][:ROWS].detach())
        return {"loss": self.loss(z1, z2), "feature_rank": rank}

    def evaluate(self, data: Data) -> dict[str, float]:
        from pyvit.eval.knn import knn_accuracy_of

        return knn_accuracy_of(self, data)

    def expectation(self, results: dict[str, float]) -> str:
        return f"k-NN accuracy {results['knn']:.2f} %" if results else "done"


RECIPE = SimCLR
