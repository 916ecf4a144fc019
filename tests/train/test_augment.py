"""Augmentations: formulas against Pillow's, and order, probabilities and ranges by statistics over draws."""

import colorsys
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from pyvit.train import augment, transforms

N = 6000


def smooth_image(h=40, w=48):
    """(1, 3, h, w) with smooth structure and all levels."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    rows = [(6 * x + 2 * y).sin(), (5 * y * x + x).cos(), (4 * x - 7 * y).sin() * x]
    return ((torch.stack(rows)[None] + 1) / 2 * 255).round() / 255


def pillow(images):
    return Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("factor", [0.19, 1.81])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color"), ("sharpness", "Sharpness")],
)
def test_enhancements_are_pillows(name, theirs, factor):
    x = smooth_image()
    found = getattr(transforms, name)(x, torch.tensor([factor]))
    want = tensor(getattr(ImageEnhance, theirs)(pillow(x)).enhance(factor))
    assert (found - want).abs().max() <= 1.9 / 255  # Pillow cuts the result to 8 bits, and rounds the grey value


def test_level_operations_are_pillows():
    x = smooth_image() * 0.7 + 20 / 255
    x = (x * 255).round() / 255
    image = pillow(x)
    added = [min(255, i + 99) if i < 128 else i for i in range(256)] * 3
    one = lambda value: torch.tensor([value])  # noqa: E731
    for found, want, off in (
        (transforms.equalize(x), ImageOps.equalize(image), 0),
        (transforms.autocontrast(x), ImageOps.autocontrast(image), 1),
        (transforms.invert(x), ImageOps.invert(image), 0),
        (transforms.posterize(x, one(1)), ImageOps.posterize(image, 1), 0),
        (transforms.posterize(x, one(3)), ImageOps.posterize(image, 3), 0),
        (transforms.solarize(x, one(26 / 255)), ImageOps.solarize(image, 26), 0),
        (transforms.solarize(x, one(128 / 255)), ImageOps.solarize(image, 128), 0),
        (transforms.solarize_add(x, one(99 / 255)), image.point(added), 0),
    ):  # fmt: skip
        assert ((found - tensor(want)) * 255).abs().max() <= off + 1e-3
    flat = torch.full((1, 3, 8, 8), 0.4)
    assert torch.equal(transforms.autocontrast(flat), flat)
    assert torch.allclose(transforms.equalize(flat), flat, atol=1e-6)


def test_hue_turns_the_colour_circle():
    x = smooth_image(6, 7)
    for shift in (-0.37, 0.0, 0.2):
        found = transforms.hue(x, torch.tensor([shift]))[0].flatten(1).T
        for (r, g, b), got in zip(x[0].flatten(1).T.tolist(), found.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(r, g, b)
            assert got == pytest.approx(colorsys.hsv_to_rgb((h + shift) % 1, s, v), abs=1e-5)


def test_affine_is_pillows():
    x, size = smooth_image(), (40, 48)
    fill = (0.4, 0.5, 0.6)
    with_fill = {"fillcolor": tuple(round(255 * v) for v in fill), "resample": Image.Resampling.BICUBIC}
    rows = {
        "shear x": (1, 0.27, 0, 0, 1, 0),
        "shear y": (1, 0, 0, -0.27, 1, 0),
        "translate": (1, 0, 0.405 * 48, 0, 1, -7.3),
    }
    for name, row in rows.items():
        found = transforms.affine(x, torch.tensor(row).view(1, 2, 3), fill)
        want = tensor(pillow(x).transform((48, 40), Image.Transform.AFFINE, row, **with_fill))
        off = (found - want).abs() * 255
        assert off.mean() < 0.6, name  # rounding, and bicubic coefficients of -0.75 instead of -0.5
        assert (off > 12).float().mean() < 0.005, name  # pixels on the border of the filled part
    found = transforms.affine(x, transforms.rotation(torch.tensor([27.0]), size), fill)
    off = (found - tensor(pillow(x).rotate(27, **with_fill))).abs() * 255
    assert off.mean() < 0.9
    assert (off > 12).float().mean() < 0.01


def test_blur_is_a_reflected_gaussian():
    x, sigma = smooth_image().double(), 1.3
    found = transforms.gaussian_blur(x, torch.tensor([sigma], dtype=torch.float64), 5)
    padded = np.pad(x[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    want = sum(weights[i] * weights[j] * padded[:, i : i + 40, j : j + 48] for i in range(5) for j in range(5))
    assert np.abs(found[0].numpy() - want).max() < 1e-12


def numbered(n=N, side=1):
    """Images whose red value is their number."""
    images = torch.zeros(n, 3, side, side)
    images[:, 0] = torch.arange(n)[:, None, None] / n
    return images


def numbers(images):
    return (images[:, 0, 0, 0] * N).round().long()


def near(count, p, n=N):
    """Whether ``count`` of n is within 4.5 standard deviations of probability p."""
    return abs(count - n * p) <= 4.5 * math.sqrt(n * p * (1 - p))


def record(monkeypatch, *names):
    """Replace transforms by the identity. Returns [name, numbers of images, parameters] of each call."""
    calls = []
    for name in names:

        def identity(images, *parameters, name=name, **rest):
            calls.append((name, numbers(images), *parameters))
            return images

        monkeypatch.setattr(transforms, name, identity)
    return calls


def gathered(calls, name):
    """The numbers of all images and their parameters."""
    found = [call[1:] for call in calls if call[0] == name]
    return [torch.cat(each) for each in zip(*found, strict=True)] if found else [torch.empty(0, dtype=torch.long)]


def test_colour_jitter(monkeypatch):
    names = ("brightness", "contrast", "saturation", "hue")
    calls = record(monkeypatch, *names)
    torch.manual_seed(0)
    augment.ColorJitter(0.8, 0.4, 0.2, 0.1, p=0.8)(numbered())
    order = {}
    for name, at, _ in calls:
        for i in at.tolist():
            order.setdefault(i, []).append(name)
    assert near(len(order), 0.8)
    assert all(sorted(each) == sorted(names) for each in order.values())
    kinds = [tuple(each) for each in order.values()]
    assert len(set(kinds)) == 24
    assert all(near(kinds.count(kind), 1 / 24, len(kinds)) for kind in set(kinds))
    for name, low, high in zip(names, (0.2, 0.6, 0.8, -0.1), (1.8, 1.4, 1.2, 0.1), strict=True):
        factor = gathered(calls, name)[1]
        assert low <= factor.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factor.max() <= high
        assert abs(factor.mean() - (low + high) / 2) < 4.5 * (high - low) / math.sqrt(12 * len(factor))


def test_probabilities_of_the_others(monkeypatch):
    calls = record(monkeypatch, "flip", "gaussian_blur", "solarize", "affine")
    torch.manual_seed(1)
    for layer in (
        augment.RandomHorizontalFlip(),
        augment.RandomGaussianBlur(0.1),
        augment.RandomSolarize(0.2),
        augment.RandomAffine(10.0, 5.0, p=0.9),
    ):
        layer(numbered())
    for name, p in (("flip", 0.5), ("gaussian_blur", 0.1), ("solarize", 0.2), ("affine", 0.9)):
        at = gathered(calls, name)[0]
        assert len(at.unique()) == len(at)
        assert near(len(at), p), name
    sigma = gathered(calls, "gaussian_blur")[1]
    assert 0.1 <= sigma.min() < 0.12 < 1.98 < sigma.max() <= 2
    assert abs(sigma.mean() - 1.05) < 0.1
    assert (gathered(calls, "solarize")[1] == 128 / 255).all()
    linear = gathered(calls, "affine")[1][:, :, :2]
    size = torch.linalg.det(linear).rsqrt()  # of the image: the matrix leads from the output to the input
    assert 0.9 <= size.min() < 0.905 < 1.095 < size.max() <= 1.1 + 1e-6
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0]).rad2deg()
    assert 9.8 < angle.abs().max() <= 10 + 1e-4
    grey = augment.RandomGrayscale(0.2)(torch.rand(N, 3, 1, 1))
    assert near(int((grey[:, 0] == grey[:, 1]).sum()), 0.2)


def test_rand_augment(monkeypatch):
    """rand-m9-mstd0.5-inc1: 15 operations, two draws, each applied half of the time, magnitudes of timm."""
    layer = augment.RandAugment((0.5, 0.5, 0.5))
    table, calls = layer.operations(), []
    assert len(table) == 15

    def recorded(name):
        def parameter(magnitude, sign, size):
            return torch.stack([magnitude, sign], 1)

        def function(images, *given):
            calls.append((name, numbers(images), *given))
            return images

        return parameter, function

    monkeypatch.setattr(layer, "operations", lambda: {name: recorded(name) for name in table})
    torch.manual_seed(2)
    layer(numbered())
    for name in table:
        assert near(len(gathered(calls, name)[0]), 0.5 / 15, 2 * N), name
    drawn = torch.cat([call[2] for call in calls])
    magnitude = 10 * drawn[:, 0]
    assert near(len(drawn), 0.5, 2 * N)
    assert near(int((magnitude == 10).sum()), 0.02275, len(drawn))  # cut: two standard deviations above the mean
    assert abs(magnitude[magnitude < 10].median() - 8.986) < 0.04
    assert near(int((magnitude < 8.5).sum()), 0.15866, len(drawn))
    assert near(int((drawn[:, 1] < 0).sum()), 0.5, len(drawn))
    at = torch.cat([call[1] for call in calls]).bincount(minlength=N)
    assert near(int((at == 2).sum()), 0.25)
    assert near(int((at == 0).sum()), 0.25)

    nine, one, size = torch.tensor([0.9, 0.9, 1.0]), torch.tensor([1.0, -1.0, -1.0]), (40, 50)
    value = {name: parameter and parameter(nine, one, size) for name, (parameter, _) in table.items()}
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert value[name].tolist() == pytest.approx([1.81, 0.19, 0.1])
    assert value["posterize"].tolist() == [1, 1, 0]
    assert (255 * value["solarize"]).tolist() == pytest.approx([26, 26, 0])
    assert (255 * value["solarize_add"]).tolist() == pytest.approx([99, 99, 110])
    assert value["shear_x"][:, 0, 1].tolist() == pytest.approx([0.27, -0.27, -0.3])
    assert value["shear_y"][:, 1, 0].tolist() == pytest.approx([0.27, -0.27, -0.3])
    assert value["translate_x"][:, 0, 2].tolist() == pytest.approx([0.405 * 50, -0.405 * 50, -0.45 * 50])
    assert value["translate_y"][:, 1, 2].tolist() == pytest.approx([0.405 * 40, -0.405 * 40, -0.45 * 40])
    assert torch.equal(value["rotate"], transforms.rotation(torch.tensor([27.0, -27.0, -30.0]), size))
    assert value["autocontrast"] is value["equalize"] is value["invert"] is None


def test_erasing():
    torch.manual_seed(3)
    n, h, w = 3000, 24, 32
    images = torch.full((n, 3, h, w), 7.0)
    found = augment.erase(images, 0.25)
    assert (images == 7).all()
    noisy = found[:, 0] != 7
    hit = noisy.flatten(1).any(1)
    assert near(int(hit.sum()), 0.25, n)
    boxes = noisy[hit]
    height, width = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert torch.equal(boxes.flatten(1).sum(1), height * width)  # a full box
    assert torch.equal((found[:, 1] != 7), noisy)
    area = height * width / (h * w)
    assert 0.01 < area.min() < 0.04
    assert 0.3 < area.max() < 0.36
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.03  # boxes that do not fit are drawn again
    ratio = height / width
    assert ratio.min() > 0.2
    assert ratio.max() < 24 / 5
    noise = found.transpose(0, 1)[:, noisy].flatten()
    assert abs(noise.mean()) < 4.5 / math.sqrt(len(noise))
    assert abs(noise.var() - 1) < 4.5 * math.sqrt(2 / len(noise))
    top = boxes.any(2).int().argmax(1)
    assert near(int((top > (h - height) / 2).sum() + 0.5 * (2 * top == h - height).sum()), 0.5, int(hit.sum()))


def test_mixup_and_cutmix():
    torch.manual_seed(4)
    images, targets = torch.zeros(2, 1, 20, 30), torch.eye(2)
    images[0] = 1.0
    shares, boxes = [], []
    for _ in range(800):
        mixed, labels = augment.mixup(images, targets, 0.8, 1.0)
        assert labels.sum(1).tolist() == pytest.approx([1, 1])
        assert mixed[0].mean() == pytest.approx(
            labels[0, 0].item(), abs=1e-6
        )  # the labels have the share of the pixels
        assert torch.allclose(mixed[0] + mixed[1], torch.ones(1, 20, 30))
        if ((mixed == 0) | (mixed == 1)).all():
            boxes.append(mixed[0, 0] == 0)
        else:
            shares.append(labels[0, 0].item())
    assert near(len(boxes), 0.5, 800)
    shares = torch.tensor(shares)
    assert abs(shares.mean() - 0.5) < 4.5 * 0.31 / math.sqrt(len(shares))
    assert abs(shares.var() - 0.25 / 2.6) < 0.02  # Beta(0.8, 0.8)
    # Boxes of a uniform area around a uniform centre, cut at the border: 1/6 of the centre's rows is cut on average.
    box = torch.stack(boxes).float()
    mean = box.mean(0)
    assert mean[10, 15] > 1.5 * mean[0, 0] > 0
    assert abs(mean - mean.flip(0)).max() < 0.16
    # timm's formula, in expectation over the area and the centre
    want = torch.zeros(20, 30)
    share = (torch.arange(200) + 0.5) / 200
    for s in share.sqrt().tolist():
        inside = []
        for n in (20, 30):
            length, at = int(n * s), torch.arange(n)
            low, high = at - length // 2, at + (length + 1) // 2
            inside.append(((at[None] >= low[:, None]) & (at[None] < high[:, None])).float().mean(0))
        want += inside[0][:, None] * inside[1] / len(share)
    assert (mean - want).abs().mean() < 0.03
    assert augment.mixup(images, targets, 0.0, 0.0)[0] is images


def test_order_of_the_recipes():
    size = (32, 32)

    def names(pipeline):
        return [type(layer).__name__ for layer in pipeline]

    flip = "RandomHorizontalFlip"
    assert names(augment.supervised(size, True, (0.5,) * 3)) == [flip, "RandAugment"]
    assert names(augment.mae(size, True)) == [flip]
    assert names(augment.simclr(size, True)) == [flip, "ColorJitter", "RandomGrayscale", "RandomGaussianBlur"]
    assert names(augment.dino(size, True, (0.4, 1), 0.1, 0.2)) == [
        flip, "ColorJitter", "RandomGrayscale", "RandomGaussianBlur", "RandomSolarize"
    ]  # fmt: skip
    for pipeline, amounts in (
        (augment.simclr(size, True), (0.8, 0.8, 0.8)),
        (augment.dino(size, True, (0.4, 1), 0.1, 0.2), (0.4, 0.4, 0.2)),
    ):
        jitter = pipeline[1]
        assert jitter.p == 0.8
        assert jitter.ranges[:3] == [(pytest.approx(1 - a), pytest.approx(1 + a)) for a in amounts]
        assert jitter.ranges[3] == ((-0.2, 0.2) if amounts[0] == 0.8 else (-0.1, 0.1))
    strong = (augment.supervised(size, True, (0.5,) * 3), augment.simclr(size, True))
    for pipeline, scale in (*((p, 0.08) for p in strong), (augment.mae(size, True), 0.2)):
        assert pipeline.crop.scale == (scale, 1.0)
        assert pipeline.crop.ratio == (3 / 4, 4 / 3)


def test_seeds_decide():
    images = torch.randint(0, 256, (12, 3, 24, 24), dtype=torch.uint8)
    before = images.clone()
    for pipeline in (
        augment.supervised((24, 24), True, (0.5,) * 3),
        augment.simclr((24, 24), True, slant=10.0),
        augment.dino((24, 24), True, (0.4, 1), 0.5, 0.2),
        augment.mild(True),
    ):
        found = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            found.append(pipeline(images))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        assert found[0].dtype == torch.float32
        assert 0 <= found[0].min() <= found[0].max() <= 1
        assert torch.equal(images, before)
        # Images of float in [0, 1] are the same images.
        torch.manual_seed(5)
        floats = images / 255
        assert torch.equal(pipeline(floats), found[0])
        assert torch.equal(floats, before / 255)


def test_images_are_cut_into_parts_without_effect(monkeypatch):
    """The size of the parts that a CPU works on does not change the result."""
    images = torch.rand(9, 3, 16, 16)
    layers = augment.simclr((16, 16), True)
    found = []
    for chunk in (1, 2**30):
        monkeypatch.setattr(transforms, "_CHUNK", chunk)
        torch.manual_seed(0)
        found.append(layers(images))
    assert all((a - b).abs().max() < 1e-6 for a, b in pairwise(found))
