"""Plots of a run. ``python -m benchmarks.plots RESULTS.csv [...] PICTURE.png`` draws an overview."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.runner import Row
from benchmarks.workload import OURS

_GREYS = ("#4d4d4d", "#7f7f7f", "#a6a6a6", "#c7c7c7", "#dddddd")
_OURS = "#c44e52"
_DASHES = {"fp32": "-", "bf16": "--", "fp16": ":"}

MODEL_MODES = ("inference", "train")


def _bars(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Ratio to the baseline, one cluster of bars per case. The axis starts at zero."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        model = f"{row.op} " if row.mode in MODEL_MODES else ""
        groups.setdefault(
            f"{model}{row.case}\n{row.dtype} {row.mode}" + (f", {row.data}" if row.data == "random" else ""), []
        ).append(row)
    names = sorted({row.provider for row in rows}, key=lambda name: (name != OURS, name))
    color = {name: _OURS if name == OURS else _GREYS[i % len(_GREYS)] for i, name in enumerate(names)}
    count = sum(len(group) + 1 for group in groups.values())
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.2 * count))
    y, ticks = 0.0, []
    for label, group in groups.items():
        ticks.append((y + (len(group) - 1) / 2, label))
        for row in sorted(group, key=lambda row: -row.ratio):
            axes.barh(y, row.ratio, color=color[row.provider], height=0.85)
            axes.text(row.ratio, y, f" {row.provider} {row.ratio:.2f}x", va="center", fontsize=6)
            y += 1
        y += 1
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=6)
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(row.ratio for row in rows))
    axes.set_xlabel("times as fast as the baseline")
    axes.set_title(title, fontsize=9)
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    title: str,
    x: str,
    y: str,
    log: bool = True,
) -> Path:
    """Curves by "provider dtype" as (x, y). Colors show providers, dashes dtypes."""
    figure, axes = plt.subplots(figsize=(5, 3.6))
    providers = list(dict.fromkeys(name.rpartition(" ")[0] for name in curves if not name.startswith(OURS)))
    for name, (at, value) in curves.items():
        provider, _, dtype = name.rpartition(" ")
        color = _OURS if provider == OURS else _GREYS[providers.index(provider) % len(_GREYS)]
        style = {"color": color, "linestyle": _DASHES[dtype], "linewidth": 2 if provider == OURS else 1}
        axes.plot(at, value, marker="o", markersize=3, label=name, **style)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    ticks = sorted({value for at, _ in curves.values() for value in at})
    axes.set_xticks(
        ticks, [f"{value:g}" if value < 1e4 else f"{value / 1e6:.2g}M" for value in ticks], fontsize=7, rotation=30
    )
    axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _save(figure, path)


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """One plot of ratios per operator, and one for the models. Returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.timed and row.ratio == row.ratio and row.mode != "scaling"]
    kinds: dict[str, list[Row]] = {}
    for row in timed:
        kinds.setdefault("models" if row.mode in MODEL_MODES else row.op, []).append(row)
    return [_bars(group, out / f"{kind}.png", kind.replace("_", " ")) for kind, group in kinds.items()]


#: Rows of the overview: operator or model, case, mode, label.
_OVERVIEW = (
    ("flash_attention", "8x12x197x64", "forward", "attention, 197 tokens"),
    ("flash_attention", "8x12x1025x64", "forward", "attention, 1025 tokens"),
    ("flash_attention", "4x12x1025x64", "forward+backward", "the same, with gradients"),
    ("window_attention", "8x56x56x96 window 7 shift 3", "forward", "shifted windows, Swin-T stage 1"),
    ("window_attention", "8x56x56x96 window 7 shift 3", "forward+backward", "the same, with gradients"),
    ("patch_embed", "16x224 patch 16", "forward", "patch embedding"),
    ("patch_embed", "16x224 patch 16 keep 25 %", "forward", "the same, keeping 25 % (MAE)"),
    ("info_nce", "batch 8192 d 512", "forward+backward", "InfoNCE, batch 8192"),
    ("vit_base_patch16_224", "batch 8", "inference", "ViT-B/16, inference"),
    ("swin_tiny_patch4_window7_224", "batch 8", "inference", "Swin-T, inference"),
    ("swin_tiny_patch4_window7_224", "batch 8", "train", "Swin-T, training step"),
)


def read(path: Path) -> list[Row]:
    """The rows of a results.csv."""
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in record.items()}) for record in csv.DictReader(file)]


def overview(rows: Sequence[Row], path: Path) -> Path:
    """Speedup over the fastest eager PyTorch form: a pair of bars (fp32, bf16) for a few cases."""
    ours = {
        (row.op, row.case, row.mode, row.dtype): row.ratio
        for row in reversed(rows)
        if row.provider == OURS and row.timed
    }
    figure, axes = plt.subplots(figsize=(8, 4.4))
    for i, (*case, _) in enumerate(_OVERVIEW):
        for j, (dtype, color) in enumerate((("fp32", _OURS), ("bf16", "#dd8452"))):
            ratio = ours.get((*case, dtype))
            if ratio is not None:
                axes.barh(i + 0.4 * j, ratio, color=color, height=0.38, label=dtype if i == 0 else None)
                axes.text(ratio, i + 0.4 * j, f" {ratio:.2f}x", va="center", fontsize=7)
    axes.set_yticks([i + 0.2 for i in range(len(_OVERVIEW))], [label for *_, label in _OVERVIEW], fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * axes.dataLim.x1)
    axes.set_xlabel("times as fast as the best of PyTorch's eager forms")
    axes.legend(fontsize=8, loc="lower right")
    return _save(figure, path)


if __name__ == "__main__":
    *tables, picture = map(Path, sys.argv[1:])
    print(overview([row for table in tables for row in read(table)], picture))
