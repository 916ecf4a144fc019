"""Small data sets as files, for the examples to run without a download."""

from __future__ import annotations

import csv
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from pyvit.data import load_data


def digits(folder: str | Path = "runs/data/digits", per_class: int | None = None) -> Path:
    """scikit-learn's handwritten digits, 32 x 32: ``folder/train/CLASS/*.png`` and ``folder/val/CLASS/*.png``."""

    def write(root: Path) -> None:
        data = load_data("digits")
        for split, images in (("train", data.train), ("val", data.test)):
            written = dict.fromkeys(data.classes, 0)
            for item in range(len(images)):
                name = data.classes[int(images.labels[item])]
                written[name] += 1
                if per_class is None or written[name] <= per_class:
                    _save(images.images[item], root / split / name / f"{item:04d}.png")

    return _once(Path(folder), write)


def scenes(folder: str | Path = "runs/data/scenes", count: int = 2000) -> Path:
    """Drawn scenes of two coloured shapes, 64 x 64, one in ten held out: ``folder/{train,val}.csv`` with columns
    filepath and title, as open_clip reads them."""

    def write(root: Path) -> None:
        data = load_data("scenes", count=count)
        for split, images in (("train", data.train), ("val", data.test)):
            (root / split).mkdir(parents=True)
            with open(root / f"{split}.csv", "w", newline="") as file:
                table = csv.writer(file)
                table.writerow(("filepath", "title"))
                for i, title in enumerate(images.captions):
                    table.writerow((f"{split}/{i:04d}.png", title))
                    _save(images.images[i], root / split / f"{i:04d}.png")

    return _once(Path(folder), write)


def photographs(folder: str | Path = "runs/data/photographs", tiles: int = 3) -> Path:
    """scikit-learn's two photographs (a temple in China, a flower), cut into ``tiles`` x ``tiles`` pieces."""

    def write(root: Path) -> None:
        from sklearn.datasets import load_sample_images

        root.mkdir(parents=True, exist_ok=True)
        samples = load_sample_images()
        for path, pixels in zip(samples.filenames, samples.images, strict=True):
            image = Image.fromarray(pixels)
            w, h = image.width // tiles, image.height // tiles
            for y in range(tiles):
                for x in range(tiles):
                    piece = image.crop((x * w, y * h, (x + 1) * w, (y + 1) * h))
                    piece.save(root / f"{Path(path).stem}_{y}{x}.png")

    return _once(Path(folder), write)


def shapes(folder: str | Path = "runs/data/shapes", count: int = 400, size: int = 128) -> Path:
    """Drawn circles and rectangles with boxes: ``folder/{train,val}/*.png`` and ``folder/{train,val}.json`` as COCO's
    annotations; one image in five is held out."""
    names = ("circle", "rectangle")

    def draw(rng: random.Random) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
        image = Image.new("RGB", (size, size), tuple(rng.randrange(80) for _ in range(3)))
        found = []
        for _ in range(rng.randint(1, 3)):
            kind, w, h = rng.randrange(2), rng.randint(size // 6, size // 3), rng.randint(size // 6, size // 3)
            h = w if kind == 0 else h
            x, y = rng.randrange(size - w), rng.randrange(size - h)
            pen = ImageDraw.Draw(image)
            (pen.ellipse, pen.rectangle)[kind]((x, y, x + w, y + h), tuple(rng.randrange(120, 256) for _ in range(3)))
            found.append((kind, [x, y, w, h]))
        return image, found

    def write(root: Path) -> None:
        rng = random.Random(0)
        for split, share in (("train", 0.8), ("val", 0.2)):
            (root / split).mkdir(parents=True)
            categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
            coco: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
            for i in range(int(share * count)):
                image, found = draw(rng)
                image.save(root / split / f"{i:04d}.png")
                coco["images"].append({"id": i, "file_name": f"{i:04d}.png", "width": size, "height": size})
                for kind, box in found:
                    at = len(coco["annotations"])
                    coco["annotations"].append({"id": at, "image_id": i, "category_id": kind + 1, "bbox": box})
            (root / f"{split}.json").write_text(json.dumps(coco))

    return _once(Path(folder), write)


def _save(pixels, path: Path) -> None:
    """``pixels``: uint8 (3, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder if it does not exist. It appears when it is complete."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            write(Path(scratch) / folder.name)
            (Path(scratch) / folder.name).rename(folder)
    return folder
