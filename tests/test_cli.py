"""The command line."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyvit import cli
from pyvit.cli import application
from pyvit.models import flops
from pyvit.train.recipe import RECIPES, load_recipe
from pyvit.train.runs import load_run

ROOT = Path(__file__).resolve().parent.parent


def invoke(*arguments: str):
    return CliRunner().invoke(
        application(), list(arguments), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"}
    )


def run(*arguments: str, code: str = "", **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "pyvit"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env}
    )


@pytest.fixture
def handlers():
    """Restores the signal handlers that the command line sets."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_info():
    done = invoke("info")
    assert done.exit_code == 0
    for word in ("torch", "flash_attention", "info_nce", "backends", "accelerate"):
        assert word in done.output


def test_info_without_the_library_says_how_to_get_it():
    done = run("info", PYVIT_NO_LIBRARY="1")
    assert done.returncode == 0, done.stderr
    assert "not in use: PYVIT_NO_LIBRARY=1 is set" in done.stdout


def test_without_typer_the_message_names_the_extra():
    hide = (
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'typer' else "
        "find(n, *a)\n"
    )
    code = hide + "import sys; from pyvit.cli import main; main()"
    done = run("flops", "x", code=code)
    assert done.returncode == 1
    assert "needs typer: pip install 'pyvit-kernels[cli]'" in done.stderr
    assert run("info", code=code).returncode == 0


def test_flops_of_the_paper_with_throughput(monkeypatch, tmp_path):
    measured = {row: 10.0 + i for i, row in enumerate(flops.PAPER_TABLE) if row.name}
    monkeypatch.setattr(flops, "paper_throughput", lambda: measured)
    picture = tmp_path / "table.png"
    done = invoke("flops", "--table", "--throughput", "--plot", str(picture))
    assert all(f"{speed:.2f}" in done.output for speed in measured.values())
    assert "278.1" in done.output  # published
    assert picture.stat().st_size > 1000
    with pytest.raises(ValueError, match=r"--plot draws .* with --table and --throughput"):
        invoke("flops", "--table", "--plot", str(picture))


def test_flops():
    done = invoke("flops", "vit_base_patch16_224")
    assert "86,567,656" in done.output
    assert "17.5" in done.output
    assert "55.4" in invoke("flops", "vit_base_patch16_224", "--size", "384").output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "supervised", "--data", "nowhere"], 1, "pyvit: data: must be a folder"),
        (
            ["train", "mae", "--data", "digits", "--option", "depth=3"],
            2,
            "pyvit: mae: option must be one of mask_ratio",
        ),
        (
            ["train", "mae", "--data", "digits", "--option", "mask_ratio=1"],
            2,
            "pyvit: mae: option mask_ratio must be in (0, 1), got 1",
        ),
        (["train", "mae", "--data", "digits", "--set", "depth"], 2, "pyvit: set must be KEY=VALUE, got 'depth'"),
        (["train", "mae", "--data", "digits", "--clip", "-1"], 2, "pyvit: clip must be at least 0, got -1.0"),
        (["train", "mae", "--data", "digits", "--out", "file"], 1, "pyvit: file"),
        (["train", "mae", "--data", "digits", "--out", "file/run"], 1, "pyvit: file/run: Not a directory"),
        (
            ["train", "mae", "--data", "digits", "--out", "damaged", "--steps", "1"],
            1,
            "pyvit: damaged/last.pt is damaged",
        ),
        (["train", "finetune", "--data", "digits", "--init", "damaged"], 1, "pyvit: damaged/config.json is not JSON"),
        (["eval", "knn", "/nonexistent"], 1, "pyvit: run: /nonexistent must hold config.json"),
    ],
)
def test_user_errors_are_one_line(arguments, code, message, tmp_path, monkeypatch, capsys, handlers):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "damaged").mkdir()
    for name in ("last.pt", "config.json"):
        (tmp_path / "damaged" / name).write_text("x")
    monkeypatch.setattr(sys, "argv", ["pyvit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == code, said
    assert message in said
    assert len(said.splitlines()) == 1, said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a.png"), "a.png: Permission denied"),
        (FileExistsError(17, "File exists", "run"), "run: File exists"),
        (
            OSError("training has finished, but last.pt could not be written"),
            "training has finished, but last.pt could not be written",
        ),
        (KeyError("model"), "KeyError: 'model'"),
        (TypeError("unexpected keyword"), "TypeError: unexpected keyword"),
        (pickle.UnpicklingError("cut\nshort"), "UnpicklingError: cut short"),
        (json.JSONDecodeError("Expecting value", "", 0), "JSONDecodeError: Expecting value"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_every_error_is_said_in_a_line(error, line, monkeypatch, capsys, tmp_path, handlers):
    """One line: with the error's type if its message is not clear by itself, with the given files, and with a hint how
    to see more."""
    (tmp_path / "weights.pth").touch()

    def fails():
        raise error

    monkeypatch.setattr(cli, "application", lambda: fails)
    monkeypatch.setattr(sys, "argv", ["pyvit", "convert", str(tmp_path / "weights.pth")])
    monkeypatch.delenv("PYVIT_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith(f"pyvit: {line}")
    assert said.count("\n") == 1
    if not isinstance(error, OSError):
        assert f"files given: {tmp_path / 'weights.pth'} (PYVIT_TRACEBACK=1 shows where)" in said
    monkeypatch.setenv("PYVIT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main()


def test_interrupted_before_there_is_anything_to_save(tmp_path):
    code = "import os, signal, pyvit.train as t\nfrom pyvit import cli\n"
    code += (
        "def busy(config): os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(30)\nt.train = busy\ncli.main()"
    )
    done = run("train", "mae", code=code)
    assert done.returncode == 130
    assert done.stderr == "pyvit: interrupted\n"


def test_help_lists_what_a_recipe_declares():
    """Every option with its default, and the recipe's defaults of the common options."""
    for recipe in RECIPES:
        chosen = load_recipe(recipe)
        said = invoke("train", recipe, "--help").output
        for name, option in chosen.options.items():
            assert f" {name}={option.default}: " in said
            assert option.help.split(";")[0].split(",")[0] in " ".join(said.split())
        for name, value in chosen.defaults.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            assert f"[default: ({shown})]" in said, (recipe, name)


def test_every_command_has_help():
    for command in ("info", "flops"):
        assert invoke(command, "--help").exit_code == 0
    for recipe in ("supervised", "finetune", "linear", "mae", "dino", "dinov2", "simclr", "clip", "siglip"):
        assert "--layer-decay" in invoke("train", recipe, "--help").output
    for command in ("knn", "linear", "zero-shot", "retrieval", "attention", "reconstruct", "patches"):
        assert invoke("eval", command, "--help").exit_code == 0


SMALL = ["--steps", "2", "--batch-size", "16", "--set", "depth=1"]


def test_train_then_evaluate_an_autoencoder(tmp_path):
    out = str(tmp_path / "run")
    done = invoke("train", "mae", "--data", "digits", "--out", out, *SMALL)
    assert "patch_embed" in done.output
    assert "k-NN accuracy" in done.output
    assert {"config.json", "log.jsonl", "last.pt", "model.safetensors", "results.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    recipe, data = load_run(out)
    assert recipe.evaluate(data)["knn"] == pytest.approx(
        json.loads((tmp_path / "run" / "results.json").read_text())["knn"]
    )
    assert "k-NN accuracy" in invoke("eval", "knn", out).output
    assert "linear accuracy" in invoke("eval", "linear", out, "--epochs", "2").output
    for picture in ("reconstruct", "attention", "patches"):
        assert "wrote" in invoke("eval", picture, out, "--count", "2").output
        assert (tmp_path / "run" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    for recipe_name in ("finetune", "linear"):
        done = invoke(
            "train", recipe_name, "--data", "digits", "--init", out, "--out", str(tmp_path / recipe_name), *SMALL[:4]
        )
        assert "accuracy" in done.output


def test_train_then_evaluate_two_towers(tmp_path):
    out = str(tmp_path / "run")
    done = invoke("train", "clip", "--data", "digits", "--out", out, *SMALL, "--option", "context=24")
    assert done.exit_code == 0
    assert "zero-shot accuracy" in invoke("eval", "zero-shot", out, "--count", "2").output
    assert "recall" in invoke("eval", "retrieval", out, "--count", "2").output
    for picture in ("zero_shot", "parts"):
        assert (tmp_path / "run" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
