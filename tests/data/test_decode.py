"""Decoding of images: bit depth, orientation, transparency, damaged files; and that all sources give the same
pixels."""

from __future__ import annotations

import io
import random
import struct
import wave
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pyvit.data import load_data
from pyvit.data.audio import read_wave
from pyvit.data.crops import Crop
from pyvit.data.decode import ImageDecoder, decode_image, open_image
from pyvit.data.files import DecodedImages

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    wide = np.rint(RAMP * 65535).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / f"wide.{ending}", "PPM" if ending == "pgm" else None)
    Image.fromarray(np.rint(RAMP * 255).astype(np.uint8)).save(tmp_path / "narrow.png")
    got, want = (decode_image(tmp_path / name, 32).float() for name in (f"wide.{ending}", "narrow.png"))
    assert (got - want).abs().max() <= 1


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    assert decode_image(tmp_path / "a.tif", 32).float().mean() == pytest.approx(127.5, abs=0.5)
    for name, values in (("large", RAMP * 255), ("negative", RAMP - 1), ("missing", np.full_like(RAMP, np.nan))):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / f"{name}.tif")
        with pytest.raises(ValueError, match=r"mode F must be in 0\.\.1"):
            decode_image(tmp_path / f"{name}.tif", 32)


def wide_png(color: int, values: np.ndarray, extra: bytes = b"") -> bytes:
    """A PNG with 16 bits per channel, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    transparency = chunk(b"tRNS", extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + head + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("color", [0, 2, 4, 6])
def test_sixteen_bits_of_every_kind_of_png(color):
    wide, full = RAMP * 65535, np.full_like(RAMP, 65535)
    channels = {0: [wide], 2: [wide] * 3, 4: [wide, full], 6: [wide, wide, wide, full]}[color]
    got = decode_image(wide_png(color, np.stack(channels, -1)), 64).float()
    assert (got - torch.from_numpy(RAMP * 255)).abs().max() <= 1


def test_a_transparent_value_of_sixteen_bits_is_white():
    values = np.full((16, 16, 1), 1000)
    values[:, 8:] = 0
    got = decode_image(wide_png(0, values, struct.pack(">H", 0)), 16)
    assert got[:, 8, 4].tolist() == [4] * 3
    assert got[:, 8, 12].tolist() == [255] * 3


def test_tiff_files_in_which_0_is_white(tmp_path):
    for name, values in (("narrow", np.uint8), ("wide", np.uint16)):
        image = Image.fromarray(np.rint(RAMP * np.iinfo(values).max).astype(values))
        image.save(tmp_path / f"{name}.tif")
        content = (tmp_path / f"{name}.tif").read_bytes()
        black = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
        assert content.count(black) == 1
        (tmp_path / f"{name}.tif").write_bytes(content.replace(black, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
        got = decode_image(tmp_path / f"{name}.tif", 64).float()
        assert (got - (255 - torch.from_numpy(RAMP * 255))).abs().max() <= 1, name


def test_32_bit_integers_are_refused(tmp_path):
    Image.fromarray((RAMP * 1e6).astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="32-bit integers have no known white"):
        decode_image(tmp_path / "a.tif", 32)


def corners() -> Image.Image:
    image = Image.new("RGB", (48, 32))
    for x, y, color in ((0, 0, "red"), (24, 0, "lime"), (0, 16, "blue"), (24, 16, "white")):
        image.paste(color, (x, y, x + 24, y + 16))
    return image


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_orientation_is_applied_whatever_the_file(tmp_path, turn, ending):
    upright = corners()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that undo EXIF's
    stored = upright.transpose(Image.Transpose(back[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    kind = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    stored.save(tmp_path / f"a.{ending}", exif=exif, **kind)
    want = torch.from_numpy(np.array(upright)).permute(2, 0, 1)[:, :, 8:40]
    for source in (tmp_path / f"a.{ending}", {"bytes": (tmp_path / f"a.{ending}").read_bytes(), "path": None}):
        assert (decode_image(source, 32).float() - want).abs().max() <= 6
        views = ImageDecoder(32).views(source, {"crop": Crop((32, 32), (1, 1))}, random.Random(0))
        assert (views["crop"][0].float() - want).abs().max() <= 6


def test_damaged_exif_is_ignored(tmp_path):
    corners().save(tmp_path / "a.jpg", exif=b"Exif\0\0rubbish rubbish")
    assert decode_image(tmp_path / "a.jpg", 32).shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB"])
def test_transparent_parts_are_white(tmp_path, mode):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 20))
    if mode == "RGB":
        flat = Image.new("RGB", (20, 20), (1, 2, 3))
        flat.paste("black", (0, 0, 10, 20))
        flat.save(tmp_path / "a.png", transparency=(1, 2, 3))
    elif mode == "PA":
        got = decode_image(image.convert("LA").convert("PA") if hasattr(Image, "PA") else image, 20)
        assert got[:, 10, 15].tolist() == [255] * 3
        return
    else:
        image.convert(mode).save(tmp_path / "a.png")
    got = decode_image(tmp_path / "a.png", 20)
    assert got[:, 10, 4].tolist() == [0] * 3
    assert got[:, 10, 15].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_keep_their_colour(tmp_path, mode):
    image = Image.new("RGB", (20, 20), "white")
    image.paste("black", (0, 0, 10, 20))
    got = decode_image(image.convert(mode), 20).float()
    assert (got[:, :, :8] < 4).all()
    assert (got[:, :, 12:] > 251).all()


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    for ending in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
        got = decode_image(tmp_path / f"a.{ending}", 16)[:, 8, 8].tolist()
        assert got[0] > 250, ending
        assert max(got[1:]) < 5, ending


def broken(kind: str) -> bytes:
    file = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    if kind == "bomb":
        Image.new("1", (20000, 10000)).save(file, "PNG")
        return file.getvalue()
    if kind == "overwritten png":
        Image.radial_gradient("L").save(file, "PNG")
        return file.getvalue()[:41] + b"\xff" * 20 + file.getvalue()[61:]  # the compressed data's first bytes
    if kind == "png of a wrong colour type":
        head = struct.pack(">IIBBBBB", 8, 8, 8, 99, 0, 0, 0)
        crc = struct.pack(">I", zlib.crc32(b"IHDR" + head))
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + crc
    if kind.startswith("cut"):
        noise.save(file, kind.split()[1])
        return file.getvalue()[: len(file.getvalue()) // 2]
    if kind == "wide float":
        Image.fromarray(np.full((8, 8), 300, np.float32)).save(file, "TIFF")
        return file.getvalue()
    return {
        "empty": b"",
        "web page": b"<html>",
        "header alone": b"\xff\xd8\xff\xe0",
        "bmp": b"BM" + b"\xff" * 60,
        "gif": b"GIF89a\xff\xff",
    }[kind]


DAMAGE = (
    "bomb", "overwritten png", "png of a wrong colour type", "cut PNG", "cut JPEG", "cut TIFF", "cut WEBP", "cut GIF",
    "cut BMP", "wide float", "empty", "web page", "header alone", "bmp", "gif",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("kind", [*DAMAGE, "gone", "a folder"])
def test_damaged_images_are_replaced_in_training_and_left_out_of_evaluation(tmp_path, kind):
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (16, 16), (40 * i,) * 3).save(paths[-1])
    if kind == "gone":
        paths[2].unlink()
    elif kind == "a folder":
        paths[2].unlink()
        paths[2].mkdir()
    else:
        paths[2].write_bytes(broken(kind))
    images = DecodedImages(paths, ImageDecoder(8), list(range(6)), list("abcdef"))
    batch = images.fetch(range(6))
    assert batch["label"].tolist() == batch["index"].tolist() == [0, 1, 3, 4, 5]
    assert batch["caption"] == list("abdef")
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 40, 120, 160, 200]
    for crops in ({}, {"crop": Crop((8, 8), (0.5, 1))}):
        batch = images.draw(range(6), crops, 0, 0)
        assert batch["label"].tolist() == [0, 1, 3, 3, 4, 5]
        assert batch["crop" if crops else "image"][:, 0, 4, 4].tolist() == [0, 40, 120, 120, 160, 200]
    assert len(images.problems) == 1
    assert "2.png" in images.problems[0]
    assert images.readable() == [0, 1, 3, 4, 5]


def test_many_damaged_files_stop_the_run(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(30)]
    for i, path in enumerate(paths):
        path.write_bytes(b"rubbish") if i < 5 else Image.new("RGB", (8, 8)).save(path)
    images = DecodedImages(paths, ImageDecoder(8))
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"4 of 30 files cannot be read, the last: .*3.png"),
    ):
        images.draw(range(30), {}, 0, 0)


def test_a_few_unreadable_files_are_named_and_the_others_counted(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(1000)]
    images = DecodedImages(paths, ImageDecoder(8))
    with pytest.warns(UserWarning, match="skipped") as said:
        images.note({i: f"{i}.png: gone" for i in range(40)})
    assert len(said) == 21
    assert "further ones are counted" in str(said[-1].message)
    assert len(images.problems) == 40


def test_evaluation_takes_seven_eighths_where_there_are_pixels_to_spare():
    """A frame around the image is cut from a large image, and kept in an image that is no larger than the output."""
    for side, kept in ((256, False), (32, True)):
        image = Image.new("RGB", (side, side), "white")
        image.paste("black", (side // 32, side // 32, side - side // 32, side - side // 32))
        assert bool(ImageDecoder(32).whole(image)[:, 0].max() > 128) == kept
        assert decode_image(image, 32)[:, 0].max() > 128


def test_sources_agree_to_the_bit(tmp_path):
    """A large rotated JPEG, from a folder, a table, a CSV file and bytes."""
    datasets = pytest.importorskip("datasets")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = []
    for kind in "ab":
        for i in range(2):
            paths.append(tmp_path / "set" / kind / f"{i}.jpg")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(noise, i, 0)).resize((800, 600)).save(paths[-1], exif=exif)
    files = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "table").mkdir()
    table = datasets.Dataset.from_dict({"image": files, "label": [0, 0, 1, 1]}, features=features)
    table.to_parquet(str(tmp_path / "table" / "train.parquet"))
    sets = [
        load_data(spec, 64) for spec in (str(tmp_path / "set"), f"hf:{tmp_path / 'table'}", f"hf:{tmp_path / 'set'}")
    ]
    crops = {"crop": Crop((32, 32), (0.1, 1), count=2)}
    for part in ("train", "test"):
        first = getattr(sets[0], part)
        for other in (getattr(each, part) for each in sets[1:]):
            assert torch.equal(other.fetch(range(2))["image"], first.fetch(range(2))["image"])
            assert torch.equal(other.draw(range(2), crops, 3, 4)["crop"], first.draw(range(2), crops, 3, 4)["crop"])
    whole = decode_image(paths[0], 64)
    assert torch.equal(decode_image(files[0], 64), whole)
    assert torch.equal(decode_image(files[0]["bytes"], 64), whole)
    with open_image(paths[0]) as image:
        assert torch.equal(decode_image(image, 64), whole)


def sound(
    kind: int, bits: int, channels: int, content: bytes, rate: int = 16000, extra: bytes = b"", size: int | None = None
) -> bytes:
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * frame, frame, bits) + extra
    data = b"data" + struct.pack("<I", len(content) if size is None else size) + content
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


TONE = 0.5 * np.sin(np.arange(1600) / 5)


def encoded(kind: int, bits: int, x: np.ndarray) -> bytes:
    if kind == 3:
        return x.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.rint(x * 127 + 128).astype(np.uint8).tobytes()
    if bits == 24:
        return b"".join(struct.pack("<i", int(v))[:3] for v in np.rint(x * (2**23 - 1)))
    return np.rint(x * (2 ** (bits - 1) - 1)).astype(f"<i{bits // 8}").tobytes()


@pytest.mark.parametrize(("kind", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("form", ["plain", "extensible", "piped"])
def test_sounds_of_every_encoding(kind, bits, channels, form):
    content = encoded(kind, bits, np.repeat(TONE, channels))
    if form == "extensible":
        extra = struct.pack("<HHIH", 22, bits, 0, kind) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
        file = sound(0xFFFE, bits, channels, content, extra=extra)
    else:
        file = sound(kind, bits, channels, content, size=0xFFFFFFFF if form == "piped" else None)
    samples, rate = read_wave(io.BytesIO(file))
    assert rate == 16000
    assert (samples - torch.from_numpy(TONE).float()).abs().max() < (0.01 if bits == 8 else 1e-4)


def test_wave_of_the_standard_library_is_read(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(encoded(1, 16, TONE))
    samples, rate = read_wave(tmp_path / "a.wav")
    assert (len(samples), rate) == (1600, 8000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "not a .wav file"),
        (b"", "not a .wav file"),
        (sound(1, 16, 2, b"\0" * 1002), "not whole frames of 4 bytes"),
        (sound(1, 16, 1, b"\0" * 100, size=200), "cut short"),
        (sound(1, 16, 1, b"\0" * 100, rate=0), "at 0 Hz"),
        (sound(1, 16, 0, b"\0" * 100), "0 channels"),
        (sound(1, 16, 1, b""), "not whole frames"),
        (sound(7, 8, 1, b"\0" * 100), "encoding 7 of 8 bits"),
        (sound(3, 16, 1, b"\0" * 100), "encoding 3 of 16 bits"),
        (sound(0xFFFE, 16, 1, b"\0" * 100), "encoding 65534"),
        (sound(3, 32, 1, np.array([np.nan, 1], "<f4").tobytes()), "finite"),
        (sound(1, 16, 1, b"\0" * 100)[:30], "cut short|damaged"),
    ],
)
def test_damaged_sounds_say_what_is_wrong(content, message):
    with pytest.raises(ValueError, match=message):
        read_wave(io.BytesIO(content))


@pytest.mark.filterwarnings("ignore:skipped")
def test_silence_short_and_damaged_sounds_in_a_folder(tmp_path):
    for c, kind in enumerate(("a", "b")):
        (tmp_path / kind).mkdir()
        for i in range(6):
            x = np.roll(TONE, i + 10 * c)[: 3 if i == 2 else None] * (i != 1)
            (tmp_path / kind / f"{i}.wav").write_bytes(sound(1, 16, 1, encoded(1, 16, x)))
    (tmp_path / "a" / "0.wav").write_bytes(b"<html>")
    (tmp_path / "a" / "x.flac").write_bytes(b"x")
    data = load_data(str(tmp_path), 20)
    assert "1 .flac files" in data.summary()
    batch = data.train.fetch(range(len(data.train)))
    assert batch["image"].shape == (9, 1, 128, 20)
    assert len(data.train.problems) == 1
    views = data.train.draw([0, 1], {"crop": Crop((128, 20), (0.2, 1), count=2)}, 0, 0)["crop"]
    assert views.shape == (2, 2, 1, 128, 20)
