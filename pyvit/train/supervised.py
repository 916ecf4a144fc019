"""Supervised classification, with the settings of DeiT (Touvron et al., 2021) and Swin (Liu et al., 2021)."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.eval import classification
from pyvit.eval.features import predict, right
from pyvit.models.audio import AudioSpectrogramTransformer
from pyvit.models.encoders import image_encoder
from pyvit.models.swin import SwinTransformer
from pyvit.models.vit import VisionTransformer
from pyvit.train import augment
from pyvit.train.config import Config
from pyvit.train.log import say
from pyvit.train.options import Option, SettingError, parse
from pyvit.train.recipe import Recipe, Views, build, initialise


class Supervised(Recipe):
    """Cross-entropy with label smoothing on cropped, mixed and erased images, or on masked spectrograms (Gong et al.,
    2021). Images with several labels each: binary cross-entropy."""

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 300,
        "batch_size": 1024,
        "min_lr": 1e-5,
        "weight_decay": 0.05,
        "warmup": 5 / 300,
        "clip": 0.0,
    }
    options: ClassVar[dict[str, Option]] = {
        "augment": Option(
            "standard",
            "strong augmentation, small rotations and shifts, horizontal flips alone, or none",
            choices=("standard", "mild", "flip", "none"),
        ),
        "mixup": Option(0.8, "alpha of mixup's Beta distribution; 0 for none", "[0, inf)"),
        "cutmix": Option(1.0, "alpha of CutMix's Beta distribution; 0 for none", "[0, inf)"),
        "smoothing": Option(0.1, "label smoothing", "[0, 1)"),
        "erase": Option(0.25, "with standard augmentation, probability of noise in a random box", "[0, 1]"),
        "repeats": Option(1, "views of an image in a batch; 3 for ViTs with standard augmentation", "[1, inf)"),
        "drop_path": Option(0.1, "stochastic depth of the last block; the default depends on the model", "[0, 1)"),
        "class_weights": Option("none", "weights of the classes in the loss", choices=("none", "balanced")),
    }
    classifies = True
    best_by: ClassVar[tuple[str, ...]] = ("accuracy", "mean_average_precision")
    #: The learning rate of the first step: DeiT's, and Swin's for 512 images.
    first_lr, swin_first_lr = 1e-6, 5e-7
    #: Swin's ``min_lr`` for 512 images, and its other settings that differ from DeiT's.
    swin_min_lr = 5e-6
    swin: ClassVar[dict[str, Any]] = {"warmup": 20 / 300, "clip": 5.0}

    @classmethod
    def model_defaults(cls, config: Config) -> dict[str, Any]:
        batch = config.batch_size or cls.defaults["batch_size"]
        lr = config.lr or cls.peak_lr(batch)
        kind, given = model_settings(config), cls.options_of(config)
        option = {"drop_path": drop_path(kind, cls.drop_paths)}
        if issubclass(kind["constructor"], SwinTransformer):
            return {"option": option, **cls.swin, "min_lr": min(cls.swin_min_lr * batch / 512, lr)}
        streamed = config.data.startswith("hf-stream:")
        image = (
            issubclass(kind["constructor"], VisionTransformer)
            and kind["constructor"] is not AudioSpectrogramTransformer
        )
        if image and given["augment"] == "standard" and not streamed:
            option["repeats"] = 3
        return {"option": option, "min_lr": min(cls.defaults["min_lr"], lr)}

    #: Stochastic depth by size: see :func:`drop_path`.
    drop_paths: ClassVar[dict[str, float]] = {
        "vit": 0.1, "vit_large": 0.2, "vit_huge": 0.2, "swin_tiny": 0.2, "swin_small": 0.3, "swin_base": 0.5
    }  # fmt: skip

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        if data.classes is None:
            raise ValueError(f"{config.recipe}: data must have classes (one subfolder each), {data.name} has none")
        if len(data.classes) < 2:
            raise ValueError(
                f"{config.recipe}: data must have at least 2 classes, {data.name} has {', '.join(data.classes)}"
            )
        assert config.model is not None
        o = self.opt
        if o["repeats"] > 1 and data.train.streamed:
            raise SettingError(f"{config.recipe}: option repeats must be 1 for a stream, got {o['repeats']}")
        self.repeats = o["repeats"]
        self.model = build(config.model, data, config, num_classes=len(data.classes), drop_path_rate=o["drop_path"])
        if config.init is not None:
            initialise(self.model, config.init)
        self.erase = o["erase"] if o["augment"] == "standard" and not data.sound else 0.0
        kinds = {
            "standard": lambda: (
                augment.Spectrogram(data.mean[0])
                if data.sound
                else augment.supervised(data.size, data.flip, tuple(data.mean))
            ),
            "mild": lambda: augment.mild(data.flip),
            "flip": lambda: augment.flips(data.flip),
            "none": augment.Augment,
        }
        self.augment = kinds[o["augment"]]()
        self.register_buffer("class_weights", self._class_weights(data), persistent=False)

    def _class_weights(self, data: Data) -> Tensor | None:
        """Weights of the classes; for images with several labels, of a class's images relative to all others."""
        known = getattr(data.train, "labels", None)
        if self.opt["class_weights"] == "none":
            return None
        if data.train.streamed:
            raise SettingError(
                f"{self.config.recipe}: option class_weights must be none for a stream, whose labels are not known in "
                "advance"
            )
        if known is None:  # a finished run that is loaded without its training data
            return None
        labels = torch.as_tensor(known)
        count = classification.counts(labels, len(data.classes or ()))
        weights = (
            (len(labels) - count) / count.clamp(min=1) if data.multilabel else classification.balanced_weights(count)
        )
        shown = [f"{name} {weight:.3g}" for name, weight in zip(data.classes or (), weights.tolist(), strict=True)]
        if os.environ.get("RANK", "0") == "0":
            say(f"class weights: {', '.join(shown[:20])}{', ...' if len(shown) > 20 else ''}")
        return weights.float()

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        swin = isinstance(self.model, SwinTransformer)
        first = self.swin_first_lr * (self.config.batch_size or 1) / 512 if swin else self.first_lr
        return {"lr": self.paper_lr(step, steps, first)}

    def views(self, batch: Views, step: int, steps: int) -> Views:
        images = self.normalize(self.augment(self.cropped(batch)["crop"] if self.crops else batch["image"]))
        if self.erase:
            images = augment.erase(images, self.erase)
        labels = batch["label"]
        targets = (labels if self.data.multilabel else F.one_hot(labels, len(self.data.classes or ()))).to(images.dtype)
        images, targets = augment.mixup(images, targets, self.opt["mixup"], self.opt["cutmix"])
        return {"images": images, "targets": targets}

    def forward(self, views: Views) -> dict[str, Tensor]:
        logits = self.model(views["images"])
        if isinstance(logits, tuple):  # a distilled DeiT without a teacher: the mean of both heads
            logits = sum(logits) / len(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing, weights, targets = self.opt["smoothing"], self.class_weights, views["targets"]
        if self.data.multilabel:
            smooth = targets * (1 - smoothing) + smoothing / 2
            return {"loss": F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights)}
        return {"loss": F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)}

    def evaluate(self, data: Data) -> dict[str, Any]:
        """Accuracy, and for imbalanced classes the balanced accuracy and a table; for several labels per image the mean
        average precision."""
        logits, labels = predict(self.model, data.test, self.normalize, group=self.group)
        classes, count = data.classes or [], classification.counts(labels, len(data.classes or ()))
        if data.multilabel:
            precision = 100 * classification.average_precision(logits, labels)
            rows = zip(classes, count.tolist(), precision.tolist(), strict=True)
            table = {name: {"images": n, "average_precision": p if n else None} for name, n, p in rows}
            return {"mean_average_precision": precision.nanmean().item(), "classes": table}
        top = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        found: dict[str, Any] = {
            "accuracy": 100 * right(logits, labels),
            "top5": 100 * top.any(1).float().mean().item(),
        }
        if classification.imbalanced(count):
            found["balanced_accuracy"] = 100 * classification.balanced_accuracy(logits, labels)
            found["classes"] = classification.class_table(logits, labels, classes)
        return found

    def result(self, results: dict[str, Any]) -> str:
        """The results as text."""
        held = f"on {len(self.data.test.readable())} held-out images"
        if "accuracy" not in results:
            line = f"mean average precision {results['mean_average_precision']:.2f} % {held}"
        else:
            line = f"test accuracy {results['accuracy']:.2f} % {held}"
        if "balanced_accuracy" in results:
            line += f"; balanced over the classes {results['balanced_accuracy']:.2f} %"
        return line + (f"\n{classification.show(results['classes'])}" if "classes" in results else "")

    def expectation(self, results: dict[str, Any]) -> str:
        usual = {("digits", "vit"): 97, ("digits", "swi"): 96}.get((self.data.name, (self.config.model or "")[:3]))
        hint = f"; with the default settings, expect at least {usual} %"
        return self.result(results) + (hint if usual else "")


def model_settings(config: Config) -> dict[str, Any]:
    """The constructor of the model's image encoder, under "constructor", and its settings."""
    found = image_encoder(config.model or "", parse(config.set, "set"))
    assert found is not None
    return {"constructor": found.constructor, **found.settings, **found.changed}


def drop_path(settings: dict[str, Any], rates: dict[str, float]) -> float:
    """Stochastic depth for a model's size: one of ``rates``. Narrower models than the papers' have none."""
    if issubclass(settings["constructor"], SwinTransformer):
        width, depth = settings.get("embed_dim", 96), sum(settings.get("depths", (2, 2, 6, 2)))
        size = "swin_base" if width >= 128 else "swin_small" if depth > 12 else "swin_tiny"
        return rates[size] if width >= 96 else 0.0
    if issubclass(settings["constructor"], VisionTransformer):
        width = settings.get("embed_dim", 768)
        size = "vit_huge" if width >= 1280 else "vit_large" if width >= 1024 else "vit"
        return rates[size] if width >= 192 else 0.0
    return 0.0


RECIPE = Supervised
