"""The command ``pyvit``: info, doctor, models, flops, convert, train, eval, predict, export, embed, search, bench."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

#: Exit codes: failure, wrong usage, Ctrl-C.
FAILED, USAGE, INTERRUPTED = 1, 2, 130

#: Errors whose messages are clear by themselves. The messages of others start with their type.
_SENTENCES = (ValueError, OSError, ImportError, FloatingPointError)


def main() -> None:
    """Entry point. Needs typer and rich (``pip install 'pyvit-kernels[cli]'``), but for ``info`` and ``doctor``."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        if sys.argv[1:2] == ["info"]:
            _info()
        elif sys.argv[1:2] == ["doctor"]:
            _doctor("--json" in sys.argv[2:])
        else:
            sys.exit(
                f"pyvit: the command line needs {' and '.join(missing)}: pip install 'pyvit-kernels[cli]' ('pyvit "
                "info' and 'pyvit doctor' work without)"
            )
        return
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files may have characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, _interrupted)
    try:
        application()()
    except Exception as error:
        if os.environ.get("PYVIT_TRACEBACK", "0") not in ("", "0"):
            raise
        line, code = explain(error)
        print(f"pyvit: {line}", file=sys.stderr)
        sys.exit(code)


def _interrupted(*_: Any) -> None:
    print("pyvit: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)


def explain(error: Exception) -> tuple[str, int]:
    """The error message for the user, and the exit code."""
    from pyvit.train.options import SettingError

    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif (
        not isinstance(error, _SENTENCES)
        or not text
        or type(error).__module__.partition(".")[0] not in ("builtins", "pyvit")
    ):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        given = [argument for argument in sys.argv[2:] if os.path.exists(argument)]
        text += f"; files given: {', '.join(given)}" if given else ""
        text += " (PYVIT_TRACEBACK=1 shows where)"
    return text, USAGE if isinstance(error, SettingError) else FAILED


def application() -> Any:
    """The typer application."""
    import typer

    app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.command("info", help="Show what is installed, what is missing and how to install it.")(_info)
    app.command("doctor", help="Check the installation, and print what a bug report needs.")(_doctor)
    app.command(
        "flops", help="Parameters, multiply-accumulates and attention memory of models, and the published comparison."
    )(_flops)
    for name in ("models", "list-models"):  # the command's name, and the function's
        app.command(name, help="Names of the models, or of those that match a wildcard.", hidden=name != "models")(
            _models
        )
    app.command("convert", help="Rewrite a checkpoint in another library's layout.")(_convert)
    from pyvit.cli.export import export
    from pyvit.cli.predict import predict

    app.command("predict")(predict)
    app.command("export")(export)
    passes_on = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command(
        "bench",
        help="Check and time operators and models beside other libraries; 'pyvit bench --help' lists the options.",
        context_settings=passes_on,
    )(_bench)
    train = typer.Typer(help="Train a model.", no_args_is_help=True, callback=_keep_memory)
    app.add_typer(train, name="train")
    from pyvit.train.recipe import RECIPES

    for recipe in RECIPES:
        train.command(recipe, help=_RECIPE_HELP[recipe], epilog=_options_of(recipe))(_trainer(recipe))
    from pyvit.cli.auto import auto

    train.command("auto")(auto)
    evaluate = typer.Typer(help="Evaluate or visualise a trained model.", no_args_is_help=True, callback=_keep_memory)
    app.add_typer(evaluate, name="eval")
    from pyvit.cli import embed
    from pyvit.cli.evaluate import COMMANDS

    for name, command in COMMANDS.items():
        evaluate.command(name)(command)
    for command in (embed.embed, embed.search):
        app.command()(command)
    return app


_RECIPE_HELP = {
    "supervised": "Classification from labels (DeiT's and Swin's settings).",
    "finetune": "Fine-tuning of pre-trained weights (--init), with layer-wise learning rates.",
    "linear": "A linear probe on frozen features (--init).",
    "mae": "Masked autoencoder: reconstruct masked patches.",
    "dino": "Self-distillation across crops (DINO).",
    "dinov2": "Self-distillation across crops and masked patches (DINOv2).",
    "simclr": "Contrastive learning of two views.",
    "clip": "Contrastive learning of images and captions.",
    "siglip": "Contrastive learning of images and captions with the sigmoid loss.",
}


def _keep_memory() -> None:
    from pyvit.memory import keep_memory

    keep_memory()


def _info() -> None:
    from pyvit.info import info

    print(info())


def _doctor(as_json: bool = False) -> None:
    from pyvit.doctor import doctor

    report = doctor()
    print(report.to_json() if as_json else report)
    if not report.passed:
        sys.exit(FAILED)


def _options_of(recipe: str) -> str:
    """The options of a recipe, one paragraph each."""
    from pyvit.train.recipe import load_recipe

    lines = [option.describe(name) for name, option in load_recipe(recipe).options.items()]
    return "\n\n".join([f"Settings of {recipe} for --option, with their defaults:", *lines])


def _trainer(recipe: str) -> Callable[..., None]:
    """A command whose options are the fields of Config."""
    import typer

    from pyvit.train.config import Config
    from pyvit.train.options import wording
    from pyvit.train.recipe import load_recipe

    hints = get_type_hints(Config)
    chosen = load_recipe(recipe)
    defaults, its = Config(), chosen.base_settings()
    if "lr" not in its:
        its["lr"] = chosen.rate_formula()
    parameters, annotations = [], {}
    for field in dataclasses.fields(Config):
        if field.name == "recipe":
            continue
        flag = "--" + field.name.replace("_", "-")
        flags = (f"{flag}/--no-{flag[2:]}",) if hints[field.name] is bool else (flag,)
        shown = (
            f"{its[field.name]:.4g}" if isinstance(its.get(field.name), float) else str(its.get(field.name, "")) or True
        )
        help = field.metadata["help"] + (f" ({wording(field.metadata['within'])})" if field.metadata["within"] else "")
        annotations[field.name] = Annotated[hints[field.name], typer.Option(*flags, help=help, show_default=shown)]
        default = getattr(defaults, field.name)
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[field.name]
            )
        )

    def command(**values: Any) -> None:
        from pyvit.train import train

        train(Config(recipe=recipe, **values))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = annotations
    return command


def _flops(
    models: Any = None, size: int = 0, table: bool = False, throughput: bool = False, plot: str | None = None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from pyvit.models import flops
    from pyvit.models.registry import create_model, list_models

    if not models and not table:
        raise ValueError("flops: name models ('vit_base*'), or ask for the published comparison with --table")
    if plot and not (table and throughput):
        raise ValueError("flops: --plot draws the published comparison, with --table and --throughput")
    console = Console(width=None if sys.stdout.isatty() else 140)
    if table:
        heads = ["model", "pixels", "params, published", "counted", "GMACs, published", "counted", "top-1 %, published"]
        heads += ["images/s, published (V100)", "images/s here"] if throughput else []
        published, measured = Table(*heads), flops.paper_throughput() if throughput else {}
        for row, cost in flops.paper_table():
            params, macs = (
                ("cited only", "") if cost is None else (f"{cost.params / 1e6:.1f} M", f"{cost.macs / 1e9:.1f}")
            )
            line = [row.label, f"{row.img_size}", f"{row.params:g} M", params, f"{row.gmacs:g}", macs, f"{row.top1:g}"]
            if throughput:
                line += [f"{row.images_per_s or '':}", f"{measured[row]:.2f}" if row in measured else ""]
            published.add_row(*line)
        console.print(published)
        if plot:
            flops.plot_paper_table(measured, plot)
            console.print(f"wrote {plot}")
        for question, memory in flops.PIXELS_OR_PATCHES:
            console.print(f"attention matrices, float32: {question}: {flops.human(memory)}")
    if models:
        names = [n for pattern in models for n in (list_models(pattern) or [pattern])]
        options: dict[str, Any] = {"img_size": size} if size else {}
        costs = [flops.count(name, **options) for name in names]
        counted = Table(*flops.HEADER, *(["images/s here"] if throughput else []))
        for name, cells in zip(names, flops.rows(costs), strict=True):
            counted.add_row(*cells, *([f"{flops.throughput(create_model(name, **options)):.1f}"] if throughput else []))
        console.print(counted)
    console.print(
        "GMACs count a multiply and an add as one; N is the longest sequence; attention memory is of one input, in "
        "training, float32"
    )


def _models(pattern: str = "*") -> None:
    from pyvit.models.registry import list_models

    names = list_models(pattern)
    if not names:
        raise ValueError(f"models: no model matches {pattern!r}; 'pyvit models' lists all")
    print("\n".join(names))


def _convert(source: Path, target: Path, to: str) -> None:
    import torch

    from pyvit.models.checkpoints import from_native, read_state, recognise, to_native

    if target.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"convert: target must end in .safetensors, .pth or .pt, got {target.name}")
    state = read_state(source)
    layout = recognise(state)
    native, unknown, unused = to_native(state, layout)
    if unknown:
        raise ValueError(f"convert: the {layout.name} layout has no rule for {', '.join(unknown)}")
    found = {k: v.contiguous() for k, v in from_native(native, to).items()}
    if target.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(found, target)
    else:
        torch.save(found, target)
    print(f"{source} ({layout.name}, {len(state)} tensors) -> {target} ({to}, {len(found)} tensors)")
    if unused:
        print(f"left out, buffers and heads of pre-training: {', '.join(unused)}")


def _bench(ctx: Any) -> None:
    import importlib

    root = Path(__file__).resolve().parents[2]
    name = "pyvit.benchmarks"
    if (root / "benchmarks" / "__main__.py").exists() and (root / "pyproject.toml").exists():  # a checkout
        sys.path.insert(0, str(root))
        name = "benchmarks"
    try:
        suite = importlib.import_module(f"{name}.__main__")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"bench: {error}; the benchmarks need more packages: pip install 'pyvit-kernels[bench]'", name=error.name
        ) from error
    sys.exit(suite.main(ctx.args))


def _annotate() -> None:
    """Add annotations that need typer: typer reads annotations when commands are registered."""
    try:
        import typer
    except ImportError:
        return
    _bench.__annotations__["ctx"] = typer.Context
    _doctor.__annotations__["as_json"] = Annotated[bool, typer.Option("--json", help="as JSON, for programs")]
    names = typer.Argument(help="names or wildcards, such as 'vit_base*'")
    _flops.__annotations__.update(
        models=Annotated[list[str] | None, names],
        size=Annotated[int, typer.Option(help="side of the images; default each model's own")],
        table=Annotated[
            bool, typer.Option("--table", help="the Swin paper's comparison and the memory of pixels against patches")
        ],
        throughput=Annotated[
            bool, typer.Option("--throughput", help="also measure images per second on this machine (float32, batch 8)")
        ],
        plot=Annotated[
            str | None,
            typer.Option(help="a picture of accuracy over images per second, with --table and --throughput"),
        ],
    )
    _models.__annotations__.update(pattern=Annotated[str, typer.Argument(help="wildcard, such as 'swin*'")])
    from pyvit.models.checkpoints import formats

    _convert.__annotations__.update(
        source=Annotated[
            Path, typer.Argument(help=".pth (weights only) or .safetensors, in any layout load_checkpoint reads")
        ],
        target=Annotated[Path, typer.Argument(help="file to write: .safetensors, .pth or .pt")],
        to=Annotated[str, typer.Option(help=f"layout: {', '.join(formats())}")],
    )


_annotate()
