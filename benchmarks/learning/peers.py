"""The same networks trained by other libraries, for the same CPU time: timm's ViT, and lightly's SimCLR and DINO.

They use the optimizer, rates, batch size, mixed precision and crop sizes of pyvit's runs, and their own networks,
initial weights, heads, losses and augmentations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.learning.frozen import frozen
from benchmarks.learning.record import cpu_seconds
from benchmarks.learning.rows import ROWS, Row
from pyvit.data import Data, load_data
from pyvit.eval.features import labels_of, over, right
from pyvit.heap import Trimmer
from pyvit.train import Config, augment
from pyvit.train.optim import make_optimizer, parameter_groups
from pyvit.train.recipe import load_recipe
from pyvit.train.schedules import cosine

NAMES = tuple(name for row in ROWS for name in row.peers)

#: Results, CPU seconds of the training, loss per step, description.
Outcome = tuple[dict[str, float], float, list[float], str]

_CALIBRATION = 20


def rows() -> Iterator[Row]:
    """The rows that have peers."""
    yield from (row for row in ROWS if row.peers)


def _vit(config: Config, **options: Any) -> nn.Module:
    """timm's ViT with the sizes of vit_pico_patch4_28, or of vit_pico_conv_s8_32 with its stem in plain PyTorch."""
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer

    sizes: dict[str, Any] = {"img_size": config.image_size or 28, "embed_dim": 96, "depth": 4, "num_heads": 3}
    if "conv_s8" not in (config.model or ""):
        return VisionTransformer(patch_size=4, **sizes, **options)
    layers: list[nn.Module] = []
    for cin, cout in ((3, 24), (24, 48), (48, 96)):
        layers += [nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
    embed: Any = partial(HybridEmbed, backbone=nn.Sequential(*layers))
    return VisionTransformer(patch_size=1, embed_layer=embed, global_pool="avg", fc_norm=False, **sizes, **options)


def _normalize(data: Data) -> Callable[[Tensor], Tensor]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return lambda images: ((images / 255 if images.dtype == torch.uint8 else images) - mean) / std


def _optimize(
    model: nn.Module,
    config: Config,
    seconds: float,
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    before: Callable[[int], None] = lambda step: None,
    after: Callable[[float], None] = lambda share: None,
) -> tuple[float, list[float]]:
    """Train ``model`` for ``seconds`` of CPU time with the optimizer of ``config``. The first steps, which count, tell
    how many there is time for.

    ``before`` is called before each optimizer step with its number, ``after`` after it with the share of the training
    that is done.
    """
    lr, clip = config.lr or 0.0, config.clip or float("inf")
    optimizer = make_optimizer(parameter_groups(model, model, 1.0, exempt=()), config)
    losses, trim = list[float](), Trimmer()
    began, steps = cpu_seconds(), 10**9
    while len(losses) < steps:
        if len(losses) == _CALIBRATION:
            steps = max(int(seconds / (cpu_seconds() - began) * _CALIBRATION), _CALIBRATION)
        total = max(min(steps, 10**6), 1)
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
            group["lr"] = cosine(len(losses), total, lr, 0.0, max(int(total * (config.warmup or 0.0)), 50))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        before(len(losses))
        optimizer.step()
        trim()
        losses.append(loss.item())
        after(len(losses) / total)
    return cpu_seconds() - began, losses


def _shuffled(count: int, batch: int) -> Iterator[list[int]]:
    while True:
        yield from (part.tolist() for part in torch.randperm(count).split(batch) if len(part) == batch)


def _start(config: Config) -> tuple[Data, dict[str, Any], int]:
    """The data, the recipe's options and the batch size of ``config``."""
    return (
        load_data(config.data, config.image_size),
        load_recipe(config.recipe).options_of(config),
        config.batch_size or 1,
    )


def timm(config: Config, seconds: float) -> Outcome:
    """timm's ViT, supervised, on the images of pyvit's recipe."""
    data, option, batch = _start(config)
    normalize, model = _normalize(data), _vit(config, num_classes=10)
    images, labels = data.train.images, labels_of(data.train)  # type: ignore[attr-defined]
    distort = {"mild": augment.mild, "flip": augment.flips}.get(option["augment"], lambda flip: nn.Identity())(
        data.flip
    )

    def loss_of(at: list[int]) -> Tensor:
        logits = model(normalize(distort(images[at])))
        return F.cross_entropy(logits.float(), labels[at], label_smoothing=option["smoothing"])

    used, losses = _optimize(model, config, seconds, _shuffled(len(images), batch), loss_of)
    model.eval()
    logits = over(data.test, lambda batch: model(normalize(batch["image"])))
    return {"accuracy": 100 * right(logits, labels_of(data.test))}, used, losses, "timm's ViT in plain PyTorch"


def _views(transform: Any, data: Data, batch: int) -> Iterator[list[Tensor]]:
    """Batches of lightly's views: a list of (B, 3, h, w), normalised."""
    from PIL import Image

    images = data.train.images  # type: ignore[attr-defined]
    for at in _shuffled(len(images), batch):
        views = [transform(Image.fromarray(images[i].permute(1, 2, 0).numpy())) for i in at]
        yield [torch.stack(view) for view in zip(*views, strict=True)]


def _statistics(data: Data) -> dict[str, Any]:
    return {"mean": list(data.mean), "std": list(data.std)}


def lightly_simclr(config: Config, seconds: float) -> Outcome:
    """lightly's SimCLR: its transform, head and loss, on timm's ViT."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    data, option, batch = _start(config)
    transform = SimCLRTransform(
        input_size=config.image_size or 28,
        min_scale=option["crop"],
        cj_strength=option["strength"],
        gaussian_blur=0.0,  # as lightly's documentation advises for images of 32 pixels
        normalize=_statistics(data),
    )
    model = nn.ModuleList([_vit(config, num_classes=0), SimCLRProjectionHead(96, option["hidden"], option["out"])])
    criterion = NTXentLoss(option["temperature"])

    def loss_of(views: list[Tensor]) -> Tensor:
        return criterion(*(model[1](model[0](view)).float() for view in views))

    used, losses = _optimize(model, config, seconds, _views(transform, data, batch), loss_of)
    return frozen(model[0], data, _normalize(data)), used, losses, "lightly's SimCLR with timm's ViT"


def lightly_dino(config: Config, seconds: float) -> Outcome:
    """lightly's DINO: its transform, head, loss and moving average, on timm's ViT."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import DINOTransform

    data, option, batch = _start(config)
    local = option["local_size"] or 12
    transform = DINOTransform(
        global_crop_size=config.image_size or 28,
        global_crop_scale=(option["global_crop"], 1.0),
        local_crop_size=local,
        local_crop_scale=(option["local_crop"], option["global_crop"]),
        n_local_views=option["local_crops"],
        cj_strength=0.0 if not option["distort"] else 0.5,
        random_gray_scale=0.0,
        gaussian_blur=(1.0, 0.1, 0.5) if option["distort"] else (0.0, 0.0, 0.0),
        solarization_prob=option["solarize"] if option["distort"] else 0.0,
        normalize=_statistics(data),
    )

    def network(freeze: int) -> nn.ModuleList:
        sizes = (option["hidden"], option["bottleneck"], option["prototypes"])
        head = DINOProjectionHead(96, *sizes, batch_norm=option["batch_norm"], freeze_last_layer=freeze)
        return nn.ModuleList([_vit(config, num_classes=0, dynamic_img_size=True), head])

    student, teacher = network(1), network(-1).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    criterion = DINOLoss(option["prototypes"], option["warm_teacher_temp"], option["teacher_temp"], 1)

    def loss_of(views: list[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [teacher[1](teacher[0](view)).float() for view in views[:2]]
        sizes = {view.shape[2:]: [other for other in views if other.shape == view.shape] for view in views}
        outputs = [out for same in sizes.values() for out in student[1](student[0](torch.cat(same))).chunk(len(same))]
        return criterion(targets, [out.float() for out in outputs], epoch=1)

    def before(step: int) -> None:
        student[1].cancel_last_layer_gradients(step * batch // len(data.train))  # type: ignore[operator]

    def after(share: float) -> None:
        momentum = cosine(int(share * 1000), 1000, option["momentum"], 1.0)
        for ours, its in zip(student, teacher, strict=True):
            update_momentum(ours, its, momentum)

    used, losses = _optimize(student, config, seconds, _views(transform, data, batch), loss_of, before, after)
    return frozen(teacher[0], data, _normalize(data)), used, losses, "lightly's DINO with timm's ViT"
