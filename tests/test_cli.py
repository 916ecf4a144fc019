"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyvit.cli import application
from pyvit.train.runs import load_run

ROOT = Path(__file__).resolve().parent.parent


def invoke(*arguments: str):
    return CliRunner().invoke(application(), list(arguments), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})


def run(*arguments: str, code: str = "", **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "pyvit"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


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
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'typer' else find(n, *a)\n"
    code = hide + "import sys; from pyvit.cli import main; main()"
    done = run("flops", "x", code=code)
    assert done.returncode == 1
    assert "needs typer: pip install 'pyvit-kernels[cli]'" in done.stderr
    assert run("info", code=code).returncode == 0


def test_flops():
    done = invoke("flops", "vit_base_patch16_224")
    assert "86,567,656" in done.output
    assert "17.5" in done.output
    assert "55.4" in invoke("flops", "vit_base_patch16_224", "--size", "384").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "supervised", "--data", "nowhere"], "pyvit: data: must be a folder"),
        (["train", "mae", "--data", "digits", "--option", "depth=3"], "pyvit: mae: option must be one of"),
        (["eval", "knn", "/nonexistent"], "pyvit: run: /nonexistent must hold config.json"),
    ],
)
def test_user_errors_are_one_line(arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pyvit", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


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
    assert {"config.json", "log.jsonl", "last.pt", "model.safetensors", "results.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
    recipe, data = load_run(out)
    assert recipe.evaluate(data)["knn"] == pytest.approx(json.loads((tmp_path / "run" / "results.json").read_text())["knn"])
    assert "k-NN accuracy" in invoke("eval", "knn", out).output
    assert "linear accuracy" in invoke("eval", "linear", out, "--epochs", "2").output
    for picture in ("reconstruct", "attention", "patches"):
        assert "wrote" in invoke("eval", picture, out, "--count", "2").output
        assert (tmp_path / "run" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    for recipe_name in ("finetune", "linear"):
        done = invoke("train", recipe_name, "--data", "digits", "--init", out, "--out", str(tmp_path / recipe_name), *SMALL[:4])
        assert "accuracy" in done.output


def test_train_then_evaluate_two_towers(tmp_path):
    out = str(tmp_path / "run")
    done = invoke("train", "clip", "--data", "digits", "--out", out, *SMALL, "--option", "context=24")
    assert done.exit_code == 0
    assert "zero-shot accuracy" in invoke("eval", "zero-shot", out, "--count", "2").output
    assert "recall" in invoke("eval", "retrieval", out, "--count", "2").output
    for picture in ("zero_shot", "parts"):
        assert (tmp_path / "run" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
