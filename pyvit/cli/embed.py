"""``pyvit embed`` and ``pyvit search``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

_Model = "a finished run's folder, a file or folder of weights, or a model's name with --checkpoint"


def embed(
    source: Annotated[str, typer.Argument(help="folder of images, .tar or .parquet file, or folder of these")],
    out: Annotated[str, typer.Option("--out", "-o", help="folder of the vectors; an interrupted call continues")],
    model: Annotated[str, typer.Option(help=_Model)],
    checkpoint: Annotated[str | None, typer.Option(help="weights for a model's name")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="allow a name without weights")] = False,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, int8; auto: 16 bits if the hardware has it")] = "auto",
    batch: Annotated[int | None, typer.Option(help="images of a forward pass; default 16 on CPUs, 128 on GPUs")] = None,
    workers: Annotated[int | None, typer.Option(help="threads; default the cores of this process")] = None,
    form: Annotated[str, typer.Option("--format", help="parquet, npy or safetensors")] = "parquet",
    stored: Annotated[str | None, typer.Option(help="float16 or float32; default as computed")] = None,
    shard: Annotated[int, typer.Option(help="images per file")] = 4096,
    labels: Annotated[bool, typer.Option("--labels", help="also store the classes")] = False,
    size: Annotated[int | None, typer.Option(help="pixels per side; default the model's")] = None,
    crop: Annotated[
        float | None, typer.Option(help="share of the side that is seen; default the weights' own, or 0.875")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="of pixels in 0..1, as 0.5,0.5,0.5; default the weights' own")
    ] = None,
    std: Annotated[str | None, typer.Option(help="as --mean")] = None,
    native: Annotated[bool, typer.Option("--native", help="whole images in their own aspect ratio (ViT only)")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default a GPU if there is one")] = None,
) -> Any:
    """Turn images into vectors, by a trained model. Under torchrun the processes share the work."""
    from pyvit.embed import Settings, embed_images
    from pyvit.memory import keep_memory
    from pyvit.train.log import say

    keep_memory()
    settings = Settings(
        model, checkpoint, random_weights, dtype, size, crop, _numbers("mean", mean), _numbers("std", std), native
    )
    done = embed_images(
        source,
        out,
        settings,
        form=form,
        stored=stored,
        per_part=shard,
        batch=batch,
        workers=workers,
        labels=labels,
        device=device,
        say=say,
    )
    if os.environ.get("RANK", "0") != "0":
        return done
    if done.unreadable:
        print(f"{len(done.unreadable)} images cannot be read: {done.out / 'unreadable.txt'}")
    if done.embedded:
        mine = " in this process" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"{done.embedded} images{mine}, {done.rate:.1f} images/s; {done.limits}")
    print(f"{done.out}: {done.rows} vectors" + ("" if done.embedded else ", complete before"))
    return done


def search(
    out: Annotated[str, typer.Argument(help="folder written by pyvit embed")],
    image: Annotated[str | None, typer.Option(help="an image file to find similar images of")] = None,
    text: Annotated[str | None, typer.Option(help="a text to find images of (CLIP, SigLIP)")] = None,
    k: Annotated[int, typer.Option("-k", help="images to find")] = 10,
    sheet: Annotated[str | None, typer.Option(help="PNG file for a contact sheet")] = None,
    model: Annotated[str | None, typer.Option(help="where the model is, if it has moved: " + _Model)] = None,
    checkpoint: Annotated[str | None, typer.Option(help="weights for a model's name")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, or a tokenizer.json, if none is with the model")] = None,
    device: Annotated[str | None, typer.Option(help="default a GPU if there is one")] = None,
) -> Any:
    """Find images by an image or a text among the vectors of pyvit embed, exactly."""
    from pyvit.embed import load_query_encoder
    from pyvit.embed import search as nearest
    from pyvit.embed.search import embed_one, save_hits, thumbnail
    from pyvit.embed.shards import open_manifest, printable

    if (image is None) == (text is None):
        raise ValueError("search: give either --image FILE or --text TEXT")
    manifest = open_manifest(Path(out).expanduser())
    if "complete" not in manifest:
        print(f"note: {out} is not complete: only its finished parts are searched")
    encoder = load_query_encoder(out, model, checkpoint, device)
    query = embed_one(encoder, image) if image is not None else encoder.text(str(text), tokenizer)
    hits = nearest(out, query, k)
    for hit in hits:
        print(printable(f"{hit.score:.4f}  {hit.name}" + ("" if hit.label is None else f"  [{hit.label}]")))
    if sheet is not None:
        shown = None if image is None else thumbnail(image)
        print(f"wrote {save_hits(sheet, out, hits, shown, str(text if image is None else Path(image).name))}")
    return hits


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"embed: {name} must be three numbers with commas, such as 0.5,0.5,0.5; got {text!r}"
        ) from None
