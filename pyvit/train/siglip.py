"""Contrastive learning of images and captions with the pairwise sigmoid loss (Zhai et al., 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pyvit.data import Data
from pyvit.losses.contrastive import need_negatives
from pyvit.models.clip import siglip_vit
from pyvit.models.registry import settings_of
from pyvit.ops import sigmoid_contrastive
from pyvit.train.clip import ImageText
from pyvit.train.config import Config
from pyvit.train.options import Option


class SigLIP(ImageText):
    """Binary classification of every pair of the batch, without a softmax over the batch."""

    defaults: ClassVar[dict[str, Any]] = {**ImageText.defaults, "batch_size": 16384, "weight_decay": 1e-4, "lr": 1e-3}
    options: ClassVar[dict[str, Option]] = {
        **ImageText.options,
        "context": Option(64, "tokens of a caption; longer ones are cut", "[3, inf)"),
    }
    betas = (0.9, 0.95)
    models = "one with an image and a text tower and a logit bias"

    @classmethod
    def fits(cls, name: str) -> bool:
        return settings_of(name)[0] is siglip_vit

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if self.model.logit_bias is None:
            raise ValueError(f"siglip: model must have a bias (siglip_*), {config.model} has none")

    def compare(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        images = embeddings["images"]
        text = embeddings["text"]
        scale = self.model.scale()
        bias = self.model.logit_bias
        need_negatives(self.config.recipe, len(images), self.group)
        loss = sigmoid_contrastive(images, text, scale, bias, group=self.group)
        return {"loss": loss, "scale": scale.detach(), "bias": bias.detach()}


RECIPE = SigLIP
