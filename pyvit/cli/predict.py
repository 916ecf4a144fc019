"""``pyvit predict``: the classes of images, as a table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer

from pyvit.train.log import say
from pyvit.train.options import check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def predict(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="folder of a run, or file of weights")],
    images: Annotated[Path, typer.Argument(metavar="DIR", help="folder of images, with any folders in it, or a file")],
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV file to write")] = Path("predictions.csv"),
    top: Annotated[int, typer.Option(help="likeliest classes in the table")] = 5,
    sheet: Annotated[Path | None, typer.Option(help="PNG file of the most and the least certain images")] = None,
    count: Annotated[int, typer.Option(help="images of each kind on the sheet")] = 8,
    threshold: Annotated[float, typer.Option(help="smallest probability of a class, for runs of several labels")] = 0.5,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or on a GPU fp16")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="images per forward pass")] = 64,
    workers: Annotated[int | None, typer.Option(help="processes that decode images; by default chosen")] = None,
) -> None:
    """Classify the images of a folder: a CSV table of paths, classes and probabilities, in a fixed order.

    Images are prepared as in the evaluation of the run. Unreadable files are listed and left out.
    """
    from pyvit.eval import contact_sheet, predictions
    from pyvit.nn.packed_weights import pack_weights
    from pyvit.train.checkpoint import write_atomic
    from pyvit.train.runs import load_network

    for name, value, within in (
        ("top", top, "[1, inf)"),
        ("count", count, "[1, inf)"),
        ("batch-size", batch_size, "[1, inf)"),
    ):
        check(name, value, int, within)
    check("threshold", threshold, float, "[0, 1]")
    gpu = torch.cuda.is_available()
    check("dtype", dtype, str, choices=("fp32", "bf16", "fp16") if gpu else ("fp32", "bf16"))
    network = load_network(source)
    classes = network.classes or []
    names, left_out = predictions.image_files(images)
    say(f"{source}: {network.name}, {len(classes)} classes; {len(names)} images of {images}")
    for note in [*network.notes, *([f"left out: {left_out}"] if left_out else [])]:
        say(f"  {note}")
    files = predictions.files_of(names, network.size, network.centre)
    model = network.model.to("cuda" if gpu else "cpu", DTYPES[dtype])
    if not gpu:
        pack_weights(model)
    extremes, done = predictions.Extremes(count if sheet is not None else 0), 0

    def write(file: BinaryIO) -> None:
        nonlocal done
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="", write_through=True)
        table = predictions.Table(text, classes, top, threshold if network.multi_label else None)
        every = predictions.predictions(
            model, files, network.normalize, batch_size, DTYPES[dtype], workers, network.multi_label
        )
        for found in every:
            table.add(found)
            extremes.add(found)
            done += 1
        text.detach()

    write_atomic(out, write)
    bad = f"; {len(files.bad)} files cannot be read and are left out" if files.bad else ""
    say(f"wrote {out}: {done} images{bad}")
    if not done:
        raise ValueError(f"predict: none of the {len(files)} files can be read; the last: {files.problems[-1]}")
    if sheet is not None:
        say(f"wrote {_save_sheet(contact_sheet, sheet, extremes, classes)}")


def _save_sheet(contact_sheet: Any, path: Path, extremes: Any, classes: list[str]) -> Path:
    from pyvit.eval.predictions import best

    shown = [*extremes.most(), *extremes.least()]
    images = contact_sheet.enlarge(torch.stack([found.image for found in shown]) / 255, 128)
    ranked = [
        [(classes[c], p) for p, c in zip(*best(found.probabilities, min(5, len(classes))), strict=True)]
        for found in shown
    ]
    title = f"the {len(extremes.most())} most certain, then the {len(extremes.least())} least certain"
    return contact_sheet.save_guesses(path, images, [Path(found.path).name for found in shown], ranked, title)
