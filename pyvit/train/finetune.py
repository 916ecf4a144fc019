"""Supervised fine-tuning of pre-trained weights, with the settings of MAE (He et al., 2022, appendix A.1) and BEiT."""

from __future__ import annotations

from typing import Any, ClassVar

from pyvit.train.supervised import Supervised


class Finetune(Supervised):
    """Supervised training from ``--init``, with learning rates multiplied by ``layer_decay`` per block below
    the head."""

    defaults: ClassVar[dict[str, Any]] = {
        **Supervised.defaults, "epochs": 100, "layer_decay": 0.65, "warmup": 0.05, "clip": 0.0
    }  # fmt: skip
    base_lr, base_batch = 5e-4, 256
    needs_init = "a run's folder or a checkpoint; to train from scratch use supervised"

    def expectation(self, results: dict[str, float]) -> str:
        return f"test accuracy {results['accuracy']:.2f} % on {len(self.data.test.readable())} held-out images"


RECIPE = Finetune
