"""Contrastive learning of images and captions (Radford et al., 2021)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyvit.data import Data, load_tokenizer
from pyvit.losses.contrastive import need_negatives
from pyvit.models.clip import clip_resnet, clip_vit, siglip_vit
from pyvit.models.registry import settings_of
from pyvit.ops import info_nce
from pyvit.train import augment
from pyvit.train.config import Config
from pyvit.train.options import Option
from pyvit.train.recipe import Contrastive, Views, build, initialise
from pyvit.train.schedules import cosine


class ImageText(Contrastive):
    """Base of the recipes for pairs of images and captions: pair i of the batch is a positive, all other pairs are
    negatives."""

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 32,
        "batch_size": 32768,
        "weight_decay": 0.2,
        "clip": 0.0,
        "lr": 5e-4,
    }
    options: ClassVar[dict[str, Option]] = {
        "tokenizer": Option("bytes", "bytes, bpe (learned from the captions), or the path of a tokenizer.json"),
        "context": Option(77, "tokens of a caption; longer ones are cut", "[3, inf)"),
        "crop": Option(0.9, "smallest share of an image that a random crop keeps", "(0, 1]"),
    }
    models, image_models = "one with an image and a text tower", False

    @classmethod
    def fits(cls, name: str) -> bool:
        return settings_of(name)[0] in (clip_vit, clip_resnet, siglip_vit)

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if data.train.captions is None:
            raise ValueError(
                f"{config.recipe}: data must have captions (a CSV with image and caption, say), {data.name} has none"
            )
        self.tokenizer = load_tokenizer(self.opt["tokenizer"], self.opt["context"], data.train.captions)
        text = {"vocab_size": self.tokenizer.vocab_size, "context_length": self.opt["context"]}
        text |= {"eot": self.tokenizer.end, "pad": self.tokenizer.pad}
        self.model = build(config.model or "", data, config, whole=True, **text)
        if not hasattr(self.model, "encode_text"):
            raise ValueError(f"{config.recipe}: model must have two towers (clip_* or siglip_*), got {config.model}")
        if config.init is not None:
            initialise(self.model, config.init)
        self.check_batch()
        # No flip: it would make "left" in a caption wrong.
        self.augment = augment.mae(data.size, False, (self.opt["crop"], 1.0))

    @property
    def backbone(self) -> nn.Module:
        return self.model.visual  # type: ignore[return-value]

    def exported(self) -> nn.Module:
        return self.model

    def warmup_steps(self, steps: int) -> int:
        """Steps with a rising learning rate."""
        return int(steps * (self.config.warmup or 0.0))

    def views(self, batch: Views, step: int, steps: int) -> Views:
        images = self.normalize(self.augment(self.cropped(batch)["crop"]))
        return {"images": images, "text": self.tokenizer(batch["caption"]).to(images.device)}

    def encode(self, views: Views) -> dict[str, Tensor]:
        return {"images": self.model.encode_image(views["images"]), "text": self.model.encode_text(views["text"])}

    def evaluate(self, data: Data) -> dict[str, float]:
        """Zero-shot accuracy if the data has classes, and retrieval recall if the captions distinguish the images."""
        from pyvit.eval.retrieval import recall_of
        from pyvit.eval.zero_shot import zero_shot_accuracy_of

        found = zero_shot_accuracy_of(self, data) if data.classes else {}
        return {**found, **recall_of(self, data)}


class CLIP(ImageText):
    """Symmetric cross-entropy over the batch."""

    options: ClassVar[dict[str, Option]] = {
        **ImageText.options,
        "warmup_steps": Option(
            2000,
            "steps with a linearly rising learning rate, but at most a tenth of all; not used if warmup is given",
            "[0, inf)",
        ),
    }
    betas, eps = (0.9, 0.98), 1e-6

    @classmethod
    def model_defaults(cls, config: Config) -> dict[str, Any]:
        """Table 18 has Adam's settings for each kind of tower."""
        resnet = settings_of(config.model or "")[0] is clip_resnet and config.optimizer in (None, "adamw")
        return {"beta2": 0.999, "eps": 1e-8} if resnet else {}

    def warmup_steps(self, steps: int) -> int:
        given = self.config.warmup is not None
        return super().warmup_steps(steps) if given else min(self.opt["warmup_steps"], steps // 10)

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        """A linear warm-up that reaches the peak at its last step, then a cosine that would be ``min_lr`` one step
        after the last (open_clip)."""
        c = self.config
        return {"lr": cosine(step, steps + 1, c.lr or 0.0, c.min_lr or 0.0, self.warmup_steps(steps))}

    def compare(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        images, text, scale = embeddings["images"], embeddings["text"], self.model.scale()
        need_negatives(self.config.recipe, len(images), self.group)
        return {"loss": info_nce(images, text, scale, group=self.group), "scale": scale.detach()}

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        """Clamp the scale to [1, 100] (section 2.5). Clamping the parameter keeps its gradient, which a clamp in the
        loss would stop."""
        self.model.logit_scale.clamp_(0.0, math.log(100.0))


RECIPE = CLIP
