"""What a recipe is, and where each is found."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyvit.data import Data
from pyvit.models.registry import create_model, settings_of
from pyvit.train.config import Config
from pyvit.train.options import Option, SettingError, choose, parse

Views = dict[str, Any]


class Recipe(nn.Module):
    """A training method: its networks, its views of a batch, its loss.

    The engine calls ``views`` (augmentation, under a seed of the step), ``forward`` (the paper's loss), and ``update`` (after the
    optimizer's step: moving averages). Randomness that must not depend on how a batch is split among processes belongs in ``views``.
    """

    #: Defaults of Config fields, and the recipe's own options.
    defaults: ClassVar[dict[str, Any]] = {}
    options: ClassVar[dict[str, Option]] = {}
    #: Base learning rate and the batch size it is for; it grows with the batch, or with its square root (``scaling`` "sqrt").
    base_lr: ClassVar[float] = 5e-4
    base_batch: ClassVar[int] = 512
    scaling: ClassVar[str] = "linear"
    optimizer: ClassVar[str] = "adamw"
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 1e-8

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__()
        self.config, self.data, self.per_epoch = config, data, 1
        self.opt = self.chosen(config)
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.std)[:, None, None], persistent=False)

    @classmethod
    def chosen(cls, config: Config) -> dict[str, Any]:
        """The recipe's options under ``config``. Raises SettingError for one that is unknown or out of its range."""
        return choose(config.recipe, cls.options, parse(config.option, "option"))

    @classmethod
    def peak_lr(cls, batch: int) -> float:
        """The peak learning rate for ``batch`` images per step."""
        share = batch / cls.base_batch
        return cls.base_lr * (math.sqrt(share) if cls.scaling == "sqrt" else share)

    @classmethod
    def rate_formula(cls) -> str:
        """:meth:`peak_lr` in words."""
        share = f"batch / {cls.base_batch}"
        return f"{cls.base_lr:g} x {f'sqrt({share})' if cls.scaling == 'sqrt' else share}"

    @property
    def rows(self) -> int:
        """Images of a micro-batch in this process."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        return (self.config.batch_size or world) // world // self.config.accumulate

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

    def step_skipped(self) -> None:
        """In the place of :meth:`update`, after a step whose gradients overflowed: forget what this step has gathered."""

    def of_micro_batches(self) -> list[str]:
        """What depends on the rows that it sees together, and with ``--accumulate`` sees those of a micro-batch alone."""
        return ["batch norms"] if has_batch_norm(self) else []

    def rate_scales(self) -> Mapping[str, float]:
        """Factors on the learning rate of the backbone's parameters whose name contains the key."""
        return {}

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


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class Contrastive(Recipe):
    """A recipe whose loss compares all rows of a batch: :meth:`encode` them, then :meth:`compare` them.

    With ``--accumulate`` the engine encodes every micro-batch first and compares the whole batch (:mod:`pyvit.train.grad_cache`), so that
    no negative is lost.
    """

    def encode(self, views: Views) -> dict[str, Tensor]:
        """Embeddings of a micro-batch, each (B, D)."""
        raise NotImplementedError

    def compare(self, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": ..., and anything worth logging} of the embeddings of a whole batch."""
        raise NotImplementedError

    def forward(self, views: Views, cached: Any = None) -> dict[str, Tensor]:
        live = self.encode(views)
        return self.compare(live) if cached is None else cached.loss(self, live)

    def of_micro_batches(self) -> list[str]:
        return []

    def check_batch(self) -> None:
        """Refuse batches without negatives, and micro-batches that batch norms in the encoder would tell apart."""
        name, batch, accumulate = self.config.recipe, self.config.batch_size, self.config.accumulate
        if batch is not None and batch < 2:
            raise SettingError(
                f"{name}: batch_size must be at least 2, for the negatives of an image are the others of its batch, got {batch}"
            )
        if accumulate > 1 and has_batch_norm(self.backbone):
            raise SettingError(
                f"{name}: accumulate must be 1 with {self.config.model}, whose batch norms would take the statistics of each micro-batch, "
                f"got {accumulate}"
            )


RECIPES = ("supervised", "finetune", "linear", "mae", "dino", "dinov2", "simclr", "clip", "siglip")


def load_recipe(name: str) -> type[Recipe]:
    """The class of a recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise SettingError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return importlib.import_module(f"pyvit.train.{name}").RECIPE


def build(name: str, data: Data, config: Config, **settings: Any) -> nn.Module:
    """The model of a run: its registered settings, under those of the recipe that its constructor knows, under ``--set``.

    The image size is the data's; that of a model without ``img_size`` is free.
    """
    constructor, _ = settings_of(name)
    wanted = {"img_size": data.size, **settings, **({"in_chans": 1} if data.sound else {})}
    known = set(_parameters(constructor))
    if data.sound and "in_chans" not in known:
        raise ValueError(f"{config.recipe}: model must take spectrograms of one channel (ast_*, vit_*, swin_*), {name} does not")
    chosen = {k: v for k, v in wanted.items() if k in known}
    model = create_model(name, **{**chosen, **parse(config.set, "set")})
    if config.checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"checkpointing: {name} does not support it")
        model.set_grad_checkpointing()
    return model


def _parameters(constructor: Any) -> Iterator[str]:
    """Names a constructor takes, through **kwargs into the classes it extends."""
    for each in inspect.getmro(constructor) if inspect.isclass(constructor) else (constructor,):
        if each in (nn.Module, object):
            return
        parameters = inspect.signature(each.__init__ if inspect.isclass(each) else each).parameters.values()
        yield from (p.name for p in parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def initialise(model: nn.Module, init: str) -> list[str]:
    """Load the weights that ``init`` holds for ``model``: a run's folder, or a checkpoint of any format pyvit reads.

    Heads of another shape are left as they are. Returns the names that were not loaded; raises when nothing fits.
    """
    path = Path(init)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"init: {path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(str(path))
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    own = model.state_dict()
    fits = {k: v for k, v in state.items() if isinstance(v, Tensor) and k in own and own[k].shape == v.shape}
    if len(fits) < len(own) / 2:
        from pyvit.models.checkpoints import load_checkpoint

        load_checkpoint(model, path)
        return []
    model.load_state_dict(fits, strict=False)
    return sorted(own.keys() - fits.keys())
