"""Interrupted runs, full disks and damaged files do not lose anything else."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyvit.train import Config, checkpoint, train

SMALL = {
    "data": "digits",
    "set": ["embed_dim=32", "depth=1", "num_heads=1", "patch_size=8"],
    "batch_size": 16,
    "save_every": 3,
    "log_every": 1,
}

SCRIPT = """
import json, os, signal, sys
from pyvit.train import engine
from pyvit.train.config import Config
settings, kill_at = json.loads(sys.argv[1]), int(sys.argv[2])
step = engine.Run.step
def mortal(self, number, batches):
    if number == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, batches)
engine.Run.step = mortal
engine.train(Config(**settings))
"""


def run(settings: dict, kill_at: int = -1, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, json.dumps(settings), str(kill_at)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYVIT_LINEAR": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)


def losses(folder: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ("supervised", []),
        pytest.param(
            "dino",
            ["prototypes=64", "hidden=16", "bottleneck=8", "local_crops=1", "local_size=16"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kill_9_and_resume_gives_the_same_bits(tmp_path, recipe, option):
    settings = {**SMALL, "recipe": recipe, "steps": 8, "set": [*SMALL["set"], "drop_path_rate=0.1"], "option": option}
    whole, broken = ({**settings, "out": str(tmp_path / name)} for name in ("whole", "broken"))
    assert run(whole).returncode == 0
    assert run(broken, kill_at=5).returncode == -signal.SIGKILL
    assert [s for s, _ in losses(tmp_path / "broken")] == list(range(5))
    second = run(broken)
    assert second.returncode == 0, second.stderr
    assert "note:" not in second.stdout
    assert "resuming" in second.stdout
    assert "at step 3 of 8" in second.stdout
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    ends = [checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "broken")]
    for part in ("model", "optimizer"):
        for x, y in zip(_tensors(ends[0][part]), _tensors(ends[1][part]), strict=True):
            assert torch.equal(x, y)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_note_about_other_hardware_or_settings(tmp_path, monkeypatch, capsys):
    """On another machine or with other settings a run continues, with a note that results may differ in the
    last bits."""
    settings = {**SMALL, "out": str(tmp_path), "steps": 2}
    train(Config(**settings))
    train(Config(**settings))
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setenv("PYVIT_LINEAR", "onednn")
    train(Config(**settings))
    assert "note: PYVIT_LINEAR was not known, is onednn; from here on" in capsys.readouterr().out
    old = checkpoint.load(tmp_path / "last.pt")
    checkpoint.save(tmp_path / "last.pt", {k: old[k] for k in ("step", "model", "optimizer", "config")})
    train(Config(**settings))
    assert "torch was not known, is " in capsys.readouterr().out


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(
        value, dict
    ):  # by key: a parameter that rested at first enters the optimizer's state last, until it is loaded again
        value = [value[key] for key in sorted(value, key=str)]
    items = value if isinstance(value, (list, tuple)) else ()
    return [t for item in items for t in _tensors(item)]


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    """If a process is killed while writing, the old file stays, and the next run removes the temporary file."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pyvit.train.checkpoint import write_atomic\n"
        "def write(file):\n    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(Path(sys.argv[1]), write)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_costs_the_checkpoint_and_the_exit_code(tmp_path):
    """All steps run; files that could not be written are reported.

    A limit on the file size makes writes fail, as on a full disk; log lines are shorter than the limit.
    """
    settings = {**SMALL, "recipe": "supervised", "steps": 4, "save_every": 2, "out": str(tmp_path / "run")}

    def starve() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run(settings, preexec_fn=starve)
    assert done.returncode == 1, done.stderr
    assert "warning: no checkpoint at step 2" in done.stdout
    assert "there is no checkpoint yet" in done.stdout
    assert "last.pt, model.safetensors could not be written; there is no checkpoint yet" in done.stderr
    assert not (tmp_path / "run" / "last.pt").exists()
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]
    assert len(losses(tmp_path / "run")) == 4
    again = run(settings)  # with room, the same command starts over and finishes
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for kind in ("cats", "dogs"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(20):
            size = (40 + i, 50 - i)
            pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / kind / f"{i:02d}.jpg")
    return tmp_path / "photos"


def test_corrupt_images_are_named_and_skipped(tmp_path, pictures, capsys):
    broken = pictures / "cats" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (pictures / "dogs" / "05.jpg").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="skipped"):
        train(
            Config(
                **{
                    **SMALL,
                    "data": str(pictures),
                    "image_size": 32,
                    "model": "vit_pico_patch4_32",
                    "steps": 4,
                    "option": ["repeats=1"],
                    "out": str(tmp_path / "run"),
                }
            )
        )
    said = capsys.readouterr().out
    assert "03.jpg" in said
    assert "05.jpg" in said
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_folder_of_rubbish_is_refused(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"rubbish")
    from pyvit.data import load_data

    images = load_data(str(tmp_path), 32).train
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="of 18 files cannot be read"):
        images.fetch(range(10))


def test_another_run_is_not_overwritten(tmp_path):
    settings = {**SMALL, "out": str(tmp_path), "steps": 1}
    train(Config(**settings))
    with pytest.raises(ValueError, match=r"holds another run \(lr was .*, is 0.5\)"):
        train(Config(**{**settings, "lr": 0.5}))
    train(Config(**{**settings, "lr": 0.5, "overwrite": True}))


def test_a_finished_run_says_so_again(tmp_path):
    settings = {**SMALL, "out": str(tmp_path), "steps": 2}
    first = train(Config(**settings))
    began = time.perf_counter()
    assert train(Config(**settings)) == first
    assert time.perf_counter() - began < 20


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        train(Config(**{**SMALL, "out": str(tmp_path), "steps": 30, "lr": 1e30, "warmup": 0.0, "clip": 0.0}))
