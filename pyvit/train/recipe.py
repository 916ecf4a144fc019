"""The base classes of recipes, and the list of recipes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.data.crops import Crop, crop_images, generator
from pyvit.models.encoders import image_encoder
from pyvit.train import schedules
from pyvit.train.config import Config
from pyvit.train.initialisation import build, initialise
from pyvit.train.optim import no_decay
from pyvit.train.options import Option, SettingError, choose, parse

__all__ = ["RECIPES", "Recipe", "Views", "build", "initialise", "load_recipe"]

Views = dict[str, Any]


class Recipe(nn.Module):
    """A training method: its networks, its views of a batch, its loss.

    The engine calls ``views`` (augmentation, seeded by the step), ``forward`` (the loss) and ``update`` (after the
    optimizer step, for moving averages). Random numbers that must not depend on how a batch is split over processes are
    drawn in ``views``.
    """

    #: Defaults of Config fields, and the recipe's own options.
    defaults: ClassVar[dict[str, Any]] = {}
    options: ClassVar[dict[str, Option]] = {}
    #: Peak learning rate at batch size ``base_batch``. It scales with the batch size, or with its square root
    #: (``scaling`` "sqrt").
    base_lr: ClassVar[float] = 5e-4
    base_batch: ClassVar[int] = 512
    scaling: ClassVar[str] = "linear"
    optimizer: ClassVar[str] = "adamw"
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 1e-8
    momentum: ClassVar[float] = 0.9
    #: The logged values that the progress line shows.
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    #: Evaluation results by which runs are compared: the first that there is. A minus sign: smaller is better.
    best_by: ClassVar[tuple[str, ...]] = ("accuracy", "zero_shot", "knn", "image_to_text@1", "-test_loss")
    #: Whether the recipe exports a moving average of its weights in any case, so that ``--ema`` is not for it.
    averages: ClassVar[bool] = False
    #: Whether the exported network has one output per class of the data, in their order.
    classifies: ClassVar[bool] = False
    #: Which models the recipe trains, as text; whether it uses only their image encoder; settings of the model that
    #: the recipe fixes; and settings that it adds to the model's.
    models: ClassVar[str] = "one with an image encoder"
    image_models: ClassVar[bool] = True
    fixed_settings: ClassVar[tuple[str, ...]] = ()
    extra_settings: ClassVar[tuple[str, ...]] = ()
    #: Whether models pre-trained as masked autoencoders average their patches: the class token has learned nothing.
    averages_patches: ClassVar[bool] = False
    #: How often an image is in a batch, each time with other random numbers (Hoffer et al., 2020).
    repeats: int = 1
    #: What ``--init`` must name, if the recipe requires it.
    needs_init: ClassVar[str] = ""

    @classmethod
    def fits(cls, name: str) -> bool:
        """Whether the recipe can train the registered model ``name``."""
        return image_encoder(name) is not None

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__()
        self.config = config
        self.data = data
        self.per_epoch = 1
        self.opt = self.options_of(config)
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.std)[:, None, None], persistent=False)

    @classmethod
    def options_of(cls, config: Config) -> dict[str, Any]:
        """The recipe's options under ``config``. Raises SettingError for an unknown option or a value out of range."""
        return choose(config.recipe, cls.options, parse(config.option, "option"))

    @classmethod
    def model_defaults(cls, config: Config) -> dict[str, Any]:
        """Defaults that depend on ``config``, whose model is known: Config fields, and options under "option", as in
        :data:`pyvit.train.presets.PRESETS`. They come before :attr:`defaults`."""
        return {}

    @classmethod
    def base_settings(cls, optimizer: str | None = None) -> dict[str, Any]:
        """Defaults of Config fields; those of ``optimizer`` if it is given."""
        chosen = optimizer or cls.optimizer
        found = {"optimizer": cls.optimizer, "min_lr": 0.0, "ema": 0.0}
        if chosen in ("adamw", "lamb", "muon"):
            found |= {"beta1": cls.betas[0], "beta2": cls.betas[1], "eps": 1e-6 if chosen == "lamb" else cls.eps}
        if chosen == "muon":
            found |= {"momentum": 0.95}
        elif chosen in ("sgd", "lars"):
            found |= {"momentum": cls.momentum}
        return {**found, **cls.defaults}

    @classmethod
    def peak_lr(cls, batch: int) -> float:
        """The peak learning rate for ``batch`` images per step."""
        share = batch / cls.base_batch
        return cls.base_lr * (math.sqrt(share) if cls.scaling == "sqrt" else share)

    @classmethod
    def rate_formula(cls) -> str:
        """:meth:`peak_lr` as text."""
        share = f"batch / {cls.base_batch}"
        return f"{cls.base_lr:g} x {f'sqrt({share})' if cls.scaling == 'sqrt' else share}"

    @property
    def rows(self) -> int:
        """Images per micro-batch in this process."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        return (self.config.batch_size or world) // world // self.config.accumulate

    @property
    def group(self) -> Any:
        """The process group that shares a batch, or None with one process."""
        return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None

    def normalize(self, images: Tensor) -> Tensor:
        """Images, uint8 or floats in [0, 1], to normalised floats."""
        images = images / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    @property
    def crops(self) -> dict[str, Crop]:
        """The crops that the recipe trains on, by name; {} for whole images. The data loader cuts them."""
        augment = getattr(self, "augment", None)
        return {"crop": augment.crop} if augment is not None and augment.crop is not None else {}

    def cropped(self, batch: Views) -> Views:
        """``batch`` with all :attr:`crops`: those that the data loader has not cut are cut from the whole images."""
        if batch.keys() >= self.crops.keys():
            return batch
        seeds = torch.randint(2**62, (len(batch["image"]),), device="cpu").tolist()
        return {**batch, **crop_images(batch["image"], self.crops, [generator(seed) for seed in seeds])}

    def views(self, batch: Views, step: int, steps: int) -> Views:
        raise NotImplementedError

    def forward(self, views: Views) -> dict[str, Tensor]:
        """{"loss": ..., and other values to log}."""
        raise NotImplementedError

    def gradients(self, step: int, steps: int) -> None:
        """Called between the backward pass and the optimizer step."""

    def update(self, step: int, steps: int) -> None:
        """Called after the optimizer step."""

    def step_skipped(self) -> None:
        """Called instead of :meth:`update` if gradients overflowed: discard what the step has accumulated."""

    def depends_on_micro_batch(self) -> list[str]:
        """Names of the parts whose result depends on which rows are in the same micro-batch, for a note about
        ``--accumulate``."""
        return ["batch norms"] if has_batch_norm(self) else []

    def rate_scales(self) -> Mapping[str, float]:
        """Factors on the learning rate of backbone parameters whose name contains the key."""
        return {}

    def paper_lr(self, step: int, steps: int, first: float = 0.0) -> float:
        """The learning rate of a step as most papers' code computes it: linear from ``first`` at step 0 to the peak
        after the warm-up, then a half cosine to ``min_lr`` after the last step."""
        c = self.config
        return schedules.warmup_cosine(
            step, steps, c.lr or 0.0, c.min_lr or 0.0, int(steps * (c.warmup or 0.0)), min(first, c.lr or 0.0)
        )

    def no_decay(self) -> set[str]:
        """Full names of the matrices without weight decay: by default those that the modules exempt."""
        return no_decay(self)

    def own_rates(self) -> Mapping[str, str]:
        """{full name: schedule} of the parameters whose learning rate is not "lr" but another one of
        :meth:`schedule`."""
        return {}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """The parameters whose gradients are clipped together. By default the norm of all of them is limited."""
        return [list(self.parameters())]

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        """Overrides of "lr" or "weight_decay" for this step, and the rates that :meth:`own_rates` names. By default the
        engine uses a cosine and a constant."""
        return {}

    def warning(self, step: int, steps: int, values: Mapping[str, float]) -> str:
        """A warning about the values that a step logs, or "". Called after every step."""
        return ""

    @property
    def backbone(self) -> nn.Module:
        """The network that layer decay applies to."""
        raise NotImplementedError

    def exported(self) -> nn.Module:
        """The network that is saved as the run's weights."""
        return self.backbone

    def classifier(self) -> nn.Module:
        """The network that gives class scores (B, classes) for normalised images, if the recipe :attr:`classifies`."""
        return self.exported()

    def encoder(self) -> nn.Module:
        """The network whose features and attention are evaluated."""
        return self.exported()

    def evaluate(self, data: Data) -> dict[str, float]:
        """Metrics on held-out images."""
        return {}

    def score(self, results: Mapping[str, float]) -> tuple[str, float] | None:
        """The name of the result in ``results`` that tells which weights are better, and a number that is larger for
        better ones; None without such a result."""
        for key in self.best_by:
            name = key.removeprefix("-")
            if math.isfinite(results.get(name, math.nan)):
                return name, results[name] * (-1 if key != name else 1)
        return None

    def expectation(self, results: dict[str, float]) -> str:
        """The last line of a run: its result and, for presets, what to expect."""
        return ", ".join(f"{k} {v:.4g}" for k, v in results.items()) or "done"


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class Contrastive(Recipe):
    """A recipe whose loss compares all rows of a batch: :meth:`encode`, then :meth:`compare`.

    With ``--accumulate`` the engine encodes all micro-batches and compares the whole batch, so that all negatives are
    kept (:mod:`pyvit.train.grad_cache`).
    """

    def encode(self, views: Views) -> dict[str, Tensor]:
        """Embeddings of a micro-batch, each (B, D)."""
        raise NotImplementedError

    def compare(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": ..., and other values to log} from the embeddings of a whole batch."""
        raise NotImplementedError

    def forward(self, views: Views, cached: Any = None) -> dict[str, Tensor]:
        live = self.encode(views)
        return self.compare(live) if cached is None else cached.loss(self, live)

    def depends_on_micro_batch(self) -> list[str]:
        return []

    def check_batch(self) -> None:
        """Refuse batches without negatives, and accumulation with batch norms in the encoder."""
        name = self.config.recipe
        batch = self.config.batch_size
        accumulate = self.config.accumulate
        if batch is not None and batch < 2:
            raise SettingError(
                f"{name}: batch_size must be at least 2, because the negatives of an image are the others of "
                f"its batch, got {batch}"
            )
        if accumulate > 1 and has_batch_norm(self.backbone):
            raise SettingError(
                f"{name}: accumulate must be 1 with {self.config.model}, whose batch norms would use the statistics "
                f"of each micro-batch, got {accumulate}"
            )


RECIPES = ("supervised", "finetune", "linear", "mae", "dino", "dinov2", "simclr", "clip", "siglip")


def load_recipe(name: str) -> type[Recipe]:
    """The class of a recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise SettingError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return importlib.import_module(f"pyvit.train.{name}").RECIPE
