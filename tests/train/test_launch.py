"""The launchers of the guide: torchrun, and accelerate, which continues torchrun's run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvit.train import checkpoint

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "train.md"
OPTIONS = ["--data", "digits", "--batch-size", "8", "--log-every", "1", "--set", "embed_dim=24", "--set", "depth=2"]
OPTIONS += ["--set", "num_heads=1", "--set", "patch_size=8", "--no-tensorboard"]


def launch(launcher: str, module: str, *options: str) -> str:
    """Run the guide's line that begins with ``launcher``, for two processes and with other ``options``."""
    lines = [line for line in GUIDE.read_text().splitlines() if line.startswith(launcher) and "--fsdp" in line]
    assert len(lines) == 1
    words = lines[0].split()
    flag = next(i for i, word in enumerate(words) if word.startswith(("--num", "--nproc")))
    words[flag + 1] = "2"
    end = words.index("train") + 1  # ... pyvit train RECIPE ...
    command = [sys.executable, "-m", module, *words[1:end], "supervised", *options, "--fsdp"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun_and_accelerate_launch(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    said = launch("torchrun", "torch.distributed.run", *OPTIONS, *out, "--steps", "2")
    assert said.count("data digits:") == 1
    said = launch("accelerate launch", "accelerate.commands.accelerate_cli", *OPTIONS, *out, "--steps", "4")
    assert f"resuming {tmp_path} at step 2 of 4" in said
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [0, 1, 2, 3]
    assert checkpoint.load(tmp_path / "last.pt")["setting"]["processes"] == "2"
