"""Images and captions with the pairwise sigmoid loss (Zhai et al., 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pyvit.models.clip import siglip_vit
from pyvit.models.registry import settings_of
from pyvit.ops import sigmoid_contrastive
from pyvit.train.clip import ImageText
from pyvit.train.recipe import Views


class SigLIP(ImageText):
    """Each pair of the batch is a yes-or-no question: no normalisation over the batch."""

    defaults: ClassVar[dict[str, Any]] = {**ImageText.defaults, "batch_size": 16384, "weight_decay": 1e-4, "lr": 1e-3}
    options: ClassVar[dict[str, Any]] = {**ImageText.options, "context": 64}
    betas = (0.9, 0.95)
    takes = "one of two towers with a bias beside the temperature"

    @classmethod
    def fits(cls, name: str) -> bool:
        return settings_of(name)[0] is siglip_vit

    def forward(self, views: Views) -> dict[str, Tensor]:
        images, text, scale, bias = self.model(views["images"], views["text"])
        if bias is None:
            raise ValueError(f"siglip: model must have a bias (siglip_*), {self.config.model} has none")
        loss = sigmoid_contrastive(images, text, scale, bias, group=self.group)
        return {"loss": loss, "scale": scale.detach(), "bias": bias.detach()}


RECIPE = SigLIP
