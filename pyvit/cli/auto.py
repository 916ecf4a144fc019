"""``pyvit train auto``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyvit.train.options import check


def auto(
    data: Annotated[str, typer.Option(help="folder of images, one subfolder per class, or other data with classes")],
    minutes: Annotated[
        float | None, typer.Option(help="time limit of the training; by default 10, with a GPU 60")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="fine-tune these weights: a run, a checkpoint, hf-hub:OWNER/NAME or timm:NAME")
    ] = None,
    out: Annotated[str | None, typer.Option(help="folder of the run; by default runs/auto-DATA")] = None,
    seed: Annotated[int, typer.Option(help="seed of weights, image order and augmentation")] = 0,
    flip: Annotated[bool, typer.Option(help="random horizontal flips, if they suit the data")] = True,
    plan: Annotated[bool, typer.Option("--plan", help="print the settings and the command, and do not train")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="discard the run in the folder")] = False,
) -> None:
    """Train a classifier with settings that suit the data, this machine and the time.

    Prints what was chosen, why, and the command of the same run. The same command resumes the run.
    """
    from pyvit.train.auto import auto as run

    check("seed", seed, int, "[0, inf)")
    if minutes is not None:
        check("minutes", minutes, float, "(0, inf)")
    run(data, minutes, init, out, seed, flip, plan, overwrite)
