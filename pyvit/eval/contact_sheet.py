"""Contact sheets: labelled rows of images in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def heat(values: Tensor) -> Tensor:
    """(..., H, W) numbers to RGB (..., 3, H, W) in [0, 1]. Each map is scaled to its range, from dark blue to
    yellow."""
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    from matplotlib import colormaps

    scaled = ((values - low) / (high - low).clamp(min=1e-12)).cpu()
    return torch.from_numpy(colormaps["viridis"](scaled.numpy())[..., :3]).float().movedim(-1, -3)


def enlarge(images: Tensor, side: int, smooth: bool = False) -> Tensor:
    """(N, C, H, W) resized to about ``side`` pixels; without ``smooth`` pixels stay squares."""
    size = (side, max(round(side * images.shape[3] / images.shape[2]), 1))
    mode = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest"}
    return torch.nn.functional.interpolate(images.float(), size, **mode)


def save_guesses(
    path: Path, images: Tensor, truth: Sequence[str], ranked: Sequence[Sequence[tuple[str, float]]], title: str
) -> Path:
    """A PNG of images (N, C, H, W) in [0, 1] titled with their classes, beside bars of (name, probability) in
    descending order; the right class is green."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = (len(images) + 1) // 2
    figure, axes = plt.subplots(
        rows, 4, figsize=(8, 1.5 * rows + 0.5), squeeze=False, gridspec_kw={"width_ratios": [1, 1.6] * 2}
    )
    for axis in axes.flat[2 * len(images) :]:
        axis.set_axis_off()
    for i, (name, guesses) in enumerate(zip(truth, ranked, strict=True)):
        picture, bars = axes.flat[2 * i], axes.flat[2 * i + 1]
        picture.imshow(
            images[i].clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest", cmap="magma", vmin=0, vmax=1
        )
        picture.set_title(name, fontsize=9)
        picture.set_axis_off()
        for at, (guess, p) in enumerate(guesses):
            bars.barh(at, p, height=0.75, color="#4c9f70" if guess == name else "#9aa8c7")
            bars.text(0.02, at, f"{guess}  {100 * p:.1f} %", va="center", fontsize=8)
        bars.set(xlim=(0, 1), ylim=(len(guesses) - 0.4, -0.6), xticks=[], yticks=[])
        bars.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def save_sheet(
    path: Path,
    columns: Sequence[tuple[str, Tensor]],
    captions: Sequence[str] | None = None,
    title: str = "",
    side: int = 1,
) -> Path:
    """A PNG with one row per image and one titled column per entry (title, (N, 3, H, W) in [0, 1]), with a caption
    under each row. Returns ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, sound = (
        len(columns[0][1]),
        columns[0][1].shape[1] == 1,
    )  # a spectrogram has one channel; show its low bands at the bottom
    wide = 1.5 * side
    figure, axes = plt.subplots(
        rows,
        len(columns),
        figsize=(wide * len(columns), (wide + (0.25 if captions else 0)) * rows + 0.5),
        squeeze=False,
    )
    for c, (name, images) in enumerate(columns):
        for r in range(rows):
            pixels = images[r].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
            axes[r, c].imshow(
                pixels, interpolation="nearest", origin="lower" if sound else "upper", cmap="magma", vmin=0, vmax=1
            )
            axes[r, c].set_xticks([])
            axes[r, c].set_yticks([])
        axes[0, c].set_title(name, fontsize=9)
    for r, caption in enumerate(captions or ()):
        axes[r, 0].set_xlabel(caption, fontsize=7, loc="left")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def save_grid(path: Path, images: Tensor, titles: Sequence[str], title: str = "", across: int = 5) -> Path:
    """A PNG of images (N, 3, H, W) in [0, 1], ``across`` in a row, each under its title. Returns ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(images) // across)
    figure, axes = plt.subplots(rows, across, figsize=(1.7 * across, 1.9 * rows + 0.5), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, name in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=7, parse_math=False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
