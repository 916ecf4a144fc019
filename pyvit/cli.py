"""The command ``pyvit``: info, train, eval, flops, bench."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

#: What a user can put right; anything else is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, FileNotFoundError, ImportError, FloatingPointError, IsADirectoryError, NotADirectoryError, PermissionError)


def main() -> None:
    """Entry point. Needs typer and rich (``pip install 'pyvit-kernels[cli]'``); ``pyvit info`` does without."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        if sys.argv[1:2] == ["info"]:
            from pyvit.info import info

            print(info())
            return
        sys.exit(f"pyvit: the command line needs {' and '.join(missing)}: pip install 'pyvit-kernels[cli]' ('pyvit info' works without)")
    try:
        application()()
    except _USER_ERRORS as error:
        sys.exit(f"pyvit: {error}")


def application() -> Any:
    """The typer application."""
    import typer

    app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.command("info", help="Say what this installation has, what it lacks and how to get it.")(_info)
    app.command("flops", help="Parameters, multiply-accumulates and attention memory of models (names or wildcards).")(_flops)
    passes_on = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command(
        "bench", help="Check and time the kernels; from a checkout. Arguments go to 'python -m benchmarks'.", context_settings=passes_on
    )(_bench)
    train = typer.Typer(help="Train a model.", no_args_is_help=True)
    app.add_typer(train, name="train")
    from pyvit.train.recipe import RECIPES

    for recipe in RECIPES:
        train.command(recipe, help=_RECIPE_HELP[recipe])(_trainer(recipe))
    evaluate = typer.Typer(help="Measure what a model has learned, or look at it.", no_args_is_help=True)
    app.add_typer(evaluate, name="eval")
    from pyvit.eval import commands

    for name, command in commands.COMMANDS.items():
        evaluate.command(name)(command)
    return app


_RECIPE_HELP = {
    "supervised": "Classification from labels (DeiT's and Swin's settings).",
    "finetune": "Classification from pre-trained weights (--init), with layer-wise rates.",
    "linear": "A linear classifier on frozen features (--init).",
    "mae": "Masked autoencoder: reconstruct hidden patches.",
    "dino": "Self-distillation across crops.",
    "dinov2": "Self-distillation across crops and masked patches, with the switches of DINOv2.",
    "simclr": "Contrastive learning of two views.",
    "clip": "Contrastive learning of images and captions.",
    "siglip": "Images and captions with the sigmoid loss.",
}


def _info() -> None:
    from pyvit.info import info

    print(info())


def _trainer(recipe: str) -> Callable[..., None]:
    """A command whose options are the fields of Config."""
    import typer

    from pyvit.train.config import Config

    hints = get_type_hints(Config)
    defaults = Config()
    parameters, annotations = [], {}
    for field in dataclasses.fields(Config):
        if field.name == "recipe":
            continue
        flag = "--" + field.name.replace("_", "-")
        flags = (f"{flag}/--no-{flag[2:]}",) if hints[field.name] is bool else (flag,)
        annotations[field.name] = Annotated[hints[field.name], typer.Option(*flags, help=field.metadata["help"])]
        default = getattr(defaults, field.name)
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[field.name])
        )

    def command(**values: Any) -> None:
        from pyvit.train import train

        train(Config(recipe=recipe, **values))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = annotations
    return command


def _flops(models: list[str], size: int = 0) -> None:
    """``size``: side of the images, default each model's own."""
    from rich.console import Console
    from rich.table import Table

    from pyvit.models.flops import count
    from pyvit.models.registry import list_models

    names = [n for pattern in models for n in (list_models(pattern) or [pattern])]
    table = Table("model", "params", "GMACs", "tokens", "attention memory, naive", "fused")
    for name in names:
        cost = count(name, **({"img_size": size} if size else {}))
        naive, fused = cost.memory()
        table.add_row(
            name, f"{cost.params:,}", f"{cost.macs / 1e9:.2f}", str(cost.tokens), f"{naive / 1e6:.1f} MB", f"{fused / 1e6:.2f} MB"
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        "per image; GMACs count a multiply and an add as one; attention memory is float32 probabilities kept for the backward pass"
    )


def _bench(ctx: Any) -> None:
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").exists():
        raise FileNotFoundError(
            "bench: the benchmark suite is not installed with the package; run this from a checkout of pyvit ('make bench')"
        )
    sys.exit(subprocess.call([sys.executable, "-m", "benchmarks", *ctx.args], cwd=root))


def _annotate() -> None:
    """typer reads annotations when commands are registered; these need typer itself."""
    try:
        import typer
    except ImportError:
        return
    _bench.__annotations__["ctx"] = typer.Context
    argument = typer.Argument(help="names or wildcards, such as 'vit_base*'")
    option = typer.Option("--size", help="side of the images; default each model's own")
    _flops.__annotations__.update(models=Annotated[list[str], argument], size=Annotated[int, option])


_annotate()
