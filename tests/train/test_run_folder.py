"""Run folders: locking, file modes, full disks, changed data, moved folders, signals."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyvit.train import Config, checkpoint, train
from pyvit.train.log import Log, say
from pyvit.train.run_folder import Lock, fingerprint
from pyvit.train.runs import load_run

SMALL = {
    "data": "digits",
    "set": ["embed_dim=24", "depth=1", "num_heads=1", "patch_size=8"],
    "batch_size": 16,
    "log_every": 1,
}
WRITES = """
import json, sys
from pyvit.train import Config, train
train(Config(**json.loads(sys.argv[1])))
"""


def start(settings: dict, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITES, json.dumps(settings)]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=-1, stderr=subprocess.STDOUT, text=True, **options
    )


def wait_for(path: Path, lines: int = 1) -> None:
    until = time.time() + 120
    while time.time() < until:
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} has not come")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(tmp_path, number):
    """Also with worker processes: terminals and schedulers send signals to all processes."""
    out = tmp_path / "run"
    settings = {**SMALL, "steps": 2000, "save_every": 10_000, "workers": 1, "out": str(out)}
    running = start(settings, start_new_session=True)
    wait_for(out / "log.jsonl", 3)
    os.killpg(running.pid, number)
    said = running.communicate(timeout=120)[0]
    assert running.returncode == 128 + number, said
    assert "Traceback" not in said
    saved = checkpoint.load(out / "last.pt")
    assert saved["step"] >= 3
    assert (
        f"stopped after step {saved['step']} of 2000; the checkpoint of step {saved['step']} is intact; the same "
        "command resumes it"
    ) in said
    assert not (out / "run.lock").exists()


def test_two_runs_in_one_folder(tmp_path):
    """The second run is refused and names the first. The file of a killed process does not lock the folder."""
    out = tmp_path / "run"
    settings = {**SMALL, "steps": 100_000, "out": str(out)}
    first = start(settings)
    try:
        wait_for(out / "log.jsonl")
        for more in ({}, {"overwrite": True}):
            with pytest.raises(ValueError, match=rf"{out} is in use by process {first.pid} on "):
                train(Config(**settings, **more))
    finally:
        first.kill()
        first.communicate()
    assert (out / "run.lock").exists()
    train(Config(**{**settings, "steps": 1, "overwrite": True}))
    assert not (out / "run.lock").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """The process in the file is looked up: the folder is locked if it is running, and free if it has ended."""
    from pyvit.train import run_folder

    monkeypatch.setattr(run_folder, "fcntl", None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, held in ((os.getppid(), True), (ended.pid, False)):
        (tmp_path / "run.lock").write_text(json.dumps({"pid": pid, "host": run_folder.socket.gethostname()}))
        lock = Lock(tmp_path)
        if held:
            with pytest.raises(ValueError, match=f"is in use by process {pid} on "):
                lock.acquire()
        else:
            lock.acquire()
            lock.release()
    assert not (tmp_path / "run.lock").exists()


def test_a_failed_start_leaves_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at most"):
        train(Config(**{**SMALL, "batch_size": 5000, "steps": 1, "out": str(tmp_path)}))
    Lock(tmp_path).acquire()


def test_files_have_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        train(Config(**SMALL, steps=1, out=str(tmp_path / "run")))
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "run").iterdir()}
    assert {"last.pt", "model.safetensors", "config.json", "results.json", "log.jsonl"} <= modes.keys()
    assert set(modes.values()) == {0o640}


def folder_of_pictures(root: Path, count: int = 12) -> Path:
    from PIL import Image

    for kind, value in (("dark", 20), ("light", 220)):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32), (value, value, i)).save(root / kind / f"{i:02d}.png")
    return root


PICTURES = {
    "model": "vit_pico_patch8_32",
    "image_size": 32,
    "batch_size": 8,
    "set": ["depth=1"],
    "option": ["augment='none'"],
}


def test_data_that_change_are_refused(tmp_path):
    data, out = folder_of_pictures(tmp_path / "data"), str(tmp_path / "run")
    settings = {**PICTURES, "data": str(data), "steps": 2, "out": out}
    train(Config(**settings))
    (data / "dark" / "00.png").rename(data / "dark" / "renamed.png")
    with pytest.raises(
        ValueError, match=r"the training set has changed since the run began: other files.*--allow-changed-data"
    ):
        train(Config(**settings))
    shutil.copy(data / "dark" / "01.png", data / "dark" / "01b.png")
    with pytest.raises(ValueError, match=r"it had \d+ images and has \d+"):
        train(Config(**settings))
    (data / "new").mkdir()
    for name in ("00", "01"):
        shutil.copy(data / "light" / f"{name}.png", data / "new" / f"{name}.png")
    with pytest.raises(ValueError, match="classes removed: none, new: new"):
        train(Config(**settings))
    shutil.rmtree(data / "new")
    train(Config(**settings, allow_changed_data=True))


def test_a_run_and_its_data_can_move(tmp_path, capsys):
    data, out = folder_of_pictures(tmp_path / "data"), tmp_path / "run"
    first = train(Config(**PICTURES, data=str(data), steps=2, out=str(out)))
    (tmp_path / "elsewhere").mkdir()
    moved = [path.rename(tmp_path / "elsewhere" / path.name) for path in (data, out)]
    assert train(Config(**PICTURES, data=str(moved[0]), steps=2, out=str(moved[1]))) == first
    assert "resuming" in capsys.readouterr().out
    recipe, loaded = load_run(moved[1])
    assert recipe.evaluate(loaded) == first


def test_fingerprints_know_names_labels_and_captions():
    from pyvit.data import load_data

    data = load_data("digits")
    first = fingerprint(data)
    assert fingerprint(load_data("digits")) == first
    data.train.labels = data.train.labels.flip(0)
    assert fingerprint(data)["hash"] != first["hash"]


def test_a_disk_that_fills_after_the_first_checkpoint(tmp_path):
    """The run ends with an error that says which checkpoint is intact."""
    out = tmp_path / "run"
    train(Config(**SMALL, steps=4, save_every=2, out=str(out)))  # room for all
    whole = (out / "last.pt").read_bytes()
    config = {**SMALL, "steps": 4, "save_every": 2, "out": str(out)}
    saved = checkpoint.load(out / "last.pt")
    checkpoint.save(out / "last.pt", {**saved, "step": 2})
    (out / "model.safetensors").unlink()

    def starve() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    running = start(config, preexec_fn=starve)
    said = running.communicate(timeout=200)[0]
    assert running.returncode == 1, said
    assert "no checkpoint at step 4" in said
    assert (
        "training has finished, but last.pt, model.safetensors could not be written; the checkpoint of step 2 is intact"
        in said
    )
    assert checkpoint.load(out / "last.pt")["step"] == 2
    assert not (out / "model.safetensors").exists()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert len(whole) > 20_000


def test_a_line_of_the_log_is_whole_or_absent(tmp_path):
    """An incomplete line is removed, so that the next one is intact."""
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom pyvit.train.log import Log\n"
        "log = Log(Path(sys.argv[1]), 0, False)\nlog.write(0, loss=1.0)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, -1))\nlog.write(1, loss=2.0, more='x' * 50)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\nlog.write(2, loss=3.0, nan=float('nan'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "warning: cannot write" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 1.0}, {"step": 2, "loss": 3.0}]


def test_tensorboard_on_a_full_disk(tmp_path):
    class Broken:
        def add_scalar(self, *_):
            raise OSError("no space left")

        close = add_scalar

    log = Log(tmp_path, 0, False)
    log._writer = Broken()
    log.write(0, loss=1.0)
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 0, "loss": 1.0}


def test_names_that_are_not_text_are_printed(tmp_path, capsys):
    say(f"skipped {os.fsdecode(bytes([0x66, 0xFF]))}")
    assert capsys.readouterr().out == "skipped f\\udcff\n"


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\3\4 cut"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt is damaged or no checkpoint of pyvit"):
        train(Config(**SMALL, steps=1, out=str(tmp_path)))
    torch.save([1], tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is not a checkpoint of pyvit: it holds a list"):
        train(Config(**SMALL, steps=1, out=str(tmp_path)))
