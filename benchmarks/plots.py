"""Plots of a run. :mod:`benchmarks.docs` draws those of the committed results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.cases import MODEL_MODES
from benchmarks.runner import Row
from benchmarks.workload import OURS

_GREYS = ("#4d4d4d", "#7f7f7f", "#a6a6a6", "#c7c7c7", "#dddddd")
_OURS = "#c44e52"
_DASHES = {"fp32": "-", "bf16": "--", "fp16": ":"}


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
