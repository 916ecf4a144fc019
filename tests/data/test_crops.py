"""Random crops: their boxes, that they are cut from the full image, and that a resumed run draws the same ones."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from pyvit.data import TensorImages, load_data
from pyvit.data.crops import Crop, crop_images, crop_resize, generator
from pyvit.data.decode import ImageDecoder
from pyvit.data.loading import evaluation_batches, training_batches
from pyvit.train import Config, checkpoint, train
from pyvit.train.engine import BatchSampler, NumberedBatches, Run, resolve_config
from pyvit.train.recipe import load_recipe


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 300), (32, 32), (1, 1), (3, 200)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.4), (0.9, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(32, 32), (128, 512)])
def test_boxes_lie_in_the_image_and_have_the_area_asked_for(width, height, scale, size):
    crop = Crop(size, scale)
    ratio = size[1] / size[0]
    areas = []
    for i in range(200):
        ((left, top, right, bottom),) = crop.boxes(width, height, random.Random(i))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        if min(width, height) > 300:  # else a pixel is much
            assert 0.7 * ratio <= (right - left) / (bottom - top) <= 1.45 * ratio
    if width == 500 and size == (32, 32) and scale[1] < 1:
        assert min(areas) < scale[0] * 1.2
        assert max(areas) > scale[1] * 0.85
        assert np.mean(areas) == pytest.approx(sum(scale) / 2, abs=0.03)


def test_crop_scales_out_of_range_are_refused():
    for scale in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.5), (-1, 1)):
        with pytest.raises(ValueError, match="crop: scale must be"):
            Crop((8, 8), scale)


@pytest.mark.parametrize("box", [(0, 0, 60, 40), (3, 5, 23, 30), (10.5, 2.25, 50.75, 39.5), (20, 10, 25, 14)])
def test_tensors_are_resized_as_pillow_resizes_files(box):
    pixels = np.random.default_rng(0).random((40, 60), dtype=np.float32)
    want = torch.from_numpy(np.array(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC, box=box)))
    got = crop_resize(torch.from_numpy(pixels)[None, None], torch.tensor([box], dtype=torch.float32), (16, 24))[0, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_whole_images_stay_as_they_are():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    views = crop_images(images, {"crop": Crop((32, 32), (1, 1))}, [random.Random(0)] * 3)
    assert torch.equal(views["crop"], images)


def test_crops_are_cut_from_the_full_image():
    """A local crop keeps a fine pattern, which would be lost if the image were first resized to 224 pixels."""
    fine = Image.fromarray(
        np.tile(np.array([[0, 0, 255, 255]], np.uint8), (1200, 400)).repeat(3).reshape(1200, 1600, 3)
    )
    decoder = ImageDecoder(224)
    ((view,),) = decoder.views(fine, {"local": Crop((96, 96), (0.004, 0.006), count=1)}, random.Random(0)).values()
    assert view.float().std() > 80  # about 97 pixels resized to 96: the stripes are visible
    ((left, _, right, bottom),) = Crop((96, 96), (0.2, 1.0)).boxes(1600, 1200, random.Random(1))
    assert right - left > 400  # boxes are not in pixels of a smaller image
    assert max(right, bottom) > 224


def test_a_large_jpeg_is_decoded_as_finely_as_its_smallest_crop_needs(tmp_path):
    side = 2048
    x, y = np.meshgrid(np.linspace(0, 255, side), np.linspace(0, 255, side))
    Image.fromarray(np.stack([x, y, (x + y) / 2], 2).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    decoded = []
    resized = Image.Image.resize

    def resize(image, *args, **kwargs):
        decoded.append(image.size)
        return resized(image, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        for scale, size, wanted in (
            ((1, 1), 224, 512),
            ((0.9, 1.0), 224, 512),
            ((0.01, 0.011), 96, 2048),
            ((1, 1), 1000, 1024 * 2),
        ):
            crop = Crop((size, size), scale)
            draw = generator(0, 0)
            box = crop.boxes(side, side, generator(0, 0))[0]
            view = ImageDecoder(224).views(tmp_path / "a.jpg", {"crop": crop}, draw)["crop"][0]
            assert decoded.pop()[0] == wanted
            middle = [(box[0] + box[2]) / 2 / side * 255, (box[1] + box[3]) / 2 / side * 255]
            assert view[:2, size // 2, size // 2].tolist() == pytest.approx(middle, abs=4)


def files(folder, n: int = 12):
    for i in range(n):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(params=["files", "memory", "part"])
def images(request, tmp_path):
    if request.param == "files":
        return load_data(str(files(tmp_path)), 32).train
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = TensorImages(pixels, torch.arange(10))
    return whole if request.param == "memory" else whole.part([3, 1, 4, 5, 9, 2, 6, 0, 8, 7])


CROPS = {
    "global": Crop((24, 24), (0.4, 1.0), count=2),
    "local": Crop((16, 16), (0.05, 0.4), count=3),
    "crop": Crop((8, 8), (0.2, 1.0)),
}


def test_views_are_a_function_of_seed_step_and_image(images):
    batch = images.draw([4, 2, 7], CROPS, 5, 11)
    assert batch["global"].shape == (2, 3, 3, 24, 24)
    assert batch["local"].shape == (3, 3, 3, 16, 16)
    assert batch["crop"].shape == (3, 3, 8, 8)
    assert batch["label"].tolist() == [int(images.labels[i]) for i in (4, 2, 7)]
    alone = images.draw([7], CROPS, 5, 11)
    assert all(
        torch.equal(alone[name][:, 0] if name != "crop" else alone[name][0], batch[name][..., 2, :, :, :])
        for name in CROPS
    )
    for seed, step in ((5, 12), (6, 11)):
        assert not torch.equal(images.draw([4, 2, 7], CROPS, seed, step)["crop"], batch["crop"])
    assert not torch.equal(batch["global"][0], batch["global"][1])
    assert images.draw([1], {"local": Crop((8, 8), (0.5, 1), count=0)}, 0, 0)["local"].shape == (0, 1, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_and_divided_runs_draw_the_same(images, workers):
    def run(start=0, rank=0, world=1, accumulate=1):
        plan = NumberedBatches(BatchSampler(len(images), 4, start, 6, 3, rank, world, accumulate))
        return list(training_batches(images, CROPS, plan, 9, workers if world == 1 and accumulate == 1 else 0))

    whole = run()
    assert len(whole) == 6
    for got, want in zip(run(start=4), whole[4:], strict=True):
        assert all(torch.equal(got[name], want[name]) for name in (*CROPS, "label", "index"))
    halves = [run(rank=rank, world=2) for rank in range(2)]
    for step, want in enumerate(whole):
        assert torch.equal(torch.cat([half[step]["crop"] for half in halves]), want["crop"])
    micro = run(accumulate=2)
    assert torch.equal(torch.cat([micro[6]["crop"], micro[7]["crop"]]), whole[3]["crop"])


def test_unreadable_files_of_workers_are_recorded(tmp_path):
    images = load_data(str(files(tmp_path)), 32).train
    images.items[3].write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped"):
        batches = list(evaluation_batches(images, range(len(images)), 4, workers=2))
    assert [i for batch in batches for i in batch["index"].tolist()] == [i for i in range(len(images)) if i != 3]
    assert list(images.bad) == [3]
    assert "problems" not in batches[0]


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("mae", {"crop"}),
        ("simclr", {"crop"}),
        ("dino", {"first", "second", "local"}),
        ("dinov2", {"first", "second", "local"}),
    ],
)
def test_recipes_train_on_crops_of_files_and_resume(recipe, names, tmp_path):
    """An uninterrupted run of 3 steps and one resumed from step 2 end with the same weights, with one worker and
    without."""
    small = {
        "mae": ["decoder_dim=16", "decoder_depth=1", "decoder_heads=1"],
        "simclr": ["hidden=16", "out=8"],
    }.get(recipe, ["prototypes=16", "hidden=16", "bottleneck=8", "local_crops=2", "local_size=16"])
    settings = {
        "recipe": recipe, "data": str(files(tmp_path / "data", 24)), "model": "vit_pico_patch8_32", "set": ["depth=1"],
        "image_size": 32, "batch_size": 4, "steps": 3, "save_every": 2, "option": small,
    }  # fmt: skip
    train(Config(**settings, out=str(tmp_path / "whole")))
    run = Run(Config(**settings, out=str(tmp_path / "again")))
    assert run.recipe.crops.keys() == names
    batches = run.batches()
    for step in range(2):
        run.step(step, batches)
    run.save(2)
    train(Config(**settings, out=str(tmp_path / "again"), workers=1))
    ends = [checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "again")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_captioned_images_are_never_mirrored():
    """The brightness of the left half shows whether an image was flipped."""
    pixels = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    pixels[..., :16] = 200
    data = load_data("synthetic", 32, count=16)
    data.train.images[:] = pixels
    assert data.flip
    for name in ("clip", "siglip"):
        settings = resolve_config(
            Config(
                recipe=name, data="synthetic", model=f"{name}_pico_patch8_32", set=["depth=1"], steps=1, batch_size=16
            )
        )
        recipe = load_recipe(name)(settings, data)
        for step in range(4):
            views = recipe.views(data.train.draw(range(16), recipe.crops, 0, step), 0, 1)["images"]
            assert (views[..., :8].mean((1, 2, 3)) > views[..., -8:].mean((1, 2, 3))).all()


def test_mirroring_can_be_turned_off(tmp_path):
    settings = {
        "data": str(files(tmp_path / "d", 24)),
        "model": "vit_pico_patch8_32",
        "image_size": 32,
        "batch_size": 4,
        "steps": 1,
    }
    for flip in (True, False):
        run = Run(Config(**settings, flip=flip, out=str(tmp_path / str(flip))))
        assert any("Flip" in type(layer).__name__ for layer in run.recipe.augment) == flip
        assert json.loads((tmp_path / str(flip) / "data.json").read_text())["flip"] == flip
