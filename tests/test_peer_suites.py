"""The runner of other libraries' test suites, on a small suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.peers import peer

SUITE = """
import pytest, timm

@pytest.mark.parametrize("model_name", ["1-vit_tiny_patch16_224", "1-swin_tiny_patch4_window7_224"])
def test_passing(model_name):
    assert timm.create_model("vit_tiny_patch16_224", depth=1)

@pytest.mark.parametrize("model_name", ["1-vit_tiny_patch16_224"])
def test_without_a_model(model_name):
    assert model_name

@pytest.mark.parametrize("model_name", ["1-vit_tiny_patch16_224"])
def test_broken(model_name):
    assert not timm.create_model("vit_tiny_patch16_224", depth=1)

@pytest.mark.parametrize("model_name", ["1-vit_tiny_patch16_224"])
def test_broken_by_pyvit(model_name):
    assert "forward" not in vars(timm.create_model("vit_tiny_patch16_224", depth=1).blocks[0].attn)
"""


def test_table(tmp_path):
    peer("timm")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_models.py").write_text(SUITE)
    script = Path(__file__).with_name("peer_suites.py")
    command = [sys.executable, str(script), "--timm", str(tmp_path), "--families", "ViT"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "| timm | ViT | 2 | 1 | 0 | 1 | 1 |" in done.stdout
    assert done.stdout.rstrip().endswith("\ntests/test_models.py::test_broken_by_pyvit[1-vit_tiny_patch16_224]")


def test_a_folder_without_tests_is_refused(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("peer_suites.py")), "--timm", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--timm must be a checkout of timm" in done.stderr
