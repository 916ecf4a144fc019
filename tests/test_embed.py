"""pyvit embed and pyvit search: every image once, whatever happens to the process; the vectors of the model itself;
inputs and models that do not fit are refused by name."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

from benchmarks import embed as bench
from pyvit import create_model
from pyvit.cli import application
from pyvit.data import decode
from pyvit.data.decode import decode_image
from pyvit.embed import Settings, embed_images, load_encoder, load_query_encoder, open_images, search, shards
from pyvit.embed.pipeline import Times, ahead, batches, vectors
from pyvit.embed.search import embed_one, thumbnail
from pyvit.eval.features import embed
from pyvit.models.metadata import header_of
from pyvit.train import Config, train
from pyvit.train.checkpoint import save_weights
from tests import peers

PICO = Settings("vit_pico_patch8_32", random_weights=True, dtype="fp32")
CLASSES = ("cats", "dogs")


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Coloured noise with structure at several scales."""
    draw = np.random.default_rng(seed)
    layers = [
        Image.fromarray(draw.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
        for n in (2, 5, 11)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], 0).astype(np.uint8))


def make_folder(root, count: int):
    for i in range(count):
        path = root / CLASSES[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, quality=95)
    return root


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """23 images in two folders, and two files that cannot be read."""
    root = make_folder(tmp_path_factory.mktemp("photographs"), 23)
    (root / "cats" / "cut.jpg").write_bytes((root / "cats" / "000.jpg").read_bytes()[:300])
    (root / "dogs" / "page.png").write_text("<html>")
    return root


def rows_of(out):
    """Position, name, label and vector of every row, and the list of unreadable images, as users read them."""
    manifest = shards.open_manifest(out)
    rows = [
        row
        for part in shards.parts(out, manifest)
        for row in zip(
            part.index,
            part.names,
            part.labels or [None] * len(part.names),
            [v.tobytes() for v in part.vectors],
            strict=True,
        )
    ]
    return rows, (out / "unreadable.txt").read_text()


WORKER = """
import os, sys, time
from pyvit.embed import Encoder, Settings, embed_images
read = Encoder.decode
Encoder.decode = lambda self, source: (time.sleep(0.01), read(self, source))[1]
settings = Settings("vit_pico_patch8_32", random_weights=True, dtype="fp32")
embed_images(sys.argv[1], sys.argv[2], settings, per_part=4, batch=3, workers=2, labels=True)
"""


def start(source, out, **env):
    command = [sys.executable, "-c", WORKER, str(source), str(out)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env}
    )


def test_killed_at_any_moment_and_finished_by_two_ranks(tmp_path):
    source = make_folder(tmp_path / "images", 240)
    (source / "cats" / "cut.jpg").write_bytes((source / "cats" / "000.jpg").read_bytes()[:300])
    embed_images(source, tmp_path / "whole", PICO, per_part=4, batch=3, workers=1, labels=True)
    out, draw = tmp_path / "out", random.Random()
    counts = [0]
    for _ in range(2):
        process = start(source, out)
        count = lambda: len(list(out.glob("part-*.parquet")))  # noqa: E731
        while count() <= counts[-1] and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        counts.append(count())
    assert 0 < counts[1] < counts[2] < 61  # each was killed at work, and the second continued
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [start(source, out, RANK=str(rank), **group) for rank in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    got, want = rows_of(out), rows_of(tmp_path / "whole")
    assert got == want
    assert [index for index, *_ in got[0]] == [*range(120), *range(121, 241)]
    assert got[1].startswith("cats/cut.jpg\t")
    left = sorted(p.name for p in out.iterdir() if not p.name.startswith("part-"))
    assert left == ["inputs.jsonl", "manifest.json", "unreadable.txt"]


@pytest.mark.parametrize("form", shards.FORMATS)
def test_vectors_are_the_models(photographs, tmp_path, form):
    done = embed_images(photographs, tmp_path, PICO, form=form, per_part=10, batch=4, labels=True)
    assert (done.rows, done.embedded) == (23, 25)
    assert [name for name, _ in done.unreadable] == ["cats/cut.jpg", "dogs/page.png"]
    files = sorted(tmp_path.glob(f"part-*.{form}"))
    assert len(files) == 3
    records = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    if form == "parquet":
        table = pa.concat_tables([pq.read_table(file) for file in files])
        names, labels, found = (table[column].to_pylist() for column in ("path", "label", "embedding"))
    else:
        names, labels = ([v for record in records for v in record[column]] for column in ("path", "label"))
        read = np.load if form == "npy" else lambda file: load_file(file)["embedding"]
        found = np.concatenate([read(file) for file in files])
    assert names == [f"{c}/{i:03d}.jpg" for c, first in (("cats", 0), ("dogs", 1)) for i in range(first, 23, 2)]
    assert labels == [name.split("/")[0] for name in names]
    torch.manual_seed(0)
    model = create_model(PICO.model).eval()
    images = torch.stack([decode_image(photographs / name, 32, 0.875) for name in names]) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        want = embed(model, (images - mean) / std)
    torch.testing.assert_close(torch.tensor(np.asarray(found, np.float32)), want, rtol=1e-4, atol=1e-4)


def test_narrow_dtypes_agree_and_workers_change_nothing(photographs, tmp_path):
    outs = []
    for workers, dtype in ((1, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16"), (1, "int8"), (3, "int8")):
        outs.append(tmp_path / f"{dtype}{workers}")
        settings = Settings(PICO.model, random_weights=True, dtype=dtype)
        embed_images(photographs, outs[-1], settings, per_part=10, batch=4, workers=workers, form="npy")
    assert rows_of(outs[0]) == rows_of(outs[1])
    assert rows_of(outs[2]) == rows_of(outs[3])
    assert rows_of(outs[4]) == rows_of(outs[5])
    wide, narrow, byte = (
        torch.tensor(np.concatenate([np.load(f) for f in sorted(o.glob("*.npy"))])) for o in outs[1::2]
    )
    assert (wide.dtype, narrow.dtype, byte.dtype) == (torch.float32, torch.float16, torch.float16)
    assert torch.cosine_similarity(wide, narrow.float()).min() > 0.999
    assert torch.cosine_similarity(wide, byte.float()).min() > 0.998
    assert not torch.equal(narrow, byte)


def test_int8_needs_layers_to_quantize_and_a_known_name():
    with pytest.raises(ValueError, match="int8 needs linear layers to quantize, resnet18 has none"):
        load_encoder(Settings("resnet18", random_weights=True, dtype="int8", size=64))
    with pytest.raises(ValueError, match="dtype must be auto, fp32, bf16, fp16 or int8, got 'int4'"):
        load_encoder(Settings(PICO.model, random_weights=True, dtype="int4"))


def test_archives_give_the_vectors_of_the_folder(photographs, tmp_path):
    folder = embed_images(photographs, tmp_path / "folder", PICO, per_part=7, labels=True)
    names = [name for name, *_ in open_images(photographs).files]
    contents = [(photographs / name).read_bytes() for name in names]
    for number, at in enumerate((range(13), range(13, 25))):
        tars, tables = tmp_path / "tars", tmp_path / "tables"
        tars.mkdir(exist_ok=True)
        tables.mkdir(exist_ok=True)
        with tarfile.open(tars / f"{number}.tar", "w") as archive:
            for i in at:
                for ending, content in (("cls", names[i].split("/")[0].encode()), (names[i][-3:], contents[i])):
                    member = tarfile.TarInfo(f"{i:05d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = pa.table(
            {
                "label": [CLASSES.index(names[i].split("/")[0]) for i in at],
                "image": [{"bytes": contents[i], "path": names[i]} for i in at],
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tables / f"{number}.parquet", row_group_size=3)
    rows, _ = rows_of(folder.out)
    for source in ("tars", "tables"):
        done = embed_images(tmp_path / source, tmp_path / f"of_{source}", PICO, per_part=7, labels=True)
        found, unreadable = rows_of(done.out)
        assert [(index, label, vector) for index, _, label, vector in found] == [(r[0], *r[2:]) for r in rows]
        assert unreadable.count("\n") == 2
        images = open_images(tmp_path / source)
        assert [images.open(name) for _, name, *_ in found] == [contents[index] for index, *_ in found]
    assert [row[1] for row in rows_of(tmp_path / "of_tars")[0]][11:13] == ["0.tar#00011.jpg", "1.tar#00013.jpg"]


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "d.parquet")
    for name, message in (
        ("nowhere", "does not exist"),
        ("empty", "no image"),
        ("a.tar", "compressed, unpack it first"),
        ("b.tar", "no tar file"),
        ("c.parquet", "no parquet file"),
        ("d.parquet", "must have a column of images.* it has text"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_images(tmp_path / name)


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    picture(1).save(tmp_path / os.fsdecode(b"caf\xe9.png"))
    (tmp_path / os.fsdecode(b"\xff\n.png")).write_bytes(b"none")
    done = embed_images(tmp_path, tmp_path / "out", PICO)
    rows, unreadable = rows_of(done.out)
    assert [row[1] for row in rows] == ["caf\\xe9.png"]
    assert unreadable.startswith("\\xff\\n.png\tUnidentifiedImageError")
    assert embed_images(tmp_path, tmp_path / "out", PICO).embedded == 0


def test_a_folder_of_other_vectors_is_not_continued(tmp_path):
    source, out = make_folder(tmp_path / "images", 5), tmp_path / "out"
    embed_images(source, out, PICO, per_part=2)
    again = embed_images(source, out, PICO, per_part=2)
    assert (again.rows, again.embedded) == (5, 0)
    other = Settings("vit_pico_patch4_32", random_weights=True, dtype="fp32")
    weights = Settings(PICO.model, checkpoint=str(tmp_path / "w.safetensors"), dtype="fp32")
    save_weights(tmp_path / "w.safetensors", create_model(PICO.model).state_dict())
    for settings, options, message in (
        (other, {}, "another model: vit_pico_patch8_32 .*, not vit_pico_patch4_32"),
        (weights, {}, "another model: vit_pico_patch8_32 .*, not vit_pico_patch8_32 with .*w.safetensors"),
        (Settings(PICO.model, random_weights=True, dtype="bf16"), {}, "dtype fp32, not bf16"),
        (PICO, {"form": "npy"}, "made with format parquet, got npy"),
        (PICO, {"per_part": 3}, "made with per_part 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_images(source, out, settings, **{"per_part": 2, **options})
    shutil.copy(source / "cats" / "000.jpg", source / "cats" / "new.jpg")
    with pytest.raises(ValueError, match=r"changed since .* 1 new \(cats/new.jpg\); choose another --out"):
        embed_images(source, out, PICO, per_part=2)
    (source / "cats" / "new.jpg").unlink()
    picture(99).save(source / "dogs" / "001.jpg", quality=10)
    with pytest.raises(ValueError, match=r"1 of another size \(dogs/001.jpg\)"):
        embed_images(source, out, PICO, per_part=2)
    with pytest.raises(ValueError, match=r"has other files, such as cats"):
        embed_images(source, source, PICO)


def test_random_weights_only_on_request(photographs, tmp_path):
    with pytest.raises(ValueError, match="vit_pico_patch8_32 has no weights of its own"):
        embed_images(photographs, tmp_path / "out", PICO.model)
    with pytest.raises(ValueError, match="did you mean vit_pico_patch8_32"):
        embed_images(photographs, tmp_path / "out", "vit_pico_patch8_33")
    with pytest.raises(FileNotFoundError, match=r"no/where.safetensors does not exist"):
        embed_images(photographs, tmp_path / "out", "no/where.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_file_of_weights_by_itself_and_for_a_name(tmp_path):
    torch.manual_seed(1)
    model = create_model(PICO.model, num_classes=7).eval()
    save_weights(tmp_path / "model.safetensors", model.state_dict(), header_of(model))
    settings = {"architecture": "none", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    file = str(tmp_path / "model.safetensors")
    encoders = [load_encoder(Settings(*given, dtype="fp32")) for given in ((file,), (PICO.model, file))]
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        want = embed(model, (pixels / 255 - 0.5) / 0.25)
    for encoder in encoders:
        assert (encoder.settings.size, encoder.settings.crop) == (32, 1.0)
        torch.testing.assert_close(encoder(pixels), want, rtol=1e-4, atol=1e-4)


def test_other_models_normalise_before_them():
    """A ResNet, whose first layer cannot take bytes."""
    encoder = load_encoder(Settings("resnet18", random_weights=True, dtype="fp32", size=64))
    assert not encoder.folded
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.settings.mean, encoder.settings.std))
    with torch.no_grad():
        want = embed(encoder.model, (pixels / 255 - mean) / std)
    torch.testing.assert_close(encoder(pixels), want)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A run of CLIP on drawn scenes, of one step."""
    out = tmp_path_factory.mktemp("runs") / "clip"
    train(Config(recipe="clip", data="scenes", model="clip_pico_patch8_64", out=str(out), steps=1, batch_size=16))
    return out


def test_a_run_brings_its_size_normalisation_and_tokenizer(towers, photographs, tmp_path):
    embed_images(photographs, tmp_path / "out", str(towers), per_part=10)
    encoder = load_query_encoder(tmp_path / "out")
    assert (encoder.settings.size, encoder.settings.crop) == (64, 1.0)
    assert encoder.settings.mean == (0.3,) * 3
    assert encoder.settings.std == (0.25,) * 3
    text = encoder.text("a red square")
    hits = search(tmp_path / "out", text, 3)
    images = torch.stack([encoder.decode(photographs / name) for name in (hit.name for hit in hits)])
    torch.testing.assert_close(torch.tensor([h.score for h in hits]), encoder(images) @ text, rtol=0, atol=1e-2)
    moved = towers.rename(towers.with_name("moved"))
    try:
        with pytest.raises(FileNotFoundError, match="clip does not exist"):
            load_query_encoder(tmp_path / "out")
        assert load_query_encoder(tmp_path / "out", str(moved)).fingerprint == encoder.fingerprint
    finally:
        moved.rename(towers)


@pytest.mark.parametrize("form", shards.FORMATS)
def test_search_is_exact(tmp_path, form):
    draw = np.random.default_rng(3)
    found = draw.standard_normal((90, 8)).astype(np.float16)
    found[[70, 12]] = found[40] * 2  # equal by cosine
    manifest = {"parts": 9, "format": form, "encoder": {"width": 8}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for n in range(9):
        at = range(10 * n, 10 * n + 10)
        shards.write_part(tmp_path, n, shards.Part([*at], [str(i) for i in at], None, found[at.start : at.stop]), form)
    query = found[40].astype(np.float64)
    exact = found.astype(np.float64) @ query / np.linalg.norm(found.astype(np.float64), axis=1) / np.linalg.norm(query)
    hits = search(tmp_path, query, 15)
    assert [hit.index for hit in hits[:3]] == [12, 40, 70]
    assert {hit.index for hit in hits} == set(np.argsort(-exact, kind="stable")[:15].tolist())
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(exact)[::-1][:15], atol=1e-6)
    assert len(search(tmp_path, query, 1000)) == 90
    with pytest.raises(ValueError, match=r"width 8, as the vectors in .*, got \(9,\)"):
        search(tmp_path, np.zeros(9))


def test_commands(photographs, tmp_path, monkeypatch):
    def run(*arguments):
        return CliRunner().invoke(application(), [str(a) for a in arguments], catch_exceptions=False).output

    out = tmp_path / "out"
    command = ("embed", photographs, "-o", out, "--model", PICO.model, "--random-weights", "--labels")
    said = run(*command)
    for words in ("25 images in", "2 images cannot be read: ", "images/s", "23 vectors", "limits"):
        assert words in said
    assert "complete before" in run(*command)
    image = photographs / "dogs" / "005.jpg"
    said = run("search", out, "--image", image, "-k", 3, "--sheet", tmp_path / "found.png")
    assert said.splitlines()[0] == "1.0000  dogs/005.jpg  [dogs]"
    assert Image.open(tmp_path / "found.png").width > 500
    for given, message in (
        (("--text", "a cat"), "needs vectors of a CLIP or SigLIP model, these are of vit_pico_patch8_32"),
        ((), "give either --image FILE or --text TEXT"),
        (("--image", photographs / "dogs" / "page.png"), "page.png cannot be read"),
        (("--image", tmp_path / "none.png"), "none.png does not exist"),
        (("--image", image, "--model", "vit_pico_patch4_32"), "vit_pico_patch4_32 .* is another model"),
        (("--image", image, "--model", "vit_tiny_patch16_224"), "width 96, .* makes vectors of 192"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run("search", out, *given)


def test_native_resolution_is_packed(tmp_path):
    for name, size in (("wide.png", (200, 50)), ("tall.png", (40, 90)), ("tiny.png", (9, 9)), ("line.png", (900, 3))):
        picture(len(name), *size).save(tmp_path / name)
    settings = Settings("vit_pico_patch8_64", random_weights=True, dtype="fp32", native=True)
    encoder = load_encoder(settings)
    names = ["wide.png", "tall.png", "tiny.png", "line.png", "wide.png"]
    images = [encoder.decode(tmp_path / name) for name in names]
    assert [tuple(x.shape[1:]) for x in images[:4]] == [(32, 128), (88, 40), (8, 8), (8, 512)]
    together = encoder(images)
    for image, vector in zip(images, together, strict=True):
        with torch.no_grad():
            alone = encoder.model.forward_head(encoder.model.forward_features(image[None]), pre_logits=True)[0]
        torch.testing.assert_close(vector, alone, rtol=1e-4, atol=1e-4)
    done = embed_images(tmp_path, tmp_path / "out", settings, batch=3)
    hits = search(done.out, embed_one(encoder, tmp_path / "tall.png"), 1)
    assert (hits[0].name, round(hits[0].score, 4)) == ("tall.png", 1.0)
    with pytest.raises(ValueError, match="--native needs a ViT"):
        load_encoder(Settings("swin_pico_patch4_window4_32", random_weights=True, native=True))


def test_decoding_at_half_the_size_keeps_the_image(monkeypatch):
    """A photograph of a megapixel for 224: half the size leaves 1.7 pixels per output pixel."""
    photograph = Image.fromarray(load_sample_image("china.jpg")).resize((1152, 864), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photograph.save(file, "JPEG", quality=88)
    reduced = decode_image(file.getvalue(), 224, 0.875).float()
    monkeypatch.setattr(decode, "_SPARE", 100)
    whole = decode_image(file.getvalue(), 224, 0.875).float()
    error = (reduced - whole).square().mean()
    assert 0 < error < 255**2 / 10**4.3


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    source = make_folder(tmp_path / "images", 3)
    model = create_model(PICO.model)
    for factor, stored, message in ((float("nan"), None, None), (1e6, "float16", "exceed float16, store float32")):
        torch.nn.init.constant_(model.norm.bias, factor)
        file = tmp_path / "w.safetensors"
        save_weights(file, model.state_dict())
        settings = Settings(PICO.model, checkpoint=str(file), dtype="fp32")
        with pytest.raises(ValueError, match=message or "not_finite"):
            embed_images(source, tmp_path / "out", settings, stored=stored)
    assert not list((tmp_path / "out").glob("part-*"))
    done = embed_images(source, tmp_path / "wide", settings, stored="float32")
    assert done.rows == 3


class Doubling:
    """Stands for an encoder on another device: an image is its number."""

    width = 1
    settings = Settings("none", size=1)

    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind)

    def decode(self, source):
        if source == 7:
            raise ValueError("seven")
        return torch.full((3, 1, 1), source, dtype=torch.uint8)

    def __call__(self, images):
        return 2.0 * images[:, 0, 0].float()


class Numbers:
    def __len__(self):
        return 20

    def items(self, start, stop):
        for i in range(start, stop):
            yield type("Item", (), {"name": str(i), "source": lambda self, i=i: i})()


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_order_and_parts_of_both_pipelines(kind):
    times, seen = Times(), []
    for done, rows in vectors(Doubling(kind), batches(Numbers(), [0, 2, 1], 8, 3), 2, times):
        seen.append(
            (done.batch.part, [done.batch.start + p for p in done.places], rows[:, 0].tolist(), done.batch.last)
        )
    assert [part for part, *_ in seen] == [0, 0, 0, 2, 2, 1, 1, 1]
    assert [last for *_, last in seen] == [False, False, True, False, True, False, False, True]
    assert sorted(i for _, at, *_ in seen for i in at) == [i for i in range(20) if i != 7]
    assert all(rows == [2.0 * i for i in at] for _, at, rows, _ in seen)
    assert 0 <= times.share() <= 1


def test_tasks_ahead_are_bounded_and_errors_come_through():
    asked = []

    def numbers():
        for i in range(50):
            asked.append(i)
            yield i

    results = ahead(lambda i: 1 // (40 - i), numbers(), 2)
    assert next(results) == 0
    assert len(asked) <= 6
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_thumbnails_keep_the_aspect():
    got = thumbnail(picture(1, 300, 100), 60)
    assert got.shape == (3, 60, 60)
    assert got[:, :19].min() == got[:, 41:].min() == 1
    assert got[:, 20:40].max() < 1


def test_the_benchmark_embeds_with_both(tmp_path):
    peers.peer("timm")
    bench.write_photographs(tmp_path, 3)
    assert Image.open(tmp_path / "00002.jpg").size == (1152, 864)
    rates = [
        bench.timm_rate(tmp_path, "bf16", "vit_tiny_patch16_224", batch=2, workers=0),
        bench.pyvit_rate(tmp_path, "auto", "vit_tiny_patch16_224"),
    ]
    assert all(rate > 0 and cost > 0 for rate, cost in rates)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(photographs, tmp_path):
    for device in ("cpu", "cuda"):
        embed_images(photographs, tmp_path / device, PICO, per_part=10, batch=4, form="npy", device=device)
    here, there = (np.concatenate([np.load(f) for f in sorted((tmp_path / d).glob("*.npy"))]) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(there, here, rtol=1e-2, atol=1e-2)
