"""The pages of the documentation site: ``python docs/assemble.py`` writes them to build/docs, from which
``make docs-site`` builds build/site.

The pages of docs/ are read where they lie, on a forge too, so they link to each other and to files of the repository by
relative paths. Here pages from outside docs/ join them, links are changed to where their targets went, and a link to
anything else of the repository becomes its text (or a link to there, if PYVIT_SOURCE_URL gives the address of the
repository's files). A link to nothing is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "docs"

#: Files from outside docs/ -> their places on the site; the results join below.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_COPIED = (".md", ".svg", ".png", ".css", ".csv", ".html")

#: Inline links and images; the first alternative is code, which holds none.
_LINK = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)|(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s]+)\)", re.DOTALL
)


class BrokenLink(ValueError):
    """A link of a page leads nowhere."""


def places() -> dict[Path, str]:
    """Files of the site -> their places on it."""
    found = {ROOT / source: place for source, place in OUTSIDE.items()}
    for folder in (ROOT / "docs", ROOT / "benchmarks" / "results"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in _COPIED:
                inside = path.relative_to(folder).as_posix()
                found[path] = inside if folder.name == "docs" else f"results/{inside}"
    return found


def relinked(page: Path, text: str, where: dict[Path, str], source_url: str = "") -> str:
    """The text of a page with its links changed to those of the site."""
    here = Path(where[page]).parent

    def change(match: re.Match[str]) -> str:
        target, _, anchor = (match["target"] or "").partition("#")
        if match["code"] or not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = (page.parent / target).resolve()
        if path in where:
            goal = os.path.relpath(where[path], here) + (f"#{anchor}" if anchor else "")
            return f"{match['image']}[{match['text']}]({goal})"
        if not path.exists() or not path.is_relative_to(ROOT):
            raise BrokenLink(f"{page.relative_to(ROOT)} links to {match['target']}, which does not exist")
        return f"[{match['text']}]({source_url}/{path.relative_to(ROOT).as_posix()})" if source_url else match["text"]

    return _LINK.sub(change, text)


def pages(source_url: str = "") -> dict[str, str]:
    """Place on the site -> text, of every page."""
    where = places()
    return {
        place: relinked(path, path.read_text(), where, source_url)
        for path, place in where.items()
        if path.suffix == ".md"
    }


def write(out: Path = OUT, say: Callable[[str], object] = print) -> None:
    shutil.rmtree(out, ignore_errors=True)
    texts = pages(os.environ.get("PYVIT_SOURCE_URL", "").rstrip("/"))
    for path, place in places().items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        if place in texts:
            alone = "---\nhide: [navigation]\n---\n\n" if place == "index.md" else ""  # its section has no other page
            (out / place).write_text(alone + texts[place])
        else:
            shutil.copyfile(path, out / place)
    say(f"{len(texts)} pages in {out}")


if __name__ == "__main__":
    try:
        write()
    except BrokenLink as error:
        sys.exit(f"docs: {error}")
