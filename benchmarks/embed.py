"""From JPEG files to vectors: ``pyvit embed`` beside a plain loop over timm's data loader.

``python -m benchmarks.embed [--images 256] [--rounds 3]`` writes photographs of one megapixel and embeds them with a
ViT-S at 224 pixels. Every contender runs in a process of its own, and the rounds alternate between them. The plain loop
is ``create_transform`` of timm, a DataLoader with two workers, and timm's model in float32 or bfloat16. A rate is of
images from file to vector, without the start of the process and the creation of the model; so is the CPU time of an
image, over all threads and processes, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import torchvision_operators  # noqa: F401  (before timm imports torchvision)

MODEL = "vit_small_patch16_224"
CONTENDERS = ("timm fp32", "timm bf16", "pyvit fp32", "pyvit auto", "pyvit int8")


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of 1152 x 864 pixels at quality 88: scikit-learn's photographs, mirrored, shifted, with noise."""
    from sklearn.datasets import load_sample_images

    sources = load_sample_images().images
    draw = np.random.default_rng(0)
    for i in range(count):
        half = np.concatenate([sources[i % 2], sources[i % 2][:, ::-1]], 1)
        whole = np.roll(np.concatenate([half, half[::-1]]), draw.integers(0, 300, 2), (0, 1)).astype(np.float32)
        noisy = np.clip(whole * draw.uniform(0.7, 1.2) + draw.normal(0, 3, whole.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).resize((1152, 864), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=88)


class Files(torch.utils.data.Dataset[torch.Tensor]):
    """The images of a folder through timm's transform."""

    def __init__(self, folder: Path, transform: object) -> None:
        self.paths, self.transform = sorted(folder.glob("*.jpg")), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> torch.Tensor:
        with Image.open(self.paths[at]) as image:
            return self.transform(image.convert("RGB"))  # type: ignore[operator]


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def timm_rate(folder: Path, dtype: str, model: str = MODEL, batch: int = 32, workers: int = 2) -> tuple[float, float]:
    """Images per second, and milliseconds of a core per image."""
    import timm
    from timm.data import create_transform, resolve_data_config

    network = timm.create_model(model, num_classes=0).eval()
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    network.to(kind)
    files = Files(folder, create_transform(**resolve_data_config({}, model=network)))
    loader = torch.utils.data.DataLoader(files, batch, num_workers=workers)
    with torch.inference_mode():
        network(torch.zeros(batch, 3, 224, 224, dtype=kind))
        began, before = time.perf_counter(), cpu_seconds()
        found = [network(images.to(kind)) for images in loader]
        rate, used = len(files) / (time.perf_counter() - began), cpu_seconds() - before
    assert sum(map(len, found)) == len(files)
    return rate, 1e3 * used / len(files)


def pyvit_rate(folder: Path, dtype: str, model: str = MODEL) -> tuple[float, float]:
    """As :func:`timm_rate`."""
    from pyvit.embed import Settings, embed_images, load_encoder
    from pyvit.memory import keep_memory

    keep_memory()  # as the command does
    encoder = load_encoder(Settings(model, random_weights=True, dtype=dtype))
    before = cpu_seconds()
    with tempfile.TemporaryDirectory() as out:
        done = embed_images(folder, Path(out) / "vectors", encoder)
    assert done.rows == done.embedded
    print(done.limits, file=sys.stderr)
    return done.rate, 1e3 * (cpu_seconds() - before) / done.rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embed", description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="one contender, on the images of --folder; prints its rate")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.only:
        library, dtype = args.only.split()
        rate = timm_rate if library == "timm" else pyvit_rate
        print(json.dumps(rate(args.folder, dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.images)
        rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        costs: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(args.rounds):
            for name in CONTENDERS:
                command = [sys.executable, "-m", "benchmarks.embed", "--only", name, "--folder", folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
                speed, cost = json.loads(done.stdout.splitlines()[-1])
                rates[name].append(speed)
                costs[name].append(cost)
    best = {name: statistics.median(found) for name, found in rates.items()}
    print(
        f"| {MODEL}, {args.images} JPEGs of 1 megapixel | images/s (median of {args.rounds}) | spread | against timm "
        "| CPU ms |"
    )
    print("|---|---|---|---|---|")
    for name, found in rates.items():
        against = " ".join(f"{best[name] / best[peer]:.2f}x {peer[5:]}" for peer in CONTENDERS[:2])
        print(
            f"| {name} | {best[name]:.1f} | {min(found):.1f} - {max(found):.1f} | {against} | {min(costs[name]):.0f} |"
        )


if __name__ == "__main__":
    main()
