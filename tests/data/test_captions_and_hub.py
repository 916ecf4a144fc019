"""Tables of captions and Hugging Face data sets: columns, encodings, splits, labels, copies of images."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from pyvit.data import load_data


def pictures(folder, n: int = 12):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


def png(i: int) -> dict:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


ROWS = [f"{i}.png" for i in range(12)]


@pytest.mark.parametrize("parting", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "CSV"])
def test_tables_of_every_form(tmp_path, parting, encoding, ending):
    pictures(tmp_path)
    lines = [parting.join(("Image ", "caption")), *(f'{name}{parting}"größe{parting} ""{name}"""' for name in ROWS), ""]
    (tmp_path / f"t.{ending}").write_bytes("\r\n".join(lines).encode(encoding))
    data = load_data(str(tmp_path / f"t.{ending}"), 8)
    assert (len(data.train), len(data.test)) == (11, 1)
    assert data.train.captions[0] == f'größe{parting} "0.png"'
    assert not data.flip
    assert "captions" in data.summary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "columns image and caption, got no row"),
        (b"image,caption\n", "rows with an image and a caption"),
        (b"image,caption\n,x\n0.png,\n", "rows with an image and a caption"),
        (b"file,caption\n0.png,x\n", "columns image and caption, got file, caption"),
        (b"image,caption,caption\n0.png,x,y\n", "each column once"),
        (b"image,caption\n0.png,a dog, running\n", "line 2: 3 fields under a header of 2"),
        (b"image,caption,label\n0.png,a dog\n", "line 2: 2 fields under a header of 3"),
        (b"image,caption\n0.png,a\0b\n", "NUL bytes"),
        ("image,caption\n0.png,gr\xf6\xdfe\n".encode("latin-1"), "must be UTF-8, .* line 2 is not"),
        (b'image,caption\n0.png,"a dog\n1.png,b\n', "line 3: unexpected end of data"),
        (b"image,caption\n0.png," + b"a" * 200_000 + b"\n", "field larger than field limit"),
        (b"image,caption,label\n0.png,a,x\n1.png,b,\n", "a label in every row, line 3"),
    ],
)
def test_tables_that_cannot_be_read_name_the_file_and_the_line(tmp_path, content, message):
    pictures(tmp_path)
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_data(str(tmp_path / "t.csv"), 8)
    assert str(tmp_path / "t.csv") in str(error.value)


def test_spaces_around_fields_mean_nothing(tmp_path):
    pictures(tmp_path)
    (tmp_path / "t.csv").write_text(
        "image, caption, label\n"
        + "".join(f" {n} , a picture ,{' x' if i % 2 else 'x '}\n" for i, n in enumerate(ROWS))
    )
    assert load_data(str(tmp_path / "t.csv"), 8).classes == ["x"]


def test_rows_without_a_caption_are_counted(tmp_path):
    pictures(tmp_path)
    (tmp_path / "t.csv").write_text(
        "image,caption\n" + "".join(f"{name},{'' if i == 3 else 'x'}\n" for i, name in enumerate(ROWS))
    )
    data = load_data(str(tmp_path / "t.csv"), 8)
    assert len(data.train) + len(data.test) == 11
    assert "1 rows without an image or a caption" in data.summary()


def test_images_that_are_not_there_are_said_at_once(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},x\n" for name in ROWS))
    with pytest.raises(FileNotFoundError, match=r"12 of 12 images that .*t.csv names do not exist, the first: .*0.png"):
        load_data(str(tmp_path / "t.csv"), 8)


def test_other_files_say_what_is_wanted(tmp_path):
    for name in ("a.json", "b.zip", "c"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(
            ValueError, match=r"is a file; it must be a table of captions or labels \(.csv, .tsv, .txt\) or a folder"
        ):
            load_data(str(tmp_path / name))


@pytest.mark.parametrize("how", ["name", "path", "link", "copy"])
def test_all_captions_of_an_image_are_on_one_side(tmp_path, how):
    import shutil

    pictures(tmp_path)
    rows = []
    for i, name in enumerate(ROWS):
        for k in range(5):
            other = name if how == "name" else f"./{name}" if how == "path" and k % 2 else name
            if how in ("link", "copy") and k:
                other = f"{i}-{k}.png"
                (tmp_path / other).symlink_to(tmp_path / name) if how == "link" else shutil.copy(
                    tmp_path / name, tmp_path / other
                )
            rows.append(f"{other},caption {k} of {i}")
    (tmp_path / "t.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    data = load_data(str(tmp_path / "t.csv"), 8)
    sides = [{p.read_bytes() for p in part.items} for part in (data.train, data.test)]
    assert not sides[0] & sides[1]
    assert (len(data.train), len(data.test)) == (55, 5)
    chosen = load_data(str(tmp_path / "t.csv"), 8, validation=0.2)
    sides = [{p.read_bytes() for p in part.items} for part in (chosen.train, chosen.test)]
    assert not sides[0] & sides[1]
    assert len(chosen.test) == 15


def test_validation_leaves_every_class_on_both_sides(tmp_path):
    pictures(tmp_path / "a", 30)
    for i in range(2):
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "b" / f"{i}.png")
    with pytest.raises(ValueError, match="validation: must leave images of every class on both sides"):
        load_data(str(tmp_path), 8, validation=0.1)


def test_replacements_of_damaged_images_come_from_the_same_split(tmp_path):
    pictures(tmp_path)
    data = load_data(str(tmp_path), 8, validation=0.5)
    for i in (0, 2, 4):
        data.train.items[i].write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped"):
        batch = data.train.draw(range(len(data.train)), {}, 0, 0)
    assert batch["index"].tolist() == [1, 1, 3, 3, 1]


datasets = pytest.importorskip("datasets")
CLASSES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


def table(numbers, labels=None, features=CLASSES):
    labels = labels if labels is not None else [i % 2 for i in range(len(numbers))]
    return datasets.Dataset.from_dict({"image": [png(i) for i in numbers], "label": labels}, features=features)


def save(path, numbers, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table(numbers, **options).to_parquet(str(path))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet"),
        ("Train.parquet", "Val.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("default/train/0000.parquet", "default/valid/0000.parquet"),
        ("flowers_training.parquet", "flowers_testing.parquet"),
        ("0000.parquet", "dev/0000.parquet"),
    ],
)
def test_parquet_splits_are_those_of_the_names(tmp_path, train, held, stream):
    save(tmp_path / train, range(24))
    save(tmp_path / held, range(100, 106))
    if stream:
        data = load_data(f"hf-stream:{tmp_path}", 8)
        assert len(list(data.train.table)) == 24
    else:
        data = load_data(f"hf:{tmp_path}", 8)
        assert len(data.train) == 24
    assert len(data.test) == 6
    assert data.classes == ["a", "b"]
    assert "held out:" in data.summary()


def test_files_of_no_split_beside_splits_are_named(tmp_path):
    save(tmp_path / "train.parquet", range(12))
    save(tmp_path / "test.parquet", range(50, 56))
    save(tmp_path / "other.parquet", range(80, 90))
    data = load_data(f"hf:{tmp_path}", 8)
    assert (len(data.train), len(data.test)) == (12, 6)
    assert "1 files whose names say no split, such as other.parquet" in data.summary()


@pytest.mark.parametrize("splits", [True, False])
def test_saved_data_sets(tmp_path, splits):
    if splits:
        datasets.DatasetDict({"train": table(range(12)), "test": table(range(50, 54))}).save_to_disk(
            str(tmp_path / "d")
        )
    else:
        table(range(20)).save_to_disk(str(tmp_path / "d"))
    data = load_data(f"hf:{tmp_path / 'd'}", 8)
    assert (len(data.train), len(data.test)) == ((12, 4) if splits else (18, 2))
    assert set(data.test.labels) == {0, 1}


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        ([1 + i % 3 for i in range(12)], "int64", ["1", "2", "3"]),
        ([10 * (i % 2) - 5 for i in range(12)], "int64", ["-5", "5"]),
        (["xyz"[i % 3] for i in range(12)], "string", ["x", "y", "z"]),
        ([bool(i % 2) for i in range(12)], "bool", ["False", "True"]),
    ],
)
def test_labels_of_any_values_become_numbers_from_0(tmp_path, values, kind, names):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    save(tmp_path / "train.parquet", range(12), labels=values, features=features)
    save(tmp_path / "test.parquet", range(50, 53), labels=values[:3], features=features)
    data = load_data(f"hf:{tmp_path}", 8)
    assert data.classes == names
    assert [names[i] for i in data.train.labels] == [str(v) for v in values]
    assert [names[i] for i in data.test.labels] == [str(v) for v in values[:3]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], r"labels of .* must be in 0\.\.1, got -1; a split without labels"),
        ([0, None, 1], "one label in each row, 1 have None"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, message):
    features = (
        CLASSES
        if None not in labels
        else datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )
    save(tmp_path / "train.parquet", range(6), features=features)
    save(tmp_path / "test.parquet", range(50, 53), labels=labels, features=features)
    with pytest.raises(ValueError, match=message):
        load_data(f"hf:{tmp_path}", 8)


@pytest.mark.parametrize("stream", ["hf", "hf-stream"])
def test_a_test_split_without_labels_is_not_measured_on(tmp_path, stream):
    numbers = range(20) if stream == "hf" else range(600)
    save(tmp_path / "train.parquet", numbers)
    save(tmp_path / "test.parquet", range(1050, 1056), labels=[-1] * 6)
    data = load_data(f"{stream}:{tmp_path}", 8)
    assert set(data.test.labels) == {0, 1}
    assert len(data.test) == (2 if stream == "hf" else 512)
    assert "not used: the split test" in data.summary()


def test_held_out_labels_must_be_known(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    save(tmp_path / "train.parquet", range(4), labels=list("abab"), features=features)
    save(tmp_path / "test.parquet", range(50, 52), labels=list("ac"), features=features)
    with pytest.raises(ValueError, match="must be among the training labels, got c"):
        load_data(f"hf:{tmp_path}", 8)


def test_repeated_images_of_a_table_stay_on_one_side(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [png(i // 5) for i in range(60)], "text": [f"caption {i}" for i in range(60)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "all.parquet"))
    data = load_data(f"hf:{tmp_path}", 8)
    assert (len(data.train), len(data.test)) == (55, 5)
    assert not {data.train.items[i]["bytes"] for i in range(55)} & {data.test.items[i]["bytes"] for i in range(5)}
    assert data.test.captions == [f"caption {i}" for i in range(45, 50)]
    assert not data.flip


@pytest.mark.parametrize("stream", [False, True])
def test_lists_of_captions_and_rows_without_one(tmp_path, stream):
    rows = {
        "image": [png(i) for i in range(12)],
        "caption": [[f"{k} of {i}" for k in range(3)] if i != 4 else [None, " "] for i in range(12)],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": [datasets.Value("string")]})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    if not stream:
        (tmp_path / "test.parquet").unlink()
        data = load_data(f"hf:{tmp_path}", 8)
        assert (len(data.train), len(data.test)) == (30, 3)
        assert data.test.captions == ["0 of 10", "1 of 10", "2 of 10"]
        assert data.train.captions[:4] == ["0 of 0", "1 of 0", "2 of 0", "0 of 1"]
        assert "1 rows without a caption" in data.summary()
        assert len(set(data.train.groups)) == 10
        return
    data = load_data(f"hf-stream:{tmp_path}", 8)
    assert data.test.captions == [f"0 of {i}" for i in range(12) if i != 4]
    with pytest.warns(UserWarning, match="examples without a caption are left out"):
        batches = list(data.train.batches(12, 0, 8, 0))
    said = [caption for batch in batches for caption in batch["caption"]]
    assert len(said) == 96
    assert len(set(said)) > 24  # not the first of each alone
    assert all(" of " in caption for caption in said)


def test_images_on_both_sides_of_given_splits_are_counted(tmp_path):
    save(tmp_path / "train.parquet", range(12))
    save(tmp_path / "test.parquet", range(8, 14))
    assert "4 of the training images are also held out" in load_data(f"hf:{tmp_path}", 8).summary()


def test_shards_by_split(tmp_path):
    for split, numbers in (("train", range(20)), ("val", range(50, 56))):
        with tarfile.open(tmp_path / f"set-{split}-000.tar", "w") as file:
            for i in numbers:
                for ending, content in (("png", png(i)["bytes"]), ("txt", f"number {i}".encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{ending}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    data = load_data(f"hf:{tmp_path}", 8)
    assert (len(data.train), len(data.test)) == (20, 6)
    assert load_data(f"hf-stream:{tmp_path}", 8).test.captions == [f"number {i}" for i in range(50, 56)]


def test_a_damaged_image_of_a_table_is_left_out(tmp_path):
    rows = {
        "image": [png(i) if i != 2 else {"bytes": b"rubbish", "path": None} for i in range(12)],
        "label": [i % 2 for i in range(12)],
    }
    datasets.Dataset.from_dict(rows, features=CLASSES).to_parquet(str(tmp_path / "train.parquet"))
    data = load_data(f"hf:{tmp_path}", 8)
    with pytest.warns(UserWarning, match="skipped row 2: UnidentifiedImageError"):
        batch = data.train.fetch(range(len(data.train)))
    assert 2 not in batch["index"].tolist()


@pytest.mark.parametrize("stream", ["hf", "hf-stream"])
def test_damaged_tables_name_the_source(tmp_path, stream):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 rubbish")
    with pytest.raises(ValueError, match=rf"data: hf.*{tmp_path.name}.*"):
        load_data(f"{stream}:{tmp_path}", 8)


def test_folders_of_splits_in_capitals_are_refused(tmp_path):
    for split in ("Train", "Val"):
        for kind in "ab":
            pictures(tmp_path / split / kind, 2)
    with pytest.raises(ValueError, match="must be in lower case, got Train, Val"):
        load_data(f"hf:{tmp_path}", 8)
    assert load_data(str(tmp_path), 8).classes == ["a", "b"]


def test_splits_that_are_not_there(tmp_path):
    save(tmp_path / "train.parquet", range(12))
    with pytest.raises(ValueError, match="must have the split 'nowhere', got train"):
        load_data(f"hf:{tmp_path}:nowhere", 8)
    (tmp_path / "train.parquet").rename(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="must have the split 'train', got test"):
        load_data(f"hf:{tmp_path}", 8)


def test_labels_of_a_stream_must_be_of_its_classes(tmp_path):
    save(tmp_path / "train.parquet", range(12), labels=[0, 1, -1] * 4)
    save(tmp_path / "test.parquet", range(50, 53), labels=[0, 1, 0])
    data = load_data(f"hf-stream:{tmp_path}", 8)
    with pytest.raises(ValueError, match=r"labels of hf-stream:.* must be in 0\.\.1, got -1"):
        list(data.train.batches(12, 0, 1, 0))
