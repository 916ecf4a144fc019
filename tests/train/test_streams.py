"""Streamed data: distribution over ranks, order, resuming, damaged files, and a whole run."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch

from pyvit.data import load_data
from pyvit.train import Config, checkpoint, train

pytest.importorskip("datasets")


def jpeg(value: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 20), (value, value, value)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Four WebDataset shards of 160 images each; image i has grey value i % 256 and the caption i."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as file:
            for i in range(160 * shard, 160 * (shard + 1)):
                for ending, content in (("png", jpeg(i % 256)), ("txt", f"number {i}".encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{ending}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture
def parquet(tmp_path):
    """A training split in two files, with named classes."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    folder = tmp_path / "parquet"
    folder.mkdir()
    for part in range(2):
        rows = {
            "image": [{"bytes": jpeg(i % 256), "path": None} for i in range(400)],
            "label": [int(i % 256 > 127) for i in range(400)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{part}.parquet"))
    return folder


def seen(stream, *spread) -> list[str]:
    return [caption for batch in stream.batches(*spread) for caption in batch["caption"]]


def test_webdataset_shards_stream_and_hold_out(shards):
    data = load_data(f"hf-stream:{shards}", 16)
    assert len(data.test) == 512
    with pytest.raises(ValueError, match="give --steps instead of --epochs"):
        len(data.train)
    batch = next(iter(data.train.batches(8, 0, 1, 0)))
    assert batch["image"].shape == (8, 3, 16, 16)
    numbers = [int(caption.split()[1]) for caption in batch["caption"]]
    assert batch["image"][:, 0, 8, 8].tolist() == [n % 256 for n in numbers]
    epoch = seen(data.train, 128, 0, 1, 0)
    assert sorted(epoch) == sorted({f"number {n}" for n in range(640)} - set(data.test.captions))
    assert epoch != sorted(epoch)


def test_a_stream_continues_where_it_was(shards):
    train = load_data(f"hf-stream:{shards}", 16).train
    whole = seen(train, 16, 0, 20, 3)  # over the end of an epoch of 8 steps
    assert seen(train, 16, 7, 20, 3) == whole[7 * 16 :]
    assert seen(train, 16, 0, 8, 3) != seen(train, 16, 0, 8, 4)
    assert seen(train, 16, 0, 8, 3, 0, 1, 4) == whole[: 8 * 16]


def test_ranks_share_a_stream(shards):
    train = load_data(f"hf-stream:{shards}", 16).train
    ranks = [seen(train, 32, 0, 4, 0, rank, 2) for rank in range(2)]
    assert [len(r) for r in ranks] == [64, 64]
    assert not set(ranks[0]) & set(ranks[1])
    assert len({*ranks[0], *ranks[1]}) == 128


def test_damage_in_a_stream_is_reported(shards):
    train = load_data(f"hf-stream:{shards}", 16).train
    rows = [
        {"png": {"bytes": content, "path": None}, "txt": str(i)}
        for i, content in enumerate([jpeg(9), b"rubbish", jpeg(7)])
    ]
    with pytest.warns(UserWarning, match="skipped example 41"):
        batch = train.read(rows, 40)
    assert batch["image"][:, 0, 0, 0].tolist() == [9, 7, 7]
    assert batch["caption"] == ["0", "2", "2"]
    assert len(train.problems) == 1
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of 1 examples in a row"):
        train.read(rows[1:2], 0)


def test_a_streamed_run_resumes_to_the_same_bits(parquet, tmp_path):
    """An uninterrupted run of 6 steps, and one resumed from step 4."""
    small = {"data": f"hf-stream:{parquet}", "image_size": 16, "batch_size": 16, "save_every": 4, "log_every": 1}
    settings = {**small, "model": "vit_pico_patch4_32", "set": ["depth=1"], "steps": 6}
    first = train(Config(**settings, out=str(tmp_path / "whole")))
    assert 0 <= first["accuracy"] <= 100
    from pyvit.train.engine import Run

    run = Run(Config(**settings, out=str(tmp_path / "again")))
    batches = run.batches()
    for step in range(4):
        run.step(step, batches)
    run.save(4)
    train(Config(**settings, out=str(tmp_path / "again")))
    ends = [checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "again")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("whole", "again")
    ]
    assert losses[0][4:6] == losses[1][-3:-1]


def test_nearest_neighbours_read_the_head_of_a_stream(parquet, tmp_path):
    settings = {"data": f"hf-stream:{parquet}", "image_size": 16, "batch_size": 16, "steps": 1}
    found = train(
        Config(recipe="simclr", model="vit_pico_patch4_32", set=["depth=1"], out=str(tmp_path / "run"), **settings)
    )
    assert found["knn"] > 90  # dark and light are told apart by any network


def test_a_stream_has_no_validation_part(parquet):
    with pytest.raises(ValueError, match="validation: must be 0 for a stream"):
        load_data(f"hf-stream:{parquet}", 16, validation=0.1)


def test_a_split_that_is_not_there(parquet):
    with pytest.raises(ValueError, match="must have the split 'nowhere', got train"):
        load_data(f"hf-stream:{parquet}:nowhere", 16)
