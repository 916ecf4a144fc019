"""Every example and notebook on small data: its loss falls or its result is right, it prints the speed with and without
pyvit, and it refuses bad input with a sentence."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.peers import peer, torchvision

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch, tmp_path, capfd) -> Run:
    """Runs an example as a program, in a folder of its own, and returns what it prints."""
    peer("timm")
    torchvision()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    speed = importlib.import_module("speed")
    quick = speed.compare
    monkeypatch.setattr(speed, "compare", lambda *steps, rounds=1: quick(*steps, rounds=1))

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        captured = capfd.readouterr()
        return captured.out + captured.err

    return call


@pytest.fixture
def sample_data(run):
    return importlib.import_module("sample_data")


def check_speed(printed: str) -> None:
    found = re.findall(r"speed of [^:]+, \d+ CPU threads: ([\d.]+) ms without pyvit, ([\d.]+) ms with", printed)
    assert len(found) == 1, printed
    assert min(map(float, found[0])) > 0


def check_losses(printed: str, pattern: str) -> None:
    """The numbers after ``pattern`` fall: the last third is lower than the first."""
    losses = [float(x) for x in re.findall(rf"{pattern}([\d.]+)", printed)]
    assert len(losses) > 1, printed
    first, last = losses[: max(len(losses) // 3, 1)], losses[-max(len(losses) // 3, 1) :]
    assert sum(last) / len(last) < 0.97 * sum(first) / len(first), losses


def test_timm(run, sample_data, tmp_path):
    sample_data.digits("digits", per_class=20)
    printed = run("timm_train", "--data-dir", "digits", "--epochs", 4, "--warmup-epochs", 0, "-b", 8, "--smoothing", 0)
    check_losses(printed, r"Loss: [\d.]+ \(")
    check_speed(printed)
    assert "replaced 4 x Attention" in printed
    assert len(torch.load(tmp_path / "runs/timm/last.pth.tar")["state_dict"]) > 50


def test_hugging_face(run, sample_data):
    sample_data.digits("digits", per_class=20)
    quick = ["--num_train_epochs", 4, "--per_device_train_batch_size", 8, "--warmup_steps", 0]
    printed = run("hf_trainer", "--output_dir", "out", "--data_dir", "digits", *quick)
    check_losses(printed, r"'loss': '?")
    check_speed(printed)
    assert "replaced 4 x ViTAttention" in printed
    assert Path("out/model.safetensors").is_file()


def test_lightning(run, sample_data):
    peer("lightning")
    sample_data.digits("digits", per_class=20)
    printed = run("lightning_train", "--data", "digits", "--epochs", 4, "--batch-size", 8)
    check_speed(printed)
    assert "replaced 4 x ShiftedWindowAttention" in printed
    assert float(re.search(r"val_loss ([\d.]+)", printed)[1]) < 2.27


def test_dino(run, sample_data):
    sample_data.digits("digits", per_class=20)
    small = ["--batch-size", 16, "--local-crops-number", 2, "--out-dim", 256]
    printed = run("dino_train", "--data-path", "digits/train", "--epochs", 2, *small)
    check_speed(printed)
    found = re.findall(r"loss of a batch: ([\d.]+) without pyvit, ([\d.]+) with", printed)
    without, ours = map(float, found[0])
    assert abs(ours - without) < 1e-3 * without


def test_open_clip_and_search(run, sample_data):
    """The trained model is the one that searches."""
    peer("open_clip")
    sample_data.scenes("scenes", 400)
    printed = run("open_clip_train", "--train-data", "scenes/train.csv", "--val-data", "scenes/val.csv", "--epochs", 4)
    check_losses(printed, r"Loss: ")
    check_speed(printed)
    for indexed in (40, 0):  # the second search uses the index
        printed = run("search_photos", "a red circle", "a blue square", "--data", "scenes/val", "--top", 5)
        assert ("indexed 40 of 40" in printed) == (indexed == 40), printed
        check_speed(printed)
    assert len(re.findall(r"  -?0\.\d+  scenes/val/\d+\.png", printed)) == 10


def test_features(run, sample_data):
    size = ["--img-size", 64, "--model", "vit_tiny_patch16_224"]
    Path("photographs").mkdir()
    sample_data.photographs("photographs/tiles")
    Path("photographs/broken.jpg").write_bytes(b"not an image")
    printed = run("extract_features", "--data", "photographs", *size)
    check_speed(printed)
    assert "left out photographs/broken.jpg" in printed
    nearest = re.findall(r"(\w+)_\d+.png is nearest to (\w+)_\d+.png", printed)
    assert len(nearest) == 18
    assert sum(a == b for a, b in nearest) >= 14, "pieces of a photograph are nearest to pieces of the same"
    with safe_open("runs/features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (18, 192)
        assert len(json.loads(file.metadata()["paths"])) == 18


def test_detection(run, sample_data, monkeypatch):
    vision = torchvision()
    if not vision.extension._has_ops():  # its nms is there (benchmarks/torchvision_operators.py), not its library
        monkeypatch.setattr("torchvision.ops.boxes._assert_has_ops", lambda: None)
    sample_data.shapes("shapes", 40, 64)
    printed = run("detection_train", "--data-path", "shapes", "--epochs", 3, "--min-size", 64)
    check_losses(printed, r"loss: ")
    check_speed(printed)
    assert "replaced 6 x ShiftedWindowAttention" in printed


def test_deployment(run, sample_data):
    model = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=1", "img_size=32"]
    printed = run("deploy", "compile", *model, "--batch-size", 2, "--out", "deployed")
    check_speed(printed)
    assert float(re.search(r"largest difference to the model: (\S+)", printed)[1]) < 1e-4
    sample_data.photographs("photographs", tiles=1)
    images = sorted(map(str, Path("photographs").iterdir()))
    code = (
        f"import runpy, sys; sys.argv = ['deploy.py', 'run', 'deployed', *{images}]; "
        f"runpy.run_path({str(EXAMPLES / 'deploy.py')!r}, run_name='__main__'); "
        "assert not {'pyvit', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^photographs/\w+\.png class \d+: ", done.stdout, re.M)) == 2

    at = Path(torch.__file__).parent
    build = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", f"-I{at / 'include'}", str(EXAMPLES / "deploy.cpp")]
    link = [f"-L{at / 'lib'}", f"-Wl,-rpath,{at / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*build, "-o", "deploy", *link, "-ldl"], check=True)
    done = subprocess.run(["./deploy", "deployed", "2", "32"], check=True, capture_output=True, text=True)
    with torch.no_grad():
        model = torch._inductor.aoti_load_package("deployed/model.pt2")
        likeliest = int(model(torch.full((2, 3, 32, 32), 0.5))[0].argmax())
    assert done.stdout.splitlines()[-1] == f"likeliest class of the first image: {likeliest}"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm_train", ["--data-dir", "nowhere"], "must have folders train and val"),
        ("hf_trainer", ["--output_dir", "out", "--data_dir", "nowhere"], "must be a folder"),
        ("lightning_train", ["--data", "nowhere"], "must have folders train and val"),
        ("dino_train", ["--data-path", "nowhere"], "must be a folder"),
        ("open_clip_train", ["--train-data", "nowhere.csv"], "must be a CSV file"),
        ("extract_features", ["--data", "nowhere", "--model", "vit_tiny_patch16_224"], "must be a folder with images"),
        ("search_photos", ["a dog"], "run open_clip_train.py first"),
        ("search_photos", ["a dog", "--model", "ViT-B-32"], "random weights find nothing"),
        ("detection_train", ["--data-path", "nowhere"], "must have train.json and val.json"),
        ("deploy", ["run", "nowhere", "a.jpg"], "has no model.pt2"),
    ],
)
def test_bad_input(run, name, arguments, message, capfd):
    with pytest.raises(SystemExit) as stopped:
        run(name, *arguments)
    assert message in f"{stopped.value} {capfd.readouterr().err}"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path, run, capfd):
    """Its cells as one program, with less data and fewer epochs."""
    plt = importlib.import_module("matplotlib.pyplot")
    plt.switch_backend("agg")
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    for name, less in (("epochs", 1), ("count", 640)):
        code = re.sub(rf"^{name} = \d+$", f"{name} = {less}", code, flags=re.M)
    exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
    plt.close("all")
    check_speed(capfd.readouterr().out)


def test_every_example_is_listed():
    listed = re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text())
    written = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".cpp")}
    assert set(listed) == written - {"speed.py", "sample_data.py"}
