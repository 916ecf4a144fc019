"""The network that embeds: trained weights, preprocessing, and a fingerprint of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data.decode import CENTRE, decode_image, decode_native
from pyvit.data.text import load_tokenizer
from pyvit.dispatch.devices import cpu_isa
from pyvit.models.checkpoint_files import config_beside
from pyvit.models.checkpoints import LoadReport, load_checkpoint
from pyvit.models.encoders import image_encoder
from pyvit.models.infer import model_from_checkpoint
from pyvit.models.registry import REGISTRY, create_model, settings_of
from pyvit.models.vit import VisionTransformer
from pyvit.nn import PatchEmbed
from pyvit.nn.packed_weights import pack_weights
from pyvit.quantization import quantize
from pyvit.train.runs import load_trained

#: int8 is of linear layers alone; everything else of such a model has the best dtype of the processor.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Normalisation of networks whose weights come without a configuration.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5,) * 3, (0.5,) * 3)

#: Keys of a file that an encoder has no use for.
_HEADS = (r"head(_dist)?\..*", r"fc\..*", r"decoder.*", r"mask_token")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to make an encoder; also its record in a manifest. None: the weights' own."""

    model: str
    checkpoint: str | None = None
    random_weights: bool = False
    dtype: str = "auto"
    size: int | None = None
    crop: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    native: bool = False


class Encoder:
    """Images to vectors, float32 on the model's device.

    Attributes:
        settings: with no None left but ``checkpoint``. fingerprint: of weights and settings. width: of a vector.
        dtype: of the model's arithmetic, apart from int8 layers.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, tokenizer: Callable[[], Any] | None = None, device: Any = None
    ) -> None:
        self.device = torch.device(device or _default_device())
        if settings.dtype == "auto":
            settings = dataclasses.replace(settings, dtype=_best_dtype(self.device))
        if settings.dtype not in (*DTYPES, "int8"):
            raise ValueError(f"embed: dtype must be auto, {', '.join(DTYPES)} or int8, got {settings.dtype!r}")
        if settings.dtype == "int8" and self.device.type != "cpu":
            raise ValueError(f"embed: dtype int8 needs the device cpu, got {self.device}")
        self.settings, self._tokenizer = settings, tokenizer
        self.fingerprint = _fingerprint(model, settings)
        tower = getattr(model, "visual", model)
        self.dtype = DTYPES[_best_dtype(self.device) if settings.dtype == "int8" else settings.dtype]
        self.model, self.tower = model.eval().requires_grad_(False).to(self.dtype), tower
        if settings.native and (
            not isinstance(tower, VisionTransformer) or type(tower).forward_features is not _PLAIN_VIT
        ):
            raise ValueError(f"embed: --native needs a ViT, {settings.model} is a {type(tower).__name__}")
        if settings.dtype == "int8" and not quantize(tower, reversible=False).quantized:
            raise ValueError(f"embed: dtype int8 needs linear layers to quantize, {settings.model} has none")
        patch = getattr(tower, "patch_embed", None)
        self.folded = isinstance(patch, PatchEmbed)
        if self.folded:  # after the change of dtype, so that mean and std stay float32
            patch.pixels = {"mean": tuple(settings.mean), "std": tuple(settings.std)}
            patch.register_constants()
        self.model.to(self.device)
        if self.device.type == "cpu":
            pack_weights(self.model)
        try:
            self.width = self(torch.zeros(1, 3, settings.size, settings.size, dtype=torch.uint8)).shape[1]
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"embed: {settings.model} cannot embed {settings.size} pixels: {error}") from error

    def decode(self, source: Any) -> Tensor:
        """A path or bytes to uint8 (3, H, W): H = W = ``settings.size``, or for native resolution of any aspect."""
        if self.settings.native:
            patch = self.tower.patch_embed.patch_size
            rows, columns = self.settings.size // patch[0], self.settings.size // patch[1]
            return decode_native(source, patch, rows * columns)
        return decode_image(source, self.settings.size, self.settings.crop)

    @torch.inference_mode()
    def __call__(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """uint8 images (B, 3, H, W), or a list of (3, H, W) of different sizes, to vectors (B, D)."""
        if isinstance(images, Tensor):
            return self._head(self._features([self._pixels(images)])[0])
        sizes: dict[tuple[int, ...], list[int]] = {}
        for at, image in enumerate(images):
            sizes.setdefault(tuple(image.shape), []).append(at)
        batches = [self._pixels(torch.stack([images[i] for i in at])) for at in sizes.values()]
        vectors = torch.cat([self._head(x) for x in self._features(batches)])
        order = torch.tensor([i for at in sizes.values() for i in at], device=vectors.device)
        return torch.empty_like(vectors).index_copy_(0, order, vectors)

    def _pixels(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if self.folded:
            return images
        shape = (1, -1, 1, 1)
        mean, std = (torch.tensor(v, device=self.device).view(shape) for v in (self.settings.mean, self.settings.std))
        return ((images / 255 - mean) / std).to(self.dtype)

    def _features(self, batches: list[Tensor]) -> list[Tensor]:
        if self.settings.native:
            return self.tower.forward_packed(batches)
        if hasattr(self.tower, "forward_head") or self.tower is self.model:
            return [self.tower.forward_features(images) for images in batches]
        return [self.tower(images) for images in batches]

    def _head(self, x: Tensor) -> Tensor:
        """Pooled features: the input of a classifier, or an embedding in the space of images and texts, normalised."""
        two = self.tower is not self.model
        if hasattr(self.tower, "forward_head"):
            x = self.tower.forward_head(x, pre_logits=not two)
        elif not two and x.dim() > 2:
            x = x[:, 0] if x.dim() == 3 else x.flatten(2).mean(2)
        return F.normalize(x.float(), dim=-1) if two else x.float()

    @torch.inference_mode()
    def text(self, text: str, tokenizer: str | None = None) -> Tensor:
        """A normalised vector (D,). Raises ValueError without a text tower or a tokenizer."""
        if not hasattr(self.model, "encode_text"):
            raise ValueError(f"search: --text needs vectors of a CLIP or SigLIP model, these are of {self.name}")
        if tokenizer is not None:
            made = load_tokenizer(tokenizer, getattr(self.model.text, "context_length", 77))
        elif self._tokenizer is not None:
            made = self._tokenizer()
        else:
            raise ValueError(
                f"search: no tokenizer.json beside the weights of {self.name}; give it with --tokenizer FILE"
            )
        return self.model.encode_text(made([text]).to(self.device))[0].float()

    @property
    def name(self) -> str:
        """The model and where its weights are from, for messages."""
        s = self.settings
        return f"{s.model} ({s.checkpoint or ('random weights' if s.random_weights else 'its own weights')})"

    def describe(self) -> str:
        """The first line of a run."""
        s = self.settings
        numbers = [" ".join(f"{v:.4g}" for v in values or ()) for values in (s.mean, s.std)]
        seen = "native aspect, as many patches as" if s.native else f"the centre ({s.crop:.4g} of the side) at"
        return (
            f"model {self.name}: {seen} {s.size} x {s.size} pixels, mean {numbers[0]}, std {numbers[1]}, "
            f"{s.dtype} on {self.device.type}, vectors of {self.width}"
        )

    def record(self) -> dict[str, Any]:
        """The entry of a manifest, which :func:`load_encoder` turns into this encoder."""
        return {**dataclasses.asdict(self.settings), "width": self.width, "fingerprint": self.fingerprint}


_PLAIN_VIT = VisionTransformer.forward_features


def load_encoder(settings: Settings, device: Any = None, say: Callable[[str], object] = lambda line: None) -> Encoder:
    """The encoder that ``settings`` name.

    ``settings.model`` is the folder of a finished ``pyvit train``, a file or folder that ``load_checkpoint`` reads, or
    a registered name with ``checkpoint``. Registered names have no weights of their own: without a checkpoint they are
    refused, unless ``random_weights`` asks for them.

    Size, mean, std and crop are those of the run, or of the configuration beside the weights; else those of the
    model's family. ``say`` gets what was loaded, line by line.
    """
    path = Path(settings.model).expanduser()
    beside: Path | None = None
    if path.exists():
        if settings.checkpoint is not None:
            raise ValueError(f"embed: --checkpoint needs --model to be a model's name, got {path}, which is a path")
        settings = dataclasses.replace(settings, model=str(path.absolute()))
        if (run := _run(path)) is not None:
            return _of_run(run, settings, device)
        model, report = model_from_checkpoint(path)
        beside = path if path.is_dir() else path.parent
        say(f"weights {path}: {report.summary()}")
    else:
        if settings.model not in REGISTRY and (
            os.sep in settings.model or path.suffix in (".safetensors", ".pth", ".pt")
        ):
            raise FileNotFoundError(f"embed: {path} does not exist")
        settings_of(settings.model)
        if settings.checkpoint is None and not settings.random_weights:
            raise ValueError(
                f"embed: {settings.model} has no weights of its own: name a file or a run with --checkpoint (or ask "
                "for random weights with --random-weights)"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _create(settings.model)
        if settings.checkpoint is not None:
            weights = Path(settings.checkpoint).expanduser()
            beside = weights if weights.is_dir() else weights.parent
            report = _load(model, weights)
            say(f"weights {weights}: {report.summary()}")
            settings = dataclasses.replace(settings, checkpoint=str(weights.absolute()))
    config = {} if beside is None else _preprocessing(beside, path)
    tower = getattr(model, "visual", model)
    size = next(iter(tower.example_inputs())).shape
    if size[1] != 3 or size[2] != size[3]:
        raise ValueError(f"embed: must be a model of square colour images, {settings.model} takes {tuple(size[1:])}")
    family = (_OPENAI if getattr(model, "logit_bias", None) is None else _HALF) if model is not tower else _IMAGENET
    defaults = {
        "size": size[2],
        "crop": 1.0 if model is not tower else CENTRE,
        "mean": family[0],
        "std": family[1],
        **config,
    }
    tokens = beside is not None and (beside / "tokenizer.json").exists() and model is not tower
    make = (lambda: load_tokenizer(str(beside), getattr(model.text, "context_length", 77))) if tokens else None
    return Encoder(model, _filled(settings, defaults), make, device)


def _filled(settings: Settings, defaults: Mapping[str, Any]) -> Settings:
    missing = {k: v for k, v in defaults.items() if getattr(settings, k) is None}
    full = dataclasses.replace(settings, **missing)
    for name in ("mean", "std"):
        values = getattr(full, name)
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(f"embed: {name} must be three numbers{' above 0' if name == 'std' else ''}, got {values}")
    if not 0 < full.crop <= 1:
        raise ValueError(f"embed: crop must be in (0, 1], got {full.crop}")
    return dataclasses.replace(full, mean=tuple(full.mean), std=tuple(full.std))  # type: ignore[arg-type]


def _run(path: Path) -> Path | None:
    """The folder of the run that ``path`` is or is the weights of."""
    if path.is_file() and path.name != "model.safetensors":
        return None
    folder = path if path.is_dir() else path.parent
    return folder if "recipe" in config_beside(folder / "model.safetensors") else None


def _of_run(folder: Path, settings: Settings, device: Any) -> Encoder:
    recipe, kept = load_trained(folder)
    data, kept = recipe.data, kept or {}
    if data.sound or data.size[0] != data.size[1]:
        raise ValueError(f"embed: {folder} must be a run on square images, it was trained on {data.name} {data.size}")
    centre = kept.get("centre")
    defaults = {"size": data.size[0], "crop": 1.0 if centre is None else centre, "mean": data.mean, "std": data.std}
    tokenizer = getattr(recipe, "tokenizer", None)
    make = None if tokenizer is None else lambda: tokenizer
    return Encoder(recipe.encoder(), _filled(settings, defaults), make, device)


def _create(name: str) -> nn.Module:
    """The image encoder of a registered model; both towers of a CLIP."""
    if name.startswith(("clip_", "siglip_")):
        return create_model(name)
    found = image_encoder(name)
    return create_model(name) if found is None else found.constructor(**{**found.settings, **found.changed})


def _load(model: nn.Module, weights: Path) -> LoadReport:
    unused = (r"norm\..*",) if isinstance(getattr(model, "norm", None), nn.Identity) else ()  # fc_norm takes its place
    return load_checkpoint(model, weights, allow=() if hasattr(model, "visual") else (*_HEADS, *unused))


def _preprocessing(folder: Path, path: Path) -> dict[str, Any]:
    """Size, crop, mean and std in a configuration of transformers, timm or open_clip; what it does not say is left
    out."""
    try:
        read = json.loads((folder / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        read = {}
    if "image_mean" in read:
        short, cut = (_side(read.get(key)) for key in ("size", "crop_size"))
        crop = cut / short if read.get("do_center_crop") and short and cut and cut <= short else 1.0
        size = cut if read.get("do_center_crop") and cut else short
        found = {"mean": read["image_mean"], "std": read["image_std"], "crop": crop, "size": size}
    else:
        config = config_beside(folder / "weights")
        read = config.get("preprocess_cfg") or config.get("pretrained_cfg") or config
        found = {"mean": read.get("mean"), "std": read.get("std"), "crop": read.get("crop_pct")}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if v}


def _side(value: Any) -> int | None:
    """The side in an entry of transformers' configurations: a number, {"shortest_edge"} or {"height", "width"}."""
    if isinstance(value, Mapping):
        value = value.get("shortest_edge") or value.get("height")
    return value if isinstance(value, int) else None


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _best_dtype(device: torch.device) -> str:
    """16 bits where the hardware computes in them."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if "bf16" in (isa := cpu_isa(torch.bfloat16)) or isa == "amx" else "fp32"


def _fingerprint(model: nn.Module, settings: Settings) -> str:
    """A hash of the weights and of everything else that the vectors depend on."""
    digest = hashlib.sha256()
    relevant = [settings.dtype, settings.size, settings.crop, settings.mean, settings.std, settings.native]
    digest.update(json.dumps(relevant).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
