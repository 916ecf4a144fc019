"""Supervised fine-tuning of pre-trained weights, with the settings of MAE (He et al., 2022, appendix A.1) and BEiT."""

from __future__ import annotations

from typing import Any, ClassVar

from pyvit.models.vit import VisionTransformer
from pyvit.train.config import Config
from pyvit.train.supervised import Supervised, drop_path, model_settings


class Finetune(Supervised):
    """Supervised training from ``--init``, with learning rates multiplied by ``layer_decay`` per block below
    the head."""

    defaults: ClassVar[dict[str, Any]] = {
        **Supervised.defaults, "epochs": 100, "layer_decay": 0.65, "warmup": 0.05, "min_lr": 1e-6
    }  # fmt: skip
    base_lr, base_batch = 5e-4, 256
    averages_patches = True
    needs_init = "a run's folder or a checkpoint; to train from scratch use supervised"
    drop_paths: ClassVar[dict[str, float]] = {
        "vit": 0.1, "vit_large": 0.2, "vit_huge": 0.3, "swin_tiny": 0.1, "swin_small": 0.2, "swin_base": 0.2
    }  # fmt: skip
    #: The settings for ViT-L and larger models that differ.
    large: ClassVar[dict[str, Any]] = {"epochs": 50, "layer_decay": 0.75, "warmup": 0.1}
    large_base_lr = 1e-3

    @classmethod
    def model_defaults(cls, config: Config) -> dict[str, Any]:
        settings = model_settings(config)
        batch = config.batch_size or cls.defaults["batch_size"]
        found: dict[str, Any] = {"option": {"drop_path": drop_path(settings, cls.drop_paths)}}
        if issubclass(settings["constructor"], VisionTransformer) and settings.get("embed_dim", 768) >= 1024:
            found |= {"lr": cls.large_base_lr * batch / cls.base_batch, **cls.large}
        lr = config.lr or found.get("lr") or cls.peak_lr(batch)
        return {**found, "min_lr": min(cls.defaults["min_lr"], lr)}

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {"lr": self.paper_lr(step, steps)}

    def expectation(self, results: dict[str, Any]) -> str:
        return self.result(results)


RECIPE = Finetune
