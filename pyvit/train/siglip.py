"""Contrastive learning of images and captions with the pairwise sigmoid loss (Zhai et al., 2023)."""

from __future__ import annotations

import dataclasses
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
from pyvit.train.schedules import cosine


class SigLIP(ImageText):
    """Binary classification of every pair of the batch, without a softmax over the batch."""

    #: The original's weight decay is 1e-4 without the learning rate, which AdamW multiplies it by: 0.1 x 1e-3.
    defaults: ClassVar[dict[str, Any]] = {
        **ImageText.defaults,
        "batch_size": 16384,
        "weight_decay": 0.1,
        "warmup": 0.03,
        "clip": 1.0,
        "lr": 1e-3,
    }
    options: ClassVar[dict[str, Option]] = {
        **ImageText.options,
        "context": Option(64, "tokens of a caption; longer ones are cut", "[3, inf)"),
        "crop": dataclasses.replace(ImageText.options["crop"], default=1.0),
    }
    betas, eps = (0.9, 0.95), 1e-8
    models = "one with an image and a text tower and a logit bias"

    @classmethod
    def fits(cls, name: str) -> bool:
        return settings_of(name)[0] is siglip_vit

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if self.model.logit_bias is None:
            raise ValueError(f"siglip: model must have a bias (siglip_*), {config.model} has none")

    def no_weight_decay(self) -> set[str]:
        """Besides the model's: only the matrices of linear layers decay (big_vision), not the embeddings of tokens."""
        return {"model.text.token_embedding.weight"}

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        """A linear warm-up from 0, then a cosine that would be ``min_lr`` one step after the last (big_vision)."""
        c, warmup = self.config, self.warmup_steps(steps)
        if step < warmup:
            return {"lr": (c.lr or 0.0) * step / warmup}
        return {"lr": cosine(step, steps + 1, c.lr or 0.0, c.min_lr or 0.0, warmup)}

    def compare(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        images = embeddings["images"]
        text = embeddings["text"]
        scale = self.model.scale()
        bias = self.model.logit_bias
        need_negatives(self.config.recipe, len(images), self.group)
        loss = sigmoid_contrastive(images, text, scale, bias, group=self.group)
        return {"loss": loss, "scale": scale.detach(), "bias": bias.detach()}


RECIPE = SigLIP
