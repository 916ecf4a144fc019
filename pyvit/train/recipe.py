"""What a recipe is, and where each is found."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.models.encoders import image_encoder
from pyvit.train.config import Config, parse
from pyvit.train.start import build, initialise

__all__ = ["RECIPES", "Recipe", "Views", "build", "initialise", "load_recipe"]

Views = dict[str, Any]


class Recipe(nn.Module):
    """A training method: its networks, its views of a batch, its loss.

    The engine calls ``views`` (augmentation, under a seed of the step), ``forward`` (the paper's loss), and ``update`` (after the
    optimizer's step: moving averages). Randomness that must not depend on how a batch is split among processes belongs in ``views``.
    """

    #: Defaults of Config fields, and the recipe's own options with theirs.
    defaults: ClassVar[dict[str, Any]] = {}
    options: ClassVar[dict[str, Any]] = {}
    #: Base learning rate and the batch size it is for: lr = base_lr * batch / base_batch.
    base_lr: ClassVar[float] = 5e-4
    base_batch: ClassVar[int] = 512
    optimizer: ClassVar[str] = "adamw"
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    #: Models: what is taken, in words, and whether it is an image encoder; settings of it that the recipe decides, and further ones it has.
    takes: ClassVar[str] = "one with an image encoder"
    encodes: ClassVar[bool] = True
    decides: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[tuple[str, ...]] = ()
    #: What ``--init`` must name, for a recipe that cannot do without.
    needs_init: ClassVar[str] = ""

    @classmethod
    def fits(cls, name: str) -> bool:
        """Whether the recipe can train the registered model ``name``."""
        return image_encoder(name) is not None

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__()
        self.config, self.data = config, data
        given = parse(config.option, "option")
        unknown = given.keys() - self.options.keys()
        if unknown:
            raise ValueError(
                f"{config.recipe}: option must be one of {', '.join(self.options) or '(none)'}, got {', '.join(sorted(unknown))}"
            )
        self.opt = {**self.options, **given}
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.std)[:, None, None], persistent=False)

    @property
    def group(self) -> Any:
        """The ranks that share a batch, or None in one process."""
        return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None

    def normalize(self, images: Tensor) -> Tensor:
        """uint8, or floats in [0, 1], to what the networks take."""
        images = images / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    def views(self, batch: Views, step: int, steps: int) -> Views:
        raise NotImplementedError

    def forward(self, views: Views) -> dict[str, Tensor]:
        """{"loss": ..., and anything worth logging}."""
        raise NotImplementedError

    def gradients(self, step: int, steps: int) -> None:
        """Between the backward pass and the optimizer's step."""

    def update(self, step: int, steps: int) -> None:
        """After the optimizer's step number ``step``."""

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        """Overrides of the step's "lr" or "weight_decay"; {} for the engine's cosine and constant."""
        return {}

    @property
    def backbone(self) -> nn.Module:
        """The network that layer decay applies to."""
        raise NotImplementedError

    def exported(self) -> nn.Module:
        """The network worth keeping, saved as the run's weights."""
        return self.backbone

    def evaluate(self, data: Data) -> dict[str, float]:
        """Figures of merit on held-out images."""
        return {}

    def expectation(self, results: dict[str, float]) -> str:
        """The last line of a run: what was reached, and what to expect."""
        return ", ".join(f"{k} {v:.4g}" for k, v in results.items()) or "done"


RECIPES = ("supervised", "finetune", "linear", "mae", "dino", "dinov2", "simclr", "clip", "siglip")


def load_recipe(name: str) -> type[Recipe]:
    """The class of a recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return importlib.import_module(f"pyvit.train.{name}").RECIPE
