"""Contrastive learning of images and captions (Radford et al., 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from pyvit.data import Data, load_tokenizer
from pyvit.models.clip import clip_resnet, clip_vit, siglip_vit
from pyvit.models.registry import settings_of
from pyvit.ops import info_nce
from pyvit.train import augment
from pyvit.train.config import Config
from pyvit.train.recipe import Recipe, Views, build, initialise


class ImageText(Recipe):
    """Both towers learn that row i of the images belongs to row i of the captions, and to no other."""

    defaults: ClassVar[dict[str, Any]] = {"epochs": 32, "batch_size": 32768, "weight_decay": 0.2, "warmup": 0.01, "clip": 0.0, "lr": 5e-4}
    options: ClassVar[dict[str, Any]] = {"tokenizer": "bytes", "context": 77, "crop": 0.9}
    betas = (0.9, 0.98)
    takes, encodes = "one of two towers, for images and for text", False

    @classmethod
    def fits(cls, name: str) -> bool:
        return settings_of(name)[0] in (clip_vit, clip_resnet, siglip_vit)

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if "caption" not in data.test.fetch([0]):
            raise ValueError(f"{config.recipe}: data must have captions (a CSV with image and caption, say), {data.name} has none")
        self.tokenizer = load_tokenizer(self.opt["tokenizer"], self.opt["context"])
        text = {"vocab_size": self.tokenizer.vocab_size, "context_length": self.opt["context"]}
        text |= {"eot": self.tokenizer.end, "pad": self.tokenizer.pad}
        self.model = build(config.model or "", data, config, whole=True, **text)
        if not hasattr(self.model, "encode_text"):
            raise ValueError(f"{config.recipe}: model must have two towers (clip_* or siglip_*), got {config.model}")
        if config.init is not None:
            initialise(self.model, config.init)
        self.augment = augment.mae(data.size, data.flip, (self.opt["crop"], 1.0))

    @property
    def backbone(self) -> nn.Module:
        return self.model.visual  # type: ignore[return-value]

    def exported(self) -> nn.Module:
        return self.model

    def views(self, batch: Views, step: int, steps: int) -> Views:
        text = self.tokenizer(batch["caption"]).to(batch["image"].device)
        return {"images": self.normalize(self.augment(batch["image"])), "text": text}

    def forward(self, views: Views) -> dict[str, Tensor]:
        images, text, scale, _ = self.model(views["images"], views["text"])
        return {"loss": info_nce(images, text, scale, group=self.group), "scale": scale.detach()}

    def evaluate(self, data: Data) -> dict[str, float]:
        """Zero-shot accuracy where there are classes, recall of captions and images where captions tell images apart."""
        from pyvit.eval.retrieval import recall_of
        from pyvit.eval.zero_shot import zero_shot_accuracy_of

        found = zero_shot_accuracy_of(self, data) if data.classes else {}
        return {**found, **recall_of(self, data)}


class CLIP(ImageText):
    """Symmetric cross-entropy over the batch."""


RECIPE = CLIP
