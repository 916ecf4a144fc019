"""Settings for ``pyvit train auto``: recipe, model, image size, batch, epochs and augmentation that suit a data set, a
machine and a time limit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyvit.data import Data, Images, load_data
from pyvit.data.decode import ImageDecoder, open_image
from pyvit.models.checkpoints import open_source
from pyvit.models.encoders import image_encoder, parameters
from pyvit.models.infer import registered_model
from pyvit.train import checkpoint
from pyvit.train.config import Config
from pyvit.train.cost import Cost, cores, measure
from pyvit.train.initialisation import inherit
from pyvit.train.log import say
from pyvit.train.options import SettingError, parse
from pyvit.train.recipe import load_recipe
from pyvit.train.run_folder import Lock


class Candidate(NamedTuple):
    """A model with its settings, the side of its images, and the fewest training images it is used for."""

    model: str
    settings: tuple[str, ...]
    size: int
    least: int

    def __str__(self) -> str:
        return " ".join([self.model, *self.settings, f"at {self.size} pixels"])


#: Models to train from scratch, by descending cost. ViTs have a convolutional stem, with which they learn in fewer
#: epochs (Xiao et al., "Early Convolutions Help Transformers See Better", 2021). From few images narrow ResNets learn
#: more: with 300 images of Fashion-MNIST at 32 pixels the last one reached 77 % in 50 epochs, a ViT of four blocks with
#: such a stem 70 % and a Swin of four blocks 70 % in 100.
LADDER = (
    Candidate("vit_base_conv_s16_224", (), 224, 1_000_000),
    Candidate("vit_small_conv_s16_224", (), 224, 50_000),
    Candidate("vit_tiny_conv_s16_224", (), 224, 10_000),
    Candidate("resnet18", ("width=32",), 128, 0),
    Candidate("resnet18", ("width=32",), 64, 0),
    Candidate("resnet18", ("width=16", "small=True"), 32, 0),
)

#: A candidate is used if the time allows this many epochs. More than MOST are not useful, nor, in fine-tuning, more
#: than MOST_FINETUNING.
FEWEST, MOST, MOST_FINETUNING = 30, 300, 50

#: Epochs are rounded down to one of these, so that a small change of the measured speed changes nothing.
ROUND = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300)

#: Minutes without --minutes, without and with a GPU; and the share of them that training takes: evaluation and
#: checkpoints take the rest.
MINUTES, MINUTES_GPU, TRAINING = 10.0, 60.0, 0.9

#: Fewer images are augmented mildly: strong crops need more images, and more epochs than FEWEST. Mixup and CutMix need
#: more epochs: MIXED (ResNets of 300 images of Fashion-MNIST after 50 epochs: 78 % with, 77 % without).
STRONG, MIXED = 10_000, 50


@dataclass
class Plan:
    """The settings of a run, and why: one line for each decision."""

    config: Config
    reasons: list[str]

    def __str__(self) -> str:
        return "\n".join([*self.reasons, "the same run as a command:", f"  {command(self.config)}"])


def auto(
    data: str,
    minutes: float | None = None,
    init: str | None = None,
    out: str | None = None,
    seed: int = 0,
    flip: bool = True,
    plan_only: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Choose settings for ``data`` (:func:`plan`), print them and the command of the same run, and train.

    The settings are kept in ``auto.json`` in the run's folder, so that the same call resumes the run although a new
    measurement would differ. Returns the final evaluation; {} with ``plan_only``.
    """
    from pyvit.train.engine import train

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingError("auto: plans on one process; start the command that --plan prints with torchrun")
    folder = Path(out or f"runs/auto-{Path(data).name.replace(':', '-') or 'data'}")
    asked = {"data": data, "minutes": minutes, "init": init, "seed": seed, "flip": flip}
    kept = None if overwrite else _kept(folder, asked)
    chosen = kept or plan(data, minutes, init, str(folder), seed, flip)
    say(str(chosen))
    if plan_only:
        return {}
    if kept is None:
        lock = Lock(folder)  # a run that is under way keeps its plan
        lock.acquire()
        try:
            record = {"asked": asked, "config": dataclasses.asdict(chosen.config), "reasons": chosen.reasons}
            checkpoint.save_json(folder / "auto.json", record)
        finally:
            lock.release()
    results = train(dataclasses.replace(chosen.config, overwrite=overwrite))
    if "accuracy" in results:
        held = int(json.loads((folder / "data.json").read_text())["images"][1])
        low, high = wilson(results["accuracy"] / 100, held)
        say(f"95 % interval of the accuracy, from {held} held-out images: {100 * low:.0f} to {100 * high:.0f} %")
    return results


def _kept(folder: Path, asked: dict[str, Any]) -> Plan | None:
    """The plan in a run's folder, or None. Raises ValueError if the folder holds the plan of another call or the run of
    another command."""
    file = folder / "auto.json"
    if not file.exists():
        if (folder / "last.pt").exists():
            raise ValueError(f"{folder} holds a run of another command; choose another --out, or --overwrite it")
        return None
    record = checkpoint.load_json(file)
    before = record["asked"]
    if differ := [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in asked.items() if before.get(k) != v]:
        raise ValueError(f"{folder} holds another run ({', '.join(differ)}); choose another --out, or --overwrite it")
    say(f"settings of {file}, chosen before")
    return Plan(Config(**record["config"]), record["reasons"])


def plan(
    data: str,
    minutes: float | None = None,
    init: str | None = None,
    out: str | None = None,
    seed: int = 0,
    flip: bool = True,
) -> Plan:
    """The settings with which to train a classifier on ``data`` within ``minutes`` on this machine, from scratch or
    from the weights ``init``.

    A few training steps are timed. Raises ValueError for data without classes, for streams and for audio.
    """
    loaded = load_data(data)
    _check(loaded, data)
    gpu, images, counts, side = torch.cuda.is_available(), len(loaded.train), _counts(loaded), _shorter_side(loaded)
    limit = minutes or (MINUTES_GPU if gpu else MINUTES)
    told = _describe(loaded, counts, side, gpu)
    config = Config(data=data, out=out, init=init, seed=seed, recipe="finetune" if init else "supervised", warmup=0.1)
    config.precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "no"
    config.flip = flip and not _characters(loaded)
    if flip and loaded.flip and not config.flip:
        told.append("no flips: the classes are called by single characters, which are others when mirrored")
    if init:
        config, candidates = _of_checkpoint(config)
    else:
        candidates = [each for each in LADDER if images >= each.least and each.size <= 1.25 * max(side, 32)]
    config, cost = _affordable(config, candidates, loaded, 60 * TRAINING * limit, told)
    most = MOST_FINETUNING if init else MOST
    config.epochs = _rounded(min(60 * TRAINING * limit / (cost.seconds * images), most))
    config.batch_size = _batch(images, config.epochs)
    config.accumulate, config.workers = max(1, config.batch_size // cost.fits), cost.workers
    config.lr = float(f"{_rate(config):.2g}")
    config.min_lr = config.lr / 100
    config.option, augmentation = _options(config, images, counts, config.flip and loaded.flip)
    told.append(
        f"epochs: {config.epochs:g}, about {_duration(cost.seconds * images * config.epochs)} at "
        f"{1 / cost.seconds:.0f} images/s; the limit is {limit:g} minutes (--minutes)"
    )
    if config.epochs < min(FEWEST, most):
        wanted = math.ceil(cost.seconds * images * FEWEST / TRAINING / 60)
        told.append(f"  these are few; {FEWEST} epochs need --minutes {wanted}")
    parts = f", in {config.accumulate} parts that fit into the memory" if config.accumulate > 1 else ""
    told.append(
        f"batch: {config.batch_size}{parts}, which makes {images // config.batch_size} steps an epoch; learning rate "
        f"{config.lr:g}, from the batch and the model's width"
    )
    return Plan(config, [*told, f"augmentation: {augmentation}"])


def _check(data: Data, name: str) -> None:
    if data.sound:
        raise ValueError("auto: data must be images; for audio use 'pyvit train supervised --model ast_...'")
    if data.train.streamed:
        raise ValueError(f"auto: data must not be a stream; give hf:{name.partition(':')[2]}, or use another recipe")
    if data.classes is None or len(data.classes) < 2 or data.train.labels is None:
        kinds = "clip or siglip" if data.train.captions is not None else "mae, dino, dinov2 or simclr"
        raise ValueError(
            f"auto: data must have at least 2 classes (one subfolder each), {data.name} has "
            f"{len(data.classes or ()) or 'none'}; without classes, train {kinds}"
        )


def _describe(data: Data, counts: list[int], side: int, gpu: bool) -> list[str]:
    tenth = any(note.startswith("one image in ten is held out") for note in data.notes)
    split = "one in ten of each class" if tenth else "the data's own split"
    return [
        f"data: {len(data.train)} training images of {len(counts)} classes, {min(counts)} to {max(counts)} of a class, "
        f"{side} pixels wide or high; on {'a GPU' if gpu else f'{cores()} cores'}",
        f"held out: {len(data.test)} images, {split}; the most frequent class has "
        f"{100 * max(counts) / sum(counts):.0f} % of the training images",
    ]


def _counts(data: Data) -> list[int]:
    """Training images of each class."""
    labels = torch.as_tensor(data.train.labels)
    found = torch.bincount(labels, minlength=len(data.classes or ())) if labels.dim() == 1 else labels.sum(0)
    return found.tolist()


def _characters(data: Data) -> bool:
    """Whether the classes may be letters or digits."""
    return all(len(name) == 1 for name in data.classes or ())


def _shorter_side(data: Data) -> int:
    """The median of the shorter sides of up to 64 training images; the data's own size if they are not files."""
    items = getattr(data.train, "items", None)
    sides = []
    for at in range(0, len(data.train), max(1, len(data.train) // 64)) if items is not None else ():
        try:
            with open_image(items[at]) as image:
                sides.append(min(image.size))
        except Exception:  # an unreadable file is reported in training
            continue
    return int(statistics.median(sides)) if sides else data.size[0]


def _of_checkpoint(config: Config) -> tuple[Config, list[Candidate]]:
    """``config`` with the model that ``init`` names, a run or a checkpoint, and that model at its own image size, of a
    checkpoint at most 224."""
    config = inherit(config, load_recipe("finetune"))
    size = config.image_size or min(registered_model(open_source(str(config.init)))[2] or 224, 224)
    return config, [Candidate(str(config.model), tuple(config.set), size, 0)]


def _affordable(
    config: Config, candidates: list[Candidate], data: Data, seconds: float, told: list[str]
) -> tuple[Config, Cost]:
    """``config`` with the first candidate that makes FEWEST epochs in ``seconds``, or the last one, and its cost."""
    for each in candidates:
        config = dataclasses.replace(config, model=each.model, set=list(each.settings), image_size=each.size)
        cost = measure(config, _resized(data, config.data, each.size))
        epochs = seconds / (cost.seconds * len(data.train))
        if epochs >= FEWEST or each is candidates[-1]:
            break
        told.append(f"too slow: {each}, {epochs:.2g} epochs in the time")
    why = f"the weights of {config.init}" if config.init else "suits the number of images, their size and the time"
    told.append(f"model: {each}; {why}")
    return config, cost


def _resized(data: Data, spec: str, size: int) -> Data:
    """``data`` at another image size."""
    if not isinstance(getattr(data.train, "decoder", None), ImageDecoder):
        return load_data(spec, size)

    def part(images: Images) -> Images:
        found: Any = copy.copy(images)
        found.decoder = ImageDecoder(size, found.decoder.centre)
        return found

    return dataclasses.replace(data, train=part(data.train), test=part(data.test), size=(size, size))


def _rounded(epochs: float) -> float:
    return float(max((e for e in ROUND if e <= epochs), default=float(f"{epochs:.2g}")))


def _batch(images: int, epochs: float) -> int:
    """A power of two from 16 to 1024 that makes some 2000 steps, and at least four an epoch."""
    wanted = min(max(images * epochs / 2000, 16), 1024, max(images // 4, 2))
    return 2 ** int(math.log2(wanted))


def _rate(config: Config) -> float:
    """The peak learning rate: DeiT's 5e-4 for 512 images and a width of 384, larger for narrow models (Yang et al.,
    "Tensor Programs V", 2022) and with the square root of the batch, for AdamW (Malladi et al., 2022)."""
    found = image_encoder(config.model or "", parse(config.set, "set"))
    settings = {**found.settings, **found.changed} if found is not None else {}
    width = settings.get("embed_dim", 64) * (4 if "depths" in settings else 1)  # of Swin's longest stage; or a ResNet's
    return 5e-4 * math.sqrt((config.batch_size or 1) / 512) * 384 / width


def _options(config: Config, images: int, counts: list[int], flips: bool) -> tuple[list[str], str]:
    """The recipe's options, and what they mean."""
    epochs = config.epochs or 0
    strong = images >= STRONG and epochs >= FEWEST and (config.image_size or 0) >= 64
    mixed = strong or (config.init is None and epochs >= MIXED)
    chosen: dict[str, Any] = {
        "augment": "standard" if strong else "mild",
        "mixup": 0.8 if mixed else 0.0,
        "cutmix": 1.0 if mixed else 0.0,
    }
    said = "strong crops and colours" if strong else "small rotations, shifts and scalings"
    said += f"{', flips' if flips else ''}{', mixup and CutMix' if mixed else ''}; label smoothing"
    found = image_encoder(config.model or "")
    if found is not None and "drop_path_rate" in parameters(found.constructor):
        chosen["drop_path"] = 0.1
        said += ", stochastic depth 0.1"
    if max(counts) > 3 * min(counts) and "class_weights" in load_recipe(config.recipe).options:
        chosen["class_weights"] = "balanced"
        said += "; classes weighted, because their sizes differ"
    return [f"{name}={value}" for name, value in chosen.items()], said


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def command(config: Config) -> str:
    """The command line that trains with ``config``: every setting that differs from its default."""
    words = ["pyvit", "train", config.recipe]
    usual = Config()
    for field in dataclasses.fields(Config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if field.name in ("recipe", "overwrite") or (value == getattr(usual, field.name) and field.name != "data"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [flag, f"{each:g}" if isinstance(each, float) and float(f"{each:g}") == each else str(each)]
    return shlex.join(words)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share of ``n``. Wilson (1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
