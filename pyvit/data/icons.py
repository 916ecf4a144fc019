"""Captioned pictures of Debian's packages: emoji (fonts-noto-color-emoji) and icons (papirus-icon-theme).

Concepts are held out: pictures that differ only in skin tone, gender, direction or colour are one concept, which is on
one side of the split. The side is a hash of the concept, so that it does not depend on the version of the package.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from pyvit.data.crops import Crop
from pyvit.data.dataset import Data
from pyvit.data.decode import ImageDecoder
from pyvit.data.files import DecodedImages

_FONT, _THEME = "NotoColorEmoji.ttf", "Papirus"
_FONT_PAGE = "https://github.com/googlefonts/noto-emoji"
_THEME_PAGE = "https://github.com/PapirusDevelopmentTeam/papirus-icon-theme"

#: One concept in this many is held out.
_SHARE = 10

_TONES = {
    0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark",
}  # fmt: skip

#: Code points that do not change an emoji's concept: man, boy, old man, ... are persons; joiners, genders, the arrow of
#: a direction and hair are dropped.
_PERSONS = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3}
_DROPPED = {0x200D, 0x2640, 0x2642, 0x27A1, *range(0x1F9B0, 0x1F9B4)}

#: The colours of the theme's folders.
_COLORS = {
    "adwaita", "black", "blue", "bluegrey", "breeze", "brown", "carmine", "custom", "cyan", "darkcyan", "deeporange",
    "green", "grey", "indigo", "magenta", "nordic", "orange", "palebrown", "paleorange", "pink", "red", "teal",
    "violet", "white", "yaru", "yellow",
}  # fmt: skip

#: Contexts of the theme that are drawn; the others repeat these, are animations, or have few icons.
_CONTEXTS = ("actions", "applications", "devices", "emblems", "mime types", "places", "status")


@dataclass
class Picture:
    """A picture with its name, its class and its concept. ``item``: what the decoder reads. ``variant``: another form
    of a picture that is there too, such as another skin tone."""

    item: Any
    name: str
    kind: str
    concept: str
    variant: bool = False


def emoji(size: int = 64, path: str | Path | None = None) -> Data:
    """The emoji of a font with colour bitmaps (CBDT), in all skin tones, with their Unicode names as captions and their
    groups as classes.

    ``path``: the font, by default where Debian and others install NotoColorEmoji.ttf. Raises FileNotFoundError if it is
    not there, ValueError for a font without colour bitmaps.
    """
    font = Path(path) if path is not None else _find(_FONT, "fonts", "fonts-noto-color-emoji", _FONT_PAGE)
    return _split("emoji", _read_font(font), ImageDecoder(size, 1.0), size)


def icons(size: int = 64, path: str | Path | None = None) -> Data:
    """The SVG icons of a theme, with the words of their file names as captions and their contexts as classes.

    ``path``: the theme's folder, by default where Debian and others install Papirus. Raises FileNotFoundError if it is
    not there, ImportError without the renderer.
    """
    theme = Path(path) if path is not None else _find(_THEME, "icons", "papirus-icon-theme", _THEME_PAGE)
    return _split("icons", _read_theme(theme), SvgDecoder(size), size)


def _find(name: str, kind: str, package: str, page: str) -> Path:
    """The file or folder ``name`` in the ``kind`` folders of the XDG data directories."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    places = [home, *(os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")]
    folders = [Path(place).expanduser() / kind for place in places if place] + [Path(f"~/.{kind}").expanduser()]
    for folder in folders:
        for found in (folder / name, *(sorted(folder.rglob(name)) if kind == "fonts" and folder.is_dir() else ())):
            if found.exists():
                return found
    data = "emoji" if kind == "fonts" else "icons"
    raise FileNotFoundError(
        f"data: {data!r} needs {name} in one of {', '.join(map(str, dict.fromkeys(folders)))}: apt-get install "
        f"{package}, or download it from {page} and give its path with --data"
    )


def _read_font(path: Path) -> list[Picture]:
    """The pictures of a font, in the order of their code points."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise ImportError("data 'emoji' is read with fonttools: pip install fonttools") from error
    with TTFont(path, lazy=True) as font:
        if "CBDT" not in font:
            raise ValueError(f"data: {path} must be a font with colour bitmaps (CBDT)")
        glyphs = {(code,): glyph for code, glyph in font.getBestCmap().items()}
        glyphs |= _ligatures(font)
        bitmaps = {name: glyph.imageData for name, glyph in font["CBDT"].strikeData[-1].items()}
    names = _emoji_names()
    found = []
    for codes, glyph in sorted(glyphs.items()):
        tones = [_TONES[code] for code in codes if code in _TONES]
        known = names.get(tuple(code for code in codes if code not in _TONES))
        if known is None or glyph not in bitmaps:
            continue
        name, group = known
        said = f"{name}, {' and '.join(dict.fromkeys(tones))} skin tone" if tones else name
        concept = " ".join(f"{_PERSONS.get(c, c):X}" for c in codes if c not in _DROPPED and c not in _TONES)
        found.append(Picture(bitmaps[glyph], said, group, concept, bool(tones)))
    return found


def _ligatures(font: Any) -> dict[tuple[int, ...], str]:
    """Glyphs of sequences of code points."""
    code = {glyph: code for code, glyph in font.getBestCmap().items()}
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup if "GSUB" in font else ():
        for table in lookup.SubTable if lookup.LookupType == 4 else ():
            for first, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    parts = (first, *ligature.Component)
                    if all(part in code for part in parts):
                        found[tuple(code[part] for part in parts)] = ligature.LigGlyph
    return found


def _emoji_names() -> dict[tuple[int, ...], tuple[str, str]]:
    """(name, group) of each emoji without skin tones, by its code points without variation selectors."""
    found, group = {}, ""
    for line in (resources.files("pyvit.data") / "emoji.txt").read_text("utf-8").splitlines():
        codes, tab, name = line.partition("\t")
        if tab:
            found[tuple(int(code, 16) for code in codes.split())] = name, group
        elif not line.startswith("#"):
            group = line
    return found


def _read_theme(path: Path) -> list[Picture]:
    """The icons of a theme, each in its largest size. Links to other icons are left out."""
    index = configparser.ConfigParser(interpolation=None, strict=False)
    if not index.read(path / "index.theme", "utf-8"):
        raise FileNotFoundError(f"data: {path} must be an icon theme, a folder with an index.theme")
    largest: dict[tuple[str, str], tuple[int, Path]] = {}
    for section in index.sections():
        folder, entry = path / section, index[section]
        context = re.sub("(?<=[a-z])(?=[A-Z])", " ", entry.get("Context", "")).lower()
        if context not in _CONTEXTS or "Scale" in entry or "symbolic" in section or folder.is_symlink():
            continue
        for file in sorted(folder.glob("*.svg")):
            if not file.is_symlink():
                here = (int(entry.get("Size", "0")), file)
                largest[context, file.stem] = max(here, largest.get((context, file.stem), here))
    found = []
    for (context, stem), (_, file) in sorted(largest.items()):
        # Icons of Windows programs begin with a checksum.
        words = re.sub(r"[-_.+ ]+", " ", re.sub(r"^[0-9A-F]{4}_|\.0$", "", stem)).strip().lower().split(" ")
        plain = [word for word in words if word not in _COLORS and word not in ("symbolic", "rtl")]
        variant = plain != words and context == "places"
        found.append(Picture(file, " ".join(words), context, " ".join(plain or words), variant))
    return found


class SvgDecoder(ImageDecoder):
    """Renders SVG files at twice the size, once each, and decodes them as :class:`ImageDecoder`."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 1.0)
        self._rendered: dict[Path, bytes] = {}

    def centred(self, centre: float) -> ImageDecoder:
        return self

    def _png(self, path: Path) -> bytes:
        if path not in self._rendered:
            try:
                from resvg_py import svg_to_bytes
            except ImportError as error:
                raise ImportError("data 'icons' is drawn with resvg: pip install resvg-py") from error
            side = 2 * self.shape[1]
            self._rendered[path] = svg_to_bytes(svg_path=str(path), width=side, height=side, skip_system_fonts=True)
        return self._rendered[path]

    def whole(self, source: Path) -> Tensor:
        return super().whole(self._png(source))

    def views(self, source: Path, crops: Mapping[str, Crop], draw: random.Random) -> dict[str, list[Tensor]]:
        return super().views(self._png(source), crops, draw)


def _held_out(pictures: Sequence[Picture]) -> tuple[list[int], list[bool]]:
    """For each picture the number of its concept, and whether it is held out. Concepts that share a picture are one."""
    same: dict[Any, str] = {}
    parent = {p.concept: p.concept for p in pictures}

    def root(concept: str) -> str:
        while parent[concept] != concept:
            concept = parent[concept]
        return concept

    for p in pictures:
        a, b = sorted((root(p.concept), root(same.setdefault(p.item, p.concept))))
        parent[b] = a
    number = {concept: n for n, concept in enumerate(sorted(set(map(root, parent))))}
    side = {c: int.from_bytes(hashlib.blake2b(c.encode(), digest_size=4).digest(), "big") % _SHARE == 0 for c in number}
    roots = [root(p.concept) for p in pictures]
    return [number[r] for r in roots], [side[r] for r in roots]


class Pictures(DecodedImages):
    """Pictures with captions. As the held-out side of a split they are without variants, and captions are names."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        decoder: ImageDecoder,
        labels: Sequence[int],
        captions: Sequence[str],
        concepts: Sequence[int],
    ) -> None:
        super().__init__([p.item for p in pictures], decoder, labels, captions, concepts=concepts)
        self.pictures = pictures

    def part(self, indices: Sequence[int]) -> Pictures:
        columns = (self.pictures, self.labels, self.captions, self.concepts)
        pictures, *known = ([column[i] for i in indices] for column in columns)
        return Pictures(pictures, self.decoder, *known)

    def held_out(self) -> Pictures:
        found = self.part([i for i, p in enumerate(self.pictures) if not p.variant])
        found.captions = [p.name for p in found.pictures]
        return found


def _split(name: str, pictures: Sequence[Picture], decoder: ImageDecoder, size: int) -> Data:
    """Of four training captions, two are a name, one is a name and its class, and one is the class alone."""
    concepts, held = _held_out(pictures)
    classes = list(dict.fromkeys(p.kind for p in pictures))
    captions = [(p.name, f"{p.name}, {p.kind}", p.name, p.kind)[n % 4] for n, p in enumerate(pictures)]
    whole = Pictures(pictures, decoder, [classes.index(p.kind) for p in pictures], captions, concepts)
    train = whole.part([i for i, out in enumerate(held) if not out])
    test = whole.part([i for i, out in enumerate(held) if out]).held_out()
    if not len(train) or not len(test):
        raise ValueError(
            f"data: {name} must have pictures of concepts on both sides of the split, found {len(pictures)} in all"
        )
    count = [len(set(part.concepts)) for part in (train, test)]
    left_out = len(pictures) - len(train) - len(test)
    note = f"{sum(count)} concepts, {count[1]} of them held out; {left_out} variants of held-out pictures are not used"
    return Data(name, train, test, (size, size), classes, flip=False, notes=[note])
