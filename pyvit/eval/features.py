"""Running a network on a data set."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyvit.data import Images
from pyvit.data.loading import evaluation_batches
from pyvit.heap import Trimmer


@torch.no_grad()
def over(
    images: Images,
    compute: Callable[[dict[str, Any]], Tensor],
    batch: int = 256,
    device: torch.device | str = "cpu",
    group: Any = None,
    workers: int | None = None,
) -> Tensor:
    """``compute`` of every batch in order, concatenated on the CPU: one row for each readable image.

    Unreadable images are in ``images.bad`` afterwards, and :func:`labels_of` leaves out their labels.

    Args:
        group: ranks that share the work; each gets all results.
        workers: processes that decode images; None chooses their number.
    """
    if group is not None:  # all ranks leave out images that one rank found unreadable in training
        known: list[dict[int, str]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(known, dict(images.bad), group=group)
        for problems in known:
            images.note(problems)
    every = images.readable()
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    mine = every[rank * len(every) // world : (rank + 1) * len(every) // world]
    found, read = [], list[int]()
    progress, trim = Progress(len(mine) if rank == 0 else 0), Trimmer()
    for part in evaluation_batches(images, mine, batch, workers):
        at = part.pop("index", None)
        if len(part["image"]):
            read += at.tolist() if at is not None else mine[len(read) : len(read) + len(part["image"])]
            moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in part.items()}
            found.append(compute(moved).cpu())
            trim()
        progress.update(len(part["image"]))
    progress.close()
    results = torch.cat(found) if found else None
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, (read, results), group=group)
        read = [i for some, _ in parts for i in some]
        kept = [rows for _, rows in parts if rows is not None]
        results = torch.cat(kept) if kept else None
        images.note({i: f"image {i}, which another process could not read" for i in sorted(set(every) - set(read))})
    if results is None:
        raise ValueError(
            f"evaluation: none of the {len(images)} images can be read"
            + "".join(f"; the last: {p}" for p in images.problems[-1:])
        )
    return results


class Progress:
    """A line on stderr every ten seconds of a long evaluation."""

    def __init__(self, total: int, what: str = "evaluating") -> None:
        self.total, self.done, self.what = total, 0, what
        self.began = self.said = time.monotonic()

    def update(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if self.total and now - self.said > 10:
            left = (now - self.began) / max(self.done, 1) * (self.total - self.done)
            print(f"{self.what}: {self.done} of {self.total} images, {left:.0f} s left", file=sys.stderr, flush=True)
            self.said = now

    def close(self) -> None:
        if self.total and self.said != self.began:
            took = time.monotonic() - self.began
            print(f"{self.what}: {self.done} images in {took:.0f} s", file=sys.stderr, flush=True)


def labels_of(images: Images) -> Tensor:
    """Labels (N,) int64 of the images that are not known to be unreadable. Raises ValueError if there are none."""
    known = getattr(images, "labels", None)
    if known is None:
        raise ValueError("this evaluation needs labels, and the data set has none")
    return torch.as_tensor(known)[images.readable()]


def check_finite(what: str, *features: Tensor) -> None:
    """Raise ValueError for features that are not finite."""
    for each in features:
        if bad := int((~each.isfinite()).flatten(1).any(1).sum()):
            raise ValueError(f"{what}: features must be finite, those of {bad} of {len(each)} images are not")


def check_labelled(what: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    """Raise ValueError if (features, labels) of a set are empty or of different length, if an image has several labels,
    or if training has fewer than two classes."""
    if train[1].dim() > 1:
        raise ValueError(f"{what}: each image must have one label, these have any number")
    for name, (rows, labels) in (("training", train), ("held-out", test)):
        if not len(rows) or len(rows) != len(labels):
            raise ValueError(
                f"{what}: there must be one label for each of the {name} features, got {len(rows)} and {len(labels)}"
            )
    if len(train[1].unique()) < 2:
        raise ValueError(f"{what}: the training images must be of at least two classes, all are of one")


def right(scores: Tensor, labels: Tensor) -> float:
    """Share of rows (N, classes) whose highest score is at the label. If n classes tie, each counts 1/n."""
    best = scores == scores.amax(1, keepdim=True)
    return (best.gather(1, labels[:, None].to(best.device))[:, 0] / best.sum(1).clamp(min=1)).mean().item()


def predict(
    model: nn.Module, images: Images, normalize: Callable[[Tensor], Tensor], batch: int = 256, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) float32 and labels (N,) of the readable images: see :func:`over`."""
    device = next(model.parameters()).device
    logits = over(images, lambda b: model(normalize(b["image"])).float(), batch, device, group)
    return logits, labels_of(images)


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """A feature vector (B, D) per image: the input of the head."""
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images), pre_logits=True)
    if hasattr(model, "encode_image"):
        return model.encode_image(images)
    features = model.forward_features(images)
    return features[:, 0] if features.dim() == 3 else features.flatten(2).mean(2) if features.dim() == 4 else features


class LastBlocks(nn.Module):
    """A vision transformer whose feature vector is the class token and the mean of the patches after each of its last
    ``blocks`` blocks, concatenated: (B, blocks * 2 * D), or (B, blocks * D) without a class token.

    What the linear evaluations of DINO and DINOv2 classify: the class tokens of four blocks (Caron et al., 2021,
    section 4.1 and appendix), and the mean of the patches (Oquab et al., 2024, appendix B.3).

    Raises ValueError for models without blocks of tokens.
    """

    def __init__(self, model: nn.Module, blocks: int) -> None:
        super().__init__()
        if not hasattr(model, "get_intermediate_layers"):
            raise ValueError(f"blocks must be 0 for a {type(model).__name__}, which is not a vision transformer")
        if not 1 <= blocks <= len(model.blocks):
            raise ValueError(f"blocks must be 1 to {len(model.blocks)}, got {blocks}")
        self.model, self.blocks = model, blocks

    def forward_features(self, images: Tensor) -> Tensor:
        layers = self.model.get_intermediate_layers(images, self.blocks, return_prefix_tokens=True, norm=True)
        parts = [part for patches, prefix in layers for part in (*prefix[:, :1].unbind(1), patches.mean(1))]
        return torch.cat(parts, 1)


def features(
    model: nn.Module, images: Images, normalize: Callable[[Tensor], Tensor], batch: int = 256, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Feature vectors (N, D) float32 and labels (N,) of the readable images: see :func:`over`."""
    device = next(model.parameters()).device
    found = over(images, lambda b: embed(model, normalize(b["image"])).float(), batch, device, group)
    return found, labels_of(images)
