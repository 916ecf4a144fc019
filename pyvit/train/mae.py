"""Masked autoencoders (He et al., 2022): mask most patches and reconstruct them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.models.encoders import image_encoder
from pyvit.models.mae import MaskedAutoencoder
from pyvit.models.vit import VisionTransformer
from pyvit.train import augment
from pyvit.train.config import Config
from pyvit.train.options import Option, parse
from pyvit.train.recipe import Recipe, Views, initialise


class MAE(Recipe):
    """The loss is the mean squared error of the masked patches, each normalised by its own mean and variance."""

    defaults: ClassVar[dict[str, Any]] = {
        "epochs": 800,
        "batch_size": 4096,
        "weight_decay": 0.05,
        "warmup": 40 / 800,
        "clip": 0.0,
    }
    options: ClassVar[dict[str, Option]] = {
        "mask_ratio": Option(0.75, "share of the patches that is masked", "(0, 1)"),
        "norm_pix": Option(True, "reconstruct pixels normalised within each patch"),
        "decoder_dim": Option(512, "width of the decoder", "[1, inf)"),
        "decoder_depth": Option(8, "blocks of the decoder", "[0, inf)"),
        "decoder_heads": Option(16, "attention heads of the decoder", "[1, inf)"),
        "crop": Option(0.2, "smallest share of an image that a random crop keeps", "(0, 1]"),
        "slant": Option(0.0, "largest rotation and shear in degrees", "[0, 180)"),
    }
    base_lr, base_batch, betas = 1.5e-4, 256, (0.9, 0.95)
    models = "a plain vision transformer, whose patches do not overlap"
    fixed_settings = ("global_pool", "mask_token", "num_classes")
    extra_settings = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")

    @classmethod
    def fits(cls, name: str) -> bool:
        found = image_encoder(name)
        return found is not None and found.constructor is VisionTransformer

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        found = image_encoder(config.model or "", parse(config.set, "set"))
        if found is None or found.constructor is not VisionTransformer:
            raise ValueError(f"mae: model must be {self.models}, got {config.model}")
        decoder = {
            f"decoder_{k}": self.opt[o]
            for k, o in (("embed_dim", "decoder_dim"), ("depth", "decoder_depth"), ("num_heads", "decoder_heads"))
        }
        wanted = {
            **found.settings,
            "num_classes": 0,
            "global_pool": "token" if found.settings.get("class_token", True) else "avg",
            "fc_norm": False,
            "img_size": data.size,
            "in_chans": data.channels,
            **decoder,
            "norm_pix_loss": self.opt["norm_pix"],
        }
        self.model = MaskedAutoencoder(
            **{
                **wanted,
                **found.changed,
                **{k: v for k, v in parse(config.set, "set").items() if k in self.extra_settings},
            }
        )
        self.model.set_grad_checkpointing(config.checkpointing)
        if config.init is not None:
            initialise(self.model, config.init)
        self.augment = augment.mae(data.size, data.flip, (self.opt["crop"], 1.0), self.opt["slant"])

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {"lr": self.paper_lr(step, steps)}

    def views(self, batch: Views, step: int, steps: int) -> Views:
        images = self.normalize(self.augment(self.cropped(batch)["crop"]))
        rows, columns = self.model.patch_embed.grid(images.shape[2:])
        return {
            "images": images,
            "noise": torch.rand(len(images), rows * columns, dtype=torch.float32, device=images.device),
        }

    def forward(self, views: Views) -> dict[str, Tensor]:
        loss, _, _ = self.model(views["images"], self.opt["mask_ratio"], views["noise"])
        return {"loss": loss}

    def evaluate(self, data: Data) -> dict[str, float]:
        """Reconstruction loss on held-out images, and k-NN accuracy."""
        from pyvit.eval.knn import knn_accuracy_of

        batch = data.test.fetch(data.test.readable()[:512])
        images = self.normalize(batch["image"].to(self.mean.device))
        loss, _, _ = self.model(images, self.opt["mask_ratio"])
        return {"test_loss": float(loss.detach()), **knn_accuracy_of(self, data)}

    def expectation(self, results: dict[str, float]) -> str:
        line = f"reconstruction loss {results['test_loss']:.3f} on held-out images (a constant patch has 1)"
        return line + (f"; k-NN accuracy {results['knn']:.2f} %" if "knn" in results else "")


RECIPE = MAE
