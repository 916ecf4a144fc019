"""Emoji and icons: the readers on a small font and theme, and the split by concept on the installed packages."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from pyvit.data import icons, load_data
from pyvit.data.icons import Picture, _emoji_names, _held_out, _read_font, _read_theme

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="4" fill="{}"/></svg>'


def png(color) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (13, 12), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    """A font with a bitmap for a face, a waving hand with and without a tone, and two persons that run."""
    builder_of = pytest.importorskip("fontTools.fontBuilder").FontBuilder
    from fontTools.ttLib import newTable
    from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics
    from fontTools.ttLib.tables._g_l_y_f import Glyph

    codes = {0x1F600: "face", 0x1F44B: "hand", 0x1F3FB: "tone", 0x1F3C3: "run", 0x200D: "join", 0x2640: "female"}
    names = [".notdef", *codes.values(), "hand_tone", "run_female"]
    drawn = {"face": "yellow", "hand": "gold", "hand_tone": "pink", "run": (0, 0, 255, 128), "run_female": "red"}
    builder = builder_of(128, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(codes)
    builder.setupGlyf({name: Glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (128, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    builder.addOpenTypeFeatures("feature ccmp { sub hand tone by hand_tone; sub run join female by run_female; } ccmp;")
    made, bitmaps = builder.font, {}
    for name, color in drawn.items():
        glyph = C_B_D_T_.cbdt_bitmap_format_17(b"", made)
        glyph.metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
        vars(glyph.metrics).update(height=12, width=13, BearingX=0, BearingY=12, Advance=13)
        glyph.imageData = png(color)
        bitmaps[name] = glyph
    line = E_B_L_C_.SbitLineMetrics()
    index = E_B_L_C_.eblc_index_sub_table_1(b"", made)
    index.names = sorted(bitmaps, key=names.index)
    index.indexFormat, index.imageFormat = 1, 17
    strike = E_B_L_C_.Strike()
    size = strike.bitmapSizeTable = E_B_L_C_.BitmapSizeTable()
    for key in (
        *("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset"),
        *("minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2"),
    ):
        setattr(line, key, 0)
    size.hori = size.vert = line
    size.colorRef, size.ppemX, size.ppemY, size.bitDepth, size.flags = 0, 12, 12, 32, 1
    strike.indexSubTables = [index]
    for tag, key, value in (("CBLC", "strikes", [strike]), ("CBDT", "strikeData", [bitmaps])):
        table = made[tag] = newTable(tag)
        table.version = 3.0
        setattr(table, key, value)
    path = tmp_path_factory.mktemp("font") / "small.ttf"
    made.save(path)
    return path


def test_a_font(font):
    found = {p.name: p for p in _read_font(font)}
    assert sorted(found) == [
        "grinning face", "person running", "waving hand", "waving hand, light skin tone", "woman running",
    ]  # fmt: skip
    assert found["grinning face"].kind == "smileys & emotion"
    assert [p.name for p in found.values() if p.variant] == ["waving hand, light skin tone"]
    assert found["waving hand"].concept == found["waving hand, light skin tone"].concept
    assert found["woman running"].concept == found["person running"].concept
    whole = icons.ImageDecoder(8, 1.0).whole(found["person running"].item)
    assert whole.shape == (3, 8, 8)
    assert whole[:, 4, 4].tolist() == pytest.approx([127, 127, 255], abs=1)  # half transparent, on white


def test_a_font_without_bitmaps(tmp_path, font):
    from fontTools.ttLib import TTFont

    with TTFont(font) as found:
        del found["CBDT"], found["CBLC"]
        found.save(tmp_path / "outlines.ttf")
    with pytest.raises(ValueError, match=r"outlines.ttf must be a font with colour bitmaps"):
        load_data(str(tmp_path / "outlines.ttf"))


def theme(folder):
    places, apps = folder / "64x64" / "places", folder / "64x64" / "apps"
    sections = [("64x64/places", "Places", 64), ("64x64/apps", "Applications", 64), ("16x16/apps", "Applications", 16)]
    lines = ["[Icon Theme]", "Name=small"]
    for section, context, size in sections:
        (folder / section).mkdir(parents=True)
        lines += [f"[{section}]", f"Context={context}", f"Size={size}"]
    (folder / "index.theme").write_text("\n".join(lines))
    for color in ("blue", "red"):
        (places / f"folder-{color}-documents.svg").write_text(SVG.format(color))
    (places / "folder-documents.svg").symlink_to("folder-blue-documents.svg")
    for i in range(40):
        (apps / f"tool{i}-reader.svg").write_text(SVG.format(f"#0000{i:02}"))
        (folder / "16x16" / "apps" / f"tool{i}-reader.svg").write_text(SVG.format("white"))
    return folder


def test_a_theme(tmp_path):
    pytest.importorskip("resvg_py")
    found = {p.name: p for p in _read_theme(theme(tmp_path))}
    assert len(found) == 42  # no link, each in one size
    assert found["folder blue documents"].concept == found["folder red documents"].concept == "folder documents"
    assert found["tool3 reader"].item.parent.parent.name == "64x64"
    data = load_data(str(tmp_path), 16)
    assert data.classes == ["applications", "places"]
    assert "41 concepts" in data.summary()
    assert not data.flip
    at = next(i for i, caption in enumerate(data.train.captions) if caption.startswith("folder blue documents"))
    blue = data.train.fetch([at])["image"][0]
    assert blue[:, 2, 8].tolist() == [0, 0, 255]
    assert blue[:, 13, 8].tolist() == [255, 255, 255]


def test_concepts_that_share_a_picture_are_one():
    """Otherwise a picture could be on both sides: concepts a and c are joined by way of b."""
    pictures = [Picture(x, x, "k", c) for x, c in (("1", "a"), ("1", "b"), ("2", "b"), ("2", "c"), ("3", "d"))]
    number, held = _held_out(pictures)
    assert number[0] == number[1] == number[2] == number[3] != number[4]
    assert len(set(held[:4])) == 1


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for data, package in (("emoji", "fonts-noto-color-emoji"), ("icons", "papirus-icon-theme")):
        with pytest.raises(FileNotFoundError, match=f"apt-get install {package}, or download it from https://"):
            load_data(data)


def installed(name):
    try:
        return load_data(name)
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["emoji", "icons"])
def test_no_concept_and_no_picture_is_on_both_sides(name):
    data = installed(name)
    assert len(data.test) > 100
    assert len(data.train) > 1000
    sides = data.train, data.test
    concepts, items = ([set(getattr(side, key)) for side in sides] for key in ("concepts", "items"))
    assert not concepts[0] & concepts[1]
    assert not items[0] & items[1]
    assert len(set(data.test.captions)) > 0.95 * len(data.test)
    assert len({int(label) for label in data.test.labels}) == len(data.classes)
    assert data.test.fetch([0])["image"].shape == (1, 3, 64, 64)
    chosen = data.validation(0.1)
    assert not set(chosen.train.concepts) & set(chosen.test.concepts)
    assert set(chosen.test.captions) <= {p.name for p in data.train.pictures if not p.variant}
    assert set(chosen.train.captions) <= set(data.train.captions)
    assert chosen.train.fetch([5])["caption"][0] == chosen.train.captions[5] in data.train.captions
    assert len(chosen.train) < len(data.train)


def test_the_side_of_a_concept_stays():
    """It must not change with another version of the package."""
    codes = {name: f"{codes[0]:X}" for codes, (name, _) in _emoji_names().items()}
    names = ("waving hand", "ewe", "bread", "peacock", "tram", "cat")
    _, held = _held_out([Picture(name, name, "", codes[name]) for name in names])
    assert [name for name, out in zip(names, held, strict=True) if out] == ["ewe", "bread", "peacock", "tram"]


def test_learned_tokens():
    from pyvit.data.text import learn_tokenizer

    tokenizer = learn_tokenizer(["a red fox", "a red cat", "Red Foxes"] * 20, 8, 300)
    ids = tokenizer(["red fox", "été 漢字 and much more text"])
    assert ids.shape == (2, 8)
    assert (ids[0] == tokenizer.end).nonzero()[0, 0] == 3  # start, red, fox
    assert ids[1, -1] == tokenizer.end
    assert (ids[0, 4:] == tokenizer.pad).all()
    assert torch.equal(ids, learn_tokenizer(["a red fox", "a red cat", "Red Foxes"] * 20, 8, 300)(
        ["RED fox", "été 漢字 and much more text"]))  # fmt: skip
