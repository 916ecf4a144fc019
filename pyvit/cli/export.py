"""``pyvit export``: a trained model as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from pyvit.train.log import say
from pyvit.train.options import SettingError


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="folder of a run, or file of weights")],
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write: .pt2, or .onnx")],
    format: Annotated[
        str | None, typer.Option(help="torch-export, aotinductor or onnx; by default the one of the file's ending")
    ] = None,
    batch: Annotated[str, typer.Option(help="images per call: a number, or dynamic for any")] = "dynamic",
) -> None:
    """Write a trained model as a torch.export program, an AOTInductor package, or ONNX.

    The file is loaded again and compared with the model. A JSON file beside it says how to prepare images: size, mean,
    standard deviation, and the names of the classes.
    """
    from pyvit.models.export import export_model
    from pyvit.train.checkpoint import save_json
    from pyvit.train.runs import load_network

    if batch != "dynamic" and (not batch.isdecimal() or int(batch) < 1):
        raise SettingError(f"batch must be dynamic or a whole number above 0, got {batch!r}")
    format = format or ("onnx" if out.suffix == ".onnx" else "torch-export")
    network = load_network(source, needs_classes=False)
    torch.manual_seed(0)
    pixels = torch.randint(256, (2, len(network.mean), *network.size), dtype=torch.uint8)
    metadata = {
        "model": network.name,
        "input": "float32 (B, C, H, W): (pixels / 255 - mean) / std, RGB",
        "size": list(network.size),
        "mean": list(network.mean),
        "std": list(network.std),
        "centre": network.centre,
        "classes": network.classes,
        "multi_label": network.multi_label,
    }
    fixed = None if batch == "dynamic" else int(batch)
    error = export_model(network.model, network.normalize(pixels), out, format, fixed, metadata)
    beside = out.with_name(out.name + ".json")
    save_json(beside, metadata)
    for note in network.notes:
        say(f"  {note}")
    checked = "not run: no onnxruntime" if error is None else f"relative difference to the model {error:.1e}"
    say(f"wrote {out} ({format}, {out.stat().st_size / 1e6:.1f} MB; {checked}) and {beside}")
