"""Folders of images: how their structure is interpreted, and what is refused or reported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyvit.data import load_data


def picture(path: Path, seed: int = 0, **save) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path, **save)


def classes(root: Path, names=("cat", "dog"), n: int = 3, ext: str = "png", seed: int = 0) -> Path:
    for c, name in enumerate(names):
        for i in range(n):
            picture(root / name / f"{i}.{ext}", 1000 * c + i + seed)
    return root


def read(root: Path):
    return load_data(str(root), 8)


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("held", ["val", "valid", "Validation", "dev", "Test", "testing", "eval", "evaluation"])
def test_splits_by_any_of_their_names(tmp_path, train, held):
    classes(tmp_path / train, n=3)
    classes(tmp_path / held, n=2, seed=50)
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.test)) == (6, 4)
    assert "6 training images, 4 held out; 2 classes: cat, dog" in data.summary()


def test_several_held_out_folders(tmp_path):
    for name, n in (("train", 3), ("test", 2), ("val", 1), ("extra", 1)):
        classes(tmp_path / name, n=n, seed=100 * n)
    data = read(tmp_path)
    assert (len(data.train), len(data.test)) == (6, 2)
    assert "left out: test, 4 images" in data.summary()
    assert "left out: extra, 2 images" in data.summary()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train", "Train", "val"), "one folder to train on"),
        (("cat", "dog", "valid"), "names a held-out split"),
        (("val", "test"), "names a held-out split"),
    ],
)
def test_splits_that_can_be_read_two_ways_are_refused(tmp_path, names, message):
    for name in names:
        classes(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_train_folder_alone_is_split(tmp_path):
    classes(tmp_path / "train", n=12)
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.test)) == (22, 2)
    assert "one image in ten is held out" in data.summary()


def test_a_class_may_be_called_train(tmp_path):
    classes(tmp_path, ("bus", "train"))
    assert read(tmp_path).classes == ["bus", "train"]


def test_an_empty_split_is_refused(tmp_path):
    classes(tmp_path / "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image and no .wav file under .*val"):
        read(tmp_path)


@pytest.mark.parametrize("linked", ["class", "all", "file", "root"])
def test_links_are_followed(tmp_path, linked):
    store, root = classes(tmp_path / "store"), tmp_path / "data"
    if linked == "root":
        root.symlink_to(store)
    elif linked == "file":
        for name in ("cat", "dog"):
            (root / name).mkdir(parents=True)
            for path in (store / name).iterdir():
                (root / name / path.name).symlink_to(path)
    else:
        root.mkdir()
        (root / "cat").symlink_to(store / "cat")
        if linked == "all":
            (root / "dog").symlink_to(store / "dog")
        else:
            shutil.copytree(store / "dog", root / "dog")
    data = read(root)
    assert data.classes == ["cat", "dog"]
    assert len(data.train) + len(data.test) == 6


def test_links_in_a_circle_end(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert len(data.train) + len(data.test) == 6
    assert "link again to a folder above it" in data.summary()
    assert "2 broken links" in data.summary()


@pytest.mark.parametrize(
    "ext", ["ppm", "pgm", "pbm", "jfif", "webp", "bmp", "tif", "TIFF", "gif", "JPEG", "Jpg", "jpe", "PNG", "tga"]
)
def test_a_class_of_one_kind_of_file_alone(tmp_path, ext):
    classes(tmp_path, ("cat",))
    for i in range(3):
        path = tmp_path / "dog" / f"{i}.{ext}"
        path.parent.mkdir(exist_ok=True)
        mode = {"pgm": "L", "pbm": "1"}.get(ext, "RGB")
        kind = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "pgm": "PPM", "pbm": "PPM"}
        Image.new("RGB", (12, 16), (40 * i, 9, 9)).convert(mode).save(
            path, kind.get(ext.lower(), ext.upper().replace("TIFF", "TIFF"))
        )
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert data.train.fetch(range(len(data.train)))["label"].tolist().count(1) == 2
    assert not data.train.problems


@pytest.mark.parametrize("hidden", [".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_hidden_folders_are_no_classes(tmp_path, hidden):
    classes(tmp_path, ("cat", "dog", hidden))
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert f"hidden {hidden}" in data.summary()
    assert len(data.train) + len(data.test) == 6


def test_empty_classes_other_files_and_images_beside_them_are_named(tmp_path):
    classes(tmp_path)
    (tmp_path / "bird").mkdir()
    (tmp_path / "fish").mkdir()
    (tmp_path / "fish" / "a.heic").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("x")
    (tmp_path / "unending").write_text("x")
    picture(tmp_path / "cover.png", 77)
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    said = data.summary()
    for words in ("folder bird without images", "folder fish without images", ".heic", ".csv", "1 images directly in"):
        assert words in said


def test_images_without_class_folders_have_no_classes(tmp_path):
    for i in range(12):
        picture(tmp_path / f"{i}.png", i)
    data = read(tmp_path)
    assert data.classes is None
    assert (len(data.train), len(data.test)) == (11, 1)
    assert "no classes" in data.summary()


def test_deeper_folders_belong_to_the_class_above_them(tmp_path):
    classes(tmp_path / "cat", ("siamese", "persian"))
    classes(tmp_path / "dog", ("terrier",), seed=5000)
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert "9 images" in data.summary()


def test_one_folder_around_everything_is_entered(tmp_path):
    classes(tmp_path / "archive" / "train")
    classes(tmp_path / "archive" / "val", seed=50)
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert "read from the folder archive" in data.summary()


def test_held_out_classes_must_be_known_and_keep_their_numbers(tmp_path):
    classes(tmp_path / "train", ("a", "b", "c"))
    classes(tmp_path / "val", ("c", "b"), seed=50)
    data = read(tmp_path)
    assert data.classes == ["a", "b", "c"]
    assert data.test.fetch(range(6))["label"].tolist() == [1, 1, 1, 2, 2, 2]
    assert "no held-out image of a" in data.summary()
    classes(tmp_path / "val", ("d",), seed=90)
    with pytest.raises(ValueError, match=r"it has d, which the other has not; there are a, b, c"):
        read(tmp_path)


def test_held_out_images_without_classes_are_left_out(tmp_path):
    classes(tmp_path / "train")
    picture(tmp_path / "test" / "0.png", 70)
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.test)) == (4, 2)
    assert "left out: test, 1 images without class folders" in data.summary()


def test_training_images_without_classes_have_none(tmp_path):
    classes(tmp_path / "val")
    for i in range(3):
        picture(tmp_path / "train" / f"{i}.png", 70 + i)
    data = read(tmp_path)
    assert data.classes is None
    assert (len(data.train), len(data.test)) == (3, 6)
    assert "train has no class folders and val has class folders" in data.summary()


def test_the_split_does_not_depend_on_the_order_of_files(tmp_path, monkeypatch):
    classes(tmp_path, n=25)
    once = read(tmp_path)
    listed = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = list(listed(path))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("pyvit.data.layout.os.scandir", Backwards)
    again = read(tmp_path)
    assert again.train.items == once.train.items
    assert again.test.items == once.test.items


@pytest.mark.parametrize("n", [2, 3, 9, 10, 11, 30])
def test_every_class_is_on_both_sides(tmp_path, n):
    classes(tmp_path, ("few", "many"), n=n)
    shutil.rmtree(tmp_path / "many")
    classes(tmp_path, ("many",), n=40, seed=9999)
    data = read(tmp_path)
    assert set(data.train.labels) == set(data.test.labels) == {0, 1}
    assert not set(data.train.items) & set(data.test.items)
    assert data.test.labels.count(0) == max(n // 10, 1)


def test_a_class_or_a_set_of_one_image_is_refused(tmp_path):
    classes(tmp_path)
    picture(tmp_path / "bird" / "0.png", 7)
    with pytest.raises(ValueError, match="class 'bird' has not"):
        read(tmp_path)
    picture(tmp_path / "alone" / "only" / "0.png")
    with pytest.raises(ValueError, match="at least two images, one to train on and one to hold out, got 1"):
        read(tmp_path / "alone")


def test_copies_of_a_file_stay_on_one_side(tmp_path):
    classes(tmp_path, n=40)
    for i in range(40):
        shutil.copy(tmp_path / "cat" / f"{i}.png", tmp_path / "cat" / f"copy of {i}.png")
    data = read(tmp_path)
    seen = {path.read_bytes() for path in data.train.items}
    assert not any(path.read_bytes() in seen for path in data.test.items)


def test_copies_on_both_sides_of_a_given_split_are_counted(tmp_path):
    classes(tmp_path / "train", n=4)
    classes(tmp_path / "val", n=2)
    assert "4 of the training images are also held out" in read(tmp_path).summary()


def test_names_that_are_not_valid_text(tmp_path):
    classes(tmp_path, ("cat", os.fsdecode(b"caf\xe9"), "日本"))
    data = read(tmp_path)
    assert len(data.classes) == 3
    assert "\\udce9" in data.summary().encode().decode()
    assert "日本" in data.summary()
    (Path(data.train.items[0])).write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped"):
        data.train.fetch([0])


def test_names_are_shown_without_control_codes(tmp_path):
    classes(tmp_path, ("cat", "\x1b[31mred\n"))
    assert "\\x1b[31mred\\n" in read(tmp_path).summary()
    assert len(read(tmp_path).summary().splitlines()) == 2


def test_accents_may_be_written_in_two_ways(tmp_path):
    classes(tmp_path / "train", ("caf\u00e9", "th\u00e9"))
    classes(tmp_path / "val", ("cafe\u0301", "the\u0301"), seed=50)
    data = read(tmp_path)
    assert data.classes == ["caf\u00e9", "th\u00e9"]
    assert data.test.labels == [0, 0, 0, 1, 1, 1]
    classes(tmp_path / "train", ("cafe\u0301",))
    with pytest.raises(ValueError, match="written in different ways"):
        read(tmp_path)


def test_no_image_at_all_names_what_is_there(tmp_path):
    (tmp_path / "a.flac").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"there are 1 .flac files"):
        read(tmp_path)


def test_a_pipe_is_not_opened(tmp_path):
    classes(tmp_path)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    data = read(tmp_path)
    assert len(data.train) + len(data.test) == 6
    assert "1 devices and pipes" in data.summary()
